"""A mixture's rewards: every dataset has its own functions and weights, and TRL one column for each of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import arguments_of, check_arguments
from sapo_trl.mixture import MixedSet
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
