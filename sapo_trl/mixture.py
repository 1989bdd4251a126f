"""Mixtures: the datasets that share every rollout in a fixed ratio, each with its own rewards, prompts and length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sapo_trl.errors import named_mappings


@dataclass(frozen=True)
class MixedSet:
    """One dataset of a mixture. What is left out is taken from the run; the dataset's name is its rows' `task`."""

    dataset_name: str | None = None  # preset, Hub id or local file
    dataset_config: str | None = None
    dataset_split: str | None = None
    share: float | None = None  # of the prompts of every rollout; left out everywhere: equal
    reward_funcs: list[str] | None = None
    reward_weights: list[float] | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    system_prompt: str | None = None
    prompt_template: str | None = None
    max_samples: int | None = None
    max_prompt_tokens: int | None = None
    max_completion_length: int | None = None  # tokens, at most the run's

    def check(self, place: str, longest: int | None) -> None:
        """Refuse values of a wrong type or size; `longest`: the run's `max_completion_length`.

        Raises:
            ValueError: with the name and the nearest fix.
        """
        for name, value in vars(self).items():
            if value is None:
                continue
            if name.startswith("max_") and (type(value) is not int or value < 1):
                raise ValueError(f"{place}.{name} {value!r} must be an integer of at least 1.")
            if name in ("reward_funcs", "reward_weights"):
                kind, words = (str, "texts") if name == "reward_funcs" else ((int, float), "numbers")
                if not isinstance(value, list) or not value or not all(isinstance(x, kind) for x in value):
                    raise ValueError(f"{place}.{name} {value!r} must be a list of {words}.")
            if name == "share" and (type(value) not in (int, float) or not 0 < value <= 1):
                raise ValueError(f"{place}.share {value!r} must be a number above 0 and at most 1.")
            if name.endswith(("name", "config", "split", "column", "prompt", "template")) and type(value) is not str:
                raise ValueError(f"{place}.{name} {value!r} is no text.")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs or ()):
            raise ValueError(
                f"{place}.reward_weights holds {len(self.reward_weights)} numbers for {len(self.reward_funcs or ())} "
                "reward_funcs of its own. Give one per function."
            )
        if self.max_completion_length is not None and self.max_completion_length > (longest or 0):
            raise ValueError(
                f"{place}.max_completion_length {self.max_completion_length} is more than the run's "
                f"max_completion_length {longest}. Raise the run's: it is the longest of all."
            )


def read_mixture(given: Any, longest: int | None) -> dict[str, MixedSet]:
    """Name -> dataset, checked, of a config's `datasets`; the shares are filled in.

    Args:
        longest: the run's `max_completion_length`.

    Raises:
        ValueError: a name or key that is not possible, with the nearest one that is, or a value that is refused.
    """
    sets: dict[str, MixedSet] = {}
    for name, values in named_mappings("datasets", given, MixedSet, "{math: {dataset_name: gsm8k}}"):
        sets[name] = MixedSet(**values)
        sets[name].check(f"datasets.{name}", longest)
    if sets:
        _check_shares({name: one.share for name, one in sets.items()})
    return sets


def _check_shares(shares: Mapping[str, float | None]) -> None:
    given = [share for share in shares.values() if share is not None]
    if not given:
        return
    if len(given) < len(shares):
        lacking = next(name for name, share in shares.items() if share is None)
        raise ValueError(f"datasets.{lacking} has no share and others have. Give every one a share, or none (equal).")
    if abs(sum(given) - 1) > 1e-6:
        listed = " + ".join(f"{share:g}" for share in given)
        raise ValueError(f"the shares of datasets add up to {listed} = {sum(given):g}, not to 1. Change one of them.")


def shares_of(sets: Mapping[str, MixedSet]) -> dict[str, float]:
    """Name -> share of the prompts of a rollout; equal ones where none is given."""
    return {name: 1 / len(sets) if one.share is None else one.share for name, one in sets.items()}


def apportion(num: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`num` prompts as whole numbers in the ratio of the shares, the largest remainders rounded up.

    >>> apportion(16, {"math": 0.5, "code": 0.3, "logic": 0.2})
    {'math': 8, 'code': 5, 'logic': 3}
    """
    total = sum(shares.values())
    exact = {name: num * share / total for name, share in shares.items()}
    counts = {name: int(x + 1e-9) for name, x in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: num - sum(counts.values())]:
        counts[name] += 1
    return counts


def prompts_of_sets(num: int, sets: Mapping[str, MixedSet]) -> dict[str, int]:
    """Name -> prompts in every rollout of `num`.

    Raises:
        ValueError: a dataset would get none.
    """
    shares = shares_of(sets)
    counts = apportion(num, shares)
    for name, count in counts.items():
        if count == 0:
            raise ValueError(
                f"datasets.{name} has a share of {shares[name]:g}, which is none of the {num} prompts of a rollout. "
                f"Raise its share, or take rollouts of at least {round(1 / min(shares.values()))} prompts "
                "(per_device_train_batch_size, num_mini_batches)."
            )
    return counts
