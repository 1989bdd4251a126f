"""Taking the run state off a trainer and putting it back, attribute by attribute, in one place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerState

from sapo_trl.checkpoints.run_state import RunState
from sapo_trl.checkpoints.weights import load_reference
from sapo_trl.config import SAPOConfig
from sapo_trl.model import is_sharded
from sapo_trl.rewards.contract import innermost
from sapo_trl.rollout.ahead import RolloutsAhead
from sapo_trl.rollout.prompts import PromptSource
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.update.finite import FiniteGuard
from sapo_trl.update.plan import UpdatePlan
from sapo_trl.update.update import Update


class Resumable(Protocol):
    """The parts of a `SAPOTrainer` that decide its next number, beside what transformers saves."""

    args: SAPOConfig
    model: Any
    ref_model: nn.Module | None
    reward_funcs: list
    reward_func_names: list[str]
    state: TrainerState
    train_dataset: Any
    accelerator: Accelerator
    num_iterations: int
    log_completions: bool
    _step: int
    _tr_loss: Tensor
    _total_loss_scalar: float
    _globalstep_last_logged: int
    _metrics: dict[str, Any]
    _logs: dict[str, Any]
    _rollout_is_new: bool
    _rollout: Rollout | None
    _ahead: RolloutsAhead | None
    _update: Update
    _plan: UpdatePlan
    _finite: FiniteGuard
    _prompts: PromptSource | None


def capture(trainer: Resumable) -> RunState:
    """The state between two optimizer steps."""
    update, args = trainer._update, trainer.args
    step = trainer._step // args.gradient_accumulation_steps
    is_within = step % (args.num_mini_batches * trainer.num_iterations) != 0
    entropy = update.entropy
    return RunState(
        micro_step=trainer._step,
        tr_loss=trainer._tr_loss,
        total_loss=trainer._total_loss_scalar,
        last_logged=trainer._globalstep_last_logged,
        metrics={mode: dict(values) for mode, values in trainer._metrics.items()},
        rollout=trainer._rollout if is_within else None,
        table=_table(trainer._logs) if trainer.log_completions and trainer._rollout_is_new else {},
        entropy={"coef": entropy.coef, "last_entropy": entropy.last_entropy} if entropy and entropy.is_adaptive else {},
        budget={
            "wanted": _wanted_budget(trainer),
            "max_tokens": update.forward.max_tokens,
            "oom_retries": update.budget.oom_retries,
            "is_settled": trainer._plan.memory.is_settled,
            "activation_checkpointing": args.activation_checkpointing,
        },
        skipped={"in_a_row": trainer._finite.in_a_row, "total": trainer._finite.total},
        prompts=trainer._prompts.state() if trainer._prompts is not None else {},
        ahead=None if trainer._ahead is None else trainer._ahead.pending,
        rewards={name: state for name, func in _with_state(trainer) if _survives(state := func.state_dict())},
    )


def restore(trainer: Resumable, folder: Path) -> list[str]:
    """Put the state of a checkpoint back; sentences on what is not exact."""
    state = RunState.load(folder, trainer.accelerator.process_index, trainer.accelerator.device)
    trainer._step, trainer._tr_loss, trainer._total_loss_scalar = state.micro_step, state.tr_loss, state.total_loss
    trainer._globalstep_last_logged, trainer._rollout = state.last_logged, state.rollout
    if trainer._ahead is not None:
        trainer._ahead.pending = state.ahead
    for name, func in _with_state(trainer):
        if name in state.rewards:
            func.load_state_dict(state.rewards[name])
    for mode, values in state.metrics.items():
        trainer._metrics[mode].clear()
        trainer._metrics[mode].update(values)
    if state.table:
        _fill_table(trainer._logs, state.table)
        trainer._rollout_is_new = True
    update, budget = trainer._update, state.budget
    if update.entropy is not None:
        vars(update.entropy).update(state.entropy)
    update.budget.oom_retries = budget["oom_retries"]
    if budget["wanted"] == _wanted_budget(trainer):
        update.forward.max_tokens = budget["max_tokens"]
        trainer._plan.memory.restore(budget["is_settled"], budget["activation_checkpointing"], trainer.model)
    elif state.rollout is not None:  # the user has asked for other packs
        active = [[row for pack in batch.packs for row in pack] for batch in state.rollout.mini_batches]
        plans, _ = update.forward.plan_equal(active, [0.0] * len(active))
        for batch, packs in zip(state.rollout.mini_batches, plans, strict=True):
            batch.packs = packs
    vars(trainer._finite).update(state.skipped)
    if trainer._prompts is not None:
        trainer._prompts.restore(state.prompts)
    if (reference := moving_reference(trainer)) is not None:
        load_reference(reference, folder)
    unsaved = [name for name, _ in _with_state(trainer) if name not in state.rewards]
    kept_out = f"resume: NOT exact: the state of {', '.join(unsaved)} is not in the checkpoint: it is not JSON"
    return _inexact(trainer) + [kept_out] * bool(unsaved)


def moving_reference(trainer: Resumable) -> nn.Module | None:
    """The reference model where training moves it (`sync_ref_model`) and this process holds it whole."""
    model = trainer.ref_model
    return model if trainer.args.sync_ref_model and model is not None and not is_sharded(model) else None


def _with_state(trainer: Resumable) -> Iterator[tuple[str, Any]]:
    """(name, function) of the reward functions that have a state; a reward model is loaded anew."""
    for name, func in zip(trainer.reward_func_names, trainer.reward_funcs, strict=True):
        inner = innermost(func)
        if hasattr(inner, "state_dict") and hasattr(inner, "load_state_dict") and not isinstance(inner, nn.Module):
            yield name, inner


def _survives(state: Any) -> bool:
    """Whether JSON gives the state of a reward function back as it is: no tensors, tuples, or keys that are no text."""
    try:
        return json.loads(text := json.dumps(state)) == state and "Infinity" not in text
    except (TypeError, ValueError):
        return False


def _wanted_budget(trainer: Resumable) -> list[Any]:
    memory = trainer._plan.memory
    given = "auto" if memory.auto_checkpointing else trainer.args.activation_checkpointing
    return [trainer.args.max_tokens_per_pack, given]


def _table(logs: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's table of completions as lists; images stay out."""
    kept = {name: logs[name] for name in logs if name != "images"}
    return {
        name: {column: list(values) for column, values in part.items()} if isinstance(part, dict) else list(part)
        for name, part in kept.items()
    }


def _fill_table(logs: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    for name, part in table.items():
        if isinstance(part, dict):
            for column, values in part.items():
                logs[name][column].extend(values)
        else:
            logs[name].extend(part)


def _inexact(trainer: Resumable) -> list[str]:
    """What keeps this run from going on as if it had never stopped, one sentence each."""
    args, state = trainer.args, trainer.state
    evaluated = [entry["step"] for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    is_epochs_end = bool(state.epoch) and state.epoch == int(state.epoch)
    reasons = {
        "NOT exact after this rollout: the random state of vLLM is not saved": args.use_vllm and trainer._ahead is None,
        "exact if the vLLM server's numbers, which depend on when requests arrive, are the same again": (
            trainer._ahead is not None and args.use_vllm and args.vllm_mode == "server"
        ),
        "NOT exact: ignore_data_skip begins the epoch's data again": args.ignore_data_skip,
        "NOT exact: the checkpoint was written before the evaluation at the end of its epoch, which is left out": (
            args.eval_strategy == "epoch" and is_epochs_end and state.global_step not in evaluated
        ),
        "NOT exact: the reference model that sync_ref_model moves is sharded and begins as it was loaded": (
            args.sync_ref_model and trainer.ref_model is not None and moving_reference(trainer) is None
        ),
        "exact if the stream gives the same rows again": not isinstance(trainer.train_dataset, Dataset),
        "exact up to the order in which GPU kernels sum; full_determinism: true fixes that too": (
            trainer.accelerator.device.type == "cuda" and not args.full_determinism
        ),
    }
    return [f"resume: {reason}" for reason, applies in reasons.items() if applies]
