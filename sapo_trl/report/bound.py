"""How far a rollout's ratios lie from 1, and the bound under which a mean gate is a gate of the mean (SAPO, Eq. 21).

Input is a dump of log-ratios (`load_dump`). `ratio_figures` draws `ratio_table`, Figures 2 and 3 of arXiv 2511.20347.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sapo_trl.report.plots import SERIES, STYLE, Table, new_axes


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
    files = []
    for path in map(Path, paths):
        found = [path] if path.suffix == ".npz" else dump_files(path)
        if not found or not found[0].exists():
            raise FileNotFoundError(f"{path} has no dump/*.npz with the arrays log_ratio, rows and advantages.")
        files += found
    parts, offset = [], 0
    for file in files:
        with np.load(file) as arrays:  # no pickles
            missing = {"log_ratio", "rows", "advantages"} - set(arrays)
            if missing:
                raise ValueError(
                    f"{file} lacks {', '.join(sorted(missing))}; it holds {', '.join(arrays) or 'nothing'}."
                )
            z, rows, advantages = (arrays[name] for name in ("log_ratio", "rows", "advantages"))
        if z.shape != rows.shape or (rows.size and not 0 <= rows.min() <= rows.max() < len(advantages)):
            raise ValueError(
                f"{file}: log_ratio {z.shape}, rows {rows.shape}, advantages {advantages.shape} don't fit."
            )
        parts.append((z.astype(np.float64), rows + offset, advantages))
        offset += len(advantages)
    return Dump(*(np.concatenate(arrays) for arrays in zip(*parts)))


def temperatures_of(config: dict[str, Any]) -> tuple[float, float]:
    """(tau_pos, tau_neg) of a run's resolved config; the paper's where it has none."""
    return config.get("sapo_temperature_pos", 1.0), config.get("sapo_temperature_neg", 1.05)


def bound_table(dump: Dump, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Table:
    """Per row with tokens: Var_i of its z, D_i = |mean_t g(z) - g(mean_t z)| and the bound tau^2/4 Var_i (Eq. 21).

    g(z) = sech^2(tau z/2), the gate under r - 1 ≈ z; tau_pos where A > 0, else tau_neg.
    """
    table: Table = []
    for row in np.unique(dump.rows):
        z, advantage = dump.log_ratio[dump.rows == row], dump.advantages[row]
        tau = tau_pos if advantage > 0 else tau_neg
        gap = abs(np.mean(np.cosh(tau * z / 2) ** -2.0) - np.cosh(tau * z.mean() / 2) ** -2.0)
        bound = tau**2 / 4 * z.var()
        within = int(gap <= bound * (1 + 1e-9) + 1e-15)  # one token: 0 <= 0 up to rounding
        values = {"advantage": advantage, "variance": z.var(), "gap": gap, "bound": bound, "within": within}
        table.append({"panel": "row", "tokens": len(z)} | values)
    return table


def _histogram(panel: str, values: np.ndarray) -> Table:
    """50 bins between the 0.1% and 99.9% quantiles; what lies outside is counted in the outer bins."""
    low, high = np.quantile(values, [0.001, 0.999])
    counts, edges = np.histogram(values.clip(low, high), bins=50)
    return [{"panel": panel, "low": a, "high": b, "count": int(n)} for a, b, n in zip(edges, edges[1:], counts)]


def ratio_table(dump: Dump, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Table:
    """The rows of `bound_table`, and the histograms of r and Var_i."""
    rows = bound_table(dump, tau_pos, tau_neg)
    variance = np.array([row["variance"] for row in rows])
    return _histogram("ratio", np.exp(dump.log_ratio)) + _histogram("variance", variance) + rows


def within_bound_frac(table: Table) -> float:
    """Share of rows whose D_i keeps the bound of Eq. 21."""
    return float(np.mean([row["within"] for row in table if row["panel"] == "row"]))


BOUND_PANELS = {"ratio": "Ratio r of a token", "variance": "Var_i of a sequence's log r", "row": "D_i against Var_i"}


def draw_histogram(ax: Axes, table: Table, panel: str) -> None:
    """Figure 2: the counts of r or of Var_i, on a logarithmic axis."""
    bins = [row for row in table if row["panel"] == panel]
    edges = [row["low"] for row in bins] + [bins[-1]["high"]]
    ax.stairs([row["count"] for row in bins], edges, fill=True, color=SERIES[0][0])
    label = "tokens" if panel == "ratio" else "sequences"
    ax.set(xlabel="outer bins hold the tails", yscale="log", ylabel=label, ylim=(0.5, None))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    _plain_powers(ax.yaxis)


def _plain_powers(axis: Axis) -> None:
    """At most five powers of ten as 100 or 1e-06: `STYLE` turns mathematical text off, which matplotlib's own need."""
    axis.set_major_locator(LogLocator(numticks=5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def draw_bound(ax: Axes, table: Table, tau_pos: float = 1.0, tau_neg: float = 1.05) -> None:
    """Figure 3: D_i of every sequence against Var_i, and the bound of Eq. 21."""
    rows = [row for row in table if row["panel"] == "row"]
    for name, tau, positive, (colour, dashes, marker) in (
        ("A > 0", tau_pos, True, SERIES[0]),
        ("A ≤ 0", tau_neg, False, SERIES[1]),
    ):
        seen = sorted(
            (r["variance"], r["gap"], r["bound"]) for r in rows if (r["advantage"] > 0) == positive and r["gap"]
        )
        if seen:
            x, gap, bound = zip(*seen)
            ax.plot(x, gap, marker, c=colour, ms=4, alpha=0.6, mew=0, label=f"D_i, {name}")
            ax.plot(x, bound, c=colour, ls=dashes, lw=1.5, label=f"τ²/4 · Var_i, τ = {tau:g}")
    ax.set(xscale="log", yscale="log", xlabel="Var_i", ylabel="D_i")
    for axis in (ax.xaxis, ax.yaxis):
        _plain_powers(axis)


def share_within(table: Table) -> str:
    """`within_bound_frac` in words."""
    rows = sum(row["panel"] == "row" for row in table)
    return f"{within_bound_frac(table):.1%} of {rows} within the bound"


@matplotlib.rc_context(STYLE)
def ratio_figures(dump: Dump, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Figure:
    """Figures 2-3: histograms of r and of Var_i, and D_i against Var_i with its bound; `ratio_table`'s numbers."""
    table = ratio_table(dump, tau_pos, tau_neg)
    figure, axes = new_axes(1, 3, (9.6, 3.3))
    for ax, panel in zip(axes, ("ratio", "variance")):
        draw_histogram(ax, table, panel)
        ax.set_title(BOUND_PANELS[panel])
    draw_bound(axes[2], table, tau_pos, tau_neg)
    axes[2].set_title(share_within(table))
    axes[2].legend(fontsize=7.5, loc="upper left")
    return figure
