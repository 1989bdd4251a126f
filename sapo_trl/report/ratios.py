"""Pictures of the ratio r: its quantiles over a run, the gate by the updates since the rollout, and the bound.

The bound is SAPO's Eq. 21 (arXiv 2511.20347), under which a mean gate is a gate of the mean. It is drawn from a dump of
log-ratios (`load_dump`): `ratio_figures` draws `ratio_table`, Figures 2 and 3 of the paper.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sapo_trl.metrics.sequence import sequence_bound
from sapo_trl.metrics.table import METRICS
from sapo_trl.report.plots import SERIES, STEP, STYLE, curve_table, draw_panels, is_maximum, new_axes, panel_axes
from sapo_trl.report.runs import Run, names_of


def fan_table(runs: list[Run], label: str) -> pd.DataFrame:
    """`curve_table` of every logged quantile of r, `ratio/p<percent>`, in rising order; seeds as their mean."""
    percents = {name: float(name.removeprefix("ratio/p")) for name in names_of(runs, "ratio/p<percent>")}
    table = curve_table({label: runs}, sorted(percents, key=lambda name: percents[name]))
    return table.assign(percent=table["key"].map(percents))


def draw_fan(ax: Axes, table: pd.DataFrame) -> None:
    """`fan_table` as nested bands, p to 100 - p; quantiles without a partner, like the median, are lines."""
    colour = SERIES[0][0]
    curves = table.pivot(index="step", columns="percent", values="smoothed")
    percents: list[float] = curves.columns.tolist()
    partners = {p: round(100 - p, 6) for p in percents if p < 50 and round(100 - p, 6) in percents}
    for i, (p, partner) in enumerate(partners.items()):
        band = curves[[p, partner]].dropna()
        ax.fill_between(band.index, band[p], band[partner], color=colour, alpha=0.16, lw=0)
        for edge in (p, partner):
            ax.plot(band.index, band[edge], c=colour, ls=SERIES[(i + 1) % 6][1], lw=1.0, label=f"{p:g}–{100 - p:g}%")
    for p in [p for p in percents if p not in partners and p not in partners.values()]:
        line = curves[p].dropna()
        ax.plot(line.index, line, c=colour, lw=1.9, label="median" if p == 50 else f"{p:g}%")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set(xlabel=STEP, ylabel="r")


STALE = "optimizer steps since the rollout"
STALENESS = ("key", "mini_batch", "value", "low", "high", "rollouts")  # columns of `staleness_table`


def staleness_table(run: Run) -> pd.DataFrame:
    """Each metric drawn by staleness, with the columns `STALENESS`: value is its mean over rollouts, low and high their
    10% and 90% quantile; of a maximum the largest of all, without a band.

    `mini_batch`: the updates since the rollout, 0 ... N-1. Read from `mini_batch_<k>/<name>` where logged; else from
    the step, of which one rollout holds num_mini_batches x num_iterations (needs logging_steps 1).
    """
    found = {metric.name: _by_mini_batch(run, metric.name) for metric in METRICS if metric.by_staleness}
    tables = []
    for name, values in found.items():
        by_k = values.groupby(values.index)
        spread = {"value": by_k.mean(), "low": by_k.quantile(0.1), "high": by_k.quantile(0.9), "rollouts": by_k.size()}
        if is_maximum(name):
            spread |= {"value": by_k.max(), "low": np.nan, "high": np.nan}
        table = pd.DataFrame(spread).rename_axis("mini_batch").reset_index().assign(key=name)
        tables += [table] if len(table) else []
    return pd.concat(tables, ignore_index=True)[list(STALENESS)] if tables else pd.DataFrame(columns=list(STALENESS))


def _by_mini_batch(run: Run, name: str) -> pd.Series:
    """The values of `name`, by the updates since the rollout."""
    matches = [match for key in run.names if (match := re.fullmatch(rf"mini_batch_(\d+)/{name}", key))]
    if matches:
        logged = {int(match[1]): run.series(match[0]) for match in matches}
        return pd.concat(logged).droplevel(1)
    points = run.series(name if run.config.get("logging_steps") == 1 else "")
    return points.set_axis((points.index - 1) % run.steps_per_rollout)


ACTS = 0.01  # drift under which w is near 1 for nearly every token (docs/gate.md)


def what_the_gate_did(run: Run) -> str:
    """In words, from the last mini-batch of every rollout; empty where no step has logged its drift alone."""
    last = {name: _at_last_mini_batch(run, name) for name in ("log_ratio/drift", "effective_update_ratio", *_TAILS)}
    drift, weight = last.pop("log_ratio/drift"), last.pop("effective_update_ratio")
    if drift.empty:
        return ""
    moved = f"{(drift >= ACTS).sum()} of {len(drift)} rollouts"
    words = f"Drift at a rollout's last mini-batch: {drift.min():.2g} to {drift.max():.2g}; the gate acts from about "
    words += f"{ACTS:g} on, as in {moved}."
    if len(weight):
        words += f" The mean w of all tokens went down to {weight.min():.3f}."
    tails = [f"{last[name].min():.2f} where {group}" for name, group in _TAILS.items() if len(last[name])]
    return words + (f" 1% of the tokens kept less of their gradient than {', '.join(tails)}." if tails else "")


_TAILS = {"gate/weight_pos_p1": "A > 0", "gate/weight_neg_p1": "A < 0"}


def _at_last_mini_batch(run: Run, name: str) -> pd.Series:
    """A value per rollout."""
    values = _by_mini_batch(run, name)
    return values[values.index == values.index.max()]


def staleness_curves(groups: dict[str, list[Run]]) -> pd.DataFrame:
    """`staleness_table` of each label in `curve_table`'s form: the mean over seeds, in a band that holds all theirs; of
    a maximum the largest."""
    tables = [staleness_table(run).assign(label=label) for label, runs in groups.items() for run in runs]
    steps = pd.concat(tables).rename(columns={"mini_batch": "step"}).groupby(["key", "label", "step"], sort=False)
    pooled = steps.agg(
        mean=("value", "mean"), max=("value", "max"), low=("low", "min"), high=("high", "max"), seeds=("value", "size")
    ).reset_index()
    value = pooled["max"].where(pooled["key"].map(is_maximum).astype(bool), pooled["mean"])
    return pooled.assign(value=value, smoothed=value).sort_values("step", kind="stable")


@matplotlib.rc_context(STYLE)
def gate_against_staleness(run: Run) -> Figure:
    """The share of the gradient that is kept, and the policy's distance, by the number of updates since the rollout."""
    table = staleness_curves({"run": [run]})
    if table.empty:
        raise ValueError(f"{run.folder} has logged no mini_batch_<k>/... and no single steps. Set logging_steps: 1.")
    figure, axes = panel_axes(table["key"].nunique(), (3.6, 2.9))
    draw_panels(axes, table, ["run"], xlabel=STALE)
    return figure


@dataclass(frozen=True)
class Dump:
    """T trained tokens of R rows, off-policy: log_ratio z (T,), rows (T,) in [0, R), advantages (R,)."""

    log_ratio: np.ndarray
    rows: np.ndarray
    advantages: np.ndarray


def dump_files(folder: Path) -> list[Path]:
    """What `dump_ratios_every` has written of a run, in the order of its steps."""
    return sorted((folder / "dump").glob("*.npz"))


def load_dump(*paths: str | Path) -> Dump:
    """Each run's `dump/*.npz`, or each .npz file; the rows of all files one after the other."""
    parts, offset = [], 0
    for path in map(Path, paths):
        files = [path] if path.suffix == ".npz" else dump_files(path)
        if not files or not files[0].exists():
            raise FileNotFoundError(f"{path} has no dump/*.npz with the arrays log_ratio, rows and advantages.")
        for z, rows, advantages in map(_arrays, files):
            parts.append((z.astype(np.float64), rows.astype(np.int64) + offset, advantages.astype(np.float64)))
            offset += len(advantages)
    return Dump(*(np.concatenate(arrays) for arrays in zip(*parts)))


def _arrays(file: Path) -> list[np.ndarray]:
    """log_ratio, rows and advantages of one file."""
    with np.load(file) as arrays:  # no pickles
        missing = {"log_ratio", "rows", "advantages"} - set(arrays)
        if missing:
            raise ValueError(f"{file} lacks {', '.join(sorted(missing))}; it holds {', '.join(arrays) or 'nothing'}.")
        z, rows, advantages = found = [arrays[name] for name in ("log_ratio", "rows", "advantages")]
    if z.shape != rows.shape or (rows.size and not 0 <= rows.min() <= rows.max() < len(advantages)):
        raise ValueError(f"{file}: log_ratio {z.shape}, rows {rows.shape}, advantages {advantages.shape} don't fit.")
    return found


def temperatures_of(config: dict[str, Any]) -> tuple[float, float]:
    """(tau_pos, tau_neg) of a run's resolved config; the paper's where it has none."""
    return config.get("sapo_temperature_pos", 1.0), config.get("sapo_temperature_neg", 1.05)


def bound_table(dump: Dump, tau_pos: float = 1.0, tau_neg: float = 1.05) -> pd.DataFrame:
    """Per row with tokens: Var_i of its z, D_i and its bound (`sequence_bound`); tau_pos where A > 0, else tau_neg."""
    tau = np.where(dump.advantages > 0, tau_pos, tau_neg)
    z, rows, taus = map(torch.from_numpy, (dump.log_ratio, dump.rows, tau))
    variance, gap, bound = (x.numpy() for x in sequence_bound(z, rows, len(tau), taus))
    within = gap <= bound * (1 + 1e-9) + 1e-15  # one token: 0 <= 0 up to rounding
    tokens = np.bincount(dump.rows, minlength=len(tau))
    numbers = {"tokens": tokens, "advantage": dump.advantages, "tau": tau, "variance": variance, "gap": gap}
    table = pd.DataFrame({"panel": "row", **numbers, "bound": bound, "within": within})
    return table[table["tokens"] > 0].astype({"tokens": "Int64", "within": "Int64"})


def _histogram(panel: str, values: np.ndarray) -> pd.DataFrame:
    """50 bins between the 0.1% and 99.9% quantiles; what lies outside is counted in the outer bins."""
    low, high = np.quantile(values, [0.001, 0.999])
    counts, edges = np.histogram(values.clip(low, high), bins=50)
    bins = pd.DataFrame({"panel": panel, "low": edges[:-1], "high": edges[1:], "count": counts})
    return bins.astype({"count": "Int64"})


def ratio_table(dump: Dump, tau_pos: float = 1.0, tau_neg: float = 1.05) -> pd.DataFrame:
    """The histograms of r and Var_i, and the rows of `bound_table`; `panel` says which is which."""
    rows = bound_table(dump, tau_pos, tau_neg)
    histograms = [_histogram("ratio", np.exp(dump.log_ratio)), _histogram("variance", rows["variance"].to_numpy())]
    return pd.concat([*histograms, rows], ignore_index=True)


def within_bound_frac(table: pd.DataFrame) -> float:
    """Share of rows whose D_i keeps the bound of Eq. 21."""
    return float(table.loc[table["panel"] == "row", "within"].mean())


def share_within(table: pd.DataFrame) -> str:
    """`within_bound_frac` in words."""
    return f"{within_bound_frac(table):.1%} of {(table['panel'] == 'row').sum()} within the bound"


def draw_histogram(ax: Axes, table: pd.DataFrame, panel: str, unit: str) -> None:
    """The counts of r or of Var_i, on a logarithmic axis."""
    bins = table[table["panel"] == panel]
    ax.stairs(bins["count"].astype(int), [*bins["low"], bins["high"].iloc[-1]], fill=True, color=SERIES[0][0])
    symbol = "r" if panel == "ratio" else "Var_i"
    ax.set(xlabel=f"{symbol} (outer bins hold the tails)", yscale="log", ylabel=unit, ylim=(0.5, None))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    _plain_powers(ax.yaxis)


def _plain_powers(axis: Axis) -> None:
    """At most five powers of ten as 100 or 1e-06: `STYLE` turns mathematical text off, which matplotlib's own need."""
    axis.set_major_locator(LogLocator(numticks=5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def draw_bound(ax: Axes, table: pd.DataFrame) -> None:
    """D_i of every sequence against Var_i, and the bound of Eq. 21."""
    rows = table[(table["panel"] == "row") & (table["gap"] > 0)].sort_values("variance")
    for name, positive, (colour, dashes, marker) in (("A > 0", True, SERIES[0]), ("A ≤ 0", False, SERIES[1])):
        side = rows[(rows["advantage"] > 0) == positive]
        if not side.empty:
            ax.plot(side["variance"], side["gap"], marker, c=colour, ms=4, alpha=0.6, mew=0, label=f"D_i, {name}")
            label = f"τ²/4 · Var_i, τ = {side['tau'].iloc[0]:g}"
            ax.plot(side["variance"], side["bound"], c=colour, ls=dashes, lw=1.5, label=label)
    ax.set(xscale="log", yscale="log", xlabel="Var_i", ylabel="D_i")
    _plain_powers(ax.xaxis)
    _plain_powers(ax.yaxis)


# Panel of `ratio_table` -> (title, how it is drawn)
BOUND_PANELS: dict[str, tuple[str, Callable[[Axes, pd.DataFrame], None]]] = {
    "ratio": ("r of a token", partial(draw_histogram, panel="ratio", unit="tokens")),
    "variance": ("Var_i of a sequence", partial(draw_histogram, panel="variance", unit="sequences")),
    "row": ("D_i against Var_i", draw_bound),
}


@matplotlib.rc_context(STYLE)
def ratio_figures(dump: Dump, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Figure:
    """Figures 2-3: histograms of r and of Var_i, and D_i against Var_i with its bound; `ratio_table`'s numbers."""
    table = ratio_table(dump, tau_pos, tau_neg)
    figure, axes = new_axes(1, 3, (9.6, 3.3))
    for ax, (title, draw) in zip(axes, BOUND_PANELS.values()):
        draw(ax, table)
        ax.set_title(title)
    axes[2].set_title(f"{within_bound_frac(table):.1%} within the bound")
    axes[2].legend(fontsize=7.5, loc="upper left")
    return figure
