"""Check a config without loading a model: `python scripts/check.py --config FILE [--num_processes n] [--field value]`.

Prints what follows from it: values that differ from the defaults (all of them with `--all`), the batch plan, whether
the gate can act, and whether it fits into a GPU's memory (`--config_file` as for `accelerate launch`, `--gpu_memory` in
GiB). Ends with 1 and one line on anything that training would refuse.
"""

import argparse
import sys
import warnings
from dataclasses import MISSING, fields

import torch
from rich.console import Console
from rich.table import Table
from trl import ModelConfig, get_peft_config

from sapo_trl.cli.arguments import ScriptArguments
from sapo_trl.cli.memory_plan import GIB, Setup, memory, model_config, nearest_fit, setup_of, shape_of
from sapo_trl.cli.parse import RunArguments, parse_run, read_yaml, resolved_fields
from sapo_trl.config import SAPOConfig, batch_plan, planned_for
from sapo_trl.data.preflight import check_model_path
from sapo_trl.moe.experts import FLOAT32_EXPERTS


def table(title: str, rows) -> Table:
    out = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in rows:
        out.add_row(name, str(value))
    return out


def defaults() -> dict:
    found = {}
    for kind in (ScriptArguments, SAPOConfig, ModelConfig):
        for f in fields(kind):
            found[f.name] = f.default if f.default_factory is MISSING else f.default_factory()
    return found


def show_memory(console: Console, run: RunArguments, setup: Setup) -> None:
    """The table of the memory arithmetic, and one sentence: fits, or the nearest change."""
    if run.model.load_in_4bit or run.model.load_in_8bit:
        console.print("\nmemory: not counted for quantised weights")
        return
    try:
        config = model_config(run.model.model_name_or_path, run.model.model_revision)
    except OSError as error:
        console.print(f"\nmemory: not counted, no config of the model: {str(error).splitlines()[0]}")
        return
    shape = shape_of(config, get_peft_config(run.model))
    result = memory(shape, setup)
    console.print()
    title = f"memory of one of {setup.num_gpus} GPU(s) with {setup.gpu_bytes / GIB:g} GiB, {setup.engine}"
    lines = Table(title=title, title_justify="left", box=None, header_style="")
    for name, side in (("phase", "left"), ("", "left"), ("GiB", "right"), ("counted as", "left")):
        lines.add_column(name, justify=side)
    for phase, name, size, how in result.lines:
        lines.add_row(phase, name, f"{size / GIB:.1f}", how)
    console.print(lines)
    counts = {"parameters": shape.total, "active": shape.active, "trained": shape.trainable}
    console.print("  " + ", ".join(f"{count / 1e9:.2f}B {name}" for name, count in counts.items()))
    if result.vllm_rows is not None:
        console.print(f"  vLLM's cache holds {result.vllm_rows} rows of {setup.row_tokens} tokens on each engine")
    if shape.num_experts and setup.engine in ("none", "ddp") and setup.load_bytes == 4 and setup.autocasts:
        console.print(f"  WARNING: {FLOAT32_EXPERTS}")
    peaks = ", ".join(f"{phase} {size / GIB:.1f}" for phase, size in result.peaks.items())
    verdict = "fits" if result.fits else f"does NOT fit. Nearest change: {nearest_fit(shape, setup) or 'no single one'}"
    console.print(f"  peaks in GiB: {peaks}; usable {result.usable / GIB:.1f}: {verdict}")


def main() -> None:
    # PEFT 0.21 asks for a property that transformers has renamed
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--config_file")
    parser.add_argument("--gpu_memory", type=float, default=80.0)
    parser.add_argument("--all", action="store_true")
    own, rest = parser.parse_known_args()
    console = Console(soft_wrap=True)
    try:
        launch = read_yaml(own.config_file) if own.config_file else {}
        processes = own.num_processes or launch.get("num_processes", 1)
        with planned_for(processes):
            # The launch of a GPU machine may be checked on one without: bf16 must then not be refused
            elsewhere = [] if torch.cuda.is_available() or "--use_cpu" in rest else ["--use_cpu", "true"]
            run = parse_run(rest + elsewhere)
            plan = batch_plan(run.config)
            setup = setup_of(run, launch, processes, own.gpu_memory * GIB)
    except ValueError as error:
        sys.exit(f"error: {error}")
    usual = defaults()
    resolved = resolved_fields(run)
    if elsewhere:
        resolved.pop("use_cpu")
    rows = [(name, value) for name, value in resolved.items() if own.all or value != usual.get(name)]
    console.print(table("resolved values" if own.all else "resolved values that differ from the defaults", rows))
    console.print()
    console.print(table(f"batch plan for {processes} process(es)", plan.rows()))
    try:
        check_model_path(run.model.model_name_or_path or "")
    except ValueError as error:
        console.print(f"\nnot there yet: {error}")
        return
    show_memory(console, run, setup)


if __name__ == "__main__":
    main()
