"""The report's sums over a run: time and tokens per phase, and how many answers got which verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from sapo_trl.report.page import html_table
from sapo_trl.report.runs import Run, run_name

SECONDS = r"time/.+|step_time|verdict/time_s"
TOTALS = rf"{SECONDS}|update/.+_tokens|update/packs|update/oom_retries"
# Phase -> (seconds, what is inside it and stands in a line of its own, once per rollout and not per step)
PHASES = {
    "generation": ("time/rollout_s", ("time/reward_s",), True),
    "rewards": ("time/reward_s", (), True),
    "old and reference log-probs": ("time/old_and_reference_logps_s", (), True),
    "update": ("time/update_s", (), False),
}


def _sizes(run: Run) -> tuple[int, int, int]:
    """(steps, rollouts begun, completions per rollout; 0 where the plan is not known)."""
    steps = max((int(record["step"]) for record in run.records), default=0)
    completions = run.json("plan.json").get("completions per rollout", 0)
    return steps, math.ceil(steps / run.steps_per_rollout), int(completions) if str(completions).isdigit() else 0


def _total(run: Run, name: str, times: int) -> float:
    """Mean of the logged values x how often it was measured: right for any logging_steps."""
    values = run.series(name).values()
    return fmean(values) * times if values else 0.0


def phases(runs: Sequence[Run]) -> str:
    """Seconds of every phase, their share of the run's steps, tokens and tokens per second."""
    rows = []
    for run in runs:
        steps, rollouts, completions = _sizes(run)
        seconds = {
            phase: _total(run, name, rollouts if per_rollout else steps)
            - sum(_total(run, part, rollouts) for part in inside)
            for phase, (name, inside, per_rollout) in PHASES.items()
            if name in run.names
        }
        whole = _total(run, "step_time", steps)
        tokens = {
            "generation": (_total(run, "completions/mean_length", rollouts) * completions, "generated"),
            "update": (_total(run, "update/forwarded_tokens", steps), "forwarded"),
        }
        trained = _total(run, "update/trained_tokens", steps)
        if seconds and whole:
            seconds["rest of the steps"] = whole - sum(seconds.values())
        for phase, spent in seconds.items():
            count, what = tokens.get(phase, (0, ""))
            also = f", {trained:,.0f} trained" if phase == "update" and trained else ""
            rows.append(
                [
                    run_name(run),
                    phase,
                    f"{spent:,.1f}",
                    f"{spent / whole:.0%}" if whole else "",
                    f"{count:,.0f} {what}{also}" if count else "",
                    f"{count / spent:,.0f}" if count and spent > 0 else "",
                ]
            )
    header = ["run", "phase", "seconds", "share of the steps", "tokens", "tokens per second"]
    return _by_run(runs, header, rows)


def _by_run(runs: Sequence[Run], header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table without its first column, the run, where there is one only: a phone has no room for it."""
    first = 0 if len(runs) > 1 else 1
    return html_table(header[first:], [row[first:] for row in rows])


def totals(runs: Sequence[Run]) -> str:
    """Every logged time and count as it was logged."""
    rows = []
    for run in runs:
        sums = {name: list(run.series(name).values()) for name in run.matching(TOTALS)}
        for name, values in sums.items():
            total = f"{sum(values):,.{0 if sum(values) > 1000 else 1}f}"
            rows.append([run_name(run), name, sum(values) / len(values), total, len(values)])
    table = _by_run(runs, ["run", "name", "mean", "sum of logged values", "times logged"], rows)
    return f"<details><summary>Every time and count that was logged</summary>{table}</details>" if rows else ""


def verdicts(runs: Sequence[Run]) -> str:
    """Answers per verdict and run, none left out: a timeout that never came is a 0 in the table."""
    rows: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        _, rollouts, completions = _sizes(run)
        for name in run.matching(r"verdict/.+_frac"):
            values = list(run.series(name).values())
            count = f"{fmean(values) * rollouts * completions:,.0f}: " if completions else ""
            cell = f"{count}{values[0]:.1%} → {values[-1]:.1%}, at most {max(values):.1%}"
            verdict = name.removeprefix("verdict/").removesuffix("_frac")
            rows.setdefault(verdict, [""] * len(runs))[i] = cell
    table = html_table(["verdict", *map(run_name, runs)], [[verdict, *cells] for verdict, cells in rows.items()])
    note = "<p>Answers of the whole run, and their share in the first, the last and the fullest rollout.</p>"
    return table + note if rows else ""
