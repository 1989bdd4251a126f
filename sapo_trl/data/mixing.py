"""A mixture's rewards: every dataset has its own functions and weights, and TRL one column for each of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from datasets import Dataset

from sapo_trl.batch_plan import BatchPlan
from sapo_trl.config import SAPOConfig
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import arguments_of, check_arguments
from sapo_trl.errors import did_you_mean
from sapo_trl.mixture import MixedSet, prompts_of_sets
from sapo_trl.rewards import load_reward
from sapo_trl.rewards.contract import TaskReward


def check_mixture(args: ScriptArguments, mixture: Mapping[str, MixedSet]) -> None:
    """Refuse arguments of a run that the datasets of its mixture replace, and what is wrong in those of one of them.

    Raises:
        ValueError: with the place and the nearest fix.
    """
    defaults = {f.name: f.default for f in fields(ScriptArguments)}
    for name in ("dataset_name", "dataset_config", "dataset_train_split", "max_samples"):
        if vars(args)[name] != defaults[name]:
            raise ValueError(f"{name}={vars(args)[name]} has no effect beside datasets. Give it in one of them.")
    for name, one in mixture.items():
        if one.dataset_name is None:
            raise ValueError(f"datasets.{name} has no dataset_name. Name a preset, a Hub id, or a local file.")
        try:
            check_arguments(arguments_of(args, one))
            for entry in one.reward_funcs or ():
                load_reward(entry)
        except ValueError as error:
            raise ValueError(f"datasets.{name}: {error}") from error


def mixed_rewards(
    mixture: Mapping[str, MixedSet], usual: Sequence[str], usual_weights: Sequence[float] | None
) -> tuple[list[Callable], list[float]]:
    """(functions, their weights): datasets that name the same function with the same weight share it.

    The first function of every dataset comes before all others: it decides what is solved.

    Args:
        usual, usual_weights: the run's, of datasets without functions of their own.
    """
    users: dict[tuple[bool, str, float], list[str]] = {}  # is first, entry, weight -> datasets
    for name, one in mixture.items():
        entries = usual if one.reward_funcs is None else one.reward_funcs
        weights = usual_weights if one.reward_funcs is None else one.reward_weights
        for i, (entry, weight) in enumerate(zip(entries, weights or [1.0] * len(entries), strict=True)):
            users.setdefault((i == 0, entry, float(weight)), []).append(name)
    columns = sorted(users, key=lambda column: not column[0])
    functions: list[Callable] = [TaskReward(load_reward(column[1]), tuple(users[column])) for column in columns]
    return functions, [weight for _, _, weight in columns]


def check_chosen_prompts(dataset: object, args: SAPOConfig, plan: BatchPlan) -> None:
    """Refuse a training set from which the prompts that the configuration asks for can't be chosen.

    Raises:
        ValueError: it is a stream, or its column `task` does not hold the datasets of the mixture, each often enough.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{args.chooses_prompts} needs a training set with a length, not a stream. Load it whole.")
    sets = args.mixture
    if not sets:
        return
    if "task" not in dataset.column_names:
        raise ValueError(f"the training set has no column 'task' with the names of datasets: {', '.join(sets)}.")
    held = Counter(map(str, dataset["task"]))
    for task in held:
        if task not in sets:
            raise ValueError(
                f"the column task holds {task!r}, which is none of datasets: {', '.join(sets)}."
                f"{did_you_mean(task, sets)}"
            )
    for name, count in prompts_of_sets(plan.prompts_per_rollout, sets).items():
        if held[name] < count:
            raise ValueError(
                f"datasets.{name} has {held[name]} prompts, and one rollout takes {count} different ones of it. Give "
                "it more prompts or a smaller share, or take smaller rollouts."
            )
