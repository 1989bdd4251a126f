r"""What kind of thing an answer is: a list, a set, an interval, a relation, a union, or one expression.

An answer is compared kind by kind, and only single expressions reach the computer algebra system. That is what keeps
`\boxed{3=5}` from being 5 and `\boxed{\{5, 6\}}` from being 6.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from sapo_trl.rewards.grading.notation import exact_number, split_top

MAX_DEPTH = 6
MAX_PARTS = 64


@dataclass(frozen=True)
class Leaf:
    """One expression."""

    text: str


@dataclass(frozen=True)
class Group:
    """Several answers. `kind` is `list`, `set`, `union` (no order), or the two brackets of a tuple or interval.

    `(1, 2)` may be either of the two; what comes from an inequality is an interval for certain.
    """

    kind: str
    parts: tuple["Shape", ...]
    is_interval: bool = False


@dataclass(frozen=True)
class Relation:
    """`left operator right`: two sides and one sign."""

    operator: str
    left: str
    right: str


@dataclass(frozen=True)
class Unreadable:
    """Anything with no reading here, such as a chain of equations: equal to its own text and to nothing else."""

    text: str


Shape = Leaf | Group | Relation | Unreadable

_WORD_SEPARATOR = re.compile(
    r",?\s?\\text\{\s?,?\s?(?:and|or)\s?\}|,?\s(?:and|or)\s|\\text\{\s?,\s?\}|\\(?:lor|vee|wedge)(?![a-zA-Z])"
)
_THOUSANDS = re.compile(
    r"(?:\\\$\s?)?[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:\s?(?:%|\\text\{[^{}]*\}(?:\^.{1,3})?|[a-zA-Z]{2,}))?"
)
_OPERATOR = re.compile(r"\\(?:leq|geq|neq|approx|in|equiv|sim)(?![a-zA-Z])|[<>=]")
_NAME = re.compile(
    r"(?:\\(?:angle|triangle|overline|vec|mathbf|hat|m\\angle|max|min|log|sin|cos|tan|det|operatorname)\s?)?"
    r"(?:\{?\s?(?:[a-zA-Z]|[A-Z]{2,4}|\\[a-zA-Z]{2,8}|[a-zA-Z]{3,15})\s?\}?|\\text\{[^{}]{1,60}\})"
    r"(?:_(?:\w|\{[^{}]{1,12}\}))?'{0,3}"
    r"(?:\s?\(\s?-?[\w.,\s\\{}/]{1,24}\s?\))?"
)
# { x | x > 1 }, { x ∈ R : x > 1 }
_BUILDER = re.compile(r"([a-zA-Z])(?:\s?\\in\s?\\mathbb\{R\})?\s?(?:\\mid(?![a-zA-Z])|:|\|)\s?(\1\b.*|.*\b\1\b.*)")
_DENIAL = re.compile(r"\b(?:not|no|never|isn't|wrong|false)\b", re.IGNORECASE)
_TUPLE_OF_NAMES = re.compile(r"\(\s?[a-zA-Z](?:_\w)?(?:\s?,\s?[a-zA-Z](?:_\w)?){1,5}\s?\)|\|\s?[a-zA-Z]{1,3}\s?\|")
_CONSTANTS = (r"\pi", r"\infty", "e", "i", r"\emptyset")
_FLIP = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}
_REALS = (r"\mathbb{r}", r"\text{all real numbers}", r"all real numbers", r"\text{all reals}", r"all reals")
_INFINITE = {"-": r"-\infty", "+": r"\infty"}


def is_name(text: str) -> bool:
    r"""Whether the text names a quantity, so that `name = value` states a value.

    >>> is_name("x"), is_name("f(2)"), is_name(r"\angle ABC"), is_name("3"), is_name("2x")
    (True, True, True, False, False)
    """
    if text in _CONSTANTS or _DENIAL.search(text):
        return False
    return bool(_NAME.fullmatch(text) or _TUPLE_OF_NAMES.fullmatch(text))


def read_shape(text: str, depth: int = 0) -> Shape:
    """The shape of a respelled answer."""
    text = text.strip()
    if depth > MAX_DEPTH:
        return Unreadable(text)
    if text.lower() in _REALS:
        return Group("()", (Leaf(_INFINITE["-"]), Leaf(_INFINITE["+"])))
    if _THOUSANDS.fullmatch(text) or r"\begin{" in text or exact_number(text) is not None:
        return Leaf(text)
    parts = _split_list(text)
    if len(parts) > MAX_PARTS or any(not part for part in parts):
        return Unreadable(text)
    if len(parts) > 1:
        return Group("list", _flattened(read_shape(part, depth + 1) for part in _spread_name(parts)))
    pieces = re.split(r"\\cup(?![a-zA-Z])", text)
    if len(pieces) > 1 and "=" not in text and r"\in" not in text.replace(r"\infty", ""):
        return Group("union", tuple(read_shape(piece, depth + 1) for piece in pieces))
    operators = _top_operators(text)
    if operators:
        return _read_relation(text, operators, depth)
    if r"\pm" in text or r"\mp" in text:
        return _both_signs(text, depth)
    return _read_bracket(text, depth)


def _flattened(parts: Iterable[Shape]) -> tuple[Shape, ...]:
    r"""`0, \pm 1` is a list of three."""
    return tuple(
        inner for part in parts for inner in (part.parts if isinstance(part, Group) and part.kind == "list" else [part])
    )


def _split_list(text: str) -> list[str]:
    parts = [piece for part in split_top(text, ";") for piece in _split_words(part)]
    return [piece for part in parts for piece in ([part] if _THOUSANDS.fullmatch(part) else split_top(part, ","))]


def _split_words(text: str) -> list[str]:
    """Splits at "and" and "or" outside of brackets."""
    marked = _WORD_SEPARATOR.sub("\0", text)
    return split_top(marked, "\0") if "\0" in marked and "\0" not in text else [text]


def _spread_name(parts: list[str]) -> list[str]:
    """`x = 1, 2` means x = 1, x = 2: the name belongs to every part, so it can go from the first."""
    name, equals, value = parts[0].partition("=")
    alone = equals and is_name(name.strip()) and not any("=" in part for part in parts[1:])
    return [value.strip(), *parts[1:]] if alone else parts


def _top_operators(text: str) -> list[re.Match]:
    """Relation signs outside of all brackets."""
    depth, position, found = 0, 0, []
    for match in _OPERATOR.finditer(text):
        between = text[position : match.start()]
        depth += sum(map(between.count, "([{")) - sum(map(between.count, ")]}"))
        position = match.end()
        if depth <= 0:
            found.append(match)
    return found


def _read_relation(text: str, operators: list[re.Match], depth: int) -> Shape:
    if len(operators) == 2:
        return _double_inequality(text, operators)
    if len(operators) > 2:
        return Unreadable(text)
    sign = operators[0].group()
    left, right = text[: operators[0].start()].strip(), text[operators[0].end() :].strip()
    if sign in (r"\approx", r"\sim"):
        return read_shape(right if not left or is_name(left) else left, depth + 1)
    if not right or not left:
        return Unreadable(text)
    if sign == r"\in":
        return read_shape(right, depth + 1) if is_name(left) else Unreadable(text)
    if sign == "=" and is_name(left):
        return Relation("=", left, right)
    if sign == "=" and is_name(right):
        return Relation("=", right, left)
    if sign in _FLIP:
        return _ray(left, sign, right)
    return Relation(sign, left, right)


def _ray(left: str, sign: str, right: str) -> Shape:
    """`x > 2` as the interval it describes; an inequality between expressions stays a relation, written with < or ≤."""
    if is_name(right) and not is_name(left):
        left, sign, right = right, _FLIP[sign], left
    if not is_name(left):
        flip = sign in (">", r"\geq")
        return Relation(_FLIP[sign], right, left) if flip else Relation(sign, left, right)
    if sign in ("<", r"\leq"):
        return Group("(" + ("]" if sign == r"\leq" else ")"), (Leaf(_INFINITE["-"]), Leaf(right)), True)
    return Group(("[" if sign == r"\geq" else "(") + ")", (Leaf(right), Leaf(_INFINITE["+"])), True)


def _double_inequality(text: str, operators: list[re.Match]) -> Shape:
    r"""`1 < x \leq 2` as the interval (1, 2]."""
    first, second = (match.group() for match in operators)
    low = text[: operators[0].start()].strip()
    middle = text[operators[0].end() : operators[1].start()].strip()
    high = text[operators[1].end() :].strip()
    rising = {first, second} <= {"<", r"\leq"}
    if not is_name(middle) or not low or not high or not (rising or {first, second} <= {">", r"\geq"}):
        return Unreadable(text)
    if not rising:
        low, high, first, second = high, low, _FLIP[second], _FLIP[first]
    kind = ("[" if first == r"\leq" else "(") + ("]" if second == r"\leq" else ")")
    return Group(kind, (Leaf(low), Leaf(high)), True)


def _both_signs(text: str, depth: int) -> Shape:
    upper = re.sub(r"\\pm(?![a-zA-Z])", "+", re.sub(r"\\mp(?![a-zA-Z])", "-", text))
    lower = re.sub(r"\\pm(?![a-zA-Z])", "-", re.sub(r"\\mp(?![a-zA-Z])", "+", text))
    return Group(
        "list", tuple(read_shape(half.strip().removeprefix("+").strip(), depth + 1) for half in (upper, lower))
    )


def _read_bracket(text: str, depth: int) -> Shape:
    """A set, tuple or interval when the text is one bracket around a list; otherwise one expression."""
    inner = text.removeprefix(r"\{").removesuffix(r"\}").strip()
    if text.startswith(r"\{") and text.endswith(r"\}") and r"\{" not in inner:
        builder = _BUILDER.fullmatch(inner)
        if builder:
            return read_shape(builder.group(2), depth + 1)
        return Group("set", _flattened(read_shape(part, depth + 1) for part in _split_list(inner)))
    if text and text[0] in "([" and text[-1] in ")]" and _one_bracket(text):
        parts = split_top(text[1:-1], ",;")
        if len(parts) > 1 and all(parts):
            return Group(text[0] + text[-1], tuple(read_shape(part, depth + 1) for part in parts))
        if text[0] + text[-1] == "()" and parts[0]:
            return read_shape(text[1:-1], depth + 1)
    return Leaf(text)


def _one_bracket(text: str) -> bool:
    """Whether the first bracket closes at the very end: not so in `(x+1)(x-1)`."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if depth == 0:
            return index == len(text) - 1
    return False
