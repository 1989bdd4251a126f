"""The pictures of the report's sections, what they need to be read, and notes on what is not drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sapo_trl.metrics.table import METRICS, title
from sapo_trl.report import ratios
from sapo_trl.report.page import Picture, Section
from sapo_trl.report.plots import SERIES, STEP, STYLE, curve_table, draw_curves, inline_svg, is_maximum, new_axes
from sapo_trl.report.runs import Run, initial_evaluations, names_of, options, own_evaluations, run_name

Groups = dict[str, list[Run]]  # label -> its seeds
# Of these sections only the panels that are named here are open, in this order; their others are folded away. With
# several labels the pictures of one label each are folded away too.
OPEN = {"Gate": ("effective_update_ratio", "gate/leak_neg", "log_ratio/drift")}
OPEN_BY_STALENESS = ("effective_update_ratio",)
# What the pictures of a section are about, each symbol once
SYMBOLS = {
    "Gate": {
        "r": "ratio of a token: its probability now over that when it was sampled. The curves leave out the steps at "
        "which every r is 1: no gate can act there",
        "A": "advantage of its completion: its reward against those of its group",
        "w": "gate weight: the share of the plain gradient r·A·∇log π that the gate lets through. Above 1 "
        "on tokens with r < 1 where an objective does not weigh by r",
        "w·r": "effective weight: what multiplies A·∇log π",
        "effective update ratio": "mean of min(1, w). 1: nothing is damped",
        "leak": "share of Σ|A|·w·r that lowers tokens of bad answers (A < 0) which have already fallen below r = 0.8",
        "drift": "how far the policy has moved since the rollout: mean (log r)²/2",
        "staleness": "optimizer steps since the rollout",
        "τ": "temperature of the gate: the larger, the sooner w falls",
        "Var_i": "variance of log r within completion i",
        "D_i": "distance of its mean gate from the gate of its mean log r; at most τ²/4·Var_i (Eq. 21). Figures and "
        "equation are numbered as in the paper of SAPO",
    }
}


def picture_section(groups: Groups, name: str) -> Section:
    """A section's pictures: labels compared key by key, then the panels that several keys share, for each label.

    Constant curves, and curves that equal another one, are not drawn but noted; evaluations are always drawn.
    """
    runs = [run for seeds in groups.values() for run in seeds]
    metrics = [metric for metric in METRICS if metric.section == name and metric.drawn]
    section, constant = Section(), {}
    drawn: dict[str, list[dict[int, float]]] = {}
    for key in [key for metric in metrics if not metric.panel for key in names_of(runs, metric.name)]:
        curves = [run.series(key).to_dict() for run in runs]
        values = {x for curve in curves for x in curve.values()}
        if len(values) == 1 and not key.startswith("eval_"):
            constant.setdefault(values.pop(), []).append(key)
        elif twin := next((other for other, x in drawn.items() if x == curves), ""):
            section.notes.append(f"{key} equals {twin}")
        else:
            drawn[key] = curves
            section.pictures.append(_curves(groups, key))
    for panel in dict.fromkeys(metric.panel for metric in metrics if metric.panel):
        keys = [key for metric in metrics if metric.panel == panel for key in names_of(runs, metric.name)]
        _shared(section, groups, panel, sorted(keys), constant)
    section.notes += [f"{value:.6g} throughout: {', '.join(names)}" for value, names in constant.items()]
    by_name = lambda picture: OPEN[name].index(picture.name)  # noqa: E731
    if name in OPEN:
        section.folded = [picture for picture in section.pictures if picture.name not in OPEN[name]]
        section.pictures = sorted((x for x in section.pictures if x.name in OPEN[name]), key=by_name)
    for key, picture in _staleness(groups, name):
        (section.pictures if name not in OPEN or key in OPEN_BY_STALENESS else section.folded).append(picture)
    if name == "Gate":
        (section.pictures if len(groups) == 1 else section.folded).extend([*_fans(groups), *_bounds(groups)])
        said = {run_name(run): ratios.what_the_gate_did(run) for run in runs}
        section.sentences = [f"{who}: {x}" if len(runs) > 1 else x for who, x in said.items() if x]
    if section.pictures or section.folded:
        section.symbols = SYMBOLS.get(name, {})
    return section


def _curves(groups: Groups, key: str) -> Picture:
    """The panel of one key; beside Pass@1 while training what scripts/evaluate.py has measured on the same problems."""
    table, labels = curve_table(groups, [key]), list(groups)
    runs = [run for seeds in groups.values() for run in seeds]
    if key == "eval_pass_at_1" and len(runs) == 1 and (points := _evaluated(runs[0])):
        samples = runs[0].config.get("num_generations_eval") or runs[0].config.get("num_generations", "?")
        training, evaluated = (
            f"while training, {samples} samples",
            f"evaluate.py, {points[0][1]['num_samples']} samples",
        )
        numbers = [
            {"step": step} | {name: x["pass_at_1"][name] for name in ("mean", "low", "high")} for step, x in points
        ]
        ends = pd.DataFrame(numbers).rename(columns={"mean": "value"})
        ends = ends.assign(key=key, label=evaluated, smoothed=np.nan, seeds=1)
        table, labels = pd.concat([ends, table.assign(label=training)]), [training, evaluated]
    return _panel(title(key), table, labels, key)


def _evaluated(run: Run) -> list[tuple[int, dict[str, Any]]]:
    """(step, evaluation.json) of the model that the run began with and of its last one, if on its held-out problems."""
    points = [(0, x) for x in initial_evaluations(run)[:1]]
    points += [(max(run.table.index), x) for _, x in own_evaluations(run)[-1:]]
    data = run.config.get("eval_dataset_name")
    return [(step, x) for step, x in points if (options(x) or {}).get("dataset_name") == data and "num_samples" in x]


def _shared(section: Section, groups: Groups, panel: str, keys: list[str], constant: dict[float, list[str]]) -> None:
    """Curves in one panel for each label; those that are 0 go to `constant`, those beyond six styles to the notes."""
    runs = [run for seeds in groups.values() for run in seeds]
    largest = {key: max(run.table[key].max() for run in runs if key in run.table) for key in keys}
    if nothing := [key for key in keys if largest[key] == 0]:
        constant.setdefault(0, []).extend(nothing)
    ordered = [key for key in keys if largest[key]]  # one order: a key looks the same everywhere
    if len(ordered) > len(SERIES):
        ordered.sort(key=lambda key: largest[key], reverse=True)
    top, rest = ordered[: len(SERIES)], ordered[len(SERIES) :]
    section.notes += [f"{key} is at most {largest[key]:.4g}" for key in rest]
    for label, seeds in groups.items() if top else ():
        table = curve_table({label: seeds}, top)
        heading = panel + _of(label, groups) + (f": {top[0]}" if len(top) == 1 else "")
        section.pictures.append(_panel(heading, table.assign(label=table["key"]), top))


def _of(label: str, groups: Groups) -> str:
    """What tells the pictures of several labels apart."""
    return f": {label}" if len(groups) > 1 else ""


@matplotlib.rc_context(STYLE)
def _picture(title: str, caption: str, draw: Callable[[Axes], None], height: float, columns: int, name="") -> Picture:
    """One small picture, `height` in inches, with a legend of so many columns above it."""
    figure, (ax,) = new_axes(1, 1, (3.5, height))
    draw(ax)
    labelled = {str(line.get_label()): line for line in ax.lines}
    handles = {label: line for label, line in labelled.items() if not label.startswith("_")}  # matplotlib's own
    if columns and handles:
        options = {"loc": "outside upper left", "ncols": columns, "fontsize": 8, "handlelength": 3}
        figure.legend(list(handles.values()), list(handles), **options)
    return Picture(title, inline_svg(figure, title), caption, name if name != title else "")


def _panel(title: str, table: pd.DataFrame, labels: Sequence[str], name="", xlabel=STEP) -> Picture:
    """The curves of `labels`, and under them where each begins and ends."""
    columns = 0 if len(labels) == 1 else 2 if max(map(len, labels)) <= 20 else 1  # two of longer names don't fit
    lines = math.ceil(len(labels) / columns) if columns else 0
    caption = _ends(table, "label")
    if not columns:
        caption = caption.removeprefix(f"{labels[0]}: ")
    caption += _band(table, xlabel)
    draw = lambda ax: draw_curves(ax, table, labels, xlabel)  # noqa: E731
    return _picture(title, caption, draw, 2.05 + 0.18 * lines, columns, name)


def _ends(table: pd.DataFrame, column: str) -> str:
    """Where each value of a column begins and ends, as it was logged; of a maximum also the largest."""
    texts = []
    for name, rows in table.groupby(column, sort=False):
        values, key = rows["value"], rows["key"].iloc[0]
        digits = ".3f" if key.endswith("pass_at_1") else ".4g"  # as in the head
        largest = f", at most {values.max():.4g} (strong: the largest of each rollout)" if is_maximum(key) else ""
        ends = " → ".join(f"{values.iloc[place]:{digits}}" for place in (0, -1)[: len(values)])
        texts.append(f"{name}: {ends}{largest}")
    return "; ".join(texts)


def _band(table: pd.DataFrame, xlabel: str) -> str:
    """What the band or the bars of a panel are; empty without any."""
    seeds = table["seeds"].max()
    if table[["low", "high"]].isna().all(axis=None):
        return ""
    if xlabel == ratios.STALE:
        return ". Band: 10% to 90% of the rollouts"
    if seeds > 1:
        return f". Band: least to greatest of {seeds} seeds"
    is_evaluated = table["key"].iloc[0].startswith("eval_")
    return ". Bars: 95% over problems" if is_evaluated else ". Band: 95% over prompts"


def _fans(groups: Groups) -> list[Picture]:
    """The quantiles of r of each label, and where each begins and ends."""
    tables = {label: ratios.fan_table(runs, label) for label, runs in groups.items()}
    return [
        _picture(f"Quantiles of r{_of(label, groups)}", _ends(x, "key"), lambda ax, x=x: ratios.draw_fan(ax, x), 2.3, 3)
        for label, x in tables.items()
        if not x.empty
    ]


def _bounds(groups: Groups) -> list[Picture]:
    """Figures 2-3 of each label that has dumped its ratios, its seeds pooled."""
    pictures = []
    for label, runs in groups.items():
        files = [file for run in runs for file in ratios.dump_files(run.folder)]
        if not files:
            continue
        table = ratios.ratio_table(ratios.load_dump(*files), *ratios.temperatures_of(runs[0].config))
        rows = table[table["panel"] == "row"]
        of = f"{rows['tokens'].sum():,} tokens of {len(rows):,} sequences in {len(files)} dumped steps"
        for panel, (name, draw) in ratios.BOUND_PANELS.items():
            caption = ratios.share_within(table) if panel == "row" else of
            pictures.append(_picture(name + _of(label, groups), caption, lambda ax, x=table, d=draw: d(ax, x), 2.5, 2))
    return pictures


def _staleness(groups: Groups, section: str) -> list[tuple[str, Picture]]:
    """(key, picture) by the updates since the rollout; several seeds are pooled."""
    keys = [metric.name for metric in METRICS if metric.by_staleness and metric.section == section]
    table = ratios.staleness_curves(groups) if keys else pd.DataFrame()
    return [
        (key, _panel(f"{title(key)} by staleness", rows, list(groups), xlabel=ratios.STALE))
        for key in keys
        if len(rows := table[table["key"] == key])
    ]
