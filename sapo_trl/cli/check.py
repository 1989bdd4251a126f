"""Check a config without loading a model: `sapo-trl check --config FILE [--num_processes n] [--field value]`.

Prints the values that differ from the defaults (all of them with `--all`), the batch plan, whether the gate can act,
what each phase needs of a GPU's memory, how many GPUs would do, an estimate of hours and cost, and a line of advice for
each setting that costs more than it should. Prints one sentence, with exit status 1, for anything that training would
refuse before its data is read. On a machine that is not the one to train on, without its GPUs, what is not installed is
a line of its own.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from rich.console import Console
from rich.table import Table
from trl import get_peft_config

from sapo_trl.batch_plan import BatchPlan, batch_plan
from sapo_trl.cli.advice import advice, enough_prompts
from sapo_trl.cli.cost import GPUS, Gpu, estimate_lines
from sapo_trl.cli.launch import check_launch, read_launch
from sapo_trl.cli.memory_plan import GIB, Memory, Setup, memory, nearest_fit, setup_of
from sapo_trl.cli.models import require_model
from sapo_trl.cli.packages import missing_packages, require_packages
from sapo_trl.cli.parse import KINDS, RunArguments, parse_run, read_yaml, resolved_fields
from sapo_trl.cli.recipes import config_path, launch_of
from sapo_trl.cli.shapes import Shape, model_config, shape_of
from sapo_trl.cli.terminal import default_of, help_for, refuse
from sapo_trl.config import planned_for
from sapo_trl.data.loading import count_prompts
from sapo_trl.model import max_positions
from sapo_trl.moe.experts import FLOAT32_EXPERTS

PRICES = ", ".join(f"{one.price:g} for {kind}" for kind, one in GPUS.items())
OPTIONS = (
    ("--num_processes n", "processes of the launch"),
    ("--config_file FILE", "accelerate's (default: launch in the recipe's head)"),
    ("--gpu KIND", f"{', '.join(GPUS)} (default: by that head)"),
    ("--gpu_price x", f"$ an hour ({PRICES})"),
    ("--gpu_memory x", "GiB of one GPU, if not that of the kind"),
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
    parser.add_argument("--gpu", choices=GPUS)
    parser.add_argument("--gpu_price", type=float)
    parser.add_argument("--gpu_memory", type=float)
    parser.add_argument("--all", action="store_true")
    try:
        own, rest = parser.parse_known_args(argv)
        file, processes, memory_gb = _stated(_read_first(rest).config)
        kind = "h200" if memory_gb == GPUS["h200"].memory else "h100"
        gpu = gpu_of(own.gpu or kind, own.gpu_price, own.gpu_memory)
        if own.config_file or own.num_processes is not None or file is None:
            file, processes = own.config_file, own.num_processes
        checked = plan_of(rest, file, processes, gpu)
        show(checked, own.all)
    except (ValueError, OSError, argparse.ArgumentError) as error:
        return refuse(error)
    return 0


def gpu_of(kind: str, price: float | None, memory_gib: float | None) -> Gpu:
    """A kind of GPU, with a price and a memory of one's own where they are given.

    Raises:
        ValueError: one of them is not above 0.
    """
    given = {"price": price, "memory": memory_gib}
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--gpu_{name} {value:g} must be a number above 0.")
    return replace(GPUS[kind], **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Checked:
    """A run, its batch plan and its spread over GPUs; `missing`: what it needs that this machine has not installed."""

    run: RunArguments
    plan: BatchPlan
    setup: Setup
    gpu: Gpu
    config_file: str | None
    missing: tuple[str, ...] = ()


def plan_of(words: Sequence[str], config_file: str | None, num_processes: int | None, gpu: Gpu) -> Checked:
    """What is known of a run before anything loads, as if launched with these processes.

    Raises:
        ValueError: what training would refuse.
    """
    launch = read_launch(config_file, num_processes) if config_file else {}
    processes = launch.get("num_processes", 1) if num_processes is None else num_processes
    if processes < 1:
        raise ValueError(f"--num_processes {processes} must be above 0.")
    on_cpu = _asks_for_cpu(words)
    with planned_for(processes):
        # a launch on GPUs may be checked on a machine without any, where bf16 must not be refused
        elsewhere = not torch.cuda.is_available() and not on_cpu
        run = parse_run([*words, "--use_cpu", "true"] if elsewhere else words)
        check_launch(launch, run.config)
        plan = batch_plan(run.config)
        if elsewhere and not (launch or run.config.bf16 or run.config.fp16):  # in float32 this machine would do
            on_cpu, elsewhere = True, False
        setup = replace(setup_of(run, launch, processes, gpu.memory * GIB), on_cpu=on_cpu)
    if not elsewhere:
        require_packages(run)
    if not run.model.model_name_or_path:
        require_model(None)
    return Checked(run, plan, setup, gpu, config_file, tuple(missing_packages(run)))


def _stated(config: str | None) -> tuple[str | None, int | None, float | None]:
    """`launch_of` a config that is there."""
    return launch_of(config) if config and config_path(config).is_file() else (None, None, None)


def _read_first(words: Sequence[str]) -> argparse.Namespace:
    """`config` and `use_cpu` of a command line, None where they are not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--use_cpu", nargs="?", const="true")
    parser.add_argument("--config", nargs="?")
    return parser.parse_known_args(words)[0]


def _asks_for_cpu(words: Sequence[str]) -> bool:
    """Whether the command line, or else the config file, sets `use_cpu`."""
    own = _read_first(words)
    given = read_yaml(own.config).get("use_cpu") if own.use_cpu is None and own.config else own.use_cpu
    return str(given).lower() in ("true", "1", "yes")


def show(checked: Checked, everything: bool) -> None:
    """Print the values, the plan, the memory, the estimate and the advice."""
    run, plan, setup = checked.run, checked.plan, checked.setup
    console = Console(soft_wrap=True, highlight=False)
    usual = {f.name: default_of(f) for kind in KINDS for f in fields(kind)}
    with planned_for(setup.num_gpus):
        resolved = resolved_fields(run)
    if not setup.on_cpu:
        resolved["use_cpu"] = False  # where it is on, this check has set it
    rows = [(name, value) for name, value in resolved.items() if everything or value != usual.get(name)]
    console.print(_table("resolved values" if everything else "resolved values that differ from the defaults", rows))
    console.print()
    launch = "" if checked.config_file is None else f", --config_file {checked.config_file}"
    console.print(_table(f"batch plan for {setup.num_gpus} process(es){launch}", plan.rows()))
    console.print()
    for sentence in checked.missing:
        console.print(f"not there yet: {sentence}", markup=False)
    try:
        prompts = None if run.config.mixture else count_prompts(run.script)
    except (ValueError, OSError, ImportError):
        prompts = None  # said by training, which needs the data
    if prompts is not None:
        show_advice(console, enough_prompts(prompts, plan))
    try:
        require_model(run.model.model_name_or_path)
    except ValueError as error:
        console.print(f"not there yet: {error}", markup=False)
        return
    show_memory(console, checked)


def _table(title: str, rows: Iterable[tuple[str, object]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in rows:
        table.add_row(name, str(value))
    return table


def show_memory(console: Console, checked: Checked) -> None:
    """Print the memory arithmetic, the GPUs, whether the run fits, the estimate of time and cost, and the advice."""
    run, setup = checked.run, checked.setup
    if run.model.load_in_4bit or run.model.load_in_8bit:
        console.print("memory: not counted for quantised weights")
        return
    try:
        config = model_config(str(run.model.model_name_or_path), run.model.model_revision)
    except OSError as error:
        console.print(f"memory: not counted, no config of the model: {str(error).splitlines()[0]}", markup=False)
        return
    shape = shape_of(config, get_peft_config(run.model))
    result = memory(shape, setup)
    console.print(_memory_table(result, setup))
    counts = {"parameters": shape.total, "active": shape.active, "trained": shape.trainable}
    console.print("  " + ", ".join(f"{count / 1e9:.2f}B {name}" for name, count in counts.items()))
    if result.vllm_rows is not None:
        held = f"{result.vllm_rows} rows of {setup.row_tokens} tokens on each engine"
        console.print(f"  vLLM's cache holds {held}, which generates {setup.engine_rows} of them")
    if shape.num_experts and setup.engine in ("none", "ddp") and setup.load_bytes == 4 and setup.autocasts:
        console.print(f"  WARNING: {FLOAT32_EXPERTS}")
    console.print(f"  {_verdict(result, shape, setup)}")
    console.print()
    lines = estimate_lines(shape, setup, checked.plan, checked.gpu, run.config.max_steps)
    console.print(_table("time and cost", lines))
    show_advice(console, advice(shape, setup, max_positions(config.get_text_config())))


def show_advice(console: Console, sentences: Iterable[str]) -> None:
    """Print each sentence as a line."""
    for sentence in sentences:
        console.print(f"advice: {sentence}", markup=False)


def _memory_table(result: Memory, setup: Setup) -> Table:
    where = f"{setup.num_gpus} GPU(s) with {setup.gpu_bytes / GIB:g} GiB, {setup.engine}"
    where = f"{setup.num_gpus} process(es) on a CPU" if setup.on_cpu else where
    table = Table(title=f"memory of one of {where}", title_justify="left", box=None, header_style="")
    for name in ("phase", "", "GiB", "counted as"):
        table.add_column(name, justify="right" if name == "GiB" else "left")
    for line in result.lines:
        table.add_row(line.phase, line.name, f"{line.size / GIB:.1f}", line.how)
    return table


def _verdict(result: Memory, shape: Shape, setup: Setup) -> str:
    peaks = "peaks in GiB: " + ", ".join(f"{phase} {size / GIB:.1f}" for phase, size in result.peaks.items())
    if setup.on_cpu:
        return peaks
    verdict = "fits" if result.fits else f"does NOT fit. Nearest change: {nearest_fit(shape, setup) or 'no single one'}"
    return f"{peaks}; usable {result.usable / GIB:.1f}: {verdict}"
