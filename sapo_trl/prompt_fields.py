"""The fields of `SAPOConfig` that say which prompts a rollout is made of, and how their completions count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sapo_trl.bounds import LOSS_AGGREGATIONS
from sapo_trl.mixture import MixedSet, read_mixture


@dataclass
class PromptFields:
    """What a run may be told about its prompts and groups of completions; docs/data.md has examples."""

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

    thinking_budget: list[int] | None = field(
        default=None,
        metadata={
            "help": "In training, tokens after which a thought that is still open is ended by a phrase, so that an "
            "answer follows; two numbers: drawn evenly between them. The phrase is not trained on."
        },
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

    @property
    def rewards_choose_prompts(self) -> bool:
        """Whether the prompts of a rollout depend on the rewards of the one before it."""
        return self.dynamic_sampling or self.drop_solved_above is not None


def check_prompts(config: Any) -> None:
    """Refuse what does not go together in a `SAPOConfig`.

    Raises:
        ValueError: with the nearest fix.
    """
    budget, longest = config.thinking_budget, config.max_completion_length
    if budget is not None:
        if len(budget) not in (1, 2) or sorted(budget) != budget or not 0 < budget[0] <= budget[-1] < longest:
            raise ValueError(
                f"thinking_budget={budget} must be one number, or two in order, above 0 and below "
                f"max_completion_length={longest}: the answer comes after it."
            )
        if config.replay == "r3":
            raise ValueError(
                "thinking_budget generates in two parts, and routing_replay='r3' records one. Set routing_replay: r2."
            )
    if config.dynamic_sampling and config.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            "dynamic_sampling looks at the sum of a completion's rewards, and multi_objective_aggregation="
            f"{config.multi_objective_aggregation!r} has none. Set multi_objective_aggregation: sum_then_normalize."
        )
    if config.dynamic_sampling and config.overlap_rewards:
        raise ValueError(
            "overlap_rewards has no effect with dynamic_sampling, under which the rewards say what is kept. Remove it."
        )
    if config.dynamic_sampling and config.replay == "r3" and config.launch_processes > 1:
        raise ValueError(
            "dynamic_sampling sends completions between processes, and with routing_replay='r3' they hold routes, too "
            "large to send. Set routing_replay: r2, or dynamic_sampling: false."
        )
    sets = config.mixture
    if sets and config.reward_weights is not None and all(one.reward_funcs for one in sets.values()):
        raise ValueError(
            "reward_weights has no effect: every one of the datasets has reward_funcs of its own. Remove it, and give "
            "datasets their reward_weights."
        )
