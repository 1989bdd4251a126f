"""Pictures of the ratio r: its quantiles over a run, and the gate by the number of updates since the rollout."""

from __future__ import annotations

import math
import re
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sapo_trl.report.plots import SERIES, STYLE, Table, curve_table, new_axes
from sapo_trl.report.runs import Run

QUANTILE = re.compile(r"ratio/p([\d.]+)")


def fan_table(runs: list[Run], label: str) -> Table:
    """`curve_table` of every logged quantile of r, `ratio/p<percent>`, in rising order; seeds as their mean."""
    names = {float(match[1]): key for run in runs for key in run.names if (match := QUANTILE.fullmatch(key))}
    points = [(percent, row) for percent in sorted(names) for row in curve_table({label: runs}, names[percent])]
    return [row | {"percent": percent} for percent, row in points]


def draw_fan(ax: Axes, table: Table) -> None:
    """`fan_table` as bands that lie in each other, p to 100 - p; what has no partner (the median) is a line."""
    colour = SERIES[0][0]
    curves: dict[float, list[dict[str, Any]]] = {}
    for row in table:
        curves.setdefault(row["percent"], []).append(row)
    outer = [p for p in curves if p < 50 and round(100 - p, 6) in curves]
    for i, p in enumerate(outer):
        low, high = curves[p], {row["step"]: row["smoothed"] for row in curves[round(100 - p, 6)]}
        band = [(row["step"], row["smoothed"], high[row["step"]]) for row in low if row["step"] in high]
        steps, bottom, top = zip(*band)
        ax.fill_between(steps, bottom, top, color=colour, alpha=0.16, lw=0)
        for edge in (bottom, top):
            ax.plot(steps, edge, c=colour, ls=SERIES[(i + 1) % 6][1], lw=1.0, label=f"{p:g}–{100 - p:g}%")
    partners = {*outer, *(round(100 - p, 6) for p in outer)}
    for p in curves.keys() - partners:
        steps, values = zip(*((row["step"], row["smoothed"]) for row in curves[p]))
        ax.plot(steps, values, c=colour, lw=1.9, label="median" if p == 50 else f"{p:g}%")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


STALENESS = {
    "effective_update_ratio": "Effective update ratio",
    "log_ratio/abs_mean": "Mean |log r|",
    "gate/weight_pos_mean": "Mean gate weight, A > 0",
    "gate/weight_neg_mean": "Mean gate weight, A < 0",
    "clip_ratio/region_mean": "Clipped tokens (fraction)",
    "ratio/max": "Largest ratio r",
    "routing/changed_frac": "Expert selections changed (fraction)",
}


def staleness_table(run: Run) -> Table:
    """Mean, 10% and 90% quantile over rollouts of each `STALENESS` metric, by the updates since the rollout, 0 ... N-1.

    Read from `mini_batch_<k>/<name>` where logged; else from the step, of which one rollout holds
    num_mini_batches x num_iterations (needs logging_steps 1).
    """
    table: Table = []
    for name in STALENESS:
        matches = [match for key in run.names if (match := re.fullmatch(rf"mini_batch_(\d+)/{name}", key))]
        groups = {int(match[1]): list(run.series(match[0]).values()) for match in matches}
        if not groups and run.config.get("logging_steps") == 1:
            points, num = run.series(name), run.steps_per_rollout
            groups = {k: [x for step, x in points.items() if (step - 1) % num == k] for k in range(num)}
        for index, values in sorted(groups.items()):
            if values:
                low, high = np.quantile(values, [0.1, 0.9])
                spread = {"mean": np.mean(values), "low": low, "high": high, "rollouts": len(values)}
                table.append({"key": name, "mini_batch": index} | spread)
    return table


@matplotlib.rc_context(STYLE)
def gate_against_staleness(run: Run) -> Figure:
    """What is left of the gradient, and how far the policy has moved, by the number of updates since the rollout."""
    if not (table := staleness_table(run)):
        raise ValueError(f"{run.folder} has logged no mini_batch_<k>/... and no single steps. Set logging_steps: 1.")
    names = {key: name for key, name in STALENESS.items() if any(row["key"] == key for row in table)}
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure, axes = new_axes(lines, columns, (3.6 * columns, 2.9 * lines))
    for ax in axes[len(names) :]:
        ax.remove()
    for ax, (key, name), (colour, _, marker) in zip(axes, names.items(), cycle(SERIES)):
        rows = [row for row in table if row["key"] == key]
        x = [row["mini_batch"] for row in rows]
        ax.fill_between(x, [row["low"] for row in rows], [row["high"] for row in rows], color=colour, alpha=0.18, lw=0)
        ax.plot(x, [row["mean"] for row in rows], c=colour, marker=marker, lw=1.9)
        ax.set(title=name, xlabel="updates since the rollout")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure
