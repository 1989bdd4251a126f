"""Multiple-choice letters: B is \\text{(B)} and (B) 12, and no letter is two letters."""

import re

from sapo_trl.rewards.grading.policy import GraderOptions

_CHOICE = re.compile(r"(?:\\text\{\s?)?\(?\s?([A-J])\s?\)?\s?\}?\s?[.:)]?(?:\s?\}?\s?[.:)]?\s?(?<![A-J])(\S.*))?")


def choice_letter(gold: str) -> str | None:
    """The letter when the gold is a multiple-choice letter: B, (B), \\text{(B)}, (B) 12."""
    match = _CHOICE.fullmatch(gold)
    bare = match and not match.group(2)
    bracketed = match and match.group(2) and gold.startswith(("(", r"\text{("))
    return match.group(1) if bare or (bracketed and not re.search(r"^,|[=<>]", match.group(2))) else None


def same_choice(letter: str, answer: str, options: GraderOptions) -> bool:
    """The letter alone or with its value. Another letter in the rest, or a second answer, is hedging."""
    if options.choice_ignore_case:
        answer = re.sub(
            r"^((?:\\text\{\s?)?\(?\s?)([a-j])(?![a-zA-Z(])", lambda m: m.group(1) + m.group(2).upper(), answer
        )
    match = _CHOICE.fullmatch(answer)
    if not match or match.group(1) != letter:
        named = re.fullmatch(r"(?:\\text\{\s?)?(?:[oO]ption|[cC]hoice|[aA]nswer)\s?\}?\s?\(?([A-J])\)?\s?\}?", answer)
        return bool(named) and named.group(1) == letter
    rest = match.group(2)
    if not rest:
        return True
    marked = re.match(r"(?:\\text\{\s?)?(?:\([A-J]\)|[A-J][.:)])", answer)
    return bool(marked) and not re.search(r"\b[A-J]\b|\b(?:or|and|not|wrong)\b|[,=]", rest)
