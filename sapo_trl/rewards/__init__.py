"""Reward functions by name, and the few functions that other stages use.

A reward function has TRL's signature, `(completions, answer, **kwargs) -> list[float | None]`. Ours are callable frozen
dataclasses: their options are their fields, they can be pickled, and `REWARDS[name]` is one with its defaults.
Importing this package imports neither sympy, which only the grading processes need, nor TRL.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from sapo_trl.errors import from_path, nearest
from sapo_trl.rewards.accuracy import AccuracyReward, accuracy_reward
from sapo_trl.rewards.contract import check_rewards, checked
from sapo_trl.rewards.formats import BoxedFormat, LanguageConsistency, TagCount, ThinkFormat
from sapo_trl.rewards.grading.golds import GoldReport, check_golds
from sapo_trl.rewards.grading.policy import VERDICTS, GraderOptions
from sapo_trl.rewards.gym import ReasoningGym
from sapo_trl.rewards.lengths import CosineLength, LengthReward, Repetition, SoftOverlong
from sapo_trl.rewards.mixtures import LogicPuzzle, MultipleChoice
from sapo_trl.rewards.running import run_rewards
from sapo_trl.rewards.verifier.pool import VerifierOptions, configure_verifier

__all__ = [
    "REWARDS",
    "VERDICTS",
    "AccuracyReward",
    "GoldReport",
    "GraderOptions",
    "VerifierOptions",
    "accuracy_reward",
    "check_golds",
    "check_rewards",
    "checked",
    "code_digest",
    "configure_verifier",
    "load_reward",
    "run_rewards",
]


class RewardDataclass(Protocol):
    """A reward function of this package: a callable frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __call__(self, *args: Any, **kwargs: Any) -> list: ...


REWARDS: dict[str, RewardDataclass] = {
    "accuracy": accuracy_reward,
    "boxed_format": BoxedFormat(),
    "think_format": ThinkFormat(),
    "tag_count": TagCount(),
    "soft_overlong": SoftOverlong(),
    "cosine_length": CosineLength(),
    "length": LengthReward(),
    "repetition": Repetition(),
    "language_consistency": LanguageConsistency(),
    "logic_puzzle": LogicPuzzle(),
    "multiple_choice": MultipleChoice(),
    "reasoning_gym": ReasoningGym(),
}


def load_reward(entry: str, **options: Any) -> Callable:
    """The reward function that a configuration names.

    An entry is a name of `REWARDS` or a dotted path `package.module.function`, and may carry options as a call does:
    `soft_overlong(max_completion_len=1024, soft_punish_cache=256)`. Options are literals; nothing is evaluated. Fields
    of `GraderOptions` are given to the rewards that grade as their own: `accuracy(percent="same_number")`.

    >>> load_reward("soft_overlong(max_completion_len=100)", soft_punish_cache=20)
    SoftOverlong(max_completion_len=100, soft_punish_cache=20)
    """
    name, written = parse_entry(entry)
    options = {**written, **options}
    if name in REWARDS:
        return _with_options(name, REWARDS[name], options)
    if "." not in name:
        raise ValueError(
            f"{name!r} is no reward.{_nearest('name', name, REWARDS)} Known are {', '.join(REWARDS)}, or a dotted path "
            f"package.module.function."
        )
    return _load_dotted(name, options)


def parse_entry(entry: str) -> tuple[str, dict[str, Any]]:
    """Name and literal options of an entry.

    >>> parse_entry("length"), parse_entry("repetition(ngram_size=4)")
    (('length', {}), ('repetition', {'ngram_size': 4}))
    """
    wrong = ValueError(f"The entry {entry!r} is not of the form name or name(option=literal, ...).")
    try:
        node = ast.parse(entry.strip(), mode="eval").body
        if not isinstance(node, ast.Call):
            return ast.unparse(node), {}
        options = {each.arg: ast.literal_eval(each.value) for each in node.keywords if each.arg is not None}
        if node.args or len(options) < len(node.keywords):  # **options have no name
            raise wrong
        return ast.unparse(node.func), options
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise wrong from error


def code_digest(entry: str) -> str | None:
    """A digest of the files that a dotted path leads to, where it is named and where defined; None for ours.

    >>> code_digest("repetition(ngram_size=4)") is None
    True
    """
    path, _ = parse_entry(entry)
    if path in REWARDS:
        return None
    modules = {path.rpartition(".")[0], str(getattr(from_path(path, "The reward"), "__module__", ""))}
    files = {getattr(sys.modules.get(module), "__file__", None) for module in modules}
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file is not None):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _nearest(what: str, word: str, known: Iterable[str]) -> str:
    near = nearest(word, known)
    return "" if near is None else f" The nearest {what} is {near!r}."


def _with_options(name: str, reward: RewardDataclass, options: dict[str, Any]) -> Callable:
    """A reward of ours with some fields set; unknown and missing ones are refused here, before anything is loaded."""
    fields = {field.name: field for field in dataclasses.fields(reward)}
    policies = {field.name for field in dataclasses.fields(GraderOptions)} if "grader" in fields else set()
    known = [*fields, *sorted(policies)]
    for option in options:
        if option not in known:
            every = f" Its options are {', '.join(known)}." if known else " It has no options."
            hint = _nearest("option", option, known) or every
            raise ValueError(f"{option!r} is no option of the reward {name!r}.{hint}")
    grading = {option: value for option, value in options.items() if option in policies}
    own = {option: value for option, value in options.items() if option not in policies}
    if grading:
        own["grader"] = dataclasses.replace(own.get("grader", vars(reward)["grader"]), **grading)
    made = dataclasses.replace(reward, **own) if own else reward
    missing = [f.name for f in fields.values() if f.metadata.get("required") and vars(made)[f.name] is None]
    if missing:
        raise ValueError(f"The reward {name!r} needs {missing[0]}: write {name}({missing[0]}=1024), in tokens.")
    return made


def _load_dotted(path: str, options: dict[str, Any]) -> Callable:
    """A function, or a class that is made with the options, from the user's own module."""
    target = from_path(path, "The reward")
    if inspect.isclass(target):
        return target(**options)
    if not options:
        return target
    return functools.update_wrapper(functools.partial(target, **options), target)
