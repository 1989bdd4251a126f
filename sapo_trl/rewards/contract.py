"""What a reward function may return, and how several of them run at once.

One number or None per completion, finite: anything else is refused with the name of the function, the row and the
value's type, before it can become a NaN advantage or, as the keys of a dict, a reward. The rules are the same for our
functions and the user's, synchronous or not. Texts never appear in the errors.
"""

import asyncio
import inspect
import math
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real

MAX_THREADS = 8


def check_rewards(name: str, values: object, num_completions: int) -> list[float | None]:
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
            f"Reward function {name!r} returned {_kind(values)} instead of a list of {num_completions} numbers. "
            f"Return one number, or None, per completion."
        )
    if len(rows) != num_completions:
        raise ValueError(
            f"Reward function {name!r} returned {len(rows)} rewards for {num_completions} completions. "
            f"Return one number, or None, per completion, in their order."
        )
    return [_check_value(name, row, value, num_completions) for row, value in enumerate(rows)]


def _check_value(name: str, row: int, value: object, num_completions: int) -> float | None:
    if value is None:
        return None
    if hasattr(value, "shape") and hasattr(value, "item") and math.prod(value.shape) == 1:
        value = value.item()  # a tensor or array of one number
    if not isinstance(value, Real):
        raise ValueError(
            f"Reward function {name!r} returned {_kind(value)} for completion {row} of {num_completions}. "
            f"Return a finite number, or None to skip it."
        )
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(
            f"Reward function {name!r} returned {number} for completion {row} of {num_completions}. "
            f"Return a finite number, or None to skip it."
        )
    return number


def _kind(value: object) -> str:
    """Type and size of a value: enough to find the mistake, and never its content."""
    size = f" of length {len(value)}" if isinstance(value, (str, bytes, dict, list, tuple, set)) else ""
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"a {type(value).__name__}{size}{shape}"


def reward_name(reward_func: Callable) -> str:
    """The name under which a reward function is logged: its own, or that of its class."""
    return reward_func.__name__ if hasattr(reward_func, "__name__") else type(reward_func).__name__


def is_async(reward_func: Callable) -> bool:
    """Whether calling the function gives a coroutine; covers objects with an `async def __call__`."""
    return inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(type(reward_func).__call__)


class _Checked:
    """A reward function whose result is checked. A class, so that it can be pickled where its function can."""

    def __init__(self, reward_func: Callable):
        self.reward_func = reward_func
        self.__name__ = reward_name(reward_func)

    def __call__(self, completions: list, **kwargs) -> list[float | None]:
        return check_rewards(self.__name__, self.reward_func(completions=completions, **kwargs), len(completions))


class _CheckedAsync(_Checked):
    """The same for a coroutine function."""

    async def __call__(self, completions: list, **kwargs) -> list[float | None]:
        return check_rewards(self.__name__, await self.reward_func(completions=completions, **kwargs), len(completions))


def reward_arguments(inputs: list[dict], prompts: list, completions: list, completion_ids: list) -> dict:
    """What a reward function gets of a batch: the dataset's other columns, prompts, completions and their ids."""
    columns = [key for key in inputs[0] if key not in ("prompt", "completion", "completion_ids")]
    values = {key: [row[key] for row in inputs] for key in columns}
    return values | {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}


def checked(reward_func: Callable) -> Callable:
    """The reward function with its result held to the contract.

    >>> checked(lambda completions, **kwargs: [0.5 for _ in completions])(completions=["a", "b"])
    [0.5, 0.5]
    """
    return _CheckedAsync(reward_func) if is_async(reward_func) else _Checked(reward_func)


class _Log:
    """Collects what one reward function logs, to be passed on afterwards, in the caller's thread and in order."""

    def __init__(self):
        self.extras: list[tuple[str, list]] = []
        self.metrics: list[tuple[str, float]] = []

    def replay(self, kwargs: dict) -> None:
        for column, values in self.extras:
            kwargs["log_extra"](column, values)
        for name, value in self.metrics:
            kwargs["log_metric"](name, value)

    def attached(self, kwargs: dict) -> dict:
        """The keyword arguments with the collectors in the place of the trainer's two functions, where it gave them."""
        collectors = {
            "log_extra": lambda column, values: self.extras.append((column, values)),
            "log_metric": lambda name, value: self.metrics.append((name, value)),
        }
        return {**kwargs, **{key: collect for key, collect in collectors.items() if key in kwargs}}


@dataclass
class PendingRewards:
    """Reward functions at work on one batch; `start_rewards` makes it."""

    names: list[str]
    kwargs: dict
    logs: list[_Log]
    futures: list[Future]
    threads: ThreadPoolExecutor

    def result(self) -> list[list[float | None]]:
        """Waits; one checked list of rewards per function, in their order. The first that fails gives the error."""
        with self.threads:
            errors = [future.exception() for future in self.futures]  # waits for all of them
        for name, error in zip(self.names, errors, strict=True):
            if error is not None:
                raise RuntimeError(
                    f"Reward function {name!r} failed: {type(error).__name__} (see the cause)."
                ) from error
        num_completions = len(self.kwargs["completions"])
        results = [
            check_rewards(name, future.result(), num_completions)
            for name, future in zip(self.names, self.futures, strict=True)
        ]
        for log in self.logs:
            log.replay(self.kwargs)
        return results


def start_rewards(
    reward_funcs: list[Callable],
    names: list[str],
    kwargs: dict,
    loop: asyncio.AbstractEventLoop | None = None,
) -> PendingRewards:
    """Starts reward functions side by side on one batch and returns at once.

    Synchronous functions run in threads (they wait for the verifier, a sandbox or a server, not for this process),
    coroutine functions together in `loop`, or in a loop of their own. What they log is passed on by `result()` in the
    order of the functions, as if they had run one after the other.
    """
    logs = [_Log() for _ in reward_funcs]
    calls = [log.attached(kwargs) for log in logs]
    threads = ThreadPoolExecutor(MAX_THREADS, "reward", _use_device, (_current_device(),))
    futures = [_submit(threads, func, call, loop) for func, call in zip(reward_funcs, calls, strict=True)]
    return PendingRewards(names, kwargs, logs, futures, threads)


def run_rewards(
    reward_funcs: list[Callable],
    names: list[str],
    kwargs: dict,
    loop: asyncio.AbstractEventLoop | None = None,
) -> list[list[float | None]]:
    """`start_rewards` and wait for the result."""
    return start_rewards(reward_funcs, names, kwargs, loop).result()


def _submit(threads: ThreadPoolExecutor, func: Callable, call: dict, loop: asyncio.AbstractEventLoop | None) -> Future:
    if not is_async(func):
        return threads.submit(func, **call)
    if loop is not None:
        return asyncio.run_coroutine_threadsafe(func(**call), loop)
    return threads.submit(lambda: asyncio.run(func(**call)))


def _current_device() -> int | None:
    """The GPU of this rank, if torch uses one: threads start on GPU 0 otherwise."""
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else None


def _use_device(device: int | None) -> None:
    if device is not None:
        sys.modules["torch"].cuda.set_device(device)
