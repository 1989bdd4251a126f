"""What `scripts/benchmark.py step` runs, prints and writes: the worlds of `step.py` and, ahead, of `ahead.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.ahead import run_ahead
from bench.report import record
from bench.step import PHASES, run_world, worlds
from sapo_trl.files import write_json


def benchmark_step(names: tuple[str, ...], model: str | None, output: Path | None) -> list[dict]:
    """Run the worlds, print seconds per phase and side, and as the last line the ratios as JSON."""
    results = [run_world(world) for world in worlds(model) if world.name in names]
    ahead = [run_ahead(world) for world in worlds(model) if f"{world.name}-ahead" in names]
    if results:
        print_steps(results)
    if ahead:
        print_ahead(ahead)
    if output is not None:
        write_json(output, record([*results, *ahead]))
    line = {x["world"]: {key: x[key] for key in x if "ratio_vs" in key} for x in (*results, *ahead)}
    print(json.dumps(line), flush=True)
    return [*results, *ahead]


def print_steps(results: Sequence[dict]) -> None:
    """A table with the seconds of four mini-batches by phase, per side."""
    printed = Table("world", "side", *(f"{phase} s" for phase in PHASES), "whole s", "CPU s", "CPU ratio", "length")
    for result in results:
        for name, row in result["seconds"].items():
            side = f"TRL, {result['trl_best_setting']}" if name == "best" else {"default": "TRL's default"}.get(name)
            ratio = row["cpu"] / result["seconds"]["ours"]["cpu"]
            cells = [f"{row[key]:.2f}" for key in (*PHASES, "wall", "cpu")]
            printed.add_row(result["world"], side or "ours", *cells, f"{ratio:.2f}", f"{row['mean_length']:.0f}")
    Console(width=150).print(printed)


def print_ahead(results: Sequence[dict]) -> None:
    """A table with the seconds of a rollout and of its optimizer steps, per side."""
    printed = Table(
        "world", "side", "threads", "wall s", "CPU s", "wall ratio", "CPU ratio", "update waits", "worker waits"
    )
    for result in results:
        fast = result["seconds_per_rollout"]["ahead"]
        for name, row in result["seconds_per_rollout"].items():
            side = result["sides"][name]
            waits = [f"{row[key]:.0%}" if key in row else "" for key in ("update_waits_frac", "worker_waits_frac")]
            numbers = [f"{row['wall']:.2f}", f"{row['cpu']:.2f}", *(f"{row[k] / fast[k]:.2f}" for k in ("wall", "cpu"))]
            printed.add_row(result["world"], side["side"], str(side["threads"]), *numbers, *waits)
    Console(width=150).print(printed)
