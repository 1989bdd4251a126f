"""Writing a checkpoint of a trainer: everything beside its place, then the name. transformers' `_save_checkpoint` with
other files, another order and another rotation (transformers 5.23, `Trainer._save_checkpoint`)."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from sapo_trl import faults
from sapo_trl.checkpoints.disk import explained, require_space
from sapo_trl.checkpoints.folder import checkpoints_in, publish, remove_leftovers, rotate, staging_of
from sapo_trl.checkpoints.run_state import RunState
from sapo_trl.checkpoints.weights import save_reference
from sapo_trl.trl_seams import push_checkpoint, save_training_state


def write_checkpoint(
    trainer: Trainer,
    run_folder: Path,
    state: RunState,
    facts: dict,
    model_only: bool,
    reference: nn.Module | None,
) -> Path:
    """Write `checkpoint-<step>`; every process calls it.

    Args:
        state: of this process.
        reference: a reference model whose weights are not those that it was loaded with.
        facts: goes into the manifest; what a resumed run is compared with.
        model_only: leave out all that a run needs to go on.

    Raises:
        OSError: the disk is full, or the folder can't be written; the unfinished checkpoint is gone then.
    """
    step, args, accelerator = trainer.state.global_step, trainer.args, trainer.accelerator
    final = run_folder / f"checkpoint-{step}"
    staging = staging_of(final)
    with _nothing_left_behind(staging):
        if args.should_save:
            remove_leftovers(run_folder)
            require_space(run_folder, _last_size(run_folder), f"checkpoint-{step}")
            staging.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        faults.inject("save.begin", step)
        trainer.save_model(str(staging), _internal_call=True)
        faults.inject("save.weights", step, folder=staging)
        _note_the_best(trainer, run_folder)
        size = 0
        if not model_only:
            save_training_state(trainer, str(staging))
            if reference is not None and args.should_save:
                save_reference(reference, staging)
            faults.inject("save.optimizer", step, folder=staging)
            size = state.save(staging, accelerator.process_index)
            faults.inject("save.run_state", step, folder=staging)
        if args.should_save:
            _save_trainer_state(trainer, staging)
            faults.inject("save.trainer_state", step, folder=staging)
        accelerator.wait_for_everyone()
        if args.should_save:
            total = publish(staging, final, facts | {"step": step, "model_only": model_only})
            own = "" if model_only else f", {size / 2**20:.1f} MiB of them the rollout and the state of process 0"
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
            name = type(part).__name__
            states: Any = trainer.state.stateful_callbacks  # by name, whatever its annotation says
            if isinstance(states[name], list):
                states[name].append(part.state())
            else:
                states[name] = part.state()
    trainer.state.save_to_json(str(staging / "trainer_state.json"))


@contextmanager
def _nothing_left_behind(staging: Path) -> Generator[None]:
    """Remove the unfinished checkpoint after an error, and say so where the disk is the reason."""
    try:
        with explained(staging.parent, f"{staging.name} was not finished and is gone. "):
            yield
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
