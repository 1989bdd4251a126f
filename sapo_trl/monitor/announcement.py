"""The lines that a trainer prints when it is ready: its plan, and how rollouts and updates will be computed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sapo_trl.batch_plan import BatchPlan
from sapo_trl.config import SAPOConfig
from sapo_trl.moe.routing_replay import replay_plan, tape_of
from sapo_trl.objective import CustomObjective
from sapo_trl.update.update import Update


def announcement(
    name: str,
    config: SAPOConfig,
    plan: BatchPlan,
    update: Update,
    model: nn.Module,
    generation: str,
    experts: Sequence[tuple[str, str]],
) -> str:
    """The lines, between rows of exclamation marks where the gate can't act.

    Args:
        generation: how completions are generated.
        experts: (what, how) of a Mixture-of-Experts model.
    """
    is_custom = isinstance(update.objective, CustomObjective)
    lines = [
        f"{name}: {config.algorithm}{' with a custom objective' if is_custom else ''}",
        str(plan),
        f"  {'generation':24} {generation}",
        f"  {'update':24} {update.forward}",
        *(f"  {what:24} {text}" for what, text in experts),
    ]
    if update.routing.replays:
        assert config.max_completion_length is not None  # a configuration without it is refused
        rows = plan.rows_per_process * config.num_mini_batches
        size = replay_plan(tape_of(model), rows, 2 * config.max_completion_length)
        lines.append(f"  {'routing replay':24} {update.routing.mode}: {size}")
    return "\n".join(lines if plan.gate_can_act else ["!" * 100, *lines, "!" * 100])
