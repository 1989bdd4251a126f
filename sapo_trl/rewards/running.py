"""Reward functions at work: which run at once and which one after the other, and what they log meanwhile."""

import asyncio
import functools
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from sapo_trl.rewards.contract import check_rewards, ended, is_async, own_lists, runs_in_thread

MAX_THREADS = 8


class _Log:
    """Collects what one reward function logs, to be passed on later in the caller's thread.

    `kwargs` are those of the function, with collectors in place of the trainer's two logging functions.
    """

    def __init__(self, kwargs: dict):
        self.calls: list[tuple[str, Callable]] = []
        collectors = {key: self._collector(key, kwargs[key]) for key in ("log_extra", "log_metric") if key in kwargs}
        self.kwargs = kwargs | collectors

    def _collector(self, key: str, log: Callable) -> Callable:
        return lambda *args, **named: self.calls.append((key, functools.partial(log, *args, **named)))

    def replay(self) -> None:
        for _, call in sorted(self.calls, key=lambda call: call[0]):
            call()


@dataclass
class PendingRewards:
    """Reward functions at work on one batch; made by `start_rewards`.

    `here` has the calls that `result` makes itself, by the index of the function.
    """

    names: list[str]
    num_completions: int
    logs: list[_Log]
    futures: list[Future]
    here: dict[int, functools.partial]
    threads: ThreadPoolExecutor

    def result(self) -> list[list[float | None]]:
        """Make the calls of this thread and wait for the others; to be called once, by the main thread.

        Returns:
            One checked list of rewards per function, in their order.

        Raises:
            RuntimeError: the first function that fails, with its error as the cause.
        """
        with self.threads:
            for number, call in self.here.items():
                try:
                    self.futures[number].set_result(call())
                except Exception as error:  # raised below, after waiting for the others
                    self.futures[number].set_exception(error)
            errors = [future.exception() for future in self.futures]
        for name, error in zip(self.names, errors, strict=True):
            if error is not None:
                raise _failure(name, error) from error
        values = [future.result() for future in self.futures]
        results = [check_rewards(name, x, self.num_completions) for name, x in zip(self.names, values, strict=True)]
        for name, log in zip(self.names, self.logs, strict=True):
            try:
                log.replay()
            except (TypeError, ValueError) as error:
                raise _failure(name, error) from error
        return results


def _failure(name: str, error: BaseException) -> RuntimeError:
    return RuntimeError(f"Reward function {name!r} failed: {type(error).__name__} (see the cause).")


def start_rewards(
    reward_funcs: list[Callable], names: list[str], kwargs: dict, loop: asyncio.AbstractEventLoop | None = None
) -> PendingRewards:
    """Start what may run concurrently on one batch and return at once; `result()` runs the rest.

    Coroutine functions start together in `loop`, or in loops of their own, and functions with `run_in_thread` in
    threads. The others wait for `result()`, which also passes on what all of them log, in the order of the functions.
    """
    logs = [_Log(kwargs) for _ in reward_funcs]
    calls = [functools.partial(func, **own_lists(log.kwargs)) for func, log in zip(reward_funcs, logs, strict=True)]
    threads = ThreadPoolExecutor(MAX_THREADS, "reward", _use_device, (_current_device(),))
    waits = [not is_async(func) and not runs_in_thread(func) for func in reward_funcs]
    here = {number: call for number, call in enumerate(calls) if waits[number]}
    futures = [Future() if wait else _submit(threads, call, loop) for call, wait in zip(calls, waits)]
    return PendingRewards(names, len(kwargs["completions"]), logs, futures, here, threads)


def run_rewards(
    reward_funcs: list[Callable], names: list[str], kwargs: dict, loop: asyncio.AbstractEventLoop | None = None
) -> list[list[float | None]]:
    """`start_rewards` and wait for the result."""
    return start_rewards(reward_funcs, names, kwargs, loop).result()


def _submit(threads: ThreadPoolExecutor, call: Callable, loop: asyncio.AbstractEventLoop | None) -> Future:
    if not is_async(call):
        return threads.submit(call)
    if loop is not None:
        return asyncio.run_coroutine_threadsafe(ended(call), loop)
    return threads.submit(lambda: asyncio.run(ended(call)))


def _current_device() -> int | None:
    """The GPU of this rank, if torch uses one: threads start on GPU 0 otherwise."""
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else None


def _use_device(device: int | None) -> None:
    if device is not None:
        sys.modules["torch"].cuda.set_device(device)
