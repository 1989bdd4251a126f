"""Check a config without loading a model: `sapo-trl check --config FILE [--num_processes n] [--field value]`.

Prints the values that differ from the defaults (all of them with `--all`), the batch plan, whether the gate can act,
and whether the run fits into a GPU's memory. Prints one sentence, with exit status 1, for anything that training would
refuse before its data is read.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch
from rich.console import Console
from rich.table import Table
from trl import get_peft_config

from sapo_trl.batch_plan import BatchPlan, batch_plan
from sapo_trl.cli.launch import check_launch, read_launch
from sapo_trl.cli.memory_plan import GIB, Memory, Setup, memory, nearest_fit, setup_of
from sapo_trl.cli.models import require_model
from sapo_trl.cli.parse import KINDS, RunArguments, parse_run, resolved_fields
from sapo_trl.cli.shapes import Shape, model_config, shape_of
from sapo_trl.cli.terminal import default_of, help_for, refuse
from sapo_trl.config import planned_for
from sapo_trl.moe.experts import FLOAT32_EXPERTS

OPTIONS = (
    ("--num_processes n", "processes of the launch (default: those of --config_file, else 1)"),
    ("--config_file FILE", "accelerate's config file, as for accelerate launch: counts its engine's memory"),
    ("--gpu_memory 80", "GiB of one GPU"),
    ("--all", "every field, not only those that differ from their defaults"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan of a config; returns the exit status."""
    # PEFT 0.21 asks for a property that transformers has renamed
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    argv = sys.argv[1:] if argv is None else argv
    if (text := help_for(argv, str(__doc__), OPTIONS)) is not None:
        print(text)
        return 0
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--config_file")
    parser.add_argument("--gpu_memory", type=float, default=80.0)
    parser.add_argument("--all", action="store_true")
    try:
        own, rest = parser.parse_known_args(argv)
        run, plan, setup = plan_of(rest, own.config_file, own.num_processes, own.gpu_memory)
    except (ValueError, OSError, argparse.ArgumentError) as error:
        return refuse(error)
    show(run, plan, setup, own.all)
    return 0


def plan_of(
    words: Sequence[str], config_file: str | None, num_processes: int | None, gpu_gib: float
) -> tuple[RunArguments, BatchPlan, Setup]:
    """A run, its batch plan and its spread over GPUs, as if launched with these processes.

    Raises:
        ValueError: what training would refuse.
    """
    launch = read_launch(config_file, num_processes) if config_file else {}
    processes = launch.get("num_processes", 1) if num_processes is None else num_processes
    if processes < 1 or gpu_gib <= 0:
        raise ValueError(f"--num_processes {processes} and --gpu_memory {gpu_gib:g} must be above 0.")
    with planned_for(processes):
        # a launch on GPUs may be checked on a machine without any, where bf16 must not be refused
        elsewhere = [] if torch.cuda.is_available() or "--use_cpu" in words else ["--use_cpu", "true"]
        run = parse_run([*words, *elsewhere])
        check_launch(launch, run.config)
        plan, setup = batch_plan(run.config), setup_of(run, launch, processes, gpu_gib * GIB)
    if not run.model.model_name_or_path:
        require_model(None)
    return run, plan, setup


def show(run: RunArguments, plan: BatchPlan, setup: Setup, everything: bool) -> None:
    """Print the values, the plan and the memory."""
    console = Console(soft_wrap=True)
    usual = {f.name: default_of(f) for kind in KINDS for f in fields(kind)}
    resolved = resolved_fields(run)
    if not torch.cuda.is_available():
        resolved.pop("use_cpu")  # set by this check
    rows = [(name, value) for name, value in resolved.items() if everything or value != usual.get(name)]
    console.print(_table("resolved values" if everything else "resolved values that differ from the defaults", rows))
    console.print()
    console.print(_table(f"batch plan for {setup.num_gpus} process(es)", plan.rows()))
    console.print()
    try:
        require_model(run.model.model_name_or_path)
    except ValueError as error:
        console.print(f"not there yet: {error}")
        return
    show_memory(console, run, setup)


def _table(title: str, rows: Iterable[tuple[str, object]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in rows:
        table.add_row(name, str(value))
    return table


def show_memory(console: Console, run: RunArguments, setup: Setup) -> None:
    """Print the table of the memory arithmetic, and whether the run fits, or the nearest change that makes it fit."""
    if run.model.load_in_4bit or run.model.load_in_8bit:
        console.print("memory: not counted for quantised weights")
        return
    try:
        config = model_config(str(run.model.model_name_or_path), run.model.model_revision)
    except OSError as error:
        console.print(f"memory: not counted, no config of the model: {str(error).splitlines()[0]}")
        return
    shape = shape_of(config, get_peft_config(run.model))
    result = memory(shape, setup)
    console.print(_memory_table(result, setup))
    counts = {"parameters": shape.total, "active": shape.active, "trained": shape.trainable}
    console.print("  " + ", ".join(f"{count / 1e9:.2f}B {name}" for name, count in counts.items()))
    if result.vllm_rows is not None:
        console.print(f"  vLLM's cache holds {result.vllm_rows} rows of {setup.row_tokens} tokens on each engine")
    if shape.num_experts and setup.engine in ("none", "ddp") and setup.load_bytes == 4 and setup.autocasts:
        console.print(f"  WARNING: {FLOAT32_EXPERTS}")
    console.print(f"  {_verdict(result, shape, setup)}")


def _memory_table(result: Memory, setup: Setup) -> Table:
    title = f"memory of one of {setup.num_gpus} GPU(s) with {setup.gpu_bytes / GIB:g} GiB, {setup.engine}"
    table = Table(title=title, title_justify="left", box=None, header_style="")
    for name in ("phase", "", "GiB", "counted as"):
        table.add_column(name, justify="right" if name == "GiB" else "left")
    for line in result.lines:
        table.add_row(line.phase, line.name, f"{line.size / GIB:.1f}", line.how)
    return table


def _verdict(result: Memory, shape: Shape, setup: Setup) -> str:
    peaks = ", ".join(f"{phase} {size / GIB:.1f}" for phase, size in result.peaks.items())
    verdict = "fits" if result.fits else f"does NOT fit. Nearest change: {nearest_fit(shape, setup) or 'no single one'}"
    return f"peaks in GiB: {peaks}; usable {result.usable / GIB:.1f}: {verdict}"
