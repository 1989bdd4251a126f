"""One self-contained HTML page of a run, or of several side by side (`write_report`).

The page loads nothing: pictures are inline SVG whose colours follow the reader's light or dark theme, there is no
script, and a policy in its head forbids both. The content of a run folder, completions above all, is untrusted text and
is escaped by the templates. Sections of missing files are left out, so a running run can be reported on too.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from sapo_trl.metrics.table import METRICS, SECTIONS
from sapo_trl.report.completions import extremes, flipped
from sapo_trl.report.head import facts, head, result, which_is_better
from sapo_trl.report.page import Section, render
from sapo_trl.report.panels import Groups, picture_section
from sapo_trl.report.runs import Run, distinct, evaluations, group_seeds, names_of, read_jsonl, run_name

EMPTY = {"null", "false", '""', '"none"', "[]", "{}"}  # as JSON; a default and a setting of these are the same


def _text_table(columns: Sequence[str], rows: list[list[Any]]) -> pd.DataFrame:
    """A table to be read; cells stay as they are, None included."""
    return pd.DataFrame(rows, columns=list(columns), dtype=object)


def _by_run(runs: Sequence[Run], columns: Sequence[str], rows: list[list[Any]]) -> pd.DataFrame:
    """A table without its first column, the run, if there is only one, which saves space on a small screen."""
    return _text_table(["run", *columns], rows).iloc[:, 0 if len(runs) > 1 else 1 :]


def _warnings(runs: Sequence[Run]) -> tuple[dict[tuple[str, str, str], list[Any]], int]:
    """((run, source, message) -> steps, unreadable lines); the run is empty where there is one only."""
    found: dict[tuple[str, str, str], list[Any]] = {}
    num_unreadable = 0
    for run in runs:
        records, torn = read_jsonl(run.folder / "warnings.jsonl")
        num_unreadable += torn
        for row in records:
            source = " ".join(str(row[key]) for key in ("source", "signal") if key in row)
            key = (run_name(run) if len(runs) > 1 else "", source, str(row.get("message", row)))
            found.setdefault(key, []).append(row.get("step", "?"))
    return found, num_unreadable


def _sizes(run: Run) -> tuple[int, int, int]:
    """(steps, rollouts begun, completions per rollout; 0 where the plan is not known)."""
    steps = max(run.table.index, default=0)
    completions = run.facts("plan.json").get("completions per rollout", 0)
    return steps, math.ceil(steps / run.steps_per_rollout), int(completions) if str(completions).isdigit() else 0


def _phases(run: Run) -> list[list[str]]:
    """Seconds of every phase, their share of the run's steps, tokens and tokens per second."""
    steps, rollouts, completions = _sizes(run)
    # mean of the logged values x how often it was measured: right for any logging_steps
    total = lambda name, times: run.series(name).mean() * times if name in run.names else 0.0  # noqa: E731
    seconds = {
        "generation": total("time/rollout_s", rollouts) - total("time/reward_s", rollouts),
        "rewards": total("time/reward_s", rollouts),
        "old and reference log-probs": total("time/old_and_reference_logps_s", rollouts),
        "update": total("time/update_s", steps),
    }
    whole, trained = total("step_time", steps), total("update/trained_tokens", steps)
    if whole and any(seconds.values()):
        seconds["rest of the steps"] = whole - sum(seconds.values())
    also = f", {trained:,.0f} trained" if trained else ""
    tokens = {
        "generation": (total("completions/mean_length", rollouts) * completions, " generated"),
        "update": (total("update/forwarded_tokens", steps), f" forwarded{also}"),
    }
    rows = []
    for phase, spent in seconds.items():
        count, what = tokens.get(phase, (0, ""))
        counted = [f"{count:,.0f}{what}", f"{count / spent:,.0f}"] if count and spent else ["", ""]
        rows.append([run_name(run), phase, f"{spent:,.1f}", f"{spent / whole:.0%}" if whole else "", *counted])
    return [row for row in rows if seconds[row[1]]]


def _totals(run: Run) -> list[list[Any]]:
    """Every logged time and count as it was logged."""
    listed = [x.name for x in METRICS if x.section == "Time and tokens" and (x.panel or not x.drawn)]
    rows = []
    for name in sorted(name for metric in listed for name in names_of([run], metric)):
        values = run.series(name)
        total = f"{values.sum():,.{0 if values.sum() > 1000 else 1}f}"
        rows.append([run_name(run), name, values.mean(), total, len(values)])
    return rows


def _verdicts(runs: Sequence[Run]) -> pd.DataFrame:
    """Answers per verdict and run; a verdict that did not occur is a 0 in the table."""
    families = ("verdict/capped_frac", "verdict/<verdict>_frac")
    rows = []
    for name in sorted(name for family in families for name in names_of(runs, family)):
        cells = [_verdict(run, name) if name in run.names else "" for run in runs]
        rows.append([name.removeprefix("verdict/").removesuffix("_frac"), *cells])
    return _text_table(["verdict", *map(run_name, runs)], rows)


def _verdict(run: Run, name: str) -> str:
    """Answers of the whole run, and their share in the first, the last and the fullest rollout."""
    _, rollouts, completions = _sizes(run)
    shares = run.series(name)
    count = f"{shares.mean() * rollouts * completions:,.0f}: " if completions else ""
    return f"{count}{shares.iloc[0]:.1%} → {shares.iloc[-1]:.1%}, at most {shares.max():.1%}"


def _layers(run: Run) -> pd.DataFrame:
    """The last logged routing numbers of every layer: a table, as 48 layers would be 200 pictures."""
    last = {name: run.series(name).iloc[-1] for name in names_of([run], "routing/layer_<layer>/<name>")}
    parts = [name.removeprefix("routing/layer_").split("/", 1) for name in last]
    index = pd.MultiIndex.from_tuples([tuple(part) for part in parts], names=["layer", ""])
    return pd.Series(last.values(), index).unstack(fill_value="").reset_index() if last else pd.DataFrame()


def _sections(groups: Groups, runs: Sequence[Run]) -> dict[str, Section]:
    """The sections of the table of metrics, with the tables that belong to them."""
    sections = {name: picture_section(groups, name) for name in SECTIONS}
    sections["Routing"].details = {f"Last value of every layer: {run_name(run)}": _layers(run) for run in runs}
    sections["Verdicts"].table, time = _verdicts(runs), sections["Time and tokens"]
    columns = ["phase", "seconds", "share of the steps", "tokens", "tokens per second"]
    time.table = _by_run(runs, columns, [row for run in runs for row in _phases(run)])
    columns = ["name", "mean", "sum of logged values", "times logged"]
    every = _by_run(runs, columns, [row for run in runs for row in _totals(run)])
    time.details = {"Every time and count that was logged": every}
    return sections


def _defaults(algorithm: str = "sapo") -> dict[str, Any]:
    """Default of every known field, resolved on a CPU where it is None (imported here: TRL takes seconds to load)."""
    from trl import ModelConfig

    from sapo_trl.algorithms import ALGORITHMS
    from sapo_trl.config import SAPOConfig
    from sapo_trl.data.arguments import ScriptArguments
    from sapo_trl.trl_seams import accelerate_state_kept

    known: dict[str, Any] = {}
    for source in (ModelConfig, ScriptArguments, SAPOConfig):
        for x in fields(source):
            known[x.name] = x.default_factory() if x.default_factory is not MISSING else x.default
    algorithm = algorithm if algorithm in ALGORITHMS else "sapo"
    # the page of a run is written while its trainer has still to save the model
    with warnings.catch_warnings(action="ignore", category=FutureWarning), accelerate_state_kept():
        resolved = SAPOConfig(algorithm=algorithm, use_cpu=True, report_to="none").to_dict()
    return known | {name: x for name, x in resolved.items() if known.get(name) is None}


def _compare(
    runs: Sequence[Run], contents: Sequence[dict[str, Any]], known: dict[str, Any] | None = None
) -> pd.DataFrame:
    """Name by run; with `known` defaults only what differs from them, the default last. ≠ marks runs that differ."""
    plain = lambda x: json.dumps(x, default=str, sort_keys=True)  # noqa: E731
    rows = []
    for name in dict.fromkeys(name for content in contents for name in content):
        values = [content.get(name, "") for content in contents]
        differ = any(plain(value) != plain(values[0]) for value in values)
        pair = set() if known is None else {plain(values[0]), plain(known.get(name))}
        same = len(pair) == 1 or (pair and pair <= EMPTY)
        if differ or not same:
            default = [] if known is None else [known.get(name, "")]
            rows.append([f"≠ {name}" if differ else name, *("none" if x is None else x for x in [*values, *default])])
    rows.sort(key=lambda row: not row[0].startswith("≠"))
    return _text_table(["", *map(run_name, runs), *([] if known is None else ["default"])], rows)


def _what_ran(runs: Sequence[Run]) -> dict[str, pd.DataFrame]:
    configs = [run.config for run in runs]
    known = _defaults(str(configs[0].get("algorithm"))) if any(configs) else {}
    files = {"Batch plan": "plan", "Hardware": "hardware", "Versions": "versions"}
    return {
        "Settings that differ from the defaults": _compare(runs, configs, known),
        "Every setting": _compare(runs, configs),
    } | {heading: _compare(runs, [run.facts(f"{name}.json") for run in runs]) for heading, name in files.items()}


def write_report(runs: Sequence[Run], path: str | Path) -> Path:
    """Write the page of one run, or of several side by side (seeds of one setting share a curve); returns its path."""
    runs = distinct(runs)
    groups, path = group_seeds(runs), Path(path)
    of = [f": {run_name(run)}" if len(runs) > 1 else "" for run in runs]
    names = [run_name(run) if len(runs) > 1 else "" for run in runs]
    warned, num_unreadable = _warnings(runs)
    better, leads = which_is_better(groups)
    page = render(
        title=f"{run_name(runs[0])}: {result(runs[0])}" if len(runs) == 1 else f"Runs: {', '.join(groups)}",
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        num_runs=len(runs),
        facts=facts(runs[0]) if len(runs) == 1 else {},
        command=runs[0].facts("versions.json").get("command", "") if len(runs) == 1 else "",
        head=head(runs) if len(runs) > 1 else pd.DataFrame(),
        better=better,
        leads=leads,
        warnings=warned,
        num_unreadable=num_unreadable,
        evaluations=[(f"{who} {name}".strip(), x) for run, who in zip(runs, names) for name, x in evaluations(run)],
        sections=_sections(groups, runs),
        extremes=[article for run, end in zip(runs, of) for article in extremes(run, end)],
        flipped=[flipped(run, end) for run, end in zip(runs, of)],
        what_ran=_what_ran(runs),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="replace")
    return path
