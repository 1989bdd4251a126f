"""The wheel is enough: built, installed into an environment of its own, and used outside the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from sapo_trl import __main__ as console
from sapo_trl import __version__
from sapo_trl.cli.parse import read_yaml

ROOT = Path(__file__).parents[2]
SMALL = ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "8"]
SMALL += ["--eval_strategy", "no", "--dump_ratios_every", "0"]


def run(*words: object, cwd: Path) -> str:
    """The output of a command that must end well, without this checkout on its path."""
    env = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `env/`, in which the wheel is installed beside the libraries of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("sapo_trl", "configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, copy, cwd=folder)
    venv.create(folder / "env", with_pip=False)
    run(*pip, "--python", folder / "env", "install", "--no-deps", "--no-index", *folder.glob("*.whl"), cwd=folder)
    shutil.rmtree(copy)
    (site,) = folder.glob("env/lib/python*/site-packages")
    # a line of a .pth file adds the folder but not that folder's own .pth files, and with them this checkout
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_from_nothing_to_a_report(place):
    python, command = place / "env/bin/python", place / "env/bin/sapo-trl"
    where = "from importlib.util import find_spec; print(*(find_spec(x).origin for x in ('sapo_trl', 'trl')))"
    ours, theirs = run(python, "-c", where, cwd=place).split()
    assert ours.startswith(str(place)) and not theirs.startswith(str(place))
    assert run(command, "--version", cwd=place) == f"sapo_trl {__version__}\n"
    few = ["--steps", "2", "--num_train", "32", "--num_test", "4"]
    run(command, "cold-start", "--output_dir", "runs/tiny", *few, cwd=place)
    launch = [python, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "-m", "sapo_trl"]
    told = run(*launch, "train", "--config", "tiny/sapo", "--max_steps", "3", *SMALL, cwd=place)
    assert "step 3/3" in told
    folder = place / "runs/tiny/sapo"
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["sapo_trl"] == __version__ and versions["command"].startswith("sapo-trl train --config tiny/sapo")
    words = ["--model", folder, "--config", "tiny/sapo", "--num_samples", "2", "--max_new_tokens", "8"]
    run(command, "evaluate", *words, "--output", "result.json", cwd=place)
    assert json.loads((place / "result.json").read_text())["num_problems"] == 4
    run(command, "report", folder, "--output", "report.html", cwd=place)
    assert "sapo-trl train --config tiny/sapo --max_steps 3" in (place / "report.html").read_text()


def test_every_recipe_of_the_repository_is_in_the_wheel(place):
    files = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*/*.yaml"))
    with zipfile.ZipFile(*place.glob("*.whl")) as wheel:
        inside = {name: wheel.read(name) for name in wheel.namelist()}
    assert sorted(name.removeprefix("sapo_trl/") for name in inside if name.endswith(".yaml")) == files
    assert all(inside[f"sapo_trl/{name}"] == (ROOT / name).read_bytes() for name in files)
    assert {"sapo_trl/py.typed", "sapo_trl/report/templates/page.html.j2"} <= set(inside)


# ---- the console command, in this process ----------------------------------------------------------------------------


def test_recipes_are_listed_in_one_line_each(capsys):
    assert console.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(ROOT.glob("configs/*/*.yaml"))) and max(map(len, lines)) < 140
    line = next(line for line in lines if line.startswith("qwen3-8b/sapo "))
    assert re.fullmatch(r"qwen3-8b/sapo +8 GPUs with 80 GB +Qwen3-8B. SAPO \(arXiv 2511.20347\): a soft gate .*", line)


def test_a_recipe_is_copied_once(tmp_path, capsys):
    mine = tmp_path / "my.yaml"
    assert console.main(["recipes", "copy", "qwen3-8b/sapo", str(mine)]) == 0
    assert mine.read_bytes() == (ROOT / "configs/qwen3-8b/sapo.yaml").read_bytes()
    assert f"next: sapo-trl check --config {mine}" in capsys.readouterr().out
    assert console.main(["recipes", "copy", "tiny/sapo", str(mine)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert console.main(["recipes", "copy", "qwen3-8b/sappo", str(tmp_path / "x.yaml")]) == 1
    assert "Did you mean 'qwen3-8b/sapo'?" in capsys.readouterr().err


def test_a_config_is_a_file_or_a_recipe_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no configs/ here
    expected = yaml.safe_load((ROOT / "configs/tiny/sapo.yaml").read_text())
    assert read_yaml("tiny/sapo") == read_yaml("configs/tiny/sapo.yaml") == expected
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/sapo").write_text("seed: 7")  # a file of one's own comes first
    assert read_yaml("tiny/sapo") == {"seed": 7}
    with pytest.raises(ValueError, match="the config qwen3-8b/sap does not exist. Did you mean 'qwen3-8b/sapo'"):
        read_yaml("qwen3-8b/sap")


def test_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    assert console.main([]) == console.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["recipes", "check", "train", "evaluate", "filter", "report", "plot", "cold-start", "lab"]
    assert [line.split()[0] for line in lines if line.startswith("  ")] == names * 2
    assert console.main(["evalute"]) == 1
    assert "Did you mean 'evaluate'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        console.main(["report", "--help"])
    assert done.value.code == 0 and "usage: sapo-trl report" in capsys.readouterr().out
