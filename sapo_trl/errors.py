"""What the error messages of every stage share: the known word that a wrong one was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NEAR = 0.5  # share of equal characters below which a suggestion misleads more than it helps


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like `word`; None when none is near.

    >>> nearest("acuracy", ["accuracy", "length"]), nearest("xyz", ["accuracy", "length"])
    ('accuracy', None)
    """
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=NEAR)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence to end an error message with, its leading space included; empty when no known word is near.

    >>> did_you_mean("learning_rat", ["learning_rate", "seed"]), did_you_mean("xyz", ["seed"])
    (" Did you mean 'learning_rate'?", '')
    """
    found = nearest(word, known)
    return "" if found is None else f" Did you mean {found!r}?"
