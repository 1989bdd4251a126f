"""Which checkpoint a run goes on from, and whether it is the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from sapo_trl.checkpoints.folder import MANIFEST, DamagedCheckpoint, checkpoints_in, newest_valid, verify
from sapo_trl.config import SAPOConfig

NEWEST = ("true", "latest")

# Fields that a resumed run must keep, with what another value would do.
KEPT = {
    **dict.fromkeys(
        ("algorithm", "objective_kwargs", "sapo_temperature_pos", "sapo_temperature_neg", "gate", "epsilon",
         "epsilon_high", "delta", "beta", "old_logprobs", "routing_replay"),
        "the run would be half of one objective and half of another",
    ),
    **dict.fromkeys(
        ("num_generations", "num_mini_batches", "num_iterations", "per_device_train_batch_size",
         "gradient_accumulation_steps", "num_processes"),
        "the place within the rollout and the data would be another",
    ),
    **dict.fromkeys(("seed", "shuffle_dataset", "dataset"), "prompts would be repeated and others left out"),
    **dict.fromkeys(
        ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim"),
        "it would have no effect: the saved optimizer and scheduler decide",
    ),
}  # fmt: skip

# Fields that say where and how a run is reported, and may change without a word.
SILENT = {"output_dir", "run_name", "resume_from_checkpoint", "report_to", "disable_tqdm", "logging_dir", "project"}


def checkpoint_of(wanted: str | bool | None, run_folder: Path) -> tuple[Path | None, list[str]]:
    """(the checkpoint to go on from or None for a new run, sentences to print).

    Args:
        wanted: None or False; True, `true` or `latest` for the newest valid one of `run_folder`; or a folder.

    Raises:
        DamagedCheckpoint: the folder is damaged; says which other one is valid.
        ValueError: none of the run's checkpoints is valid.
    """
    if wanted is None or wanted is False or str(wanted).lower() in ("false", "none", ""):
        return None, []
    if str(wanted).lower() not in NEWEST:
        folder = Path(wanted)
        try:
            verify(folder)
        except ValueError as error:
            raise DamagedCheckpoint(f"{error} {_other(folder)}") from None
        return folder, []
    folder, skipped = newest_valid(run_folder)
    if folder is None and checkpoints_in(run_folder):
        raise ValueError(f"no checkpoint in {run_folder} can be resumed from:\n  " + "\n  ".join(skipped))
    if folder is None:
        return None, [f"resume: {run_folder} holds no checkpoint yet, so the run starts at step 0"]
    return folder, [*skipped, f"resume: {folder}"]


def _other(folder: Path) -> str:
    """What to do about a damaged checkpoint: the newest valid one beside it."""
    valid, _ = newest_valid(folder.parent) if folder.parent.is_dir() else (None, [])
    if valid is None:
        return "There is no valid checkpoint beside it."
    return f"Resume from {valid}, or with resume_from_checkpoint: true from the newest valid one."


def finished_step(folder: Path, max_steps: int) -> int | None:
    """The checkpoint's step if the run had no step left to do there, else None."""
    state = json.loads((folder / "trainer_state.json").read_text())
    planned = max_steps if max_steps > 0 else state["max_steps"]
    return state["global_step"] if state["global_step"] >= planned else None


def identity(config: SAPOConfig, dataset: Any) -> dict[str, Any]:
    """What decides whether a resumed run is the same run, as plain data for JSON."""
    fields = {name: json.loads(json.dumps(value, default=str)) for name, value in config.to_dict().items()}
    return fields | {"num_processes": config.world_size, "dataset": dataset_digest(dataset)}


def dataset_digest(dataset: Any, most_rows: int = 64) -> str:
    """Rows and a hash of prompts spread over the whole dataset; `stream` for one without a length."""
    if not isinstance(dataset, Dataset):
        return "stream"
    places = range(0, len(dataset), max(1, len(dataset) // most_rows))
    text = json.dumps([dataset[i].get("prompt") for i in places], default=str)
    return f"{len(dataset)} rows, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """Sentences on what changed since the checkpoint.

    Raises:
        ValueError: a change that would make the run wrong; says which, and how to start a new run instead.
    """
    changed = {name: (saved.get(name), now.get(name)) for name in now if saved.get(name) != now.get(name)}
    refused = {name: pair for name, pair in changed.items() if name in KEPT}
    if refused:
        lines = "\n".join(f"  {name}: {a} -> {b}; {KEPT[name]}" for name, (a, b) in refused.items())
        raise ValueError(
            f"{folder} can't be resumed with other settings than it was saved with:\n{lines}\n"
            f"Set them back, or start a new run from its weights: model_name_or_path: {folder}."
        )
    told = {name: pair for name, pair in changed.items() if name not in SILENT}
    return [f"changed since the checkpoint: {name} {a} -> {b}" for name, (a, b) in told.items()]


def saved_identity(folder: Path) -> dict[str, Any] | None:
    """What `identity` was when the checkpoint was written; None for another trainer's."""
    path = folder / MANIFEST
    return json.loads(path.read_text()).get("identity") if path.is_file() else None
