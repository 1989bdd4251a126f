"""What the grader leaves to a decision: its options with their defaults, and the names of its verdicts."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

# Every graded completion gets exactly one of these names. `gold_unusable` is paid None, `right` 1, the others 0.
VERDICTS = ("right", "wrong", "no_answer", "gold_unusable", "timeout", "error")


@dataclass(frozen=True)
class GraderOptions:
    """Questions of policy. The defaults refuse what a strict teacher would not let pass.

    Args:
        require_box: An answer counts only in a box; otherwise answer tags and a plain "the answer is ..." count too.
        restated: `refused`: an answer is evaluated, so one that leaves a sum, product, integral, derivative, limit,
            determinant, remainder, gcd, lcm, max or min undone is wrong where the reference has none. `evaluated`: sums
            and products between integers, remainders, gcd, lcm, max and min of integers count by their value.
        percent: `value`: 50% is 1/2. `same_number`: 50% is 50 (for questions "how many per cent").
        degrees: `optional`: 90° may be said as 90 and as π/2. `radians`: 90° is π/2. `strict`: 90° is only 90°.
        units: `optional`: a unit may be missing on either side; two different units never agree. `strict`: same unit.
        tuple_as_set: {1, 2} is accepted for (1, 2), in any order.
        bare_list_as_tuple: "1, 2" without brackets is accepted for (1, 2), in this order.
        choice_ignore_case: b is accepted for the multiple-choice letter B.
        decimals: `exact`: 0.333 is 333/1000. `rounded`: a decimal of at least three digits also equals what rounds
            to it.
        bare_base: 101 is accepted for 101₂.
    """

    require_box: bool = False
    restated: Literal["refused", "evaluated"] = "refused"
    percent: Literal["value", "same_number"] = "value"
    degrees: Literal["optional", "radians", "strict"] = "optional"
    units: Literal["optional", "strict"] = "optional"
    tuple_as_set: bool = False
    bare_list_as_tuple: bool = True
    choice_ignore_case: bool = True
    decimals: Literal["exact", "rounded"] = "exact"
    bare_base: bool = False

    def __post_init__(self):
        for field in fields(self):
            name, allowed, value = field.name, get_args(field.type), vars(self)[field.name]
            if allowed and value not in allowed:
                raise ValueError(f"{name}={value!r} is no policy of the grader. Set it to one of {', '.join(allowed)}.")


DEFAULT_OPTIONS = GraderOptions()


@dataclass(frozen=True)
class Grade:
    """A verdict, the answer that was read, whether it was too long to be looked at, and the score of another scorer."""

    verdict: str
    extracted: str = ""
    capped: bool = False
    score: float | None = None
