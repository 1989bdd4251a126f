"""The laboratory's picture: reward against drift, a panel for each task."""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from sapo_trl.lab.sweep import NUMBERS, Table
from sapo_trl.lab.world import TASKS
from sapo_trl.report.plots import STYLE, line_style, new_axes

REFERENCE = "sapo"  # whose drift places a regime on the axis, so that all methods share it


def lab_table(table: Table) -> pd.DataFrame:
    """One line per regime and method, with the regime's drift: that of `sapo` in it."""
    rows = pd.DataFrame(table.rows.values()).drop(columns=["curve", "rewards", "source"], errors="ignore")
    rows[[*NUMBERS]] = rows[[*NUMBERS]].astype(float)
    reference = rows[rows["method"] == REFERENCE].set_index("regime")["drift"]
    rows["regime_drift"] = rows["regime"].map(reference)
    return rows.sort_values(["task", "regime_drift", "method"], kind="stable")


def plain(regime: str) -> bool:
    """N and the learning rate only: nothing else than the drift differs."""
    return all(part.split("=")[0] in ("N", "lr", "task") for part in regime.split())


def lab_figure(rows: pd.DataFrame, methods: tuple[str, ...]) -> Figure:
    """Median over seeds with the range from the worst to the best seed, of the regimes that differ in N and the
    learning rate only."""
    rows = rows[rows["regime"].map(plain) & rows["method"].isin(methods)].dropna(subset=["regime_drift"])
    tasks = [task for task in TASKS if task in set(rows["task"])]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(1, len(tasks), (4.6 * len(tasks), 4.0), sharey=True)
        for ax, task in zip(axes, tasks, strict=True):
            for number, method in enumerate(methods):
                colour, dashes, marker = line_style(number)
                mine = rows[(rows["task"] == task) & (rows["method"] == method)].sort_values("regime_drift")
                x = mine["regime_drift"]
                ax.fill_between(x, mine["min"], mine["max"], color=colour, alpha=0.12, linewidth=0)
                ax.plot(x, mine["median"], color=colour, linestyle=dashes, marker=marker, markersize=4, label=method)
            ax.set(
                xscale="log", title=f"Task: {task}", xlabel="drift per rollout under SAPO, mean (log r)²/2", ylim=(0, 1)
            )
        axes[0].set_ylabel("reward: median and range of 8 seeds")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(6, len(methods)))
    return figure
