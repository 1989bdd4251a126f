"""The pictures room: what a gate does, and what a run did.

Input is a run (`sapo_trl.report.runs.load_run`). Every figure function draws a table of the same
arguments (`gate_figure` draws `gate_table`), and `save` writes both as `<name>.png` and `<name>.csv`. No pyplot, so
nothing here needs a
display or leaves state behind. Series differ by dashes and marker as well as by colour. Equation and figure numbers
are those of SAPO, arXiv 2511.20347.
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.objective import GATES, LossInputs, gate_weight, soft_gate
from sapo_trl.report.runs import Run

Table = list[dict[str, Any]]  # one dict per row; a key that a row lacks is an empty cell

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
STYLE = {
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
DPI = 200  # pictures are shown at half size, sharp on dense screens

# What training curves show, with their units; held-out Pass@1 is put second.
CURVES = {
    "reward": "Training reward",
    "completions/mean_length": "Completion length (tokens)",
    "entropy": "Entropy (nats per token)",
    "effective_update_ratio": "Effective update ratio",
    "grad_norm": "Gradient norm",
}
TITLES = CURVES | {
    "reward_std": "Standard deviation of the reward",
    "frac_reward_zero_std": "Prompts all scored alike (fraction)",
    "completions/clipped_ratio": "Completions cut at the limit (fraction)",
    "gate/weight_pos_mean": "Mean gate weight, A > 0",
    "gate/weight_neg_mean": "Mean gate weight, A < 0",
    "gate/weight_corrective_mean": "Mean gate weight, step towards r = 1",
    "gate/weight_expansive_mean": "Mean gate weight, step away from r = 1",
    "gate/pull_mean": "Mean pull w·r",
    "gate/pull_pos_mean": "Mean pull w·r, A > 0",
    "gate/pull_neg_mean": "Mean pull w·r, A < 0",
    "gate/pull_corrective_mean": "Mean pull w·r, step towards r = 1",
    "gate/pull_expansive_mean": "Mean pull w·r, step away from r = 1",
    "gate/expansive_frac": "Steps away from r = 1 (fraction of tokens)",
    "ratio/mean": "Mean ratio r",
    "ratio/max": "Largest ratio r",
    "log_ratio/abs_mean": "Mean |log r|",
    "sequence/log_ratio_var": "Mean Var_i of a sequence's log r",
    "sequence/gate_gap": "Mean D_i of a sequence",
    "sequence/within_bound_frac": "Sequences within the bound, Eq. 21 (fraction)",
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "update/skipped_rows_frac": "Rows skipped, A = 0 (fraction)",
    "routing/changed_frac": "Expert selections changed (fraction)",
    "routing/router_entropy": "Router entropy (nats per token)",
    "routing/load_min": "Smallest load of an expert (fraction)",
    "routing/load_max": "Largest load of an expert (fraction)",
    "routing/load_entropy": "Entropy of the experts' loads (nats)",
    "eval_reward": "Held-out reward",
    "kl": "KL to the reference (nats per token)",
    "sampling/kl": "KL of sampler and trainer (nats per token)",
    "rewards/unscorable_frac": "Completions without a reward (fraction)",
}
PASS_AT_1 = re.compile(r"eval_(.+[_/])?pass(_at_|@)1")


def save(figure: Figure, table: Table, folder: str | Path, name: str) -> list[Path]:
    """Write `<folder>/<name>.png` and `<name>.csv` (6 significant digits); returns both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    picture, numbers = folder / f"{name}.png", folder / f"{name}.csv"
    figure.savefig(picture, dpi=DPI, facecolor="white", metadata={"Software": None})
    columns = list(dict.fromkeys(key for row in table for key in row))
    with numbers.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()} for row in table)
    return [picture, numbers]


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element that takes the page's font and theme colours; `name` is its text alternative."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # ids unique among the page's pictures
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()[stream.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| id="[A-Za-z.0-9]+_\d+"', "", svg)  # HTML needs neither
    size = re.search(r'viewBox="([^"]*)"', svg)[1]
    svg = f'<svg role="img" aria-label="{html.escape(name)}" viewBox="{size}">' + svg[svg.index(">") + 1 :]
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    colours = {INK: "ink", MUTED: "muted", GRID: "grid"} | {x[0]: f"c{i}" for i, x in enumerate(SERIES[:5])}
    for colour, variable in colours.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def new_axes(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches (a page shows an inch as 100 pixels) and its axes, row by row."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def gate_table(tau: float = 1.0) -> Table:
    """Per ratio r = 0.01 ... 3: `<curve>/<pos|neg>/objective` J, `.../change` J(r) - J(1) and `.../weight` dJ/dr / A.

    A = +1 (pos) and -1 (neg). Gates from `soft_gate` and `gate_weight` at `tau`; `clip` is GRPO's surrogate with the
    paper's range, its weight by autograd. J(r) and J(r) + constant train the same, so `change` is what compares.
    """
    ratio = torch.arange(1, 301, dtype=torch.float64) / 100
    columns = {"ratio": ratio}
    for sign, value in (("pos", 1.0), ("neg", -1.0)):
        advantages = torch.full_like(ratio, value)
        for name in (*GATES, "clip"):
            if name == "clip":
                objective, weight = _clip_curve(ratio, advantages)
            else:
                objective = soft_gate(ratio.log(), tau, name, advantages) * advantages
                weight = gate_weight(ratio.log(), tau, name, advantages)
            columns[f"{name}/{sign}/objective"] = objective
            columns[f"{name}/{sign}/change"] = objective - objective[99]
            columns[f"{name}/{sign}/weight"] = weight
    values = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _clip_curve(ratio: torch.Tensor, advantages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO's min(r A, clip(r) A) and its weight; d J/d log pi = w r A, so dividing by r A leaves w."""
    grpo, logps = ALGORITHMS["grpo"], ratio.log()
    rows = torch.zeros(len(ratio), dtype=torch.long)
    tokens = LossInputs(logps, torch.zeros_like(ratio), advantages, rows, num_rows=1)
    clip = grpo.objective(**grpo.defaults)
    return clip.surrogate(tokens).detach(), clip.weight(tokens) / ratio


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
    ratio = [row["ratio"] for row in table]
    figure, axes = new_axes(2, 2, (9.0, 6.3), sharex=True, sharey="row")
    for column, (sign, title) in enumerate((("pos", "likelier"), ("neg", "less likely"))):
        for ax, quantity in ((axes[column], "change"), (axes[2 + column], "weight")):
            for name, _, colour, dashes, width, opacity in _GATE_LINES:
                y = [row[f"{name}/{sign}/{quantity}"] for row in table]
                ax.plot(ratio, y, c=colour, ls=dashes, lw=width, alpha=opacity)
            ax.axvline(1, color=MUTED, lw=0.8, zorder=0.5)
            _shade_clipped(ax, sign, labelled=quantity == "change")
        axes[column].set_title(f"A {'>' if sign == 'pos' else '<'} 0: make the token {title}", weight="bold", size=11)
        axes[2 + column].set_xlabel(r"$r = \pi_\theta\,/\,\pi_\mathrm{old}$", fontsize=11.5, parse_math=True)
    axes[0].set(xlim=(0, 3), ylim=(-2, 2), ylabel="objective  J(r) − J(1)")
    axes[1].text(2.95, 1.72, f"every gate at τ = {tau:g}", color=MUTED, ha="right")
    axes[2].set(ylim=(-0.03, 1.09), ylabel="gradient weight  w(r)")
    lines = dict(zip([line[1] for line in _GATE_LINES], axes[0].lines))
    order = ["SAPO (sigmoid)", "GRPO's hard clip", "erf", "arctan", "softsign", "one-sided"]
    options = {"ncols": 6, "fontsize": 9.5, "handlelength": 2.9, "columnspacing": 1.3}
    figure.legend([lines[name] for name in order], order, loc="outside upper center", **options)
    return figure


def _shade_clipped(ax: Axes, sign: str, labelled: bool) -> None:
    """The ratios at which the clipped token's gradient is zero."""
    grpo = ALGORITHMS["grpo"]
    low, high = (1 + grpo.defaults["epsilon_high"], 3.0) if sign == "pos" else (0.0, 1 - grpo.defaults["epsilon"])
    ax.axvspan(low, high, color=GRID, alpha=0.45, lw=0, zorder=0)
    if labelled:
        ax.text((low + high) / 2, -1.85, "clipped:\nno gradient", color=MUTED, ha="center", va="bottom")


def pass_keys(runs: Iterable[Run]) -> list[str]:
    """The runs' held-out Pass@1 metrics (one per evaluation set)."""
    return sorted({key for run in runs for key in run.names if PASS_AT_1.fullmatch(key)})


def title(key: str) -> str:
    """What a panel of `key` is called."""
    if match := PASS_AT_1.fullmatch(key):
        return "Held-out Pass@1" + (f": {match[1][:-1]}" if match[1] else "")
    return TITLES.get(key, key)


def smooth(points: dict[int, float], steps_per_rollout: int) -> dict[int, float]:
    """Step -> centred mean over a 15th of the rollouts (at least 3; fewer at both ends, so that nothing lags).

    Averages whole rollouts first: the gate starts every rollout on-policy, so single steps are a saw. A rollout with
    fewer values than the others (the one now running) is left out and takes its neighbour's value.
    """
    steps, values = np.array(list(points)), np.array(list(points.values()))
    rollouts, inverse, counts = np.unique((steps - 1) // steps_per_rollout, return_inverse=True, return_counts=True)
    whole = counts == counts.max()
    centres, means = ((np.bincount(inverse, x) / counts)[whole] for x in (steps, values))
    half = max(1, len(rollouts) // 30)
    curve = [means[max(0, i - half) : i + half + 1].mean() for i in range(len(means))]
    return dict(zip(points, np.interp(steps, centres, curve)))


def curve_table(groups: dict[str, list[Run]], key: str) -> Table:
    """Points of one panel: label, step, value, smoothed, low, high, seeds. Labels that never measured `key` are absent.

    One run: low and high are the logged interval (`<key>_low`, `<key>_high`), if any. Several seeds: value and
    smoothed are means over seeds at the steps that all of them have, low and high the smoothed extremes.
    Evaluations (`eval_...`) are not smoothed: each point is a measurement with an interval of its own.
    """
    table: Table = []
    for label, runs in groups.items():
        seeds = [run for run in runs if key in run.names]
        if not seeds:
            continue
        points = [run.series(key) for run in seeds]
        steps = sorted(set.intersection(*map(set, points)))
        smoothed = points
        if not key.startswith("eval_"):
            smoothed = [smooth(seed, run.steps_per_rollout) for seed, run in zip(points, seeds)]
        raw, curves = (np.array([[seed[step] for step in steps] for seed in x]) for x in (points, smoothed))
        low, high = (dict(zip(steps, ends)) for ends in (curves.min(0), curves.max(0)))
        if len(seeds) == 1:
            low, high = seeds[0].series(f"{key}_low"), seeds[0].series(f"{key}_high")
        for step, value, curve in zip(steps, raw.mean(0), curves.mean(0)):
            row = {"key": key, "label": label, "step": step, "value": value, "smoothed": curve}
            table.append(row | {"low": low.get(step), "high": high.get(step), "seeds": len(seeds)})
    return table


def draw_curves(ax: Axes, table: Table, labels: Sequence[str]) -> None:
    """One panel of `curve_table`. A label's style is its place in `labels`, the same in every panel."""
    for number, label in enumerate(labels):
        rows = [row for row in table if row["label"] == label]
        if not rows:
            continue
        colour, (_, dashes, marker) = SERIES[number % 6][0], SERIES[(number + number // 6) % 6]  # 36 different pairs
        steps = [row["step"] for row in rows]
        evaluated, single = rows[0]["key"].startswith("eval_"), rows[0]["seeds"] == 1
        if not evaluated and single:
            ax.plot(steps, [row["value"] for row in rows], c=colour, lw=0.8, alpha=0.35)
        marks = {"marker": marker, "ms": 4.5, "markevery": None if evaluated or len(rows) < 4 else 0.25}
        ax.plot(steps, [row["smoothed"] for row in rows], c=colour, ls=dashes, lw=1.9, label=label, **marks)
        spread = [(row["step"], row["low"], row["high"]) for row in rows if row["low"] is not None]
        if spread and evaluated and single:
            ax.vlines(*zip(*spread), color=colour, lw=1.2)
        elif spread:
            ax.fill_between(*zip(*spread), color=colour, alpha=0.15, lw=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def training_table(groups: dict[str, list[Run]], keys: Sequence[str] | None = None) -> Table:
    """`curve_table` of each key; by default those of `CURVES` and held-out Pass@1."""
    runs = [run for seeds in groups.values() for run in seeds]
    chosen = keys or ["reward", *pass_keys(runs), *list(CURVES)[1:]]
    table = [row for key in chosen for row in curve_table(groups, key)]
    if not table:
        known = ", ".join(sorted({key for run in runs for key in run.names})) or "nothing (no step is logged yet)"
        raise ValueError(f"No run has logged any of {', '.join(chosen)}; logged: {known}.")
    return table


@matplotlib.rc_context(STYLE)
def training_curves(groups: dict[str, list[Run]], keys: Sequence[str] | None = None) -> Figure:
    """Runs overlaid (label -> its seeds), a panel for each key that any of them measured.

    Raw values are light, smoothed ones strong; several seeds are a mean with a min-max band.
    """
    table = training_table(groups, keys)
    panels = list(dict.fromkeys(row["key"] for row in table))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = new_axes(lines, columns, (3.2 * columns, 2.4 * lines + 0.4))
    for ax, key in zip(axes, panels):
        draw_curves(ax, [row for row in table if row["key"] == key], list(groups))
        ax.set(title=title(key), xlabel="optimizer step")
    for ax in axes[len(panels) :]:
        ax.remove()
    drawn = {line.get_label(): line for ax in axes[: len(panels)] for line in ax.lines}
    names = {label: f"{label} ({len(runs)} seeds, min–max)" for label, runs in groups.items() if len(runs) > 1}
    shown = [label for label in groups if label in drawn]
    texts = [names.get(label, label) for label in shown]
    handles = [drawn[label] for label in shown]
    figure.legend(handles, texts, loc="outside upper center", ncols=min(4, len(shown)), handlelength=3)
    return figure


DEMO_KEYS = ("reward", "completions/mean_length", "effective_update_ratio")


def demo_table(run: Run, before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Curves of `DEMO_KEYS`, then Pass@1 of both evaluations with its interval."""
    table = [row for key in DEMO_KEYS for row in curve_table({"run": [run]}, key)]
    for label, interval in (("before", before["pass_at_1"]), ("after", after["pass_at_1"])):
        ends = {"low": interval["low"], "high": interval["high"]}
        table.append({"key": "pass_at_1", "label": label, "value": interval["mean"]} | ends)
    return table


@matplotlib.rc_context(STYLE)
def demo_curves(run: Run, before: dict[str, Any], after: dict[str, Any]) -> Figure:
    """Reward, completion length and effective update ratio by step, and held-out Pass@1 before and after.

    before, after: `Evaluation.to_dict()` of `sapo_trl.evaluation.evaluate`.
    """
    table = demo_table(run, before, after)
    figure, axes = new_axes(2, 2, (9.0, 5.2))
    for ax, key in zip(axes, DEMO_KEYS):
        draw_curves(ax, [row for row in table if row["key"] == key], ["run"])
        ax.set(title=title(key), xlabel="optimizer step")
    bars = axes[3]
    for x, row in enumerate(table[-2:]):
        mean, low, high = row["value"], row["low"], row["high"]
        bars.bar(x, mean, 0.55, color=[GRID, SERIES[0][0]][x], edgecolor=MUTED, hatch=["//", ""][x], lw=0.6)
        bars.errorbar(x, mean, [[mean - low], [high - mean]], color=INK, capsize=5, lw=1.4)
        bars.text(x, high + 0.03, f"{mean:.3f} [{low:.3f}, {high:.3f}]", ha="center")
    bars.set(xlim=(-0.6, 1.6), ylim=(0, 1.1), xticks=[0, 1], xticklabels=["before", "after"])
    bars.set_title(f"Held-out Pass@1, {after['pass_at_1']['confidence']:.0%} interval")
    bars.grid(axis="x", visible=False)
    return figure
