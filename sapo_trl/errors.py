"""What the error messages of every stage share: the known word that a wrong one was probably meant to be.

And what a config names by its dotted path, or under names of its own, with the errors of one that is wrong.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

NEAR = 0.6  # share of equal characters below which a suggestion misleads more than it helps


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that begins with `word`, or is most like it, in upper or lower case; None when none is near.

    >>> nearest("acuracy", ["accuracy", "length"]), nearest("xyz", ["accuracy", "length"])
    ('accuracy', None)
    >>> nearest("ADAM", ["adalomo", "adamw_torch"])
    'adamw_torch'
    """
    words: dict[str, str] = {}
    for one in known:
        words.setdefault(one.lower(), one)
    begun = [one for one in words if len(word) > 2 and one.startswith(word.lower())]
    found = begun or difflib.get_close_matches(word.lower(), words, n=1, cutoff=NEAR)
    return words[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence to end an error message with, its leading space included; empty when no known word is near.

    >>> did_you_mean("learning_rat", ["learning_rate", "seed"]), did_you_mean("xyz", ["seed"])
    (" Did you mean 'learning_rate'?", '')
    """
    found = nearest(word, known)
    return "" if found is None else f" Did you mean {found!r}?"


def imported(module: str, what: str) -> ModuleType:
    """A module of somebody's own; `what` begins the errors.

    Raises:
        ValueError: there is none, or it fails as it is imported: where, and with what.
    """
    try:
        return import_module(module)
    except (Exception, SystemExit) as error:
        library = str(Path(traceback.__file__).parent)
        passed = [(at.filename, at.lineno) for at in traceback.extract_tb(error.__traceback__)[1:]]
        own = [at for at in passed if not at[0].startswith(("<frozen", library)) or "site-packages" in at[0]]
        if isinstance(error, ModuleNotFoundError) or not (own or isinstance(error, SyntaxError)):
            raise ValueError(f"{what} cannot be loaded: {error}. Check the path and PYTHONPATH.") from error
        file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else own[-1]
        said = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"{what} cannot be loaded: {type(error).__name__} in {file}, line {line}: {said}.") from error


def from_path(path: str, what: str) -> Callable:
    """The function or class at `package.module.name`; `what` begins the errors, such as "The reward".

    Raises:
        ValueError: there is none.
    """
    module_name, _, name = path.rpartition(".")
    module = imported(module_name, f"{what} {path!r}")
    if name not in vars(module):
        near = nearest(name, vars(module))
        hint = "" if near is None else f" The nearest name is {near!r}."
        raise ValueError(f"The module {module_name!r} has no {name!r}.{hint}")
    if not callable(target := vars(module)[name]):
        raise ValueError(f"{what} {path!r} is a {type(target).__name__}, not a function.")
    return target


def named_mappings(field: str, given: Any, kind: Any, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, values) of a field that maps names to the fields of the dataclass `kind`.

    Raises:
        ValueError: a name or key that is not possible, with the nearest one that is.
    """
    known = [f.name for f in fields(kind)]
    if not isinstance(given, Mapping):
        raise ValueError(f"{field} is {given!r}, not a mapping: write {field}: {example}.")
    for name, values in given.items():
        place = f"{field}.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)):
            raise ValueError(f"{place}: a name of letters, digits, - and _ is needed, for it is part of metric names.")
        if not isinstance(values, Mapping):
            raise ValueError(f"{place} is {values!r}, not a mapping: write {name}: {{dataset_name: …}}.")
        for key in values:
            if key not in known:
                raise ValueError(f"{place}: unknown key {key!r}; known: {', '.join(known)}.{did_you_mean(key, known)}")
        yield str(name), dict(values)
