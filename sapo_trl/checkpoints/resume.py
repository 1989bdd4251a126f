"""Which checkpoint a run goes on from, and whether it is the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from sapo_trl.checkpoints.folder import (
    DamagedCheckpoint,
    checkpoints_in,
    newest_valid,
    read_manifest,
    remove_leftovers,
    verify,
)
from sapo_trl.checkpoints.run_state import holds_completions
from sapo_trl.config import SAPOConfig
from sapo_trl.data.pictures import COLUMNS, picture_key, stored_pictures
from sapo_trl.files import masked

NEWEST = ("true", "latest")
# Rows of the training set whose text is compared.
MOST_ROWS = 1024

# Fields that a resumed run must keep, with what another value would do.
KEPT = {
    **dict.fromkeys(
        ("algorithm", "objective_kwargs", "sapo_temperature_pos", "sapo_temperature_neg", "gate", "epsilon",
         "epsilon_high", "delta", "beta", "old_logprobs", "routing_replay", "loss_aggregation", "zero_variance_filter"),
        "the run would be half of one objective and half of another",
    ),
    **dict.fromkeys(
        ("num_generations", "num_mini_batches", "num_iterations", "per_device_train_batch_size",
         "gradient_accumulation_steps", "num_processes"),
        "the place within the rollout and the data would be another",
    ),
    **dict.fromkeys(
        ("seed", "shuffle_dataset", "dataset", "datasets", "dynamic_sampling", "drop_solved_above"),
        "prompts would be repeated and others left out"
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args"),
        "it would have no effect, because the saved optimizer brings its own",
    ),
    **dict.fromkeys(
        ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
        "the learning rate would jump to another place of another schedule",
    ),
}  # fmt: skip

# The same where the checkpoint holds completions that are yet to be trained on.
KEPT_WITHIN_A_ROLLOUT = {
    "temperature": "the completions that wait to be trained on were sampled at the other one; none wait between two "
    "rollouts, unless one is ahead",
}

# Fields that say where and how a run is reported, and may change without a word; and one that the run itself settles.
SILENT = {
    "output_dir", "run_name", "resume_from_checkpoint", "report_to", "disable_tqdm", "logging_dir", "project",
    "activation_checkpointing", "gradient_checkpointing",
}  # fmt: skip


def agreed_checkpoint(
    wanted: str | bool | None, run_folder: Path, now: Mapping[str, Any], accelerator: Accelerator
) -> tuple[Path | None, list[str]]:
    """(the checkpoint that all processes go on from or None for a new run, sentences to print).

    The main process reads and hashes the files, once for all.

    Args:
        wanted: None or False; True, `true` or `latest` for the newest valid one of `run_folder`; or a folder.
        now: `identity` of this run.

    Raises:
        ValueError: the folder is damaged, or the run has other settings; says what to do.
    """
    message: list[Any] = [None, [], None]  # folder, sentences, error
    if accelerator.is_main_process:
        try:
            folder, notes = checkpoint_of(wanted, run_folder)
            if folder is not None:
                notes += compare(read_manifest(folder)["identity"], now, folder)
            message = [folder, notes, None]
        except (ValueError, OSError) as error:
            message[2] = str(error)
    folder, notes, failure = broadcast_object_list(message)
    if failure is not None:
        raise ValueError(failure)
    return folder, notes


def checkpoint_of(wanted: str | bool | None, run_folder: Path) -> tuple[Path | None, list[str]]:
    """(the checkpoint to go on from or None for a new run, sentences to print).

    Raises:
        DamagedCheckpoint: the folder is damaged; says which other one is valid.
        ValueError: none of the run's checkpoints is valid.
    """
    if wanted is None or str(wanted).lower() in ("false", "none", ""):
        return None, []
    if str(wanted).lower() not in NEWEST:
        folder = Path(str(wanted))
        try:
            verify(folder)
        except (DamagedCheckpoint, OSError) as error:
            raise DamagedCheckpoint(f"{error} {_other(folder)}") from None
        return folder, []
    remove_leftovers(run_folder)
    folder, skipped = newest_valid(run_folder)
    if folder is None and checkpoints_in(run_folder):
        raise ValueError(f"no checkpoint in {run_folder} can be resumed from:\n  " + "\n  ".join(skipped))
    if folder is None:
        return None, [f"resume: {run_folder} holds no checkpoint yet, so the run starts at step 0"]
    return folder, [*skipped, f"resume: {folder}"]


def _other(folder: Path) -> str:
    """What to do about a folder that can't be resumed from: the newest valid one inside or beside it."""
    for place in (folder, folder.parent):
        valid, _ = newest_valid(place) if place.is_dir() else (None, [])
        if valid is not None:
            return f"Resume from {valid}, or with resume_from_checkpoint: true from the newest valid one."
    return "There is no valid checkpoint beside it."


def finished(folder: Path, planned_steps: int) -> tuple[int, str] | None:
    """(step, why) of a checkpoint at which a run of so many steps has nothing left to do, else None."""
    step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    if step >= planned_steps:
        return step, f"step {step} of {planned_steps}"
    ended = read_manifest(folder).get("ended")
    return (step, f"step {step}, {ended}") if ended else None


def stream_place(folder: Path, accumulation: int) -> tuple[int, int]:
    """(whole passes over a stream, batches of the pass that has begun) at a checkpoint.

    transformers takes a stream for as long as the run and counts on into a second pass that it begins elsewhere.
    """
    state = json.loads((folder / "trainer_state.json").read_text())
    passes = int(state["epoch"])
    return passes, round((state["epoch"] - passes) * state["max_steps"] * accumulation)


def identity(config: SAPOConfig, dataset: Any) -> dict[str, Any]:
    """What decides whether a resumed run is the same run, as plain data for JSON and without secrets."""
    fields = json.loads(json.dumps(config.to_dict(), default=str))
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "datasets")}
    threads = torch.get_num_threads() if config.device.type == "cpu" else None  # decides the order of sums there
    facts = {"num_processes": config.world_size, "dataset": dataset_digest(dataset), "threads": threads}
    return masked(fields) | versions | facts


def dataset_digest(dataset: Any) -> str:
    """Rows and a hash of texts spread over the whole dataset; `stream` for one without a length."""
    if not isinstance(dataset, Dataset):
        return "stream"
    some = dataset.select(range(0, len(dataset), max(1, len(dataset) // MOST_ROWS)))
    pictures = [key for stored in stored_pictures(some) if (key := picture_key(stored))]
    rows = some.select_columns([name for name in dataset.column_names if name not in COLUMNS])
    text = json.dumps([*rows, *pictures], default=str)
    return f"{len(dataset)} rows, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Sentences on what changed since the checkpoint.

    Raises:
        ValueError: a change that would make the run wrong; says which, and how to start a new run instead.
    """
    names = sorted(saved.keys() | now.keys())
    changed = {name: (saved.get(name), now.get(name)) for name in names if saved.get(name) != now.get(name)}
    kept = KEPT
    if changed.keys() & KEPT_WITHIN_A_ROLLOUT.keys() and holds_completions(folder):
        kept = KEPT | KEPT_WITHIN_A_ROLLOUT
    refused = {name: pair for name, pair in changed.items() if name in kept}
    if refused:
        lines = "\n".join(f"  {name}: {a} -> {b}; {kept[name]}" for name, (a, b) in refused.items())
        raise ValueError(
            f"{folder} can't be resumed with other settings than it was saved with:\n{lines}\n"
            f"Set them back, or start a new run from its weights: model_name_or_path: {folder}."
        )
    told = {name: pair for name, pair in changed.items() if name not in SILENT}
    return [f"changed since the checkpoint: {name} {a} -> {b}" for name, (a, b) in told.items()]
