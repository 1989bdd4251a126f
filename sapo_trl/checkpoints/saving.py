"""Writing a checkpoint of a trainer: everything beside its place, then the name. transformers' `_save_checkpoint` with
other files, another order and another rotation (transformers 5.23, `Trainer._save_checkpoint`)."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from sapo_trl import faults
from sapo_trl.checkpoints.folder import checkpoints_in, publish, require_space, rotate, staging_of
from sapo_trl.checkpoints.run_state import RunState
from sapo_trl.trl_seams import push_checkpoint, save_training_state


def write_checkpoint(trainer: Trainer, run_folder: Path, state: RunState, facts: dict) -> Path:
    """Write `checkpoint-<step>`; every process calls it.

    Args:
        state: of this process.
        facts: goes into the manifest; what a resumed run is compared with.

    Raises:
        OSError: the disk is full, or the folder can't be written; the unfinished checkpoint is gone then.
    """
    step, args, accelerator = trainer.state.global_step, trainer.args, trainer.accelerator
    final = run_folder / f"checkpoint-{step}"
    staging = staging_of(final)
    with _nothing_left_behind(staging):
        if args.should_save:
            for stale in run_folder.glob(".checkpoint-*.partial"):
                shutil.rmtree(stale, ignore_errors=True)
            require_space(run_folder, _last_size(run_folder), f"checkpoint-{step}")
            staging.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        faults.inject("save.begin", step)
        trainer.save_model(str(staging), _internal_call=True)
        faults.inject("save.weights", step)
        _note_the_best(trainer, run_folder)
        if not args.save_only_model:
            save_training_state(trainer, str(staging))
            faults.inject("save.optimizer", step)
            size = state.save(staging, accelerator.process_index)
            faults.inject("save.run_state", step)
        if args.should_save:
            _save_trainer_state(trainer, staging)
            faults.inject("save.trainer_state", step)
        accelerator.wait_for_everyone()
        if args.should_save:
            total = publish(staging, final, facts | {"step": step, "model_only": args.save_only_model})
            own = "" if args.save_only_model else f", {size / 2**20:.1f} MiB of them the rollout and the run's state"
            print(f"saved {final}: {total / 2**20:.1f} MiB{own}", flush=True)
    faults.inject("save.published", step, folder=final)
    accelerator.wait_for_everyone()
    if args.push_to_hub:
        push_checkpoint(trainer, str(final))
    if args.should_save:
        best = trainer.state.best_model_checkpoint
        rotate(run_folder, args.save_total_limit, [final, *([Path(best)] if best else [])])
        faults.inject("save.rotated", step)
    return final


def _last_size(run_folder: Path) -> int:
    """Bytes of the newest checkpoint: what the next one will take; 0 before the first."""
    found = checkpoints_in(run_folder)
    return sum(path.stat().st_size for path in found[-1].rglob("*") if path.is_file()) if found else 0


def _note_the_best(trainer: Trainer, run_folder: Path) -> None:
    """The path of the best checkpoint so far; this one, which has no name yet, may be it."""
    best, step = trainer.state.best_global_step, trainer.state.global_step
    folder = run_folder / f"checkpoint-{best}"
    if best and (best == step or folder.exists()):
        trainer.state.best_model_checkpoint = str(folder)


def _save_trainer_state(trainer: Trainer, staging: Path) -> None:
    for part in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(part, ExportableState):
            name, states = type(part).__name__, trainer.state.stateful_callbacks
            if isinstance(states[name], list):
                states[name].append(part.state())
            else:
                states[name] = part.state()
    trainer.state.save_to_json(str(staging / "trainer_state.json"))


@contextmanager
def _nothing_left_behind(staging: Path) -> Generator[None]:
    """Remove the unfinished checkpoint after an error, and say so where the disk was full."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(staging.parent).free if staging.parent.exists() else 0
        shutil.rmtree(staging, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or free < 2**20
        if isinstance(error, torch.OutOfMemoryError) or not full:
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk of {staging.parent} is full ({free:,} bytes free): {staging.name} was not finished and is gone, "
            f"the checkpoints before it are whole. Free some space and resume. ({error})",
        ) from error
