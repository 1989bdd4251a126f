"""What the commands have in common on a terminal: their help, and one sentence for what they refuse."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig

from sapo_trl.config import SAPOConfig
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.files import masked
from sapo_trl.prompt_fields import PromptFields

# Fields of TRL and transformers that every recipe sets or that people look for first
USUAL_FIELDS = (
    "sapo_temperature_pos", "sapo_temperature_neg", "learning_rate", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "num_generations", "max_completion_length", "temperature", "beta", "use_vllm",
    "vllm_mode", "activation_checkpointing", "bf16", "use_cpu", "eval_strategy", "eval_steps", "save_steps",
    "report_to", "seed", "output_dir", "resume_from_checkpoint",
)  # fmt: skip
USUAL_MODEL_FIELDS = ("model_name_or_path", "dtype", "attn_implementation", "use_peft", "lora_r")
NAME_WIDTH = 38


def default_of(f: Field) -> Any:
    """The default value of a field."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def help_for(argv: Sequence[str], usage: str, own: Sequence[tuple[str, str]] = ()) -> str | None:
    """The help that `-h`, `--help` or `--help-all` among a command's words asks for; None without one of them.

    Args:
        usage: how the command is called and what it does.
        own: (option, explanation) pairs of the command itself.
    """
    everything = "--help-all" in argv
    if not everything and not {"-h", "--help"} & {*argv}:
        return None
    ours = [f for f in fields(SAPOConfig) if f.name not in {g.name for g in fields(GRPOConfig)}]
    prompts = [f for f in ours if f.name in {g.name for g in fields(PromptFields)}]
    groups = [
        ("data and rewards", fields(ScriptArguments)),
        ("algorithm and update", [f for f in ours if f not in prompts]),
        ("prompts and groups", prompts),
    ]
    if everything:
        inherited = {f.name for f in fields(TrainingArguments)}
        rest = [f for f in fields(SAPOConfig) if f not in ours and f.init]
        groups.append(("TRL's GRPOConfig", [f for f in rest if f.name not in inherited]))
        groups.append(("TRL's ModelConfig", fields(ModelConfig)))
        groups.append(("transformers' TrainingArguments", [f for f in rest if f.name in inherited]))
    else:
        usual = [f for f in fields(SAPOConfig) if f.name in USUAL_FIELDS]
        usual += [f for f in fields(ModelConfig) if f.name in USUAL_MODEL_FIELDS]
        groups.append(("the usual ones of TRL and transformers; --help-all shows every one", usual))
    blocks = [usage.strip(), _block("this command", own)] if own else [usage.strip()]
    blocks += [_block(title, map(_described, group)) for title, group in groups]
    return "\n\n".join(blocks)


def _described(f: Field) -> tuple[str, str]:
    """A field's option with its default, and the first sentence of its explanation."""
    default = default_of(f)
    shown = " ".join(map(str, default)) if isinstance(default, list) else "" if default is None else str(default)
    text = " ".join(str(f.metadata.get("help", "")).split()).replace("%%", "%")
    return f"--{f.name} {shown}".rstrip(), text.split(". ")[0].rstrip(".")


def _block(title: str, options: Iterable[tuple[str, str]]) -> str:
    """A title and its options in two columns."""
    width = min(120, shutil.get_terminal_size((100, 24)).columns) - NAME_WIDTH - 2
    lines = [f"{title}:"]
    for option, text in options:
        first, *more = textwrap.wrap(text, max(30, width)) or [""]
        fits = len(option) < NAME_WIDTH
        lines += [f"  {option:{NAME_WIDTH}}{first}"] if fits else [f"  {option}", " " * (NAME_WIDTH + 2) + first]
        lines += [" " * (NAME_WIDTH + 2) + line for line in more]
    return "\n".join(lines)


def refuse(error: Exception) -> int:
    """Print why a command does not run, as one sentence without a traceback; returns the exit status 1.

    `accelerate launch` prints a report of its own after it, which a process that it started can't prevent. With several
    processes that report quotes what is recorded here; with one, `accelerate launch --quiet` leaves the report out.
    """
    sentence = f"error: {masked(str(error))}"
    sys.stdout.flush()
    print(f"{'─' * 60}\n{sentence}", file=sys.stderr, flush=True)
    try:
        raise SystemExit(sentence) from None  # without the frames of the error, which the report would print too
    except SystemExit as record:
        get_error_handler().record_exception(record.with_traceback(None))
    return 1
