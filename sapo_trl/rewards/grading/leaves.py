"""Two single expressions: compared as text, as exact numbers with their units, and at last as symbols.

The cheap comparisons come first and are final where they apply: two literals are equal or they are not, and no answer
of text is ever multiplied out letter by letter.
"""

import re
from fractions import Fraction

from sapo_trl.rewards.grading.notation import exact_number
from sapo_trl.rewards.grading.policy import GraderOptions
from sapo_trl.rewards.grading.units import split_unit

# Words that say the same. Everything else that is text must be the same text.
_SYNONYMS = [
    {"no solution", "no solutions", "none", "no real solution", "no real solutions", r"\emptyset", "empty set"},
    {"does not exist", "dne", "limit does not exist"},
    {"undefined", "not defined"},
    {"infinitely many", "infinite", "infinitely many solutions"},
]
_SMALL_WORDS = {"no", "yes", "up", "on", "am", "pm"}
_TEXT_COMMAND = re.compile(r"\\text\s?\{([^{}]*)\}")
_BASE = re.compile(r"\(?([0-9A-Fa-f]+)\)?_(?:(\d)|\{\s?(?:\\text\{\s?)?(\w+)\s?\}{1,2})")
_BASE_WORDS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_UNDONE = re.compile(r"\\(?:i{0,3}nt|oint|sum|prod|lim|limsup|liminf|det)(?![a-zA-Z])")
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d")


def squeezed(text: str) -> str:
    """The text without spaces, except between two letters or two digits, which would grow together."""
    return re.sub(r"(?<![a-zA-Z0-9]) | (?![a-zA-Z0-9])|(?<=\d) (?=[a-zA-Z])|(?<=[a-zA-Z]) (?=\d)", "", text)


def leaves_equal(gold: str, answer: str, options: GraderOptions) -> bool:
    r"""Whether two respelled expressions are equal.

    >>> leaves_equal("0.5", r"\frac{1}{2}", GraderOptions()), leaves_equal("101_2", "101_3", GraderOptions())
    (True, False)
    """
    gold, answer = _unbraced(gold), _unbraced(answer)
    if squeezed(gold) == squeezed(answer):
        return True
    if is_text(gold) or is_text(answer):
        gold_words, answer_words = words(gold), words(answer)
        return gold_words == answer_words or any({gold_words, answer_words} <= group for group in _SYNONYMS)
    if _unmarked(gold) == _unmarked(answer):
        return True
    if _BASE.fullmatch(gold) or _BASE.fullmatch(answer):
        return _same_base(gold, answer, options)
    if ":" in gold or ":" in answer:
        return _same_ratio(gold, answer)
    return not _restates(gold, answer) and _same_quantity(gold, answer, options)


def _restates(gold: str, answer: str) -> bool:
    """Whether the answer leaves undone what the question asks: a sum, limit or integral that the gold does not have."""
    return bool(set(_UNDONE.findall(answer)) - set(_UNDONE.findall(gold)))


def _unbraced(text: str) -> str:
    inner = text[1:-1]
    return inner.strip() if text.startswith("{") and text.endswith("}") and "{" not in inner else text


def words(text: str) -> str:
    r"""The plain words of a text answer: without \text, articles, quotes, hyphens and capitals.

    >>> words(r"\text{The Tuesday}."), words("A right-angled triangle")
    ('tuesday', 'right angled triangle')
    """
    plain = _TEXT_COMMAND.sub(r" \1 ", text).lower().replace("-", " ")
    return " ".join(re.sub(r"[.\"'!]|\b(?:the|an?)\s|^\s*(?:on|in|at)\s", "", plain).split())


def _unmarked(text: str) -> str:
    r"""Mathematics with words in it, for comparing as text: signs stay, and so do the capitals of variables.

    >>> _unmarked(r"10:30 \text{ p.m.}") == _unmarked("10:30pm"), _unmarked(r"-5\text{ m}") == _unmarked(r"5\text{ m}")
    (True, False)
    """
    plain = _TEXT_COMMAND.sub(lambda match: " " + match.group(1).lower() + " ", text).strip()
    if _CLOCK.match(plain):
        plain = re.sub(r"\s*([ap])\.?m\b\.?", r" \1m", plain.lower())
    return squeezed(" ".join(plain.split()))


def is_text(text: str) -> bool:
    """Whether the expression is words, not a product of variables: xy is a product, `even` is a word."""
    plain = _TEXT_COMMAND.sub(r" \1 ", text).strip()
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z'\-. ,!\"]*", plain):
        return False
    if r"\text" in text:
        return len(plain) > 1
    return any(word.lower() in _SMALL_WORDS or _is_word(word) for word in plain.split())


def _is_word(word: str) -> bool:
    return len(word) > 4 or (len(word) > 2 and bool(re.search(r"[aeiouAEIOU]", word)) and not word.isupper())


def _same_base(gold: str, answer: str, options: GraderOptions) -> bool:
    """101₂ is its digits and its base; without the base it is one hundred and one, unless the policy differs."""
    pairs = []
    for text in (gold, answer):
        match = _BASE.fullmatch(text)
        base = match and (match.group(2) or match.group(3))
        digits = match.group(1) if match else text
        pairs.append((digits.lstrip("0").lower(), _BASE_WORDS.get(base, base)))
    same_digits = pairs[0][0] == pairs[1][0]
    same_base = pairs[0][1] == pairs[1][1]
    return same_digits and (same_base or (options.bare_base and None in (pairs[0][1], pairs[1][1])))


def _same_ratio(gold: str, answer: str) -> bool:
    """2:3 is 4:6 and 2/3; a clock time such as 3:30 is itself only."""
    if _CLOCK.fullmatch(gold):
        return gold.lstrip("0") == answer.lstrip("0")
    left, right = ([exact_number(term.strip()) for term in text.split(":")] for text in (gold, answer))
    if None in left or None in right:
        return (
            gold.count(":") < 2 and answer.count(":") < 2 and _symbols_equal(_as_quotient(gold), _as_quotient(answer))
        )
    left, right = _with_unit_term(left), _with_unit_term(right)
    if len(left) != len(right) or not left[0] or not right[0]:
        return False
    return all(a * right[0] == b * left[0] for a, b in zip(left, right, strict=True))


def _with_unit_term(terms: list[Fraction]) -> list[Fraction]:
    return terms if len(terms) > 1 else [*terms, Fraction(1)]


def _as_quotient(ratio: str) -> str:
    top, colon, bottom = ratio.partition(":")
    return rf"\frac{{{top}}}{{{bottom}}}" if colon else ratio


def _same_quantity(gold: str, answer: str, options: GraderOptions) -> bool:
    """Values with units: the units must not contradict each other, and the values must agree."""
    (gold, gold_unit), (answer, answer_unit) = (_read_quantity(text, options) for text in (gold, answer))
    missing = gold_unit is None or answer_unit is None
    tolerated = options.units == "optional" and not (
        options.degrees == "strict" and "degree" in (gold_unit, answer_unit)
    )
    if options.degrees == "optional" and {gold_unit, answer_unit} == {"degree", None}:
        tolerated = True
    if gold_unit != answer_unit and not (missing and tolerated):
        return False
    left, right = exact_number(gold), exact_number(answer)
    if left is not None and right is not None and left == right:
        return True
    if options.decimals == "rounded" and _rounds_to(gold, answer):
        return True
    return (left is None or right is None) and _symbols_equal(gold, answer)


def _read_quantity(text: str, options: GraderOptions) -> tuple[str, str | None]:
    """(value, unit), with per cent and degrees turned into what the policy says they are."""
    value, unit = split_unit(text)
    if value.endswith("%"):
        number = value.removesuffix("%").strip()
        value = number if options.percent == "same_number" else rf"\frac{{{number}}}{{100}}"
    if unit == "degree" and options.degrees == "radians":
        value, unit = rf"({value})\cdot \frac{{\pi }}{{180}}", None
    return value, unit


def _rounds_to(gold: str, answer: str) -> bool:
    """Whether one of the two is a decimal of at least three digits that the other one rounds to."""
    from sapo_trl.rewards.grading import symbolic  # sympy: only ever imported in a worker process

    for short, long in ((gold, answer), (answer, gold)):
        match = re.fullmatch(r"-?(\d*)\.(\d+)", short)
        value = symbolic.approximate(long) if match and len((match[1] + match[2]).lstrip("0")) >= 3 else None
        if value is not None and abs(value - Fraction(short)) <= Fraction(1, 2 * 10 ** len(match[2])):
            return True
    return False


def _symbols_equal(gold: str, answer: str) -> bool:
    from sapo_trl.rewards.grading import symbolic  # sympy: only ever imported in a worker process

    return symbolic.expressions_equal(gold, answer)
