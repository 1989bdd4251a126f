"""Taking the run state off a trainer and putting it back, attribute by attribute, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor

from sapo_trl.checkpoints.run_state import RunState
from sapo_trl.config import SAPOConfig
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.update.finite import FiniteGuard
from sapo_trl.update.plan import UpdatePlan
from sapo_trl.update.update import Update


class Resumable(Protocol):
    """The parts of a `SAPOTrainer` that decide its next number, beside what transformers saves."""

    args: SAPOConfig
    model: Any
    accelerator: Accelerator
    num_iterations: int
    _step: int
    _tr_loss: Tensor
    _total_loss_scalar: float
    _globalstep_last_logged: int
    _metrics: dict[str, Any]
    _current_train_step_time: float
    _rollout: Rollout | None
    _update: Update
    _plan: UpdatePlan
    _finite: FiniteGuard


def capture(trainer: Resumable) -> RunState:
    """The state between two optimizer steps."""
    update, memory = trainer._update, trainer._plan.memory
    step = trainer._step // trainer.args.gradient_accumulation_steps
    is_within = step % (trainer.args.num_mini_batches * trainer.num_iterations) != 0
    entropy = update.entropy
    return RunState(
        micro_step=trainer._step,
        tr_loss=trainer._tr_loss,
        total_loss=trainer._total_loss_scalar,
        last_logged=trainer._globalstep_last_logged,
        metrics={mode: dict(values) for mode, values in trainer._metrics.items()},
        step_time=trainer._current_train_step_time,
        rollout=trainer._rollout if is_within else None,
        entropy={} if entropy is None else {"coef": entropy.coef, "last_entropy": entropy.last_entropy},
        budget={
            "max_tokens": update.forward.max_tokens,
            "oom_retries": update.budget.oom_retries,
            "is_settled": memory.is_settled,
            "activation_checkpointing": trainer.args.activation_checkpointing,
        },
        skipped={"in_a_row": trainer._finite.in_a_row, "total": trainer._finite.total},
    )


def restore(trainer: Resumable, folder: Path) -> list[str]:
    """Put the state of a checkpoint back; sentences on what is not exact."""
    state = RunState.load(folder, trainer.accelerator.process_index, trainer.accelerator.device)
    if state is None:
        return [f"resume: NOT exact, {folder} was written by another trainer: a new rollout begins"]
    trainer._step, trainer._tr_loss, trainer._total_loss_scalar = state.micro_step, state.tr_loss, state.total_loss
    trainer._globalstep_last_logged, trainer._rollout = state.last_logged, state.rollout
    for mode, values in state.metrics.items():
        trainer._metrics[mode].clear()
        trainer._metrics[mode].update(values)
    trainer._current_train_step_time = state.step_time
    update = trainer._update
    if update.entropy is not None:
        vars(update.entropy).update(state.entropy)
    update.forward.max_tokens, update.budget.oom_retries = state.budget["max_tokens"], state.budget["oom_retries"]
    trainer._plan.memory.restore(state.budget["is_settled"], state.budget["activation_checkpointing"], trainer.model)
    vars(trainer._finite).update(state.skipped)
    notes = []
    if trainer.args.use_vllm:
        notes.append("resume: NOT exact after this rollout, the random state of vLLM is not saved")
    if trainer.accelerator.device.type == "cuda":
        notes.append("resume: exact up to the order in which GPU kernels sum; full_determinism: true fixes that too")
    return notes
