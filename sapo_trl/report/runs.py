"""Read a run folder: the logged records, the resolved config, and which runs are seeds of one setting.

Files may be missing, half-written or hostile: a run is read while it runs, and names in it are made visible.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

# Fields in which two seeds of one setting may differ
SEED_FIELDS = ("seed", "data_seed", "output_dir", "run_name", "logging_dir", "hub_model_id")

# Control and direction marks are written out: no name or completion may hide or reorder the text around it
_MARKS = (*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
VISIBLE = {code: f"\\u{code:04x}" for code in _MARKS}


@dataclass
class Run:
    """A run folder: logged records in order, the resolved config, and the label under which it is drawn.

    `num_unreadable` counts lines of metrics.jsonl that are no JSON: a killed run leaves one, a running one may.
    """

    folder: Path
    records: list[dict[str, float]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    num_unreadable: int = 0

    def series(self, key: str) -> dict[int, float]:
        """Step -> value where `key` was measured and is finite; of a step logged twice (a resumed run), the last."""
        found = {int(row["step"]): row[key] for row in self.records if math.isfinite(row.get(key, math.nan))}
        return dict(sorted(found.items()))

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on one rollout; 1 if the config is not known."""
        return self.config.get("num_mini_batches", 1) * self.config.get("num_iterations", 1)

    @cached_property
    def names(self) -> list[str]:
        """Every name with a finite value, sorted."""
        found = {key for record in self.records for key, value in record.items() if math.isfinite(value)}
        return sorted(found - {"step"})

    def matching(self, pattern: str) -> list[str]:
        return [name for name in self.names if re.fullmatch(pattern, name)]

    def json(self, name: str) -> Any:
        """Content of a JSON file of the folder; {} if it is missing or half-written."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}


def _numbers(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The record's numbers; an interval {mean, low, high} under `key` becomes `key`, `key_low` and `key_high`."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        key = prefix + name.translate(VISIBLE)
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
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict)]
    return rows, len(lines) - len(rows)


def load_run(folder: str | Path, label: str = "") -> Run:
    """Read `metrics.jsonl` and `resolved_config.yaml`; one of the two is enough, so a run may have just begun."""
    folder = Path(folder)
    metrics, config = folder / "metrics.jsonl", folder / "resolved_config.yaml"
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, [path.name for path in folder.parent.glob("*/")], n=1, cutoff=0.4)
        hint = f" Did you mean {folder.parent / near[0]}?" if near else ""
        raise FileNotFoundError(f"{folder} is not a folder.{hint}")
    if not metrics.exists() and not config.exists():
        runs = {
            path.parent.name: path.parent
            for path in (*folder.glob("../*/metrics.jsonl"), *folder.glob("*/metrics.jsonl"))
        }
        near = difflib.get_close_matches(folder.name, runs, n=1, cutoff=0.0)
        hint = f" Nearest run: {runs[near[0]]}." if near else ""
        raise FileNotFoundError(f"{folder} has no metrics.jsonl, so it is not a run folder.{hint}")
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
    folder = "/".join(run.folder.resolve().parts[-2:])
    return f"{run.label}: {folder}" if run.label else folder


def group_seeds(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Label -> runs that are seeds of it. Runs with one name but different settings stay apart, by their folders."""
    named: dict[str, list[Run]] = {}
    for run in runs:
        named.setdefault((run.label or _stem(run.folder)).translate(VISIBLE).lstrip("_"), []).append(run)
    groups: dict[str, list[Run]] = {}
    for label, members in named.items():
        settings = [{name: x for name, x in run.config.items() if name not in SEED_FIELDS} for run in members]
        if all(setting == settings[0] for setting in settings):
            groups[label] = members
        else:
            groups |= {"/".join(run.folder.resolve().parts[-2:]): [run] for run in members}
    return groups


def completion_tables(run: Run) -> list[Path]:
    """The tables of completions in order; all but unreadable ones (the last may be half-written)."""
    paths = sorted((run.folder / "completions").glob("completions_*.parquet"))
    return [path for path in paths if _is_readable(path)]


def _is_readable(path: Path) -> bool:
    try:
        return bool(pq.read_metadata(path).num_rows)
    except (pa.ArrowInvalid, OSError):
        return False


def _read_table(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    return pq.read_table(path, columns=columns).to_pylist()


def last_completions(run: Run) -> list[dict[str, Any]]:
    """Rows of the newest readable completions table."""
    paths = completion_tables(run)
    return _read_table(paths[-1]) if paths else []


def message_text(value: Any) -> str:
    """A prompt or completion as text; chat messages are joined with their roles."""
    if isinstance(value, list):
        return "\n".join(f"[{m.get('role')}] {m.get('content')}" if isinstance(m, dict) else str(m) for m in value)
    return str(value)


def evaluations(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """(what was evaluated, `Evaluation.to_dict()`) of the run's evaluation.json: one, several by name, or a list.

    First that of the model the run began with, if it lies beside or in its folder and was made with the same options.
    """
    content = run.json("evaluation.json")
    named = {"": content} if "pass_at_1" in content else content
    named = named if isinstance(named, dict) else {str(i): x for i, x in enumerate(named, start=1)}
    named = {name: x for name, x in named.items() if isinstance(x, dict) and "pass_at_1" in x}
    found = [
        (" ".join(str(y) for y in (x.get("name", name), x.get("step", "")) if y != ""), x) for name, x in named.items()
    ]
    if before := named and _initial_evaluation(run, next(iter(named.values()))):
        found = [("before training", before), *((name or "after training", x) for name, x in found)]
    return found


def _initial_evaluation(run: Run, after: dict[str, Any]) -> dict[str, Any]:
    """The evaluation of the model that the run began with; {} unless its options are those of `after`."""
    options = lambda x: {k: v for k, v in x.items() if k not in ("model", "output", "batch_size")}  # noqa: E731
    model = Path(str(run.config.get("model_name_or_path", "")))
    if model.name and isinstance(after.get("arguments"), dict):
        for folder in filter(Path.is_dir, (model, model.parent)):
            before = Run(folder).json("evaluation.json")
            made = before.get("arguments") if isinstance(before, dict) and "pass_at_1" in before else None
            if isinstance(made, dict) and (made.get("model"), options(made)) == (
                str(model),
                options(after["arguments"]),
            ):
                return before
    return {}


@dataclass(frozen=True)
class Flip:
    """A prompt whose answers changed from wrong to right or back: shares of right ones, and one answer of each."""

    early_right_frac: float
    late_right_frac: float
    early: dict[str, Any]
    late: dict[str, Any]


@dataclass(frozen=True)
class Flips:
    """Prompts answered in at least two tables: how many got better and worse, and the largest change each way."""

    num_repeated: int
    num_better: int
    num_worse: int
    better: Flip | None
    worse: Flip | None


def flips(run: Run) -> Flips | None:
    """Compare each prompt's first and last table; None without a reward column of 0 and 1.

    Only two columns of every table are read, and whole rows of the tables that are shown.
    """
    paths = completion_tables(run)
    column = next((name for path in paths[-1:] for name in _zero_one_columns(path)), None)
    if column is None:
        return None
    paths = [path for path in paths if {"prompt", "completion", column} <= set(pq.read_schema(path).names)]
    seen: dict[str, list[tuple[Path, float]]] = {}  # prompt -> (table, share of right answers) in order
    for path in paths:
        right: dict[str, list[float]] = {}
        for row in _read_table(path, ["prompt", column]):
            if row[column] in (0.0, 1.0):  # neither None nor NaN: answers that could be graded
                right.setdefault(message_text(row["prompt"]), []).append(row[column])
        for prompt, values in right.items():
            seen.setdefault(prompt, []).append((path, sum(values) / len(values)))
    repeated = {prompt: (tables[0], tables[-1]) for prompt, tables in seen.items() if len(tables) > 1}
    change = {prompt: late - early for prompt, ((_, early), (_, late)) in repeated.items()}
    best, worst = max(change, key=change.get, default=""), min(change, key=change.get, default="")
    return Flips(
        len(repeated),
        sum(x > 0 for x in change.values()),
        sum(x < 0 for x in change.values()),
        _flip(best, repeated[best], column, becomes=1.0) if change.get(best, 0) > 0 else None,
        _flip(worst, repeated[worst], column, becomes=0.0) if change.get(worst, 0) < 0 else None,
    )


def _flip(prompt: str, tables: tuple[tuple[Path, float], tuple[Path, float]], column: str, becomes: float) -> Flip:
    rows = [
        next(row for row in _read_table(path) if message_text(row["prompt"]) == prompt and row[column] == wanted)
        for (path, _), wanted in zip(tables, (1.0 - becomes, becomes))
    ]
    return Flip(tables[0][1], tables[1][1], *rows)


def _zero_one_columns(path: Path) -> list[str]:
    """Reward columns that hold 0 and 1 only, accuracy first."""
    rows = _read_table(path)
    values = {name: [row[name] for row in rows if _is_number(row[name])] for name in rows[0] if "reward" in name}
    return sorted((name for name, x in values.items() if x and {*x} <= {0, 1}), key=lambda x: "accuracy" not in x)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
