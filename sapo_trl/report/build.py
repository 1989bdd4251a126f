"""The report room: one self-contained HTML page of a run, or of several side by side (`write_report`).

The page loads nothing: pictures are inline SVG whose colours follow the reader's light or dark theme, there is no
script, and a policy in its head forbids both. Whatever stands in a run folder is untrusted text (completions above
all) and is escaped by `escaped`. Missing files leave their section out, so a run may be reported on while it runs.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from sapo_trl.report.bound import (
    BOUND_PANELS,
    draw_bound,
    draw_histogram,
    dump_files,
    load_dump,
    ratio_table,
    share_within,
    temperatures_of,
)
from sapo_trl.report.completions import extremes, flipped
from sapo_trl.report.page import PAGE, escaped, grid, html_section, html_table
from sapo_trl.report.plots import (
    SERIES,
    STYLE,
    Table,
    curve_table,
    draw_curves,
    inline_svg,
    new_axes,
    pass_keys,
    title,
)
from sapo_trl.report.ratios import STALENESS, draw_fan, fan_table, staleness_table
from sapo_trl.report.runs import Run, evaluations, group_seeds, read_jsonl, run_name
from sapo_trl.report.tables import SECONDS, phases, totals, verdicts

NONE = "<p>No warnings.jsonl, so none was recorded.</p>"
EMPTY = {"null", "false", '""', '"none"', "[]", "{}"}  # as JSON; a default and a setting of these are the same

# Section -> names of its panels in order, as patterns; one panel compares all runs
PANELS = {
    "Reward": (
        r"reward",
        r"reward_std",
        r"eval_reward",
        r"frac_reward_zero_std",
        r"rewards/.+/mean",
        r"rewards/unscorable_frac",
    ),
    "Gate": (
        r"effective_update_ratio",
        *(rf"gate/{kind}_{x}_mean" for kind in ("weight", "pull") for x in ("pos", "neg", "corrective", "expansive")),
        r"gate/(?!.+_p\d+$).+",
        r"ratio/(max|mean)",
        r"log_ratio/.+",
        r"(?!mini_batch_).*clip_ratio.*",
        r"sampl.+",
        r"sequence/.+",
    ),
    "Completions": (r"completions/mean_length", r"completions/clipped_ratio", r"entropy"),
    "Optimizer": (r"loss", r"grad_norm", r"kl", r"learning_rate", r"aux_loss", r"entropy_(bonus|coef)"),
    "Routing": (r"routing/changed_frac", r"routing/(?!layer_).+"),
    "Verdicts": (),
    "Time and tokens": (r"update/.+_frac",),
}
# Section -> titles and names of curves drawn together, one panel for each label
JOINT_PANELS = {
    "Gate": (
        ("Gate weight that 1% of tokens are below", r"gate/weight_.+_p1"),
        ("Gate weight that 10% of tokens are below", r"gate/weight_.+_p10"),
        ("Pull w·r that 10% of tokens are below", r"gate/pull_.+_p10"),
        ("Pull w·r that 1% of tokens are above", r"gate/pull_.+_p99"),
    ),
    "Verdicts": (("Verdicts", r"verdict/(?!time_s$).+"),),
    "Time and tokens": (("Seconds", SECONDS),),
}


@matplotlib.rc_context(STYLE)
def _panel(name: str, table: Table, labels: Sequence[str], xlabel: str = "optimizer step", key: str = "") -> str:
    """One small picture, and under it where each curve begins and ends."""
    legend = len(labels) > 1
    columns = 2 if max(map(len, labels)) <= 20 else 1  # two columns of longer names don't fit
    lines = math.ceil(len(labels) / columns) if legend else 0
    figure, (ax,) = new_axes(1, 1, (3.5, 2.05 + 0.18 * lines))
    draw_curves(ax, table, labels)
    ax.set_xlabel(xlabel)
    if legend:
        figure.legend(loc="outside upper left", ncols=columns, fontsize=8, handlelength=3)
    ends = []
    for label in labels:
        if values := [row["smoothed"] for row in table if row["label"] == label]:
            ends.append(f"{f'{label}: ' if legend else ''}{values[0]:.4g} → {values[-1]:.4g}")
    return _figure(name, figure, "; ".join(ends), key)


def _figure(name: str, figure: Figure, caption: str, key: str = "") -> str:
    logged = f" <small>{escaped(key)}</small>" if key not in ("", name) else ""
    text = f"<figcaption>{escaped(caption)}</figcaption>"
    return f"<figure><h3>{escaped(name)}{logged}</h3>{inline_svg(figure, name)}{text}</figure>"


def _panels(groups: dict[str, list[Run]], section: str) -> str:
    """The section's pictures: labels compared key by key, then the joint panels of each label.

    What never changes, or is another curve once more, is told in a line and not drawn; evaluations are always drawn.
    """
    runs = [run for seeds in groups.values() for run in seeds]
    found = [sorted({key for run in runs for key in run.matching(pattern)}) for pattern in PANELS.get(section, ())]
    keys = list(dict.fromkeys(key for names in found for key in names))
    if section == "Reward":
        keys[1:1] = pass_keys(runs)
    pictures, still, notes, drawn = [], {}, [], {}
    for key in keys:
        curves = [run.series(key) for run in runs]
        values = {x for curve in curves for x in curve.values()}
        if len(values) == 1 and not key.startswith("eval_"):
            still.setdefault(values.pop(), []).append(key)
        elif twin := next((other for other, x in drawn.items() if x == curves), ""):
            notes.append(f"{key} equals {twin}")
        else:
            drawn[key] = curves
            pictures.append(_panel(title(key), curve_table(groups, key), list(groups), key=key))
    for name, pattern in JOINT_PANELS.get(section, ()):
        pictures += _joint(groups, name, pattern, still, notes)
    notes += [f"{value:.6g} throughout: {', '.join(names)}" for value, names in still.items()]
    pictures += [*_fans(groups), *_bounds(groups)] if section == "Gate" else []
    pictures += _staleness(groups, section)
    return grid(pictures) + (f'<p class="note">{escaped("; ".join(notes))}.</p>' if notes else "")


def _joint(groups: dict[str, list[Run]], name: str, pattern: str, still: dict, notes: list[str]) -> list[str]:
    """Curves in one panel for each label; those that are 0 go to `still`, those beyond the six styles to `notes`."""
    runs = [run for seeds in groups.values() for run in seeds]
    keys = sorted({key for run in runs for key in run.matching(pattern)})
    largest = {key: max(max(run.series(key).values(), default=-math.inf) for run in runs) for key in keys}
    if nothing := [key for key in keys if largest[key] == 0]:
        still.setdefault(0, []).extend(nothing)
    ordered = [key for key in keys if largest[key]]  # one order: a key looks the same everywhere
    if len(ordered) > len(SERIES):
        ordered.sort(key=largest.get, reverse=True)
    top, rest = ordered[: len(SERIES)], ordered[len(SERIES) :]
    notes += [f"{key} is at most {largest[key]:.4g}" for key in rest]
    pictures = []
    for label, seeds in groups.items() if top else ():
        table = [row for key in top for row in curve_table({key: seeds}, key)]
        parts = [name, *([label] if len(groups) > 1 else []), *(top if len(top) == 1 else [])]
        pictures.append(_panel(": ".join(parts), table, top))
    return pictures


@matplotlib.rc_context(STYLE)
def _fans(groups: dict[str, list[Run]]) -> list[str]:
    """The quantiles of r of each label, and where each begins and ends."""
    pictures = []
    for label, runs in groups.items():
        if not (table := fan_table(runs, label)):
            continue
        name = "Quantiles of r" + (f": {label}" if len(groups) > 1 else "")
        figure, (ax,) = new_axes(1, 1, (3.5, 2.3))
        draw_fan(ax, table)
        ax.set_xlabel("optimizer step")
        handles = {line.get_label(): line for line in ax.lines}
        figure.legend(handles.values(), handles, loc="outside upper left", ncols=3, fontsize=8, handlelength=3)
        ends: dict[str, list[float]] = {}
        for row in table:
            ends.setdefault(row["key"], []).append(row["smoothed"])
        caption = "; ".join(f"{key}: {values[0]:.4g} → {values[-1]:.4g}" for key, values in ends.items())
        pictures.append(_figure(name, figure, caption))
    return pictures


@matplotlib.rc_context(STYLE)
def _bounds(groups: dict[str, list[Run]]) -> list[str]:
    """Figures 2-3 of each label that has dumped its ratios, its seeds pooled."""
    pictures = []
    for label, runs in groups.items():
        folders = [run.folder for run in runs if dump_files(run.folder)]
        if not folders:
            continue
        taus = temperatures_of(runs[0].config)
        table = ratio_table(load_dump(*folders), *taus)
        counts = {kind: sum(row["count"] for row in table if row["panel"] == kind) for kind in ("ratio", "variance")}
        num_dumps = sum(len(dump_files(folder)) for folder in folders)
        of = f"{counts['ratio']:,} tokens of {counts['variance']:,} sequences in {num_dumps} dumped steps"
        for panel, name in BOUND_PANELS.items():
            full_name = name + (f": {label}" if len(groups) > 1 else "")
            figure, (ax,) = new_axes(1, 1, (3.5, 2.5))
            if panel == "row":
                draw_bound(ax, table, *taus)
                figure.legend(loc="outside upper left", ncols=2, fontsize=8, handlelength=3)
            else:
                draw_histogram(ax, table, panel)
            pictures.append(_figure(full_name, figure, share_within(table) if panel == "row" else of))
    return pictures


def _staleness(groups: dict[str, list[Run]], section: str) -> list[str]:
    """By the updates since the rollout; several seeds are pooled, and the band is 10% to 90% of rollouts."""
    pictures = []
    for key, name in STALENESS.items():
        if section != ("Routing" if key.startswith("routing/") else "Gate"):
            continue
        table: Table = []
        for label, runs in groups.items():
            rows = [row for run in runs for row in staleness_table(run) if row["key"] == key]
            for step in sorted({row["mini_batch"] for row in rows}):
                seeds = [row for row in rows if row["mini_batch"] == step]
                mean = sum(row["mean"] for row in seeds) / len(seeds)
                band = {"low": min(row["low"] for row in seeds), "high": max(row["high"] for row in seeds)}
                point = {"key": key, "label": label, "step": step, "value": mean, "smoothed": mean}
                table.append(point | band | {"seeds": len(seeds)})
        if table:
            pictures.append(_panel(f"{name} by staleness", table, list(groups), xlabel="updates since the rollout"))
    return pictures


def _progress(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        steps = [int(record["step"]) for record in run.records]
        times = [record["time_s"] for record in run.records if "time_s" in record]
        last, planned = max(steps, default=0), run.config.get("max_steps", -1)
        state = f"{last} of {planned}" if planned > 0 else str(last)
        state += f" ({run.num_unreadable} unreadable lines)" if run.num_unreadable else ""
        # a resumed run starts its clock again
        total = sum(now - before if now >= before else now for before, now in zip([0.0, *times], times))
        seconds = f"{total / 60:.1f} min" if total >= 60 else f"{total:.1f} s"
        reward = list(run.series("reward").values())
        ends = f"{reward[0]:.4g} → {reward[-1]:.4g}" if reward else "no step logged yet"
        rows.append([run_name(run), run.config.get("algorithm", ""), state, seconds, ends])
    note = "Light: as logged; strong: smoothed. Under each picture: the smoothed curve's first and last value."
    if len(runs) > 1:
        note += " Runs that differ only in their seed share a curve: their mean, in a band from least to greatest."
    return (
        html_table(["run", "algorithm", "optimizer steps", "time", "training reward, first → last"], rows)
        + f"<p>{note}</p>"
    )


def _defaults(algorithm: str = "sapo") -> dict[str, Any]:
    """Default of every known field, resolved on a CPU where it is None (imported here: TRL takes seconds to load)."""
    from trl import ModelConfig

    from sapo_trl.algorithms import ALGORITHMS
    from sapo_trl.cli.arguments import ScriptArguments
    from sapo_trl.config import SAPOConfig

    known: dict[str, Any] = {}
    for source in (ModelConfig, ScriptArguments, SAPOConfig):
        for x in fields(source):
            known[x.name] = x.default_factory() if x.default_factory is not MISSING else x.default
    algorithm = algorithm if algorithm in ALGORITHMS else "sapo"
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        resolved = SAPOConfig(algorithm=algorithm, use_cpu=True, report_to="none").to_dict()
    return known | {name: x for name, x in resolved.items() if known.get(name) is None}


def _compare(runs: Sequence[Run], contents: Sequence[dict[str, Any]], known: dict[str, Any] | None = None) -> str:
    """Name by run; with `known` defaults only what differs from them, the default last. ≠ marks runs that differ."""
    plain = lambda x: json.dumps(x, default=str, sort_keys=True)  # noqa: E731
    rows = []
    for name in dict.fromkeys(name for content in contents for name in content):
        values = [content.get(name, "") for content in contents]
        differ = any(plain(value) != plain(values[0]) for value in values)
        pair = {plain(values[0]), plain(known.get(name))} if known is not None else set()
        same = len(pair) == 1 or (pair and pair <= EMPTY)
        if differ or not same:
            default = [] if known is None else [known.get(name, "")]
            rows.append([f"≠ {name}" if differ else name, *("none" if x is None else x for x in [*values, *default])])
    rows.sort(key=lambda row: not row[0].startswith("≠"))
    return html_table(["", *map(run_name, runs), *([] if known is None else ["default"])], rows)


def _what_ran(runs: Sequence[Run]) -> str:
    configs = [run.config for run in runs]
    full = _compare(runs, configs)
    defaults = _defaults(str(configs[0].get("algorithm"))) if full else {}
    settings = f"<h3>Settings that differ from the defaults</h3>{_compare(runs, configs, defaults)}" if full else ""
    plan, versions, hardware = (
        [dict(run.json(f"{name}.json")) for run in runs] for name in ("plan", "versions", "hardware")
    )
    return html_section(
        "What ran",
        settings,
        f"<details><summary>Every setting</summary>{full}</details>" if full else "",
        f"<h3>Batch plan</h3>{_compare(runs, plan)}" if any(plan) else "",
        f"<h3>Hardware</h3>{_compare(runs, hardware)}" if any(hardware) else "",
        f"<h3>Versions</h3>{_compare(runs, versions)}" if any(versions) else "",
    )


def _warnings(runs: Sequence[Run]) -> str:
    """A list, which a phone can show whole: when, how often, from whom, what."""
    items, unreadable = [], 0
    for run in runs:
        seen: dict[tuple[str, str], list[Any]] = {}  # (source, message) -> steps
        records, torn = read_jsonl(run.folder / "warnings.jsonl")
        unreadable += torn
        for row in records:
            source = " ".join(str(row[key]) for key in ("source", "signal") if key in row)
            seen.setdefault((source, str(row.get("message", row))), []).append(row.get("step", "?"))
        for (source, message), steps in seen.items():
            when = f"step {steps[0]}" + (f" and {len(steps) - 1} more times" if len(steps) > 1 else "")
            where = f"{run_name(run)}, {when}" if len(runs) > 1 else when
            items.append(f"<li>{escaped(f'{where}, {source}' if source else where)}: {escaped(message)}</li>")
    note = f"<p>{unreadable} unreadable lines of warnings.jsonl.</p>" if unreadable else ""
    return html_section("Warnings", f"<ul>{''.join(items)}</ul>" if items else NONE, note)


def _evaluations(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        for name, x in evaluations(run):
            interval = x["pass_at_1"]
            ks = ", ".join(f"pass@{k} {v:.3f}" for k, v in x.get("pass_at_k", {}).items() if k != "1")
            share = f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
            share += f" ({interval['confidence']:.0%})" if "confidence" in interval else ""
            size = f"{x.get('num_problems', '?')} × {x.get('num_samples', '?')}"
            length, cut = x.get("mean_length_tokens", ""), x.get("truncated_frac", "")
            length = f"{length:.1f}" if isinstance(length, float) else length
            rows.append([f"{run_name(run)} {name}".strip(), share, ks, size, length, cut])
    header = [
        "run",
        "Pass@1 with interval",
        "pass@k",
        "problems × samples",
        "mean tokens",
        "cut at the limit (fraction)",
    ]
    filled = [i for i in range(len(header)) if any(row[i] != "" for row in rows)]
    return html_section(
        "Evaluation", html_table([header[i] for i in filled], [[row[i] for i in filled] for row in rows])
    )


def _layers(runs: Sequence[Run]) -> str:
    """The last logged routing numbers of every layer: a table, as 48 layers would be 200 pictures."""
    parts = []
    for run in runs:
        last = {name: list(run.series(name).values())[-1] for name in run.matching(r"routing/layer_\d+/.+")}
        layers, columns = (sorted({name.split("/", 2)[i] for name in last}) for i in (1, 2))
        rows = [[x.removeprefix("layer_"), *(last.get(f"routing/{x}/{y}", "") for y in columns)] for x in layers]
        if rows:
            summary = f"Last value of every layer: {escaped(run_name(run))}"
            parts.append(f"<details><summary>{summary}</summary>{html_table(['layer', *columns], rows)}</details>")
    return "".join(parts)


def write_report(runs: Sequence[Run], path: str | Path) -> Path:
    """Write the page of one run, or of several side by side (seeds of one setting share a curve); returns its path."""
    groups, path = group_seeds(runs), Path(path)
    pictures = {name: _panels(groups, name) for name in PANELS}
    pictures["Routing"] += _layers(runs)
    pictures["Verdicts"] = verdicts(runs) + pictures["Verdicts"]
    pictures["Time and tokens"] = phases(runs) + pictures["Time and tokens"] + totals(runs)
    sections = [html_section(name, content) for name, content in pictures.items()]
    body = [_progress(runs), _warnings(runs), _evaluations(runs), *sections]
    of = {id(run): f": {run_name(run)}" if len(runs) > 1 else "" for run in runs}
    body.append(html_section("Completions of the last table", *(extremes(run, of[id(run)]) for run in runs)))
    body.append(html_section("Completions that flipped", *(flipped(run, of[id(run)]) for run in runs)))
    body.append(_what_ran(runs))
    name = ", ".join(groups)
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    path.parent.mkdir(parents=True, exist_ok=True)
    page = PAGE.format(title=escaped(f"Run report: {name}", 200), written=written, body="".join(body))
    path.write_text(page, encoding="utf-8", errors="replace")
    return path
