"""The examples of README and docs/: Python runs, and commands and settings name what exists."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import tiny_model

from sapo_trl import SAPOConfig
from sapo_trl.__main__ import COMMANDS
from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.cli.names_elsewhere import LAUNCH_NAMES
from sapo_trl.cli.parse import KINDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FIELDS = {f.name for kind in KINDS for f in fields(kind)}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def pages_with(language: str):
    found = [path for path in PAGES if blocks(path, language)]
    return pytest.mark.parametrize("path", found, ids=[path.name for path in found])


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> Path:
    """A folder in which the examples find what `scripts/cold_start.py --output_dir runs/tiny` writes."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_model(tokenizer).save_pretrained(folder / "runs/tiny/model")
    tokenizer.save_pretrained(folder / "runs/tiny/model")
    rows = [json.dumps({"prompt": f"{i} + 1 = ?", "answer": str(i + 1)}) for i in range(64)]
    (folder / "runs/tiny/train.jsonl").write_text("\n".join(rows))
    return folder


@pages_with("python")
def test_python_runs(path, world, monkeypatch):
    """The blocks of a page one after the other, in one namespace."""
    monkeypatch.chdir(world)
    known = dict(ALGORITHMS)
    namespace: dict = {}
    try:
        for block in blocks(path, "python"):
            exec(compile(block, path.name, "exec"), namespace)
    finally:
        ALGORITHMS.clear()
        ALGORITHMS.update(known)
    if "trainer" in namespace:
        assert namespace["trainer"].state.global_step == namespace["trainer"].args.max_steps > 0


@pages_with("yaml")
def test_settings_exist_and_are_accepted(path, tmp_path):
    for block in blocks(path, "yaml"):
        values = yaml.safe_load(block)
        assert values.keys() <= FIELDS
        own = {name: value for name, value in values.items() if name in {f.name for f in fields(SAPOConfig)}}
        SAPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **own)


@pages_with("sh")
def test_commands_name_what_exists(path):
    """Scripts, recipes, targets of make and options; files under runs/ and the reader's own are left alone."""
    sources = [*ROOT.glob("scripts/*.py"), *ROOT.glob("scripts/bench/*.py"), *ROOT.glob("sapo_trl/cli/*.py")]
    options = set(re.findall(r"--\w+", " ".join(source.read_text(encoding="utf-8") for source in sources)))
    options |= {f"--{name}" for name in (*FIELDS, *LAUNCH_NAMES)}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    for line in "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        if words[:1] == ["sapo-trl"]:
            assert set(words[1:2]) <= COMMANDS.keys(), line
        for word in words:
            if word.startswith(("scripts/", "configs/", "tests/")):
                assert (ROOT / word).exists(), line
            if word.startswith("--") and words[0] in ("python", "accelerate", "sapo-trl"):
                assert word.partition("=")[0] in options, line
