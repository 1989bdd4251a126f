"""Many runs beside each other: a row for each run, a row for each of its rollouts, and pictures of both.

`runs.csv` and `rollouts.csv` (`RUN`, `ROLLOUT`: their columns) are all that the pictures need, so they are drawn again
without the runs' folders. A seed's run has **collapsed** if the reward of its last two rollouts is under half of its
best rollout's, and has **survived** if it ends with a higher held-out Pass@1 than it began with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sapo_trl.metrics.table import title
from sapo_trl.report.plots import DPI, SERIES, STYLE, new_axes
from sapo_trl.report.runs import Run

SETTING = ("world", "method", "mini_batches", "learning_rate", "rollouts_ahead")  # what all seeds of a setting share
LAST = 2  # rollouts whose mean reward is the run's last one
# column of rollouts.csv -> (metric, taken as): the mean over a rollout's steps, or at its last mini-batch, before its
# own update, where the policy is furthest from the rollout
ROLLOUT = {
    "reward": ("reward", "mean"),
    "length": ("completions/mean_length", "mean"),
    "entropy": ("entropy", "mean"),
    "grad_norm": ("grad_norm", "mean"),
    "drift": ("log_ratio/drift", "last"),
    "leak": ("gate/leak_neg", "last"),
    "update_ratio": ("effective_update_ratio", "last"),
}
TAU_NEG = re.compile(r"sapo(?: sapo_temperature_neg=(\S+))?$")  # runs of Figure 5; without the option it is 1.05
PANELS = ("reward", "entropy", "grad_norm", "drift", "leak")


def rollout_table(run: Run) -> pd.DataFrame:
    """A line per rollout of a run, 0 ..., with the columns of `ROLLOUT`; what was not logged is empty."""
    table = run.table.reindex(columns=[metric for metric, _ in ROLLOUT.values()])
    by_rollout = table.groupby((table.index - 1) // run.steps_per_rollout)
    columns = {name: by_rollout[metric].agg(how) for name, (metric, how) in ROLLOUT.items()}
    return pd.DataFrame(columns).rename_axis("rollout").reset_index()


def ending(rewards: Sequence[float]) -> dict[str, Any]:
    """`reward_best`, `reward_last` and `collapsed_at`: from which rollout on the reward stays under half of the best.

    >>> ending([0.5, 0.8, 0.3, 0.5, 0.1, 0.2])
    {'reward_best': 0.8, 'reward_last': 0.15, 'collapsed_at': 4}
    >>> ending([0.5, 0.8, 0.3, 0.7])["collapsed_at"]  # it has not
    """
    best, last = max(rewards), float(np.mean(rewards[-LAST:]))
    above = [i for i, reward in enumerate(rewards) if reward >= best / 2]
    at = None if last >= best / 2 else min(above[-1] + 1, len(rewards) - 1)
    return {"reward_best": round(best, 4), "reward_last": round(last, 4), "collapsed_at": at}


def setting_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A line per setting: seeds, Pass@1 after training (mean, least, greatest), collapsed and surviving seeds."""
    found = runs.assign(survived=runs["pass_at_1_after"] > runs["pass_at_1_before"])
    by_setting = found.groupby(list(SETTING), sort=False)
    after = by_setting["pass_at_1_after"]
    numbers = {
        "seeds": after.size(),
        "before": by_setting["pass_at_1_before"].mean(),
        "after": after.mean(),
        "least": after.min(),
        "greatest": after.max(),
        "reward_last": by_setting["reward_last"].mean(),
        "collapsed": by_setting["collapsed_at"].count(),
        "survived": by_setting["survived"].sum(),
    }
    return pd.DataFrame(numbers).reset_index()


def survival_table(settings: pd.DataFrame) -> pd.DataFrame:
    """Largest tried learning rate at which every seed survives, for each method and N; 0 where none is.

    A rate counts only if all smaller ones tried do as well.
    """
    rows = []
    groups: Any = settings.groupby(["world", "method", "mini_batches", "rollouts_ahead"], sort=False)
    for (world, method, mini_batches, ahead), group in groups:
        rates = group.sort_values("learning_rate")
        survives = (rates["survived"] == rates["seeds"]).cumprod().astype(bool)
        rows.append({
            "world": world, "method": method, "mini_batches": mini_batches, "rollouts_ahead": ahead,
            "largest_rate": rates["learning_rate"][survives].max() if survives.any() else 0.0,
            "rates_tried": " ".join(f"{x:g}" for x in rates["learning_rate"]), "seeds": rates["seeds"].min(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), handlelength=3)


@matplotlib.rc_context(STYLE)
def curve_figure(runs: pd.DataFrame, rollouts: pd.DataFrame) -> Figure:
    """Figure 4: `PANELS` by rollout, the mean of the seeds in a band from least to greatest, and held-out Pass@1.

    Args:
        runs: of one world, N and number of rollouts ahead; methods may differ in their learning rate.
    """
    rows = rollouts.merge(runs[["run", "method"]], on="run")
    figure, axes = new_axes(2, 3, (9.6, 5.4))
    for name, ax in zip(PANELS, axes):
        for (colour, dashes, marker), method in zip(SERIES, dict.fromkeys(runs["method"])):
            seeds = rows[rows["method"] == method].groupby("rollout")[name]
            mean = seeds.mean()
            ax.fill_between(mean.index, seeds.min(), seeds.max(), color=colour, alpha=0.12, lw=0)
            ax.plot(mean.index, mean, c=colour, ls=dashes, marker=marker, ms=3.5, lw=1.7, label=method)
        ax.set(title=title(ROLLOUT[name][0]), xlabel="rollout")
        if name == "drift":
            ax.set_yscale("log")
    _dots(axes[5], runs, "method")
    axes[5].set(title="Held-out Pass@1 of each seed", ylim=(0, 1))
    axes[5].tick_params(axis="x", rotation=20)
    _legend(figure, axes[0])
    return figure


def _dots(ax: Axes, runs: pd.DataFrame, x: str) -> None:
    """Held-out Pass@1 of every run, and a bar at their mean, by the values of `x`."""
    values = list(dict.fromkeys(runs[x]))
    for place, value in enumerate(values):
        after, colour = runs.loc[runs[x] == value, "pass_at_1_after"], SERIES[place % len(SERIES)][0]
        ax.plot(place + np.linspace(-0.15, 0.15, len(after)), after, "o", c=colour, ms=4)
        ax.hlines(after.mean(), place - 0.3, place + 0.3, color=colour, lw=2)
    ax.axhline(runs["pass_at_1_before"].mean(), color=SERIES[5][0], lw=1, ls=":")
    ax.set_xticks(range(len(values)), [str(value) for value in values])


@matplotlib.rc_context(STYLE)
def grid_figure(runs: pd.DataFrame, x: str, panel: Sequence[str], label: str = "") -> Figure:
    """Held-out Pass@1 against `x`, mean and range of the seeds, a panel for each value of the columns `panel`.

    Args:
        x: a column of numbers.
        label: the column whose values are the lines of a panel; without one there is a single line.
    """
    groups: Any = list(runs.groupby(list(panel), sort=True))
    figure, axes = new_axes(1, len(groups), (3.4 * len(groups), 3.3), sharey=True)
    for ax, (values, rows) in zip(axes, groups):
        for (colour, dashes, marker), name in zip(SERIES, dict.fromkeys(runs[label]) if label else [""]):
            seeds = (rows[rows[label] == name] if label else rows).groupby(x)["pass_at_1_after"]
            mean, low, high = seeds.mean(), seeds.min(), seeds.max()
            bars = [mean - low, high - mean]
            ax.errorbar(mean.index, mean, bars, c=colour, ls=dashes, marker=marker, ms=4, capsize=2, label=str(name))
        ax.axhline(rows["pass_at_1_before"].mean(), color=SERIES[5][0], lw=1, ls=":")
        ticks = sorted(set(runs[x]))
        ax.set(xscale="log", xlabel=x.replace("_", " "), ylim=(0, 1))
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_title(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in zip(panel, values)))
    axes[0].set_ylabel("held-out Pass@1")
    if label:
        _legend(figure, axes[0])
    return figure


def tuned(runs: pd.DataFrame, seeds: int = 2) -> pd.DataFrame:
    """The runs of each method at its own learning rate, the one with the highest mean Pass@1 over its first `seeds`
    seeds; the result has the other seeds only, where there are any, so that none is judged by what chose it."""
    chosen = []
    for _, mine in runs.groupby("method", sort=False):
        first = sorted(mine["seed"].unique())[:seeds]
        for_choice = mine[mine["seed"].isin(first)]
        best = for_choice.groupby("learning_rate")["pass_at_1_after"].mean().idxmax()
        at_best = mine[mine["learning_rate"] == best]
        others = at_best[~at_best["seed"].isin(first)]
        chosen.append(others if len(others) else at_best)
    return pd.concat(chosen)


def figures(runs: pd.DataFrame, rollouts: pd.DataFrame) -> dict[str, Figure]:
    """Name -> picture, of every question that these runs say something about."""
    found = {}
    is_plain, is_fresh = ~runs["method"].str.contains("="), runs["rollouts_ahead"] == 0
    for (world, n), rows in runs[is_plain & is_fresh].groupby(["world", "mini_batches"]):
        of = f"{world}-N{n}"
        for rate, same in rows.groupby("learning_rate"):
            if same["method"].nunique() > 1:
                found[f"figure-4-{of}-lr{rate:g}"] = curve_figure(same, rollouts)
        if rows["learning_rate"].nunique() > 1 and rows["method"].nunique() > 1:
            found[f"figure-4-{of}-tuned"] = curve_figure(tuned(rows), rollouts)
            found[f"rates-{of}"] = grid_figure(rows, "learning_rate", ["mini_batches"], "method")
    sapo = runs[is_fresh & runs["method"].str.match(TAU_NEG.pattern)]
    taus = sapo["method"].str.extract(TAU_NEG, expand=False).fillna("1.05").astype(float)
    if taus.nunique() > 2:
        found["figure-5"] = grid_figure(sapo.assign(tau_neg=taus), "tau_neg", ["mini_batches", "learning_rate"])
    for (world, rate), rows in runs[is_plain].groupby(["world", "learning_rate"]):
        if rows["mini_batches"].nunique() > 2:
            found[f"staleness-{world}-lr{rate:g}"] = grid_figure(rows, "mini_batches", ["rollouts_ahead"], "method")
    return found


def draw(folder: Path) -> list[Path]:
    """Every picture of the rows in `folder`, as PNG beside them; returns the paths."""
    runs, rollouts = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "rollouts.csv")
    paths = []
    for name, figure in figures(runs, rollouts).items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI // 2, facecolor="white", metadata={"Software": None})
    return paths


def markdown(folder: Path) -> str:
    """The settings and the largest learning rates of the runs in `folder`, as two Markdown tables."""
    settings = setting_table(pd.read_csv(folder / "runs.csv"))
    tables = [settings, survival_table(settings)]
    lines = []
    for table in tables:
        cells = [[f"{x:.3f}" if isinstance(x, float) and x >= 0.01 else f"{x:g}" if isinstance(x, float) else str(x)
                  for x in row] for row in table.itertuples(index=False)]  # fmt: skip
        rows = [list(table.columns), ["---"] * table.shape[1], *cells]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(lines)
