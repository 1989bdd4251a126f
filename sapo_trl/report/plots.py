"""Pictures with their numbers: gates, and the curves of runs.

Every figure function draws a table of the same arguments (`gate_figure` draws `gate_table`), and `save` writes both as
`<name>.png` and `<name>.csv`. Without pyplot, nothing here needs a display or leaves state behind. Series differ by
dashes and marker as well as by colour. Equation and figure numbers are those of SAPO, arXiv 2511.20347.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.metrics.table import METRICS, find, title
from sapo_trl.objective import GATES, LossInputs, gate_weight, soft_gate
from sapo_trl.report.runs import Run, names_of

INK, MUTED, GRID = "#1b1f24", "#636c76", "#d5d9de"
# Okabe and Ito's colours, the bright ones darkened to 3:1 on white; (colour, dashes, marker)
SERIES = (
    ("#0072b2", "-", "o"),
    ("#d55e00", (0, (5, 1.5)), "s"),
    ("#00875f", (0, (1.2, 1.2)), "^"),
    ("#b0568f", (0, (6, 1.5, 1.2, 1.5)), "D"),
    ("#96700a", (0, (9, 2)), "v"),
    ("#636c76", (0, (4, 1.2, 1, 1.2, 1, 1.2)), "P"),
)
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture on every machine
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names come from users and may hold a $
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
}
STYLE |= dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), MUTED)
STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset", "legend.frameon"), False)
STEP = "optimizer step"
DPI = 200  # pictures are shown at half size, sharp on dense screens


def save(figure: Figure, table: pd.DataFrame, folder: str | Path, name: str) -> list[Path]:
    """Write `<folder>/<name>.png` and `<name>.csv` (6 significant digits); returns both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    picture, numbers = folder / f"{name}.png", folder / f"{name}.csv"
    figure.savefig(picture, dpi=DPI, facecolor="white", metadata={"Software": None})
    table.to_csv(numbers, index=False, float_format="%.6g", lineterminator="\n")
    return [picture, numbers]


def inline_svg(figure: Figure, name: str) -> Markup:
    """The figure as an <svg> element that takes the page's font and theme colours; `name` is its text alternative."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # ids unique among the page's pictures
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()[stream.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| id="[A-Za-z.0-9]+_\d+"', "", svg)  # HTML needs neither
    width, height = figure.get_size_inches() * 72
    head = f'<svg role="img" aria-label="{html.escape(name)}" viewBox="0 0 {width:g} {height:g}">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    colours = {INK: "ink", MUTED: "muted", GRID: "grid"} | {x[0]: f"c{i}" for i, x in enumerate(SERIES[:5])}
    for colour, variable in colours.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg)


def new_axes(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches (a page shows an inch as 100 pixels) and its axes, row by row."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def panel_axes(num: int, size: tuple[float, float], legend: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure with `num` axes of `size` inches, three a line, and `legend` inches above them."""
    columns = min(3, num)
    lines = math.ceil(num / columns)
    figure, axes = new_axes(lines, columns, (size[0] * columns, size[1] * lines + legend))
    for ax in axes[num:]:
        ax.remove()
    return figure, axes[:num]


def gate_table(tau: float = 1.0) -> pd.DataFrame:
    """Per ratio r = 0.01 ... 3: `<curve>/<pos|neg>/objective` J, `.../change` J(r) - J(1) and `.../weight` dJ/dr / A.

    A = +1 (pos) and -1 (neg). Gates from `soft_gate` and `gate_weight` at `tau`; `clip` is GRPO's surrogate with the
    paper's range. A constant in J(r) changes nothing in training, so `change` is the quantity to compare.
    """
    ratio = torch.arange(1, 301, dtype=torch.float64) / 100
    columns = {"ratio": ratio.numpy()}
    for sign, value in (("pos", 1.0), ("neg", -1.0)):
        advantages = torch.full_like(ratio, value)
        curves = {"clip": _clip_curve(ratio, advantages)}
        for gate in GATES:
            objective = soft_gate(ratio.log(), tau, gate, advantages) * advantages
            curves[gate] = objective, gate_weight(ratio.log(), tau, gate, advantages)
        for name, (objective, weight) in curves.items():
            columns[f"{name}/{sign}/objective"] = objective.numpy()
            columns[f"{name}/{sign}/change"] = (objective - objective[99]).numpy()
            columns[f"{name}/{sign}/weight"] = weight.numpy()
    return pd.DataFrame(columns)


def _clip_curve(ratio: torch.Tensor, advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO's min(r A, clip(r) A) and its weight w, (T,) each."""
    grpo, rows = ALGORITHMS["grpo"], torch.zeros(len(ratio), dtype=torch.long)
    tokens = LossInputs(ratio.log(), torch.zeros_like(ratio), advantages, rows, num_rows=1)
    clip = grpo.objective(**grpo.defaults)
    return clip.surrogate(tokens), clip.weight(tokens) / ratio


# In drawing order, what the picture compares on top: (name, legend, colour, dashes, width, opacity). One-sided is a
# broad band because it lies under the plain ratio on one side and under erf on the other.
_GATE_LINES = (
    ("one-sided", "one-sided", SERIES[4][0], "-", 6.0, 0.35),
    ("softsign", "softsign", SERIES[3][0], SERIES[3][1], 1.5, 1),
    ("arctan", "arctan", SERIES[1][0], SERIES[1][1], 1.5, 1),
    ("erf", "erf", SERIES[2][0], SERIES[2][1], 1.8, 1),
    ("clip", "GRPO's hard clip", INK, (0, (3.2, 1.2)), 2.2, 1),
    ("sigmoid", "SAPO (sigmoid)", SERIES[0][0], "-", 3.0, 1),
)


@matplotlib.rc_context(STYLE)
def gate_figure(tau: float = 1.0) -> Figure:
    """Figure 1: objective and gate weight against r, for A > 0 and A < 0; the numbers are `gate_table`'s."""
    table = gate_table(tau)
    figure, axes = new_axes(2, 2, (9.0, 6.3), sharex=True, sharey="row")
    for column, (sign, aim) in enumerate((("pos", "likelier"), ("neg", "less likely"))):
        for ax, quantity in ((axes[column], "change"), (axes[2 + column], "weight")):
            for name, _, colour, dashes, width, opacity in _GATE_LINES:
                y = table[f"{name}/{sign}/{quantity}"]
                ax.plot(table["ratio"], y, c=colour, ls=dashes, lw=width, alpha=opacity)
            ax.axvline(1, color=MUTED, lw=0.8, zorder=0.5)
            _shade_clipped(ax, table, sign, labelled=quantity == "change")
        axes[column].set_title(f"A {'>' if sign == 'pos' else '<'} 0: make the token {aim}", weight="bold", size=11)
        axes[2 + column].set_xlabel(r"$r = \pi_\theta\,/\,\pi_\mathrm{old}$", fontsize=11.5, parse_math=True)
    axes[0].set(xlim=(0, 3), ylim=(-2, 2), ylabel="objective  J(r) − J(1)")
    axes[1].text(2.95, 1.72, f"every gate at τ = {tau:g}", color=MUTED, ha="right")
    axes[2].set(ylim=(-0.03, 1.09), ylabel="gradient weight  w(r)")
    handles = dict(zip([line[1] for line in _GATE_LINES], axes[0].lines))
    options = {"ncols": 6, "fontsize": 9.5, "handlelength": 2.9, "columnspacing": 1.3}
    figure.legend([*handles.values()][::-1], [*handles][::-1], loc="outside upper center", **options)
    return figure


def _shade_clipped(ax: Axes, table: pd.DataFrame, sign: str, labelled: bool) -> None:
    """The ratios at which the clipped token's gradient is zero."""
    zero = table.loc[table[f"clip/{sign}/weight"] == 0, "ratio"]
    low, high = zero.min() - 0.01, zero.max() + 0.01  # the table's step
    ax.axvspan(low, high, color=GRID, alpha=0.45, lw=0, zorder=0)
    if labelled:
        ax.text((low + high) / 2, -1.85, "clipped:\nno gradient", color=MUTED, ha="center", va="bottom")


def smooth(points: pd.Series, steps_per_rollout: int, is_maximum: bool = False) -> pd.Series:
    """By step: centred mean over a 15th of the rollouts (at least 3; fewer at both ends, so that nothing lags).
    Under 10 rollouts none is averaged with another: each tells something.

    Averages whole rollouts first: the policy is near the rollout's at its beginning, so the values of single steps
    zigzag. A rollout with fewer values than the others (the one now running) is left out and takes its neighbour's
    value. `is_maximum`: the largest value of every rollout instead, not averaged.
    """
    steps, values = points.index.to_numpy(), points.to_numpy()
    rollouts, inverse, counts = np.unique((steps - 1) // steps_per_rollout, return_inverse=True, return_counts=True)
    whole = counts == counts.max()
    half = max(1, len(rollouts) // 30) if len(rollouts) >= 10 else 0
    by_rollout = pd.Series(values).groupby(inverse)
    centres, means = (np.bincount(inverse, steps) / counts)[whole], by_rollout.mean()[whole]
    averaged = means.rolling(2 * half + 1, center=True, min_periods=1).mean()
    curve = by_rollout.max()[whole] if is_maximum else averaged
    return pd.Series(np.interp(steps, centres, curve), points.index)


def is_maximum(key: str) -> bool:
    """Whether the metric is the largest value of a step: a mean of it would hide what it is for."""
    row = find(key)
    return row is not None and row.reduction == "maximum"


def measured(run: Run, key: str) -> pd.Series:
    """The values of `key`, by step; of the gate without the steps with r = 1 throughout, where no gate can act."""
    points, row = run.series(key), find(key)
    moved = points[run.series("log_ratio/abs_mean").reindex(points.index) != 0]
    return moved if len(moved) and row is not None and row.section == "Gate" else points


def line_style(number: int) -> tuple[str, Any, str]:
    """Colour, dashes and marker of the `number`-th of several lines; 36 are different."""
    colour, (_, dashes, marker) = SERIES[number % 6][0], SERIES[(number + number // 6) % 6]
    return colour, dashes, marker


CURVE = ("key", "label", "step", "value", "smoothed", "low", "high", "seeds")  # columns of `curve_table`


def curve_table(groups: dict[str, list[Run]], keys: Iterable[str]) -> pd.DataFrame:
    """Points of each key's panel, with the columns `CURVE`. Labels that never measured a key are absent from it.

    Points are those of `measured`. One run: low and high are the logged interval (`<key>_low`, `<key>_high`), if any.
    Several seeds: value and smoothed are means over seeds at the steps that all of them have, low and high the smoothed
    extremes; of a maximum they are the largest.
    Evaluations (`eval_...`) are not smoothed: each point is a measurement with an interval of its own.
    """
    having = {(key, label): [run for run in groups[label] if key in run.names] for key in keys for label in groups}
    curves = [_curve(label, seeds, key) for (key, label), seeds in having.items() if seeds]
    return pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(columns=list(CURVE))


def _curve(label: str, seeds: list[Run], key: str) -> pd.DataFrame:
    points = [measured(run, key) for run in seeds]
    curves = points
    if not key.startswith("eval_"):
        curves = [smooth(series, run.steps_per_rollout, is_maximum(key)) for series, run in zip(points, seeds)]
    raw, smoothed = (pd.concat(x, axis=1, join="inner") for x in (points, curves))
    low, high = smoothed.min(axis=1), smoothed.max(axis=1)
    if len(seeds) == 1:
        low, high = (seeds[0].series(f"{key}_{end}").reindex(raw.index) for end in ("low", "high"))
    whole = "max" if is_maximum(key) else "mean"
    numbers = {"value": raw.agg(whole, axis=1), "smoothed": smoothed.agg(whole, axis=1), "low": low, "high": high}
    return pd.DataFrame({"key": key, "label": label, "step": raw.index, **numbers, "seeds": len(seeds)})


def draw_curves(ax: Axes, table: pd.DataFrame, labels: Sequence[str], xlabel: str = STEP) -> None:
    """One panel of `curve_table`. A label's style is its place in `labels`, the same in every panel.

    Points without a smoothed value are not joined.
    """
    for number, label in enumerate(labels):
        rows = table[table["label"] == label]
        if rows.empty:
            continue
        colour, dashes, marker = line_style(number)
        evaluated, single = rows["key"].iloc[0].startswith("eval_"), rows["seeds"].iloc[0] == 1
        if not evaluated and single:
            ax.plot(rows["step"], rows["value"], c=colour, lw=0.8, alpha=0.35)
        joined = rows["smoothed"].notna().any()
        (line,) = ax.plot(
            rows["step"],
            rows["smoothed" if joined else "value"],
            c=colour,
            ls=dashes if joined else "",
            lw=1.9,
            label=label,
        )
        line.set(marker=marker, ms=4.5, markevery=None if evaluated or len(rows) < 4 else 0.25)
        spread = rows.dropna(subset=["low", "high"])
        if evaluated and single:
            ax.vlines(spread["step"], spread["low"], spread["high"], color=colour, lw=1.2)
        elif not spread.empty:
            ax.fill_between(spread["step"], spread["low"], spread["high"], color=colour, alpha=0.15, lw=0)
    steps = sorted(set(table["step"]))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if any(key.startswith("eval_") for key in table["key"]):  # ticks at measurements, at most six, the last one too
        ax.set_xticks(steps[:: -math.ceil(len(steps) / 6)])
    ax.set_xlabel(xlabel)
    ax.set_ylabel(axis(table["key"].iloc[0]) if len(table) else "")


def axis(key: str) -> str:
    """What the axis of a metric says: its unit or symbol, else the last part of its name; nothing of an unknown one."""
    row = find(key)
    return "" if row is None else row.unit or row.symbol or key.rpartition("/")[2]


def draw_panels(axes: Sequence[Axes], table: pd.DataFrame, labels: Sequence[str], xlabel: str = STEP) -> None:
    """One panel for each key of `curve_table`, in the table's order, under the key's title."""
    for ax, key in zip(axes, table["key"].unique()):
        draw_curves(ax, table[table["key"] == key], labels, xlabel)
        ax.set_title(title(key))


def training_table(groups: dict[str, list[Run]], keys: Sequence[str] | None = None) -> pd.DataFrame:
    """`curve_table` of each key; by default of the metrics that the table of metrics has for an overview."""
    runs = [run for seeds in groups.values() for run in seeds]
    overview = [metric.name for metric in METRICS if metric.overview]
    chosen = keys or [key for name in overview for key in names_of(runs, name)]
    table = curve_table(groups, chosen)
    if table.empty:
        wanted = ", ".join(chosen or overview)
        known = ", ".join(sorted({key for run in runs for key in run.names})) or "nothing (no step is logged yet)"
        raise ValueError(f"No run has logged any of {wanted}; logged: {known}.")
    return table


@matplotlib.rc_context(STYLE)
def training_curves(groups: dict[str, list[Run]], keys: Sequence[str] | None = None) -> Figure:
    """Runs overlaid (label -> its seeds), a panel for each key that any of them measured.

    Raw values are light, smoothed ones strong; several seeds are a mean with a min-max band.
    """
    table = training_table(groups, keys)
    figure, axes = panel_axes(table["key"].nunique(), (3.2, 2.4), legend=0.4)
    draw_panels(axes, table, list(groups))
    lines = {str(line.get_label()): line for ax in axes for line in ax.lines}
    handles = {label: lines[label] for label in groups if label in lines}
    seeds = {label: f" ({len(runs)} seeds, min–max)" if len(runs) > 1 else "" for label, runs in groups.items()}
    options = {"ncols": min(4, len(handles)), "handlelength": 3}
    texts = [label + seeds[label] for label in handles]
    figure.legend(list(handles.values()), texts, loc="outside upper center", **options)
    return figure


DEMO_KEYS = ("reward", "completions/mean_length", "effective_update_ratio")


def demo_table(run: Run, before: dict[str, Any], after: dict[str, Any]) -> pd.DataFrame:
    """Curves of `DEMO_KEYS`, then Pass@1 of both evaluations with its interval."""
    ends = [
        {"key": "pass_at_1", "label": label, "value": x["mean"], "low": x["low"], "high": x["high"]}
        for label, x in (("before", before["pass_at_1"]), ("after", after["pass_at_1"]))
    ]
    table = pd.concat([curve_table({"run": [run]}, DEMO_KEYS), pd.DataFrame(ends)])
    return table.astype({"step": "Int64", "seeds": "Int64"})


@matplotlib.rc_context(STYLE)
def demo_curves(run: Run, before: dict[str, Any], after: dict[str, Any]) -> Figure:
    """Reward, completion length and effective update ratio by step, and held-out Pass@1 before and after.

    before, after: `Evaluation.to_dict()` of `sapo_trl.evaluation.evaluate`.
    """
    table = demo_table(run, before, after)
    figure, axes = new_axes(2, 2, (9.0, 5.2))
    for ax, key in zip(axes, DEMO_KEYS):  # a key that was not logged leaves its panel empty
        draw_panels([ax], table[table["key"] == key], ["run"])
    bars, ends = axes[3], table[table["key"] == "pass_at_1"]
    for x, (mean, low, high) in enumerate(zip(ends["value"], ends["low"], ends["high"])):
        bars.bar(x, mean, 0.55, color=[GRID, SERIES[0][0]][x], edgecolor=MUTED, hatch=["//", ""][x], lw=0.6)
        bars.errorbar(x, mean, [[mean - low], [high - mean]], color=INK, capsize=5, lw=1.4)
        bars.text(x, high + 0.03, f"{mean:.3f} [{low:.3f}, {high:.3f}]", ha="center")
    bars.set(xlim=(-0.6, 1.6), ylim=(0, 1.1), xticks=[0, 1], xticklabels=["before", "after"], ylabel="Pass@1")
    bars.set_title(f"Held-out Pass@1, {after['pass_at_1']['confidence']:.0%} interval")
    bars.grid(axis="x", visible=False)
    return figure
