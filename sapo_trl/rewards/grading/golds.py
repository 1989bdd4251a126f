r"""Are the reference answers usable? Checked when the data is loaded, not found out after a week of rewards.

A usable one can be read, and is right as an answer: `\boxed{reference}`. What can only be compared as text (Tuesday) is
usable too, and counted apart: no other spelling of it is right.
"""

import json
import re
from dataclasses import dataclass

from sapo_trl.rewards.grading.grader import read, reference_answers
from sapo_trl.rewards.grading.policy import DEFAULT_OPTIONS, GraderOptions
from sapo_trl.rewards.verifier.pool import configure_verifier

MAX_EXAMPLES = 5


@dataclass(frozen=True)
class GoldReport:
    """What became of the reference answers: one normalised text per row, "" where there is none."""

    answers: list[str]
    corrected: int
    text_rows: list[int]
    unusable_rows: list[int]
    reasons: dict[int, str]

    @property
    def unusable_frac(self) -> float:
        return len(self.unusable_rows) / max(1, len(self.answers))

    def summary(self) -> str:
        """One paragraph for the log."""
        text = f"{len(self.answers)} reference answers, {self.corrected} corrected"
        text += f", {len(self.text_rows)} compared as text (rows {_first(self.text_rows)})" if self.text_rows else ""
        reasons = _first([f"row {row} ({self.reasons[row]})" for row in self.unusable_rows])
        share = f" ({self.unusable_frac:.1%}): {reasons}." if self.unusable_rows else "."
        return f"{text}, {len(self.unusable_rows)} unusable{share}"


def _first(items: list) -> str:
    more = len(items) - MAX_EXAMPLES
    return ", ".join(map(str, items[:MAX_EXAMPLES])) + (f" and {more} more" if more > 0 else "")


def normalise_gold(gold: object) -> str | None:
    """The reference as a formula in `$...$`, a bare number, a JSON list of such texts ("one of"), or None."""
    texts = []
    for text in reference_answers(gold):
        upright = rf"\text{{{text}}}" if is_text(text) and "\\" not in text else text
        texts.append(text if re.fullmatch(r"-?\d+(?:\.\d+)?", text) else f"${upright}$")
    return json.dumps(texts, ensure_ascii=False) if len(texts) > 1 else texts[0] if texts else None


def is_text(text: str) -> bool:
    r"""Whether a reference can only be compared as text: Tuesday, A \perp B \heartsuit."""
    node = read(text).node
    return node is None or all(part.op == "text" for part in (node.args[0] if node.op == "list" else (node,)))


def check_golds(
    answers: list, options: GraderOptions = DEFAULT_OPTIONS, max_unusable_frac: float | None = None
) -> GoldReport:
    """Normalises reference answers and checks that each can be read and is right against its own boxed form.

    Raises a ValueError when the share of unusable ones is above `max_unusable_frac`; it holds no text of theirs.
    """
    texts = [reference_answers(answer) for answer in answers]
    normalised = [normalise_gold(answer) or "" for answer in answers]
    boxed = [rf"\boxed{{{row[0]}}}" if row else "" for row in texts]
    grades = configure_verifier().verify(boxed, normalised, options)
    reasons = {
        row: f"its own boxed form is graded {grade.verdict}" if normalised[row] else "no answer that can be read"
        for row, grade in enumerate(grades)
        if grade.verdict != "right"
    }
    usable = [row for row in range(len(answers)) if row not in reasons]
    report = GoldReport(
        answers=["" if row in reasons else text for row, text in enumerate(normalised)],
        corrected=sum(normalised[row] != str(answers[row]) for row in usable),
        text_rows=[row for row in usable if any(map(is_text, texts[row]))],
        unusable_rows=list(reasons),
        reasons=reasons,
    )
    if max_unusable_frac is not None and report.unusable_frac > max_unusable_frac:
        raise ValueError(
            f"{report.summary()} More than max_unusable_frac={max_unusable_frac} of the reference answers cannot be "
            f"used. Check answer_column, or drop these rows."
        )
    return report
