"""The top of the page: what each run came to, what it was, and which of several is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.metrics.table import title
from sapo_trl.report.runs import Run, before_and_after, last_evaluations, names_of, options, own_evaluations, run_name
from sapo_trl.stats import Interval, paired_difference


def per_problem(evaluation: dict[str, Any]) -> np.ndarray:
    """Share of right samples of each problem, (problems,); empty where the file does not say."""
    counts, samples = evaluation.get("num_correct"), evaluation.get("num_samples", 1)
    return np.array(counts, dtype=float) / samples if isinstance(counts, list) and samples else np.array([])


def result(run: Run) -> str:
    """One line: Pass@1 before and after training, with the interval of the paired difference where it is known.

    From evaluation.json of both; else from the evaluations while training, the run's own evaluation.json, or the
    training reward.
    """
    if pair := before_and_after(run):
        first, last = (f"{x['pass_at_1']['mean']:.3f}" for x in pair)
        before, after = map(per_problem, pair)
        known = len(before) and before.shape == after.shape
        return f"Pass@1 {first} → {last}" + (f", {signed(paired_difference(before, after))} (95%)" if known else "")
    keys = names_of([run], "eval_pass_at_1") or names_of([run], "eval_<set>_pass_at_1")
    if ends := [_ends(run, key) for key in keys if len(run.series(key)) > 1]:
        return "; ".join(ends)
    alone = [f"{name} Pass@1 {_text(*(x['pass_at_1'][key] for key in ENDS))}" for name, x in own_evaluations(run)]
    reward = run.series("reward")
    trained = f"training reward {reward.iloc[0]:.4g} → {reward.iloc[-1]:.4g}" if len(reward) else ""
    return "; ".join(alone).strip() or trained or "no step logged yet"


ENDS = ("mean", "low", "high")  # of an interval


def _ends(run: Run, key: str) -> str:
    """The first and the last evaluation while training, each with its interval; the steps, unless the first is 0."""
    table = pd.DataFrame({end: run.series(name) for end, name in zip(ENDS, (key, f"{key}_low", f"{key}_high"))})
    rows = table.dropna(subset="mean")
    first, last = (_text(*rows.iloc[place]) for place in (0, -1))
    begun = f" (step {rows.index[0]} → {rows.index[-1]})" if rows.index[0] else ""
    return f"{title(key)} {first} → {last}{begun}"


def _text(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f}" if np.isnan([low, high]).any() else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def signed(x: Interval) -> str:
    """A difference and its interval.

    >>> signed(Interval(0.125, -0.25, 0.5, 0.95, 30))
    '+0.125 [-0.250, +0.500]'
    """
    return f"{x.mean:+.3f} [{x.low:+.3f}, {x.high:+.3f}]"


def facts(run: Run) -> dict[str, str]:
    """Name -> text of what the run was and how far it came; nothing that is not known."""
    config, last = run.config, max(run.table.index, default=0)
    planned = config.get("max_steps", -1)
    steps = f"{last} of {planned}" if planned > 0 else str(last)
    steps += f" ({run.num_unreadable} unreadable lines)" if run.num_unreadable else ""
    times = [record["time_s"] for record in run.records if "time_s" in record]
    # a resumed run starts its clock again
    total = sum(now - before if now >= before else now for before, now in zip([0.0, *times], times))
    reward = run.series("reward")
    ends = "" if reward.empty else f"{reward.iloc[0]:.4g} → {reward.iloc[-1]:.4g}"
    data = f"{config.get('dataset_name') or ''}, held out: {config.get('eval_dataset_name') or 'none'}"
    found = {
        "algorithm": _algorithm(config),
        "optimizer steps": steps,
        "time": f"{total / 60:.1f} min" if total >= 60 else f"{total:.1f} s",
        "training reward, first → last": ends,
        "model": str(config.get("model_name_or_path") or ""),
        "data": data if config.get("dataset_name") else "",
    }
    return {name: text for name, text in found.items() if text}


def _algorithm(config: dict[str, Any]) -> str:
    """The algorithm, with its temperatures if it has any."""
    name = str(config.get("algorithm", ""))
    options = ALGORITHMS[name].options if name in ALGORITHMS else {}
    tau = [config.get(field) for field in ("sapo_temperature_pos", "sapo_temperature_neg") if field in options]
    return f"{name}, τ = {tau[0]} where A > 0, {tau[1]} elsewhere" if tau and None not in tau else name


def head(runs: Sequence[Run]) -> pd.DataFrame:
    """A line per run: its result and its facts; model and data stand among the settings."""
    rows = [{"run": run_name(run), "result": result(run)} | facts(run) for run in runs]
    return pd.DataFrame(rows, dtype=object).fillna("").drop(columns=["model", "data"], errors="ignore")


def which_is_better(groups: dict[str, list[Run]]) -> tuple[str, pd.DataFrame]:
    """A sentence, and for each label its paired difference to the one with the highest Pass@1.

    Compared are the shares of right samples of each problem in evaluation.json, of the problems that every label was
    evaluated on with the same options; seeds of a label are averaged problem by problem.
    """
    if len(groups) < 2:
        return "", pd.DataFrame()
    measured = {label: _by_options(runs) for label, runs in groups.items()}
    common = sorted(set.intersection(*(set(x) for x in measured.values())))
    if not common:
        return (
            "Not known: a paired difference needs evaluation.json of scripts/evaluate.py in every run's folder, made "
            "with the same options on the same problems."
        ), pd.DataFrame()
    shares = {label: np.concatenate([x[key] for key in common]) for label, x in measured.items()}
    best = max(shares, key=lambda label: shares[label].mean())
    rows, unclear = [[best, f"{shares[best].mean():.3f}", "", ""]], []
    for label in (label for label in groups if label != best):
        difference = paired_difference(shares[label], shares[best])
        is_shown = difference.low > 0
        unclear += [] if is_shown else [label]
        rows.append([label, f"{shares[label].mean():.3f}", signed(difference), "yes" if is_shown else "no"])
    over = f"95% interval over {len(shares[best])} problems, paired"
    sentence = f"{best} has the highest Pass@1"
    sentence += f", but its lead over {', '.join(unclear)} may be chance: the interval includes 0" if unclear else ""
    seeds = min(map(len, groups.values()))
    more = "another seed may order them otherwise" if seeds == 1 else f"at least {seeds} seeds each, averaged"
    columns = ["", "Pass@1", f"lead of {best} ({over})", "more than chance"]
    return f"{sentence} ({over}; {more}).", pd.DataFrame(rows, columns=columns, dtype=object)


def _by_options(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """Name and options of an evaluation -> share of right samples of each problem, the mean over runs that have it."""
    found: dict[str, list[np.ndarray]] = {}
    for run in runs:
        for name, evaluation in last_evaluations(run).items():
            known = options(evaluation)
            if known is not None and len(shares := per_problem(evaluation)):
                key = f"{name} {len(shares)} {sorted((option, str(x)) for option, x in known.items())}"
                found.setdefault(key, []).append(shares)
    return {key: np.mean(list_of, axis=0) for key, list_of in found.items()}
