r"""Which answer does a text give? String work, linear in the text, so that a hostile text cannot stall it.

The answer is the last `\boxed{...}` or `<answer>...</answer>`, unless the text takes it back, negates it or leaves it
open. Boxes side by side or as alternatives ("\boxed{5}, or else \boxed{6}") are one answer of several parts. Without
any box a plain "the answer is ..." counts: base models are trained from there.
"""

import re
from typing import NamedTuple

TAIL_CHARS = 3000  # how much text after the last box, or at the end of a text without one, is read for its meaning
JOIN_CHARS = 200  # two boxes further apart than this are two statements
MAX_JOINED = 20

_BRACES = re.compile(
    r"\\(?:boxed|fbox|framebox|bbox|Aboxed|ovalbox|doublebox|shadowbox)\*?\s*(?:\[[^\[\]\n]{0,40}\]\s*){0,2}"
    r"(?:\{|(?P<bare>[-+]?\d+(?:[.,/]\d+)*|\\(?!boxed|fbox)[a-zA-Z]{2,20}(?:\{[^{}\n]{0,80}\}|\d)*|[a-zA-Z](?![a-zA-Z])))"
    r"|\\\\(?!boxed|fbox)|\\[{}]|[{}]"
)
_OPEN = r"[\s$\\(\[*:]*"  # what may stand between words and a value
_CLOSE = r"[\s$\\)\]*.,]{0,9}"
_VALUE = r"[-+]?(?:\d+(?:[.,/]\d+)*|\\d?frac\{\d+\}\{\d+\}|\\sqrt\{\d+\}|\(?[A-J]\)?(?![a-zA-Z]))"
_PATTERNS = {  # what the words around an answer do to it
    "withdrawn": r"(?:^|[.!?\n][\s*$)}]*)(?:but |hmm,? |oh,? |no,? )?wait\b|\bwait[,!]"
    r"|(?:^|[.!?\n]\s*)(?:hmm,? |oh,? )?(?:no[,.!]|correction:)|\bi (?:take (?:that|it) back|withdraw)"
    r"|\b(?:scratch that|i retract|on second thought|oops|disregard|never ?mind)\b"
    r"|\bi (?:have |)made an? (?:\w+ )?(?:mistake|error)|\bi(?: a|')m (?:not (?:sure|certain)|unsure|guessing)"
    r"|\b(?:that|this|it|answer)(?:'s| is| was| looks| seems| cannot be| can't be| isn't| wasn't)(?: \w+){0,2}"
    r" (?:wrong|incorrect|mistaken|false|(?<=not |n't |.be )(?:right|correct|the answer))\s*(?:[.,;!?)\n]|$)"
    rf"|\b(?:that|it|this|answer) should (?:\w+ )?(?:have been|be {_OPEN}\d)|\bthe (?:correct|right|real) value is",
    "doubted after": _CLOSE + r"(?:\\text\{\s*)?(?:possibly|perhaps|maybe"
    r"|(?:is|was|seems|looks) (?:wrong|incorrect|false|not (?:right|correct|the)))",
    "doubted before": rf"(?:\beither .{{1,40}} or|\d\$? or|\bperhaps|\bmaybe|\bpossibly) {_OPEN}$",
    "negated": rf"\b(?:not|cannot|\w+n't|never|rather than|instead of)\s+(?:equal (?:to )?|be |simply |just )?{_OPEN}$"
    r"|\b(?:not (?:the case|true|correct|right)|false|wrong|incorrect|(?<!no )(?<!n't )doubt) that\b[^.!?,;\n]*$",
    # "or possibly 6", "Alternatively (C)": a second answer, which has to be the same one
    "other": r"\b(?:or|but|alternatively|possibly|perhaps|maybe|otherwise|else|actually|instead|rather)[\s,:]{1,3}"
    r"(?:(?:it|the answer|this|that)(?:'s| is| could| might| may| should)?(?: also)?(?: be)? )?[\s$\\(\[*]{0,6}?"
    rf"({_VALUE})[\s$)\]*]{{0,4}}(?:[.!?\n]|$|(?:might|may|could|is)(?: also)? (?:be )?(?:right|correct|the answer))",
    "hedge": r"\b(?:or|else|otherwise|alternatively|possibly|perhaps|maybe|either|could also|might also|if not)\b",
    # between the boxes of one list
    "connectors": r"\\(?:q?quad|text|mbox|mathrm|,|;|:|!)|\((?:[a-h]|i{1,3}|iv|v|\d)\)|\b[a-h]\)|\n\d[.)]"
    r"|\bpart\s{1,2}\(?\w\)?|\b(?:and|or)\b|[a-z](?:_\{?\w{1,3}\}?)?\s{0,3}(?:=|\\in\b)|[\s$,;:&.(){}\[\]\\*#]",
    "anchor": r"(?:\b(?:answer|correct (?:option|choice))(?:\*\*|__)?\s{0,3}(?:is|:|=|：)"
    r"(?:\s(?:therefore|thus|then)\b)?|答案\s?[是为：:]|故选|####)[\s:：*]{0,8}",
}
_SAID = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in _PATTERNS.items()}
_SPOKEN_END = re.compile(r"\n|\. |。|\.$|,? (?:because|since|as|which) ")
_MATH = re.compile(r"\$\$?([^$]{1,2000})\$\$?|\\\(([^\n]{1,2000}?)\\\)|\\\[([^\n]{1,2000}?)\\\]")


class Box(NamedTuple):
    """Offsets of one box: its command, its content, the end of the content, and the end of the box."""

    start: int
    inside: int
    stop: int
    end: int


def find_boxes(text: str) -> tuple[list[Box], bool]:
    """Closed boxes that stand in no other closed box, in order; and whether the box opened last never closes."""
    opened: list[tuple[int, int, bool]] = []  # start, start of the content, is it a box
    closed: list[Box] = []
    last_start = -1
    for token in _BRACES.finditer(text):
        is_box = len(token.group()) > 2
        last_start = token.start() if is_box else last_start
        if token["bare"]:
            closed.append(Box(token.start(), token.start("bare"), token.end(), token.end()))
        elif is_box or (token.group() == "{" and opened):  # braces of the prose around boxes are of no interest
            opened.append((token.start(), token.end(), is_box))
        elif token.group() == "}" and opened:
            start, inside, is_box = opened.pop()
            while is_box and closed and closed[-1].start > start:
                closed.pop()
            if is_box:
                closed.append(Box(start, inside, token.start(), token.end()))
    return closed, any(is_box and start == last_start for start, _, is_box in opened)


def final_answer(text: str, require_box: bool = False) -> tuple[str, ...]:
    r"""The parts of the answer that the visible part of a completion ends on, several for a list; none without one.

    >>> final_answer(r"First \boxed{3}, then \boxed{5}."), final_answer(r"\boxed{5}. Wait, no.")
    (('5',), ())
    """
    if not require_box and text.count("<answer>") == text.count("</answer>"):
        text = text.replace("<answer>", r"\boxed{").replace("</answer>", "}")
    boxes, unclosed = find_boxes(text)
    if unclosed or not boxes:
        return () if unclosed or require_box else _spoken_answer(text)
    tail = text[boxes[-1].end :][:TAIL_CHARS]
    before = {box: text[max(0, box.start - 60) : box.start] for box in boxes[-MAX_JOINED:]}
    kept = [box for box, words in before.items() if not _SAID["negated"].search(words)]
    doubted = _SAID["doubted after"].match(tail) or (len(kept) == 1 and _SAID["doubted before"].search(before[kept[0]]))
    if not kept or doubted or _SAID["withdrawn"].search(tail):
        return ()
    parts = [*_joined(text, kept), *_SAID["other"].findall(tail), *_spoken_answer(tail)]
    return tuple(dict.fromkeys(map(str.strip, parts)))  # the same box twice is one answer


def _joined(text: str, boxes: list[Box]) -> list[str]:
    """Contents of the last box and of those that belong to the same statement before it."""
    parts = [text[boxes[-1].inside : boxes[-1].stop]]
    for before, after in zip(reversed(boxes[:-1]), reversed(boxes[1:])):
        between = text[before.end : after.start]
        is_joined = not _SAID["connectors"].sub("", between) or _SAID["hedge"].search(between)
        if len(between) > JOIN_CHARS or _SAID["withdrawn"].search(between) or not is_joined:
            break
        parts.insert(0, text[before.inside : before.stop])
    return parts


def _spoken_answer(text: str) -> tuple[str, ...]:
    """What stands behind the last "the answer is", "Answer:" or "####": a formula, else the sentence."""
    tail = text[-TAIL_CHARS:]
    start = max((anchor.end() for anchor in _SAID["anchor"].finditer(tail)), default=len(tail))
    rest = tail[start:].lstrip()
    line = _SPOKEN_END.split(rest, maxsplit=1)[0].strip(" *")
    if not line or _SAID["withdrawn"].search(rest):
        return ()
    formula = _MATH.match(rest)
    if formula and not re.search(r"\$|\\\(|\d", line[formula.end() :]):
        line = next(filter(None, formula.groups()))
    return tuple(dict.fromkeys(map(str.strip, [line, *_SAID["other"].findall(rest[len(line) :])])))
