"""The pictures of the report's sections, and notes on what is not drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib
import pandas as pd
from matplotlib.axes import Axes

from sapo_trl.metrics.table import METRICS, title
from sapo_trl.report import ratios
from sapo_trl.report.page import Picture, Section
from sapo_trl.report.plots import SERIES, STEP, STYLE, curve_table, draw_curves, inline_svg, new_axes
from sapo_trl.report.runs import Run, names_of

Groups = dict[str, list[Run]]  # label -> its seeds


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
            section.pictures.append(_panel(title(key), curve_table(groups, [key]), list(groups), key))
    for panel in dict.fromkeys(metric.panel for metric in metrics if metric.panel):
        keys = [key for metric in metrics if metric.panel == panel for key in names_of(runs, metric.name)]
        _shared(section, groups, panel, sorted(keys), constant)
    section.notes += [f"{value:.6g} throughout: {', '.join(names)}" for value, names in constant.items()]
    if name == "Gate":
        section.pictures += [*_fans(groups), *_bounds(groups)]
    section.pictures += _staleness(groups, name)
    return section


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
    draw = lambda ax: draw_curves(ax, table, labels, xlabel)  # noqa: E731
    return _picture(title, caption, draw, 2.05 + 0.18 * lines, columns, name)


def _ends(table: pd.DataFrame, column: str) -> str:
    """Where the smoothed curve of each value of a column begins and ends."""
    ends = table.groupby(column, sort=False)["smoothed"].agg(["first", "last"])
    return "; ".join(f"{name}: {first:.4g} → {last:.4g}" for name, first, last in ends.itertuples())


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


def _staleness(groups: Groups, section: str) -> list[Picture]:
    """By the updates since the rollout; several seeds are pooled, and the band is 10% to 90% of rollouts."""
    keys = [metric.name for metric in METRICS if metric.by_staleness and metric.section == section]
    table = ratios.staleness_curves(groups) if keys else pd.DataFrame()
    return [
        _panel(f"{title(key)} by staleness", rows, list(groups), xlabel=ratios.STALE)
        for key in keys
        if len(rows := table[table["key"] == key])
    ]
