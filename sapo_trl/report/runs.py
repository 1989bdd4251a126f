"""Reading of run folders: logged records, resolved config, evaluations, and which runs are seeds of one setting.

Files may be missing, half-written (of a running run) or hostile: control characters in names are written out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from sapo_trl.errors import did_you_mean
from sapo_trl.metrics.table import find
from sapo_trl.text import visible

# Fields in which two seeds of one setting may differ
SEED_FIELDS = ("seed", "data_seed", "output_dir", "run_name", "logging_dir", "hub_model_id", "resume_from_checkpoint")


@dataclass
class Run:
    """A run folder: logged records in order, the resolved config, and the label under which it is drawn.

    `num_unreadable` counts lines of metrics.jsonl that are no JSON: a killed run leaves one, a running one may.
    `num_parts`: as many of the last parts of its path tell it from the runs beside it.
    """

    folder: Path
    records: list[dict[str, float]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    num_unreadable: int = 0
    num_parts: int = 2

    @cached_property
    def table(self) -> pd.DataFrame:
        """A line per step and a column per name, finite or NaN; of a step logged twice (a resumed run), the last."""
        finite = [{name: x for name, x in record.items() if math.isfinite(x)} for record in self.records]
        table = pd.DataFrame(finite, columns=None if finite else ["step"]).dropna(subset="step")
        return table.astype({"step": int}).groupby("step").last()

    def series(self, name: str) -> pd.Series:
        """The values of `name`, by step."""
        return self.table[name].dropna() if name in self.table else pd.Series(dtype=float)

    @property
    def folder_name(self) -> str:
        """The end of its path."""
        return str(Path(*self.folder.resolve().parts[-self.num_parts :]))

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on one rollout; 1 if the config is not known."""
        return self.config.get("num_mini_batches", 1) * self.config.get("num_iterations", 1)

    @property
    def names(self) -> list[str]:
        """Every name with a value, sorted."""
        return sorted(self.table)

    def json(self, name: str) -> Any:
        """Content of a JSON file of the folder; {} if it is missing or half-written."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}

    def facts(self, name: str) -> dict[str, Any]:
        """`json` of a file that holds one object; {} if it holds anything else."""
        content = self.json(name)
        return content if isinstance(content, dict) else {}


def names_of(runs: Iterable[Run], metric: str) -> list[str]:
    """What any of the runs has logged of a metric, or of a family, that the table of metrics has under this name."""
    rows = {name: find(name) for run in runs for name in run.names}
    return sorted(name for name, row in rows.items() if row is not None and row.name == metric)


def _numbers(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The record's numbers; an interval {mean, low, high} under `key` becomes `key`, `key_low` and `key_high`."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        key = prefix + visible(name)
        if isinstance(value, dict) and "mean" in value:
            flat |= _numbers({key: value["mean"], f"{key}_low": value.get("low"), f"{key}_high": value.get("high")})
        elif isinstance(value, dict):
            flat |= _numbers(value, f"{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[key] = value
    return flat


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file, one a line, and the number of unreadable lines; nothing without the file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines, rows = [line for line in text.split("\n") if line.strip()], []
    for line in lines:
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict)]
    return rows, len(lines) - len(rows)


def load_run(folder: str | Path, label: str = "") -> Run:
    """Read `metrics.jsonl` and `resolved_config.yaml`; one of the two is enough, so a run may have just begun."""
    folder = Path(folder)
    metrics, config = folder / "metrics.jsonl", folder / "resolved_config.yaml"
    if not folder.is_dir():
        near = did_you_mean(folder.name, [path.name for path in folder.parent.glob("*/")])
        raise FileNotFoundError(f"{folder} is not a folder.{near}")
    if not metrics.exists() and not config.exists():
        runs = [*sorted(folder.glob("*/metrics.jsonl")), *sorted(folder.glob("../*/metrics.jsonl"))]
        near = f" Nearest run: {runs[0].parent}." if runs else ""
        raise FileNotFoundError(f"{folder} has no metrics.jsonl, so it is not a run folder.{near}")
    rows, num_unreadable = read_jsonl(metrics)
    records = [record for record in map(_numbers, rows) if "step" in record]
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is no YAML: {' '.join(str(error).split())}.") from None
    return Run(folder, records, settings if isinstance(settings, dict) else {}, label, num_unreadable)


def _stem(folder: Path) -> str:
    """The folder's name without a seed: `sapo-seed0` and `sapo/seed_0` are both `sapo`."""
    path = folder.resolve()
    return re.sub(r"[-_.]?s(eed)?[-_=]?\d+$", "", path.name) or path.parent.name


def run_name(run: Run) -> str:
    """Tells seeds of one label apart."""
    return f"{run.label}: {run.folder_name}" if run.label else run.folder_name


def distinct(runs: Iterable[Run]) -> list[Run]:
    """The runs in order, each with a name of its own; a folder that is given twice under one label counts once."""
    found: dict[tuple[str, Path], Run] = {}
    for run in runs:
        found.setdefault((run.label, run.folder.resolve()), run)
    folders = {folder.parts for _, folder in found}
    longest = max(map(len, folders), default=2)
    enough = (n for n in range(2, longest) if len({parts[-n:] for parts in folders}) == len(folders))
    num_parts = next(enough, longest)
    for run in found.values():
        run.num_parts = num_parts
    return list(found.values())


def group_seeds(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Label -> runs that are seeds of it. Runs with one name but different settings stay apart, by their folders."""
    runs = distinct(runs)
    named: dict[str, list[Run]] = {}
    for run in runs:
        named.setdefault(visible(run.label or _stem(run.folder)).lstrip("_"), []).append(run)
    groups: dict[str, list[Run]] = {}
    for label, members in named.items():
        settings = [{name: x for name, x in run.config.items() if name not in SEED_FIELDS} for run in members]
        if all(setting == settings[0] for setting in settings):
            groups[label] = members
        else:
            for run in members:
                groups.setdefault(run_name(run), []).append(run)
    return groups


def _is_evaluation(x: Any) -> bool:
    """Whether this is `Evaluation.to_dict()`, with a number at both ends of the interval of Pass@1 and for its mean."""
    interval = x.get("pass_at_1") if isinstance(x, dict) else None
    ends = [interval.get(name) for name in ("mean", "low", "high")] if isinstance(interval, dict) else [None]
    return all(isinstance(end, int | float) and math.isfinite(end) for end in ends)


def _every_evaluation(run: Run) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, number in a list, evaluation) of the run's evaluation.json: one, several by name, or a list."""
    content = run.json("evaluation.json")
    if isinstance(content, list):
        found = [("", str(i), x) for i, x in enumerate(content, start=1)]
    elif isinstance(content, dict):
        found = [("", "", content)] if "pass_at_1" in content else [(name, "", x) for name, x in content.items()]
    else:
        found = []
    return [(str(x.get("name", name)), number, x) for name, number, x in found if _is_evaluation(x)]


def own_evaluations(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """(what was evaluated, `Evaluation.to_dict()`) of the run's evaluation.json: one, several by name, or a list."""
    return [(f"{name or number} {x.get('step', '')}".strip(), x) for name, number, x in _every_evaluation(run)]


def last_evaluations(run: Run) -> dict[str, dict[str, Any]]:
    """Name -> evaluation of the run's evaluation.json, the last one of each name; "" where it has none."""
    return {name: x for name, _, x in _every_evaluation(run)}


def evaluations(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """`own_evaluations`, after that of the model that the run began with where there is one."""
    found, pair = own_evaluations(run), before_and_after(run)
    return [("before training", pair[0]), *((name or "after training", x) for name, x in found)] if pair else found


def initial_evaluations(run: Run) -> list[dict[str, Any]]:
    """The evaluations of the model that the run began with, which lie in the model's folder and beside it."""
    model = Path(str(run.config.get("model_name_or_path", "")))
    folders = [folder for folder in (model, model.parent) if model.name and folder.is_dir()]
    found = [Run(folder).json("evaluation.json") for folder in folders]
    known = [x for x in found if _is_evaluation(x) and options(x) is not None]
    return [x for x in known if x["arguments"].get("model") == str(model)]


def before_and_after(run: Run) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The evaluation of the model that the run began with, and the run's own, if the same options made them."""
    for _, after in own_evaluations(run)[:1]:
        for before in initial_evaluations(run):
            if options(before) == options(after):
                return before, after
    return None


# Arguments of an evaluation that don't change what is measured
NOT_COMPARED = ("model", "output", "batch_size", "baseline", "engine", "base_url", "config")


def options(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """What two evaluations must share to be compared; None where it is not known."""
    arguments = evaluation.get("arguments")
    if not isinstance(arguments, dict):
        return None
    return {name: x for name, x in arguments.items() if name not in NOT_COMPARED}
