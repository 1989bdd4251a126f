"""The fields of the configuration that say which prompts a rollout is made of; a part of `SAPOConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sapo_trl.bounds import LOSS_AGGREGATIONS
from sapo_trl.mixture import MixedSet, read_mixture


@dataclass
class PromptFields:
    """What a run may be told about its prompts; docs/data.md has examples."""

    datasets: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "A mixture with a fixed ratio in every rollout: name -> any of dataset_name, dataset_config, "
            "dataset_split, share, reward_funcs, reward_weights, prompt_column, answer_column, system_prompt, "
            "prompt_template, max_samples, max_prompt_tokens, max_completion_length."
        },
    )

    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Replace prompts whose completions all got one reward by further ones, as DAPO does."},
    )
    dynamic_sampling_max_rounds: int = field(
        default=10,
        metadata={"help": "Generations of a rollout under dynamic_sampling; then it is filled with such prompts."},
    )

    drop_solved_above: float | None = field(
        default=None,
        metadata={
            "help": "Prompts of whose completions at least this share is right leave for good. Right: the first reward "
            "function that scores it gives at least 1."
        },
    )

    loss_aggregation: str | None = field(
        default=None,
        metadata={"help": f"How tokens are averaged: {', '.join(LOSS_AGGREGATIONS)}; default: the algorithm's."},
    )
    zero_variance_filter: bool = field(
        default=False,
        metadata={"help": "Leave prompts whose completions all got one reward out of the loss's averages (ScaleRL)."},
    )

    @property
    def mixture(self) -> dict[str, MixedSet]:
        """`datasets`, checked; empty without one."""
        return read_mixture(self.datasets or {}, vars(self)["max_completion_length"])

    def completion_limits(self, tasks: Sequence[str | None]) -> list[int]:
        """Most tokens of a completion for rows of these datasets; empty where no dataset has a limit of its own."""
        own = {name: one.max_completion_length for name, one in self.mixture.items() if one.max_completion_length}
        return [own.get(str(task), vars(self)["max_completion_length"]) for task in tasks] if own else []

    @property
    def chooses_prompts(self) -> str:
        """The field by which the prompts of a rollout are not simply the next ones in TRL's order; empty if none."""
        names = ("datasets", "dynamic_sampling", "drop_solved_above")
        return next((name for name in names if vars(self)[name]), "")
