"""All tables of a folder of runs: how they compare, what became of them by their drift, what the guard says of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from sapo_trl.monitor.guard import CollapseGuard
from sapo_trl.report.comparison import markdown, read_table, sections

SIGNAL = "log_ratio/drift"
BANDS = {"to 0.01": 0.01, "to 0.1": 0.1, "to 0.3": 0.3, "to 1": 1.0, "over 1": math.inf}


def all_tables(folder: Path) -> str:
    """`markdown` of the folder and, where it has `rollouts.csv`, the tables of this file."""
    text, files = markdown(folder), [folder / "runs.csv", folder / "rollouts.csv"]
    if not all(path.exists() for path in files):
        return text
    runs, rollouts = map(read_table, files)
    runs = runs[runs["run"].isin(rollouts["run"])]
    tables = {
        "Drift, and how runs ended": drift_table(runs, rollouts),
        "What the collapse guard says of the drift": alarm_table(runs, rollouts),
    }
    return f"{text}\n{sections(tables)}"


def first_alarm(rollouts: pd.DataFrame) -> float:
    """The rollout after which the guard first tells of a run's drift, by its lines of `rollouts.csv`; infinite if
    never."""
    guard = CollapseGuard()
    in_order = rollouts.sort_values("rollout")
    for rollout, reward, drift in zip(in_order["rollout"], in_order["reward"], in_order["drift"], strict=True):
        logs = {name: value for name, value in (("reward", reward), (SIGNAL, drift)) if math.isfinite(value)}
        if any(alarm.signal == SIGNAL for alarm in guard.judge(rollout + 1, logs)):
            return rollout
    return math.inf


def alarm_table(runs: pd.DataFrame, rollouts: pd.DataFrame) -> pd.DataFrame:
    """By world and how runs ended: how many there are, of how many the guard told, and for the collapsed ones when: in
    a rollout before the one from which the reward stays under half of its best, or in that one."""
    first = runs["run"].map({run: first_alarm(lines) for run, lines in rollouts.groupby("run")}).astype(float)
    at = runs["collapsed_at"].fillna(-1)  # none
    ended = np.select(
        [at >= 0, runs["pass_at_1_after"] > runs["pass_at_1_before"]],
        ["collapsed", "above where they began"],
        "not above",
    )
    told = {
        "runs": 1,
        "with an alarm": first < math.inf,
        "before the fall": first < at,
        "in that rollout": first == at,
    }
    table = runs[["world"]].assign(ended=ended, **told)
    return table.groupby(["world", "ended"], sort=False).sum().reset_index()


def drift_table(runs: pd.DataFrame, rollouts: pd.DataFrame) -> pd.DataFrame:
    """By world and the median drift of a run's rollouts: how many there are, the mean change of held-out Pass@1, how
    many end above where they began, and how many have collapsed."""
    drift = runs["run"].map(rollouts.groupby("run")["drift"].median())
    band = pd.cut(drift, [-math.inf, *BANDS.values()], labels=list(BANDS))
    change = runs["pass_at_1_after"] - runs["pass_at_1_before"]
    table = runs[["world"]].assign(
        median_drift=band, runs=1, change=change, above=change > 0, collapsed=runs["collapsed_at"].notna()
    )
    how = {"runs": "sum", "change": "mean", "above": "sum", "collapsed": "sum"}
    found = table.groupby(["world", "median_drift"], observed=True).agg(how).reset_index()
    return found.assign(change=[f"{x:+.3f}" for x in found["change"]])
