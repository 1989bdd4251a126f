r"""Are the gold answers usable? Checked when the data is loaded, not found out after a week of rewards.

A raw gold such as `2\sqrt{3}` reads as 2 in a verifier that expects formulas in `$...$`. Here every gold is brought
into one form, and must be right when it is given as an answer: `\boxed{gold}` against `gold`.
"""

import re
from dataclasses import dataclass

from sapo_trl.rewards.grading.grader import usable_gold
from sapo_trl.rewards.grading.leaves import is_text
from sapo_trl.rewards.grading.policy import DEFAULT_OPTIONS, GraderOptions
from sapo_trl.rewards.verifier.pool import DEADLINE_S, get_verifier

MAX_EXAMPLES = 5
EXAMPLE_CHARS = 60
_BARE_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class GoldReport:
    """What became of the gold answers: one normalised text per row, "" where there is none."""

    answers: list[str]
    mended: int
    unusable_rows: list[int]
    reasons: dict[int, str]
    examples: list[str]

    @property
    def unusable_frac(self) -> float:
        return len(self.unusable_rows) / max(1, len(self.answers))

    def summary(self) -> str:
        """One paragraph for the log."""
        text = f"{len(self.answers)} gold answers, {self.mended} mended, {len(self.unusable_rows)} unusable"
        if not self.unusable_rows:
            return text + "."
        rows = ", ".join(f"row {row} ({self.reasons[row]})" for row in self.unusable_rows[:MAX_EXAMPLES])
        more = len(self.unusable_rows) - MAX_EXAMPLES
        return f"{text} ({self.unusable_frac:.1%}): {rows}" + (f" and {more} more." if more > 0 else ".")


def normalise_gold(gold: object) -> str | None:
    r"""The gold as a formula in `$...$`, a bare number, or None.

    >>> normalise_gold(r"2\sqrt{3}"), normalise_gold("7"), normalise_gold("Tuesday"), normalise_gold("")
    ('$2\\sqrt{3}$', '7', '$\\text{Tuesday}$', None)
    """
    text = usable_gold(gold)
    if text is None:
        return None
    if _BARE_NUMBER.fullmatch(text):
        return text
    return rf"$\text{{{text}}}$" if is_text(text) and r"\text" not in text else f"${text}$"


def check_golds(
    answers: list,
    options: GraderOptions = DEFAULT_OPTIONS,
    max_unusable_frac: float | None = None,
    deadline_s: float = DEADLINE_S,
) -> GoldReport:
    """Normalises gold answers and checks that each is right against its own boxed form.

    Raises a ValueError when the share of unusable ones is above `max_unusable_frac`. Their text is in `examples` (cut
    to 60 characters), not in the error.
    """
    normalised = [normalise_gold(answer) for answer in answers]
    boxed = [rf"\boxed{{{text.strip('$')}}}" if text else "" for text in normalised]
    grades = get_verifier().verify(boxed, [text or "" for text in normalised], options, deadline_s=deadline_s)
    reasons = {
        row: "no answer that can be compared" if text is None else f"its own boxed form is graded {grade.verdict}"
        for row, (text, grade) in enumerate(zip(normalised, grades, strict=True))
        if grade.verdict != "right"
    }
    report = GoldReport(
        answers=["" if row in reasons else text for row, text in enumerate(normalised)],
        mended=sum(row not in reasons and text != str(answers[row]) for row, text in enumerate(normalised)),
        unusable_rows=list(reasons),
        reasons=reasons,
        examples=[str(answers[row])[:EXAMPLE_CHARS] for row in list(reasons)[:MAX_EXAMPLES]],
    )
    if max_unusable_frac is not None and report.unusable_frac > max_unusable_frac:
        raise ValueError(
            f"{report.summary()} More than max_unusable_frac={max_unusable_frac} of the gold answers cannot be "
            f"used. Check answer_column, or drop these rows."
        )
    return report
