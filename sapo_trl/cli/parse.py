"""From a YAML file and a command line to validated configs, with every wrong key refused by name."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml
from trl import ModelConfig, TrlParser

from sapo_trl.cli.arguments import ScriptArguments
from sapo_trl.config import SAPOConfig
from sapo_trl.errors import did_you_mean as nearest

PACKAGES = ("sapo_trl", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "math-verify", "deepspeed")
SECRETS = ("hub_token", "push_to_hub_token")


@dataclass(frozen=True)
class RunArguments:
    """What one launch was told, parsed and validated."""

    script: ScriptArguments
    config: SAPOConfig
    model: ModelConfig


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: YAML would silently keep the last."""


def _mapping_without_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    seen: dict = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if key in seen:
            raise ValueError(f"the key {key!r} stands twice, in lines {seen[key]} and {line}. Remove one.")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def read_yaml(path: str | Path) -> dict:
    """A YAML mapping.

    Raises:
        ValueError: no such file, not a mapping, or a key that stands twice.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ValueError(f"the config {path} does not exist.{nearest(str(path), siblings)}")
    try:
        content = yaml.load(path.read_text(), _StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a mapping of settings.")
    return content


def known_fields() -> list[str]:
    """Every key that a config file or the command line may set."""
    return [f.name for kind in (ScriptArguments, SAPOConfig, ModelConfig) for f in fields(kind) if f.init]


def _refuse_unknown(argv: Sequence[str], known: Sequence[str]) -> None:
    for word in argv:
        name = word[2:].split("=")[0].replace("-", "_")
        if word.startswith("--") and name not in known and not (name.startswith("no_") and name[3:] in known):
            raise ValueError(f"unknown argument {word}.{nearest(name, known)}")


def parse_run(argv: Sequence[str] | None = None) -> RunArguments:
    """`--config file.yaml --any_field value ...` to configs; the command line wins over the file.

    Raises:
        ValueError: unknown or duplicate keys (with the nearest known one), and all that `SAPOConfig` refuses.
    """
    argv = [part for word in (sys.argv[1:] if argv is None else argv) for part in _split_config(word)]
    known = known_fields()
    if "--config" in argv:
        if argv[-1] == "--config":
            raise ValueError("--config needs the path of a YAML file.")
        path = argv[argv.index("--config") + 1]
        for key in read_yaml(path):
            if key not in known and key != "env":
                raise ValueError(f"{path}: unknown key {key!r}.{nearest(str(key), known)}")
    _refuse_unknown([word for word in argv if word != "--config"], known)
    # abbreviations off: --learning 1 would otherwise be accepted for --learning_rate
    parser = TrlParser((ScriptArguments, SAPOConfig, ModelConfig), allow_abbrev=False, exit_on_error=False)
    try:
        return RunArguments(*parser.parse_args_and_config(list(argv), fail_with_unknown_args=True))
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError(f"the arguments could not be read: {error}") from error


def _split_config(word: str) -> list[str]:
    """TrlParser understands `--config x` only; people also write `--config=x`."""
    return ["--config", word.split("=", 1)[1]] if word.startswith("--config=") else [word]


def resolved_fields(run: RunArguments) -> dict:
    """All fields of all three configs, as plain data for YAML; secrets are left out."""
    merged = asdict(run.script) | run.config.to_dict() | asdict(run.model)
    return {key: json.loads(json.dumps(merged[key], default=str)) for key in sorted(merged) if key not in SECRETS}


def versions() -> dict:
    """Versions of the packages that decide what a run computes, of Python and of the machine."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}


def write_run_record(run: RunArguments, plan_rows: Sequence[tuple[str, str]]) -> None:
    """`resolved_config.yaml`, `versions.json` and `plan.json` in the output folder."""
    folder = Path(run.config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump(resolved_fields(run), sort_keys=True))
    record = versions() | {"command": " ".join(sys.argv), "num_processes": run.config.world_size}
    (folder / "versions.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "plan.json").write_text(json.dumps(dict(plan_rows), indent=2) + "\n")
