"""The nearest known word, for error messages about a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known word that is nearest to `word`; empty where none is near.

    >>> did_you_mean("sapo_temprature", ["sapo_temperature", "seed"]), did_you_mean("q", ["seed"])
    (" Did you mean 'sapo_temperature'?", '')
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
