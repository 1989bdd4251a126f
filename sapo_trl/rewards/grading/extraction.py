r"""Which answer does a text give? String work only, linear in the text, so that a hostile text cannot stall it.

The answer is the last `\boxed{...}`, unless the text takes it back afterwards ("wait, no"), negates it ("not
\boxed{5}") or never closes it. Boxes that stand side by side ("\boxed{1} and \boxed{2}") or as alternatives
("\boxed{5}, or else \boxed{6}") are one answer of several parts: against a gold of one part that is hedging, and it
fails by itself. Without any box a plain "the answer is ..." counts, because base models are trained from there.
"""

import re
from dataclasses import dataclass

TAIL_CHARS = 3000  # how much text after the last box, or at the end of a text without one, is read for its meaning
JOIN_CHARS = 200  # two boxes further apart than this are two statements
MAX_JOINED = 20

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
_RETRACTION = re.compile(
    r"(?:^|[.!?\n][\s*$)}]*)(?:but |hmm,? |oh,? |no,? )?(?:wait|actually)\b|\bwait[,.!]"
    r"|\b(?:scratch that|i retract|on second thought|oops|correction|disregard|never ?mind)\b"
    r"|\bi (?:made|have made|'ve made) an? (?:\w+ )?(?:mistake|error)"
    r"|\bi(?: now)? (?:take (?:that|it|this) back|withdraw|changed? my mind)"
    r"|\b(?:that|this|it|answer|above|result|value) (?:is|was|looks|seems)"
    r"(?: \w+){0,2} (?:wrong|incorrect|mistaken|false)\b"
    r"|\b(?:that|this|it|answer|above|result|value) (?:is not|isn't|was not|wasn't|cannot be|can't be)"
    r" (?:the )?(?:right|correct|true|final|possible|answer)"
    r"|\b(?:that|it|this|answer) should"
    r" (?:actually |instead |rather )?(?:be(?! noted| mentioned| stressed| emphasi| clear| remembered)|have been)\b"
    r"|\bthe (?:correct|right|real|true) (?:value|result) (?:is|should|must)"
    r"|\bthat's (?:wrong|incorrect|not (?:right|it|correct))"
    r"|(?:^|[.!?\n]\s*)no[,.!]"
    r"|\bi(?: a|')m (?:not (?:sure|certain|confident)|unsure|guessing)",
    re.IGNORECASE,
)
_WRONG_AT_ONCE = re.compile(
    r"[\s$\\)\]*.]{0,9}(?:\\text\{\s*)?(?:is|was) (?:wrong|incorrect|false|not\b)", re.IGNORECASE
)
_HEDGED_AFTER = re.compile(
    r"[\s$\\)\]*,.]{0,9}(?:or|possibly|perhaps|maybe)\b(?!,? (?:equivalently|simply|about|approximately|roughly))",
    re.IGNORECASE,
)
_HEDGED_BEFORE = re.compile(
    r"(?:\beither .{1,40} or|\d\$? or|\bperhaps|\bmaybe|\bpossibly) [\s$\\(\[*:]*$", re.IGNORECASE
)
_HEDGE = re.compile(
    r"\b(?:or|else|otherwise|alternatively|possibly|perhaps|maybe|either|could also|might also|if not)\b", re.IGNORECASE
)
_CONNECTORS = re.compile(
    r"\\(?:quad|qquad|text|mbox|mathrm|,|;|:|!)|\b(?:and|or)\b|[a-zA-Z](?:_\{?\w{1,3}\}?)?\s{0,3}(?:=|\\in\b)|[\s$,;:&.(){}\[\]\\*]"
)
_NEGATED = re.compile(
    r"(?:\bnot|n't|\bnever|\brather than|\binstead of)\s+(?:equal (?:to )?|be |simply |just )?[\s$\\(\[*:]*$",
    re.IGNORECASE,
)
_ANCHOR = re.compile(r"(?:\banswer\s{0,3}(?:is|:|=)|\banswer\*\*\s{0,3}:|####)[\s:*]{0,8}", re.IGNORECASE)
_MATH = re.compile(r"\$\$?([^$]{1,2000})\$\$?|\\\(([^\n]{1,2000}?)\\\)|\\\[([^\n]{1,2000}?)\\\]")


@dataclass(frozen=True)
class Box:
    """Offsets of one box: its command, its content, and the end behind its closing brace."""

    start: int
    inside: int
    end: int

    def content(self, text: str) -> str:
        return text[self.inside : self.end - 1]


@dataclass(frozen=True)
class Answer:
    """The parts of the final answer (several when a text gives a list), or none and the reason why."""

    parts: tuple[str, ...]
    why_none: str = ""


def find_boxes(text: str) -> tuple[list[Box], bool]:
    r"""Closed boxes that stand in no other closed box, in order; and whether the box opened last never closes.

    >>> text = r"\boxed{1} and \boxed{x^{2}"
    >>> boxes, unclosed = find_boxes(text)
    >>> [box.content(text) for box in boxes], unclosed
    (['1'], True)
    """
    opened: list[tuple[int, int, bool]] = []  # start, start of the content, is it a box
    closed: list[Box] = []
    last_start = -1
    for token in _BRACES.finditer(text):
        is_box = len(token.group()) > 2
        if is_box or (token.group() == "{" and opened):  # braces of the prose around boxes are of no interest
            opened.append((token.start(), token.end(), is_box))
            last_start = token.start() if is_box else last_start
        elif token.group() == "}" and opened:
            start, inside, is_box = opened.pop()
            if is_box:
                while closed and closed[-1].start > start:
                    closed.pop()
                closed.append(Box(start, inside, token.end()))
    return closed, any(is_box and start == last_start for start, _, is_box in opened)


def final_answer(text: str, require_box: bool = False) -> Answer:
    r"""The answer that the visible part of a completion ends on.

    >>> final_answer(r"First \boxed{3}. Finally we get \boxed{5}.").parts
    ('5',)
    >>> final_answer(r"It is \boxed{5}. Wait, that is wrong.")
    Answer(parts=(), why_none='withdrawn')
    """
    boxes, unclosed = find_boxes(text)
    if unclosed:
        return Answer((), "unclosed")
    if not boxes:
        return Answer((), "no box") if require_box else _spoken_answer(text)
    tail = text[boxes[-1].end : boxes[-1].end + TAIL_CHARS]
    if _WRONG_AT_ONCE.match(tail) or _RETRACTION.search(tail):
        return Answer((), "withdrawn")
    if _HEDGED_AFTER.match(tail):
        return Answer((), "hedged")
    kept = [box for box in boxes[-MAX_JOINED:] if not _NEGATED.search(text[max(0, box.start - 60) : box.start])]
    if not kept:
        return Answer((), "negated")
    if _HEDGED_BEFORE.search(text[max(0, kept[-1].start - 60) : kept[-1].start]) and len(kept) == 1:
        return Answer((), "hedged")
    return Answer(_distinct([*_joined(text, kept), *_spoken_answer(tail).parts]))


def _joined(text: str, boxes: list[Box]) -> list[str]:
    """Contents of the last box and of those that belong to the same statement before it."""
    parts = [boxes[-1].content(text)]
    for before, after in zip(reversed(boxes[:-1]), reversed(boxes[1:])):
        between = text[before.end : after.start]
        if len(between) > JOIN_CHARS or _RETRACTION.search(between):
            break
        is_list = not _CONNECTORS.sub("", between)
        if not is_list and not _HEDGE.search(between):
            break
        parts.insert(0, before.content(text))
    return parts


def _spoken_answer(text: str) -> Answer:
    """What stands behind the last "the answer is", "Answer:" or "####": a formula, else the sentence."""
    tail = text[-TAIL_CHARS:]
    anchors = list(_ANCHOR.finditer(tail))
    if not anchors:
        return Answer((), "no answer")
    rest = tail[anchors[-1].end() :]
    if _RETRACTION.search(rest):
        return Answer((), "withdrawn")
    line = rest.lstrip().partition("\n")[0].partition(". ")[0].strip(" *")
    formula = _MATH.match(rest.lstrip())
    if formula and not _HEDGE.search(line[formula.end() :]):
        line = next(group for group in formula.groups() if group)
    return Answer((line,)) if line else Answer((), "no answer")


def _distinct(parts: list[str]) -> tuple[str, ...]:
    """The parts without repetitions: the same box twice is one answer."""
    return tuple(dict.fromkeys("".join(part.split()) and part.strip() for part in parts))
