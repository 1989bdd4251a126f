"""Rewards for what is mixed into mathematics: logic puzzles and multiple-choice questions.

In a mixture every row names its kind in a column `task` (`math`, `logic_puzzle`, `multiple_choice`); each reward then
scores its own rows and returns None for the others, which TRL leaves out of their sum. Without that column every row is
its own.
"""

import re
from dataclasses import dataclass

from sapo_trl.rewards.contract import own_rows
from sapo_trl.rewards.grading.extraction import final_answer
from sapo_trl.rewards.grading.grader import answers_equal, choice_letter, reference_answers
from sapo_trl.rewards.grading.policy import GraderOptions
from sapo_trl.rewards.grading.texts import completion_text, prefilled_thoughts, visible_part

ANSWER_TAG = re.compile(r"<answer>((?:(?!</?answer>).){0,4000})</answer>", re.DOTALL)
# `Zoey is a knight`
_CLAIM = re.compile(r"\b([A-Z][a-zA-Z]{0,30})\s{1,3}is\s{1,3}(not\s{1,3})?an?\s{1,3}([a-z]{2,20})\b")


@dataclass(frozen=True)
class LogicPuzzle:
    """1.0 when the completion gives the roles of the reference answer, for every person and for nobody else.

    Knights-and-knaves reward of Logic-RL (https://arxiv.org/abs/2502.14768, section 3.2), whose values are 2, -1.5 and
    -2 for right, wrong and unreadable. The answer is read from `<answer>...</answer>`, else from the part after the
    thought. The reference answer is a text such as "Zoey is a knight, Oliver is a knave".

    >>> reward = LogicPuzzle()
    >>> reward(["<answer>(1) Zoey is a knave (2) Ed is a knight</answer>"], answer=["Ed is a knight. Zoey is a knave."])
    [1.0]
    """

    right: float = 1.0
    wrong: float = 0.0
    unreadable: float = 0.0
    __name__ = "logic_puzzle_reward"
    own_task = "logic_puzzle"

    def __call__(self, completions: list, answer: list, task: list[str] | None = None, **kwargs) -> list[float | None]:
        own = own_rows(task, self.own_task, len(completions))
        return [
            self._value(completion_text(completion), reference) if mine else None
            for completion, reference, mine in zip(completions, answer, own, strict=True)
        ]

    def _value(self, text: str, reference: object) -> float | None:
        wanted = _roles(reference) if isinstance(reference, str) else None
        if not wanted:
            return None
        visible = visible_part(text)
        answers = ANSWER_TAG.findall(visible)
        given = _roles(answers[-1] if answers else visible)
        if not given:
            return self.unreadable
        return self.right if given == wanted else self.wrong


def _roles(text: str) -> dict[str, str] | None:
    """Name → role; None when a text claims two roles for one person, or denies one, which is not an answer."""
    roles: dict[str, str] = {}
    for name, denied, role in _CLAIM.findall(text):
        if denied or roles.setdefault(name.lower(), role) != role:
            return None
    return roles


@dataclass(frozen=True)
class MultipleChoice:
    r"""1.0 when the completion ends on the right letter and no other; None where the reference answer is no letter.

    The accuracy reward of DeepSeek-R1 (https://arxiv.org/abs/2501.12948, section 2.2.2) for questions with options. It
    reads letters only and needs no computer algebra, so it runs in the trainer's process.

    >>> MultipleChoice()([r"\boxed{B}", "The answer is (C).", r"\boxed{A} or \boxed{B}"], answer=["B", "C", "B"])
    [1.0, 1.0, 0.0]
    """

    ignore_case: bool = True
    prefilled: bool | None = None
    __name__ = "multiple_choice_reward"
    own_task = "multiple_choice"

    def __call__(
        self, completions: list, answer: list, prompts: list | None = None, task: list[str] | None = None, **kwargs
    ) -> list[float | None]:
        own = own_rows(task, self.own_task, len(completions))
        thoughts = prefilled_thoughts(len(completions), prompts, self.prefilled)
        rows = zip(completions, answer, own, thoughts, strict=True)
        return [self._value(completion_text(c), ref, thought) if mine else None for c, ref, mine, thought in rows]

    def _value(self, text: str, reference: object, thought: bool) -> float | None:
        references = reference_answers(reference)
        if len(references) != 1 or choice_letter(references[0]) is None:
            return None
        parts = final_answer(visible_part(text, thought))
        options = GraderOptions(choice_ignore_case=self.ignore_case)
        return float(len(parts) == 1 and len(parts[0]) < 200 and answers_equal(references[0], parts[0], options))
