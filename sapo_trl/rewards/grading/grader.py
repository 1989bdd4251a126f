r"""The strict grader: does the answer that a completion ends on equal the gold answer?

It stands on math-verify's parser and adds what a reward needs, where a model is paid for every loophole: an answer is
compared kind by kind (`shapes`), literals are compared exactly (`notation`), a unit must be a unit (`units`), and an
answer that is hedged, withdrawn, chained or padded with words is not the answer (`extraction`). Questions of policy,
on which mathematicians differ, are the fields of `GraderOptions`.
"""

import re

from sapo_trl.rewards.grading.choices import choice_letter, same_choice
from sapo_trl.rewards.grading.compare import shapes_equal
from sapo_trl.rewards.grading.extraction import final_answer
from sapo_trl.rewards.grading.leaves import is_text, squeezed, words
from sapo_trl.rewards.grading.notation import balanced, respell
from sapo_trl.rewards.grading.policy import DEFAULT_OPTIONS, Grade, GraderOptions
from sapo_trl.rewards.grading.shapes import read_shape
from sapo_trl.rewards.grading.texts import visible_part

MAX_ANSWER_CHARS = 1500  # the longest answers of the usual sets are matrices of some 300 characters
MAX_GOLD_CHARS = 1000
MAX_GOLD_WORDS = 8  # a gold of more words is a sentence, and no answer will ever equal it


def grade(text: str, gold: object, options: GraderOptions = DEFAULT_OPTIONS, prefilled: bool = False) -> Grade:
    r"""The verdict on one completion. Call it in a worker process: an answer may take for ever.

    >>> grade(r"so we get \boxed{\frac{1}{2}}.", "0.5").verdict
    'right'
    >>> grade(r"\boxed{5} or \boxed{6}", "6").verdict
    'wrong'
    """
    gold_text = usable_gold(gold)
    if gold_text is None:
        return Grade("gold_unusable")
    answer = final_answer(visible_part(text, prefilled), options.require_box)
    if not answer.parts:
        return Grade("no_answer")
    if sum(map(len, answer.parts)) > MAX_ANSWER_CHARS:
        return Grade("wrong", capped=True)
    extracted = ", ".join(answer.parts)
    right = answers_equal(gold_text, extracted, options)
    if not right and len(answer.parts) > 1:  # the same answer in two forms is no hedge
        right = all(answers_equal(gold_text, part, options) for part in answer.parts)
    return Grade("right" if right else "wrong", extracted)


def usable_gold(gold: object) -> str | None:
    r"""The respelled gold, or None for what can never be equalled: nothing, a sentence, broken brackets.

    >>> usable_gold("$\\dfrac{1}{2}$"), usable_gold(7), usable_gold(""), usable_gold("#### 12")
    ('\\frac{1}{2}', '7', None, '12')
    """
    if isinstance(gold, (list, tuple)) and len(gold) == 1:
        gold = gold[0]
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        return None
    text = str(gold)
    if r"\boxed" in text or "####" in text:  # a whole solution that ends on the answer
        text = ", ".join(final_answer(text).parts)
    if len(text) > MAX_GOLD_CHARS:
        return None
    text = respell(text)
    usable = text and balanced(text) and len(re.findall(r"(?<!\\)\b[a-zA-Z]{2,}", text)) <= MAX_GOLD_WORDS
    return text if usable else None


def answers_equal(gold: str, answer: str, options: GraderOptions = DEFAULT_OPTIONS) -> bool:
    """Whether an answer as it stands in the box equals a respelled gold."""
    answer = respell(answer)
    if not answer or not balanced(answer):
        return False
    if squeezed(gold) == squeezed(answer):
        return True
    if is_text(gold) and words(gold) == words(answer):  # before "Carol and Bob" is read as a list
        return True
    letter = choice_letter(gold)
    if letter:
        return same_choice(letter, answer, options)
    return shapes_equal(read_shape(gold), read_shape(answer), options)
