"""Named evaluation sets: what is sampled from each, while training (`eval_sets`) and by `scripts/evaluate.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sapo_trl.errors import did_you_mean, named_mappings


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set and its sampling. What is left out is taken from the run or the command."""

    dataset_name: str | None = None  # preset, Hub id or local file
    dataset_split: str | None = None
    num_problems: int | None = None  # only the first ones; default: all
    num_samples: int | None = None  # completions per problem
    ks: tuple[int, ...] | None = None  # of pass@k and maj@k; default: 1 and num_samples
    temperature: float | None = None  # 0 is greedy
    top_p: float | None = None
    max_completion_length: int | None = None  # tokens

    def over(self, usual: EvalSet) -> EvalSet:
        """The set, with the values of `usual` where it has none."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        filled = replace(usual, **given)
        if filled.ks is None and type(filled.num_samples) is int:  # else refused by `check`
            filled = replace(filled, ks=tuple(sorted({1, filled.num_samples})))
        return filled

    def check(self, place: str) -> None:
        """Refuse values that would fail, or mislead, after hours of sampling.

        Args:
            place: what stands before a name where it was given, such as `--` or `eval_sets.aime.`.

        Raises:
            ValueError: with the name and the nearest fix.
        """
        for name in ("num_problems", "num_samples", "max_completion_length"):
            value = vars(self)[name]
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{place}{name} {value} is {'less than 1' if type(value) is int else 'no integer'}.")
        samples = self.num_samples or math.inf
        for k in self.ks or ():
            if type(k) is not int or not 1 <= k <= samples:
                raise ValueError(
                    f"{place}ks {k}: pass@k needs k from 1 to {place}num_samples {samples}. Raise num_samples, or "
                    "change k."
                )
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
                raise ValueError(f"{place}{name} {value!r} is no number.")
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"{place}temperature {self.temperature} must be 0 (greedy) or a finite number above it.")
        if self.temperature == 0 and samples > 1:
            raise ValueError(
                f"{place}temperature 0 is greedy, so that all {samples} samples of a problem would be the same. Add "
                f"{place}num_samples 1, or sample with {place}temperature 1."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"{place}top_p {self.top_p} must be above 0 and at most 1.")


def read_sets(given: Any, usual: EvalSet) -> dict[str, EvalSet]:
    """Name -> set, complete and checked, of a config's `eval_sets`.

    Raises:
        ValueError: a name or key that is not possible, with the nearest one that is, or a value that is refused.
    """
    sets: dict[str, EvalSet] = {}
    for name, values in named_mappings("eval_sets", given, EvalSet, "{aime: {dataset_name: aime25}}"):
        place = f"eval_sets.{name}"
        for key, value in values.items():
            if key.startswith("dataset") and not isinstance(value, str | None):
                raise ValueError(f"{place}.{key} {value!r} is no text.")
        ks = values.get("ks")
        if ks is not None and not (isinstance(ks, list | tuple) and ks and all(type(k) is int for k in ks)):
            raise ValueError(f"{place}.ks {ks!r} is no list of integers, such as [1, 4].")
        read: dict[str, Any] = {**values, "ks": None if ks is None else tuple(ks)}
        sets[name] = EvalSet(**read).over(usual)
        sets[name].check(f"{place}.")
    return sets


def check_best_metric(metric: str, sets: Mapping[str, EvalSet]) -> None:
    """Refuse a `metric_for_best_model` that none of the sets will log.

    Raises:
        ValueError: with the nearest name that is logged.
    """
    full = metric if metric.startswith("eval_") else f"eval_{metric}"
    known = [f"eval_{name}_{score}" for name, one in sets.items() for score in _scores(one.ks or ())]
    is_score = re.fullmatch(r".*_(pass|maj)_at_\d+(_low|_high)?", full) is not None
    is_known = re.sub("_(low|high)$", "", full) in known
    if not is_known and (is_score or not full.startswith(tuple(f"eval_{name}_" for name in sets))):
        raise ValueError(
            f"metric_for_best_model={metric!r} is logged by none of the eval_sets {', '.join(sets)}."
            f"{did_you_mean(full, known)}"
        )


def _scores(ks: Iterable[int]) -> list[str]:
    return ["pass_at_1", "reward", *(f"{kind}_at_{k}" for k in ks if k > 1 for kind in ("pass", "maj"))]
