"""What the error messages of every stage share: the known word that a wrong one was probably meant to be.

And what a config names by its dotted path, with the errors of one that is wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib import import_module

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


def from_path(path: str, what: str) -> Callable:
    """The function or class at `package.module.name`; `what` begins the errors, such as "The reward".

    Raises:
        ValueError: there is none.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{what} {path!r} cannot be loaded: {error}. Check the path and PYTHONPATH.") from error
    if name not in vars(module):
        near = nearest(name, vars(module))
        hint = "" if near is None else f" The nearest name is {near!r}."
        raise ValueError(f"The module {module_name!r} has no {name!r}.{hint}")
    if not callable(target := vars(module)[name]):
        raise ValueError(f"{what} {path!r} is a {type(target).__name__}, not a function.")
    return target
