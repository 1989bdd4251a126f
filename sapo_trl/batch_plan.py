"""The batch plan: what a rollout and an optimizer step are made of, and whether the gate can act on it."""

from __future__ import annotations

from dataclasses import dataclass

from sapo_trl.config import SAPOConfig
from sapo_trl.mixture import prompts_of_sets


@dataclass(frozen=True)
class BatchPlan:
    """What one rollout and one optimizer step are made of, over all processes.

    Attributes:
        completions_per_rollout, prompts_per_rollout: completions = prompts x num_generations.
        steps_per_rollout: optimizer steps before the next rollout, num_mini_batches x num_iterations.
        effective_batch: completions per optimizer step.
        rows_per_process: the same for one process.
        off_policy_steps: of those, the ones whose ratio is not 1 by construction.
        gate_status: `acts` or `inert`, with the reason.
        prompts_by_dataset: those of a mixture, as text; empty without one.
    """

    completions_per_rollout: int
    prompts_per_rollout: int
    steps_per_rollout: int
    effective_batch: int
    rows_per_process: int
    num_processes: int
    off_policy_steps: int
    gate_status: str
    prompts_by_dataset: str = ""

    @property
    def gate_can_act(self) -> bool:
        """Whether any update of a rollout is off-policy."""
        return self.off_policy_steps > 0

    def __str__(self) -> str:
        return "\n".join(f"  {name:24} {value}" for name, value in self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) pairs for a table."""
        per_process = f"{self.rows_per_process} on each of {self.num_processes} process(es)"
        return [
            ("prompts per rollout", self.prompts_by_dataset or f"{self.prompts_per_rollout}"),
            ("completions per rollout", f"{self.completions_per_rollout}"),
            ("optimizer steps / rollout", f"{self.steps_per_rollout}"),
            ("effective batch", f"{self.effective_batch} completions, {per_process}"),
            ("gate", self.gate_status),
        ]


def batch_plan(config: SAPOConfig) -> BatchPlan:
    """The plan that follows from a validated config.

    Raises:
        ValueError: the gate is inert and `require_off_policy` is set, or a dataset of the mixture gets no prompt.
    """
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    effective = rows * config.world_size
    rollout = effective * config.num_mini_batches
    steps = config.num_mini_batches * config.num_iterations
    off_policy = steps if config.rollouts_ahead and config.old_logprobs == "sampler" else steps - 1
    if off_policy:
        first = "" if off_policy == steps else " (the first is on-policy, r = 1)"
        age = f", weights up to {2 * steps - 1} updates old" if config.rollouts_ahead else ""
        status = f"acts on {off_policy} of {steps} steps of a rollout{first}{age}"
    else:
        status = (
            "INERT: num_mini_batches=1 and num_iterations=1 make every update on-policy, r = 1 for every token, and "
            f"{config.algorithm} is plain policy gradient. Set num_mini_batches=4 (the SAPO paper) to let it act."
        )
        if config.require_off_policy:
            raise ValueError(f"require_off_policy is set, but the gate is {status}")
    prompts, sets = rollout // (config.num_generations or 1), config.mixture
    parts = ", ".join(f"{name} {count}" for name, count in prompts_of_sets(prompts, sets).items()) if sets else ""
    by_dataset = f"{prompts}: {parts}" if sets else ""
    return BatchPlan(rollout, prompts, steps, effective, rows, config.world_size, off_policy, status, by_dataset)
