"""The update benchmark's table, picture and files: what `scripts/benchmark.py update` prints and writes."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench.cases import CASES, HEADLINE, TRL_DEFAULT, Setting
from bench.update import run_case
from sapo_trl.files import write_json
from sapo_trl.monitor.files import command_line, versions
from sapo_trl.report.plots import DPI, INK, MUTED, SERIES, STYLE

# The quick run: the setting that the full run's sweep found fastest, and TRL's default once
QUICK = replace(HEADLINE, peak_runs=1, settings=(TRL_DEFAULT, Setting(1, False)))
QUICK_SCHEDULE = ("best", "ours", "default", "ours", "best")

# case -> (least ratio over TRL's default, over its best); the last is a floor: nothing to gain, nothing lost
TARGETS = {
    CASES[0].name: (8.0, 6.0),
    CASES[1].name: (4.0, None),
    CASES[3].name: (None, 0.97),
}
DENOMINATORS = {
    "ratio_vs_default": "seconds of TRL's default (8 rows a device batch, checkpointing on) / ours",
    "ratio_vs_best": "seconds of TRL's fastest setting / ours; of a sweep, or the first case's where none was made",
    "activation_peak_ratio": "ours / TRL's default, peaks over what the process held before the update",
    "activation_peak_ratio_vs_best": "ours / TRL's fastest setting",
    "limit_ratio": "ours / (useful operations / matmul rate measured beside it); a group's prompt counts once",
    "gradient_error": "largest over parameters of |ours - TRL| / |TRL|, norms",
    "useful_tokens": "completions of rows whose group's rewards differ, their prompt once a group",
    "metrics_overhead_frac": "CPU seconds of token_metrics and StepMetrics.reduce / ours",
    "guards_overhead_frac": "CPU seconds of the finite check, the replicas' checksum and the watchdog / ours",
}
LINE = ("ratio_vs_default", "ratio_vs_best", "activation_peak_ratio", "gradient_error", "limit_ratio")
COLUMNS = (
    "case", "rows", "trl_best_setting", "ours_s", "trl_default_s", "trl_best_s", "ratio_vs_default",
    "ratio_vs_best", "limit_ratio", "gradient_error", "activation_peak_ratio", "useful_tokens", "forwarded_tokens",
    "trl_forwarded_tokens",
)  # fmt: skip
HEADS = {
    "trl_best_setting": "TRL's best", "ours_s": "ours s", "trl_default_s": "TRL s", "trl_best_s": "best s",
    "ratio_vs_default": "ratio", "ratio_vs_best": "vs best", "limit_ratio": "/ limit", "gradient_error": "grad. error",
    "activation_peak_ratio": "peak", "useful_tokens": "useful", "forwarded_tokens": "forwarded",
    "trl_forwarded_tokens": "TRL forwards",
}  # fmt: skip


def table(results: Sequence[dict], columns: Sequence[str] = COLUMNS) -> Table:
    """One line per case."""
    printed = Table(*(HEADS.get(name, name) for name in columns))
    for result in results:
        printed.add_row(*(_cell(result.get(name, "")) for name in columns))
    return printed


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def machine() -> dict:
    """Processor, cores and threads that the times belong to."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": model, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}


def record(results: Sequence[dict], **more: object) -> dict:
    """What a results file holds."""
    facts = {"machine": machine(), "versions": versions(), "command": f"python {command_line()}"}
    facts |= {"denominators": DENOMINATORS}
    return facts | more | {"cases": list(results)}


def headline_line(result: dict) -> str:
    """The last printed line: the headline case's numbers as JSON."""
    names = (*LINE, "activation_peak_ratio_vs_best", "metrics_overhead_frac", "guards_overhead_frac", "repeats")
    return json.dumps({name: result[name] for name in names})


def in_words(case: str) -> str:
    """The name of a case as the picture has it.

    >>> in_words("cpu-moe sapo, lengths 1k, zero-advantage 2/4, prompt 100")
    'sapo, experts, up to 1k tokens,\\n2 of 4 groups without advantage, prompts of 100'
    """
    found = re.fullmatch(r"(\S+) (\S+), lengths (\w+), zero-advantage (\d+)/(\d+), prompt (\d+)", case)
    if found is None:
        return case
    shape, algorithm, lengths, equal, groups, prompt = found.groups()
    answers = "equal lengths" if lengths == "equal" else f"up to {lengths} tokens"
    experts = ", experts" if "moe" in shape else ""
    return f"{algorithm}{experts}, {answers},\n{equal} of {groups} groups without advantage, prompts of {prompt}"


def figure(results: Sequence[dict]) -> Figure:
    """Per case how many times faster than TRL's default and than its best setting, with the targets."""
    style: Any = STYLE  # matplotlib's stub wants each of its 340 keys as a literal
    with matplotlib.rc_context(style):
        drawn = Figure(figsize=(8.2, 0.9 + 0.5 * len(results)), layout="constrained")
        ax = drawn.subplots()
        series = (
            ("ratio_vs_default", "over TRL's default (8 rows, checkpointing)", -0.13, SERIES[0]),
            ("ratio_vs_best", "over TRL's fastest setting", 0.13, SERIES[1]),
        )
        for column, (key, label, shift, (colour, _, marker)) in enumerate(series):
            places = [row + shift for row in range(len(results))]
            values = [result[key] for result in results]
            ax.hlines(places, 1, values, color=colour, linewidth=1.2)
            ax.plot(values, places, marker, color=colour, label=label, zorder=3)
            for place, value, result in zip(places, values, results, strict=True):
                ax.annotate(f"{value:.2g}×", (value, place), (6, -3), textcoords="offset points", fontsize=8)
                target = TARGETS.get(result["case"], (None, None))[column]
                if target is not None:
                    ax.plot([target] * 2, [place - 0.12, place + 0.12], color=INK, linewidth=2.2, zorder=4)
        ax.plot([], [], "|", color=INK, markersize=9, markeredgewidth=2.2, label="aimed at")
        ax.axvline(1, color=MUTED, linewidth=0.8)
        ax.set(xscale="log", xlabel="times faster (log scale)", yticks=range(len(results)))
        ax.set_yticklabels([in_words(result["case"]) for result in results], fontsize=8)
        ax.set_xticks([1, 2, 4, 8, 16, 32], [f"{x}×" for x in (1, 2, 4, 8, 16, 32)])
        ax.minorticks_off()
        ax.grid(axis="y", visible=False)
        ax.invert_yaxis()
        ax.set_title("One update: CPU seconds of TRL over ours")
        drawn.legend(loc="outside lower center", ncols=3)
    return drawn


def benchmark_update(quick: bool, output: Path | None = None, plot: Path | None = None) -> list[dict]:
    """Run the cases, print a table, write the files asked for, and print the headline case as JSON last."""
    cases = (QUICK,) if quick else CASES
    results, started = [], time.monotonic()
    for case in cases:
        results.append(run_case(case, QUICK_SCHEDULE if quick else None))
        print(f"{time.monotonic() - started:5.0f} s  {case.name}: {results[-1]['ratio_vs_default']:.2f}x", flush=True)
        write(results, output, plot)  # a long run that is stopped keeps what it measured
    Console(width=200).print(table(results))
    for name, text in DENOMINATORS.items():
        print(f"{name}: {text}")
    print(headline_line(results[0]), flush=True)
    return results


def write(results: Sequence[dict], output: Path | None, plot: Path | None) -> None:
    """The record as JSON and the picture, where asked for."""
    if output is not None:
        write_json(output, record(results))
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        figure(results).savefig(plot, dpi=DPI, facecolor="white", metadata={"Software": None})
