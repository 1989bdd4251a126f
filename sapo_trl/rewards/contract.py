"""What a reward function may return, under which name it is logged, and where it runs.

It returns one finite number, or None, per completion. Anything else is refused with the name of the function, the row
and the value's type, before it can become a NaN advantage or, as the keys of a dict, a reward. The rules are the same
for the functions of this package and the user's, synchronous or not. Texts never appear in the errors.

Synchronous functions run one after the other in the caller's thread, as in TRL, because signal handlers, math_verify
and sqlite connections work in the main thread only. A function or object with the attribute `run_in_thread = True` runs
in a thread of its own, because it only waits for other processes; coroutine functions run together.

In a mixture every row names its kind in a column `task`. A reward for one kind names it in its attribute `own_task` and
returns None for the rows of others.
"""

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

LARGEST = 1e18  # rewards and their standard deviation are float32, in which the squares of larger numbers overflow
# What every reward function gets under these names; a column of the data under one of them would never arrive
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def check_rewards(name: str, values: Any, num_completions: int) -> list[float | None]:
    """The rewards as floats and Nones, or one error that says what is wrong with them.

    >>> check_rewards("mine", [1, True, None], 3)
    [1.0, 1.0, None]
    >>> check_rewards("mine", [1.0, float("inf")], 2)
    Traceback (most recent call last):
    ...
    ValueError: Reward function 'mine' returned inf for completion 1 of 2. Return a finite number, or None to skip it.
    """
    rows = values.tolist() if hasattr(values, "tolist") and hasattr(values, "shape") else values  # tensor or array
    if not isinstance(rows, (list, tuple)):
        raise ValueError(
            f"Reward function {name!r} returned {kind_of(values)} instead of a list of {num_completions} numbers. "
            f"Return one number, or None, per completion."
        )
    if len(rows) != num_completions:
        raise ValueError(
            f"Reward function {name!r} returned {len(rows)} rewards for {num_completions} completions. "
            f"Return one number, or None, per completion, in their order."
        )
    return [_check_value(name, row, value, num_completions) for row, value in enumerate(rows)]


def _check_value(name: str, row: int, value: Any, num_completions: int) -> float | None:
    if value is None:
        return None
    if hasattr(value, "shape") and hasattr(value, "item") and math.prod(value.shape) == 1:
        value = value.item()  # a tensor or array of one number
    if isinstance(value, Real) and -LARGEST <= value <= LARGEST:
        return float(value)
    found = value if isinstance(value, float) else kind_of(value)
    limit = "" if isinstance(value, float) and not math.isfinite(value) else f" of at most {LARGEST:g} in size"
    raise ValueError(
        f"Reward function {name!r} returned {found} for completion {row} of {num_completions}. "
        f"Return a finite number{limit}, or None to skip it."
    )


def kind_of(value: Any) -> str:
    """Type and size of a value, enough to find the mistake, but never its content."""
    size = f" of length {len(value)}" if isinstance(value, (str, bytes, dict, list, tuple, set)) else ""
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"a {type(value).__name__}{size}{shape}"


def innermost(reward_func: Callable) -> Any:
    """The function inside a `functools.partial`, a `TaskReward` or `checked`; another callable as it is."""
    while isinstance(reward_func, functools.partial | TaskReward | _Checked | _CheckedAsync):
        reward_func = reward_func.reward_func if isinstance(reward_func, _Checked | _CheckedAsync) else reward_func.func
    return reward_func


def reward_name(reward_func: Callable) -> str:
    """The name under which a reward function is logged: its own, that of its class, or of the function in a partial."""
    named: Any = reward_func if hasattr(reward_func, "__name__") else innermost(reward_func)
    return named.__name__ if hasattr(named, "__name__") else type(named).__name__


def unique_names(reward_funcs: Sequence[Callable | str]) -> list[str]:
    """A name for each function, all different, because equal names would share their metrics; a text is a name itself.

    >>> unique_names([lambda **_: [], lambda **_: [], "format", functools.partial(reward_name), "format"])
    ['<lambda>', '<lambda>_2', 'format', 'reward_name', 'format_2']
    """
    names: list[str] = []
    for func in reward_funcs:
        name = func if isinstance(func, str) else reward_name(func)
        numbered = (f"{name}_{number}" for number in range(2, len(reward_funcs) + 2))
        names.append(name if name not in names else next(other for other in numbered if other not in names))
    return names


def is_async(reward_func: Callable) -> bool:
    """Whether calling the function gives a coroutine; covers partials, and objects with an `async def __call__`."""
    inner = innermost(reward_func)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def runs_in_thread(reward_func: Callable) -> bool:
    """Whether a synchronous function asks for a thread; also in a partial."""
    return any(getattr(func, "run_in_thread", False) for func in (reward_func, innermost(reward_func)))


def refuse_reserved(columns: Sequence[str], which: str) -> None:
    """Refuse a column whose name is an argument that every reward function gets."""
    for name in columns:
        if name in RESERVED:
            raise ValueError(
                f"{which} has a column {name!r}, under which every reward gets something else. Rename or remove it."
            )


def own_tasks(reward_func: Callable) -> tuple[str, ...]:
    """The kinds of rows that a reward is for, in a mixture; empty if it scores all of them. Also in a partial."""
    if isinstance(reward_func, TaskReward):
        return reward_func.tasks
    own = getattr(innermost(reward_func), "own_task", None)
    return () if own is None else (own,)


def own_rows(task: Sequence[object] | None, name: str, num_rows: int) -> list[bool]:
    """Which rows of a mixture are of this kind; without the column `task` all of them."""
    return [True] * num_rows if task is None else [row == name for row in task]


@dataclass(frozen=True)
class TaskReward:
    """A reward function for the rows of some datasets of a mixture; None for those of others.

    Without a column `task` every row is its own. A function that is for one kind of rows does not see that column,
    which here holds the datasets' names.

    >>> TaskReward(lambda completions, **kwargs: [1.0] * len(completions), ("a",))(["x", "y"], task=["b", "a"])
    [None, 1.0]
    """

    func: Callable
    tasks: tuple[str, ...]

    def __call__(self, completions: list, task: list[str] | None = None, **kwargs) -> Any:
        own = [i for i in range(len(completions)) if task is None or task[i] in self.tasks]
        columns = {"completions": completions} | kwargs
        if task is not None and not own_tasks(self.func):
            columns["task"] = task
        picked = {
            name: [x[i] for i in own] if isinstance(x, list) and len(x) == len(completions) else x
            for name, x in columns.items()
        }
        if "log_extra" in picked:
            picked["log_extra"] = functools.partial(_log_own, kwargs["log_extra"], own, len(completions))
        if is_async(self.func):
            return self._later(picked, own, len(completions))
        return self._spread(self.func(**picked) if own else [], own, len(completions))

    async def _later(self, picked: dict, own: list[int], num: int) -> list[float | None]:
        return self._spread(await self.func(**picked) if own else [], own, num)

    def _spread(self, values: Any, own: list[int], num: int) -> list[float | None]:
        found = dict(zip(own, check_rewards(reward_name(self.func), values, len(own)), strict=True))
        return [found.get(i) for i in range(num)]


def _log_own(log_extra: Callable, own: list[int], num: int, column: str, values: list) -> None:
    found = dict(zip(own, values, strict=True))
    log_extra(column, [found.get(i) for i in range(num)])


@dataclass(frozen=True)
class _Checked:
    """A reward function whose result is checked; a class, so that it can be pickled if its function can."""

    reward_func: Callable
    __name__: str

    def __call__(self, completions: list, **kwargs) -> list[float | None]:
        given = own_lists({"completions": completions} | kwargs)
        return check_rewards(self.__name__, self.reward_func(**given), len(completions))


@dataclass(frozen=True)
class _CheckedAsync:
    """The same for a coroutine function."""

    reward_func: Callable
    __name__: str

    async def __call__(self, completions: list, **kwargs) -> list[float | None]:
        given = own_lists({"completions": completions} | kwargs)
        return check_rewards(self.__name__, await ended(functools.partial(self.reward_func, **given)), len(completions))


def check_reward_call(reward_func: Callable, columns: Sequence[str] | None) -> None:
    """Raise unless a reward function can be called with what it will get, before anything is generated.

    Args:
        columns: of the dataset; None: not known.

    Raises:
        ValueError: an argument that no column fills, or one that the function does not take.

    >>> check_reward_call(lambda completions, gold, **kwargs: [], ["prompt", "answer"])
    Traceback (most recent call last):
    ...
    ValueError: Reward function '<lambda>' is missing a required argument: 'gold'. It gets prompts, \
completions, completion_ids, trainer_state, log_extra, log_metric, answer by name: take the others with **kwargs.
    """
    given = [*RESERVED, *(name for name in columns or () if name not in ("prompt", "completion", "completion_ids"))]
    try:
        signature = inspect.signature(reward_func)
    except ValueError:  # some written in C
        return
    try:
        (signature.bind if columns is not None else signature.bind_partial)(**dict.fromkeys(given))
    except TypeError as error:
        what = str(error).replace("got", "gets", 1) if str(error).startswith("got") else f"is {error}"
        raise ValueError(
            f"Reward function {reward_name(reward_func)!r} {what}. It gets {', '.join(given)} by name: take the others "
            "with **kwargs."
        ) from None


def reward_arguments(inputs: list[dict], prompts: list, completions: list, completion_ids: list) -> dict:
    """The arguments of a reward function: the dataset's other columns, prompts, completions and their ids."""
    columns = [key for key in inputs[0] if key not in ("prompt", "completion", "completion_ids")]
    values = {key: [row[key] for row in inputs] for key in columns}
    return values | {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}


def checked(reward_func: Callable) -> Callable:
    """The reward function with its result checked.

    >>> checked(lambda completions, **kwargs: [0.5 for _ in completions])(completions=["a", "b"])
    [0.5, 0.5]
    """
    kind = _CheckedAsync if is_async(reward_func) else _Checked
    return kind(reward_func, reward_name(reward_func))


def own_lists(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one reward function, with lists and messages of its own: what it does to them, nobody else sees.

    >>> mine = own_lists({"prompts": (given := [["a"], "b"])})["prompts"]
    >>> mine[0].clear(), mine.pop()
    (None, 'b')
    >>> given
    [['a'], 'b']
    """
    return {name: [*map(_own, value)] if isinstance(value, list) else value for name, value in kwargs.items()}


def _own(value: Any) -> Any:
    """A copy of nested lists and mappings; what they hold, such as pictures, is shared."""
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    return [_own(item) for item in value] if value and isinstance(value[0], list | dict) else list(value)


def check_scores(rewards: Any, models: Mapping[int, str]) -> None:
    """The scores of reward models, which score every completion.

    Args:
        rewards: (B, functions).
        models: the columns of the models, and their names.

    Raises:
        ValueError: names the model and the first completion whose score is not finite.
    """
    for column, name in models.items():
        finite = rewards[:, column].isfinite().tolist()
        if not all(finite):
            row = finite.index(False)
            raise ValueError(
                f"Reward model {name!r} gave {rewards[row, column].item()} for completion {row} of {len(finite)}. Its "
                "weights are damaged, or it overflows in its number format."
            )


async def ended(call: Callable) -> Any:
    """The result of a coroutine function; what would end the loop, with its result awaited for ever, is an error."""
    try:
        return await call()
    except (SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:
        raise RuntimeError(f"{type(error).__name__} in a coroutine") from error
