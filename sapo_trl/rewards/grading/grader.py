"""The strict grader: does the answer that a completion ends on equal the reference answer? See also `GraderOptions`."""

import contextlib
import re
from functools import lru_cache
from numbers import Real
from typing import NamedTuple

from sapo_trl.rewards.grading.extraction import final_answer
from sapo_trl.rewards.grading.latex import BrokenError, Token, UnreadableError, plain, tokenize
from sapo_trl.rewards.grading.parser import Parser
from sapo_trl.rewards.grading.policy import DEFAULT_OPTIONS, Grade, GraderOptions
from sapo_trl.rewards.grading.texts import listed_texts, visible_part
from sapo_trl.rewards.grading.tree import Node

MAX_ANSWER_CHARS = 1500  # the longest answers of the usual sets are matrices of some 300 characters
MAX_GOLD_CHARS = 1000
MAX_GOLD_WORDS = 8  # a reference of more words is a sentence, and no answer will ever equal it
_NOTHING = frozenset(("", "nan", "none", "null", "n/a", "inf", "-inf", "#n/a", "#div/0!", "#name?", "#ref!", "#value!"))
_DELIMITERS = re.compile(r"^\s*(?:\${1,2}|\\\(|\\\[)|(?:(?<!\\)\${1,2}|\\\)|\\\])[.\s]*$|(?<!\.)\.\s*$")
_PM, _MP = Token("command", "pm"), Token("command", "mp")
_BOTH_SIGNS = [{_PM: Token("sign", a), _MP: Token("sign", b)} for a, b in ("+-", "-+")]
_CLOCK = re.compile(r"0?(\d{1,2}):([0-5]\d)(?:\s?([ap])\.?\s?m\.?)?")
_HOUR = re.compile(r"^\d{1,2}(?=\s?[ap]\.?\s?m)")
_DASHED = re.compile(r"\d+(?:\s?-\s?\d+){1,2}|\d+(?:/\d+){2}")  # a date, a range, a score: nothing to be computed
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\s?\d{3})+(?!,?\d)")
_LETTER = re.compile(r"(?:(?:[oO]ption|[cC]hoice|[aA]nswer|选)\s?:?\s?)?\(?([A-Ja-j])\)?[.:)]?")
_LETTER_AND_VALUE = re.compile(r"(?:\(([A-J])\)|([A-J])[.:)])\s?((?!\\(?:ll|gg|[lgn]eq|in)\b|[=<>]).*)")


class Reading(NamedTuple):
    """A text as one plain line and as a tree, None where it has none; `broken` texts are no answer to anything."""

    line: str
    node: Node | None = None
    declared: frozenset[tuple[str, bool]] = frozenset()  # names, and whether they are integers
    broken: bool = False


@lru_cache(maxsize=4096)
def read(text: str, commas: bool = True) -> Reading:
    """Reads an answer. With `commas`, `1,234` is one number; without, it is a list of two."""
    line = ""
    try:
        tokens = tokenize(text, commas)
        line = plain(tokens)
        declared: set[tuple[str, bool]] = set()
        # ± is a list of two
        variants = dict.fromkeys(tuple(signs.get(token, token) for token in tokens) for signs in _BOTH_SIGNS)
        nodes = [Parser(variant, declared).answer() for variant in variants]
        parts = tuple(part for node in nodes for part in (node.args[0] if node.op == "list" else (node,)))
        node = nodes[0] if len(nodes) == 1 else Node("list", (parts, ","))
        return Reading(line, node, frozenset(declared))
    except (UnreadableError, RecursionError) as error:
        unpaired = sum(map(line.count, "([{")) != sum(map(line.count, ")]}"))
        return Reading(line, broken=isinstance(error, BrokenError) or unpaired)


def grade(text: str, gold: object, options: GraderOptions = DEFAULT_OPTIONS, prefilled: bool = False) -> Grade:
    r"""The verdict on one completion. Call it in a worker process: an answer may take long.

    >>> grade(r"so we get \boxed{\frac{1}{2}}.", "0.5").verdict, grade(r"\boxed{5} or \boxed{6}", "6").verdict
    ('right', 'wrong')
    """
    references = reference_answers(gold)
    if not references:
        return Grade("gold_unusable")
    parts = final_answer(visible_part(text, prefilled), options.require_box)
    if not parts:
        return Grade("no_answer")
    if sum(map(len, parts)) > MAX_ANSWER_CHARS:
        return Grade("wrong", capped=True)
    right = any(_is_met(reference, parts, options) for reference in references)
    return Grade("right" if right else "wrong", ", ".join(parts))


def _is_met(reference: str, parts: tuple[str, ...], options: GraderOptions) -> bool:
    """Whether the parts together are the reference, or each of them is: the same answer in two forms is no hedge."""
    if len(parts) > 1:  # a letter beside a value: what the question asks for counts
        letters = tuple(p for p in parts if any(kind.fullmatch(read(p).line) for kind in (_LETTER, _LETTER_AND_VALUE)))
        values = tuple(p for p in parts if p.isalpha() or not _LETTER.fullmatch(read(p).line))
        parts = (letters if choice_letter(reference) else values) or parts
    together = answers_equal(reference, ", ".join(parts), options)
    return together or (len(parts) > 1 and all(answers_equal(reference, part, options) for part in parts))


def reference_answers(gold: object) -> tuple[str, ...]:
    r"""The texts of which one has to be met; none for what can never be equalled: nothing, a sentence, broken LaTeX.

    A list, or a text that is one (`["0.5", "1/2"]`), says "one of". A whole solution gives the answer that it ends on.

    >>> reference_answers("$\\dfrac{1}{2}$"), reference_answers(7), reference_answers("['70']"), reference_answers("1/")
    (('\\dfrac{1}{2}',), ('7',), ('70',), ())
    """
    if isinstance(gold, (list, tuple)):
        return tuple(dict.fromkeys(text for item in gold for text in reference_answers(item)))
    text = str(gold).strip() if isinstance(gold, (str, Real)) and not isinstance(gold, bool) else ""
    if (items := listed_texts(text)) is not None:
        return reference_answers(items)
    if re.search(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])|####|</answer>", text):
        text = ", ".join(final_answer(text))
    text = _DELIMITERS.sub("", text).strip()
    sentence = len(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", text)) > MAX_GOLD_WORDS
    if text.lower() in _NOTHING or len(text) > MAX_GOLD_CHARS or sentence or read(text).broken or not read(text).line:
        return ()
    return (text,)


def answers_equal(gold: str, answer: str, options: GraderOptions = DEFAULT_OPTIONS) -> bool:
    """Whether an answer as it stands in the box equals one text of `reference_answers`."""
    wanted, given = read(gold), read(answer)
    if wanted.line == given.line != "":
        return True
    if letter := choice_letter(gold):
        return _same_choice(letter, given.line, options)
    if clock := _CLOCK.fullmatch(wanted.line.lower()):
        other = _CLOCK.fullmatch(_HOUR.sub(r"\g<0>:00", given.line.lower()))
        return other is not None and clock.groups()[:2] == other.groups()[:2] and clock[3] in (None, other[3])
    if _DASHED.fullmatch(wanted.line):
        other = given.line.strip("() ")
        return _DASHED.fullmatch(other) is not None and _dashed_parts(other) == _dashed_parts(wanted.line)
    from sapo_trl.rewards.grading.compare import Comparison  # mpmath: only ever imported in a worker process

    pairs = [(wanted, given)]
    if _THOUSANDS.fullmatch(gold) and "," in answer:  # one number and no list, whose answer may stand in brackets
        pairs.append((wanted, read(_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), answer))))
    elif "," in gold and "," in answer:
        pairs.append((read(gold, False), read(answer, False)))
    if re.fullmatch(r"\s*-?\d+,\d+\s*", answer) and "," not in gold:  # 0,5 for 0.5
        pairs.append((wanted, read(answer.replace(",", "{,}"))))
    with contextlib.suppress(RecursionError):
        for left, right in pairs:
            said = left.declared | right.declared
            integers = frozenset(name for name, is_integer in said if is_integer)
            agreed = all((name, False) not in said for name in integers)  # k is not real here and an integer there
            if agreed and left.node and right.node and Comparison(options, integers).same(left.node, right.node):
                return True
    return False


def _dashed_parts(line: str) -> tuple[bool, list[int]]:
    """What joins the numbers, and the numbers: 03-05 is 3-5."""
    return "/" in line, [int(digits) for digits in re.findall(r"\d+", line)]


def choice_letter(gold: str) -> str | None:
    """The letter when a reference is one: B, (B), (B) 12."""
    line = read(gold).line
    match = re.fullmatch(r"\(?([A-J])\)?[.:)]?", line) or re.fullmatch(r"\(([A-J])\)(?!\s?,)[^=<>]*", line)
    return match[1] if match else None


def _same_choice(letter: str, line: str, options: GraderOptions) -> bool:
    """The letter alone or with its value. Another letter in the rest, or a second answer, is hedging."""
    if alone := _LETTER.fullmatch(line):
        return letter == (alone[1].upper() if options.choice_ignore_case else alone[1])
    match = _LETTER_AND_VALUE.fullmatch(line)
    hedged = match is None or re.search(r"\b[A-J]\b|\b(?:or|and|not|wrong)\b|[,=]", match[3])
    return not hedged and letter in (match[1], match[2])
