"""What a reward function may return, under which name, where it runs, and several of them at once."""

import asyncio
import functools
import inspect
import pickle
import signal
import sqlite3
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sapo_config

from sapo_trl.batch_plan import batch_plan
from sapo_trl.data.preflight import check_whole_groups
from sapo_trl.metrics.table import check_logged
from sapo_trl.rewards import REWARDS, check_rewards, checked, run_rewards
from sapo_trl.rewards.accuracy import AccuracyReward
from sapo_trl.rewards.contract import own_lists, reward_name, unique_names
from sapo_trl.rewards.lengths import LengthReward
from sapo_trl.rewards.running import start_rewards


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 0.5, None], [1.0, 0.5, None]),
        ((True, False, True), [1.0, 0.0, 1.0]),
        (torch.tensor([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0]),
        (torch.tensor([1, 0, 1]), [1.0, 0.0, 1.0]),
        (np.array([0.5, 1, 2], dtype=np.float32), [0.5, 1.0, 2.0]),
        ([np.float32(0.5), np.int64(1), torch.tensor(2.0)], [0.5, 1.0, 2.0]),
    ],
)
def test_accepted(values, expected):
    assert check_rewards("f", values, 3) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"secret": 1, "b": 2, "c": 3}, "returned a dict of length 3 instead of a list of 3 numbers"),
        (None, "returned a NoneType instead"),
        ("abc", "returned a str of length 3 instead"),
        (1.0, "returned a float instead"),
        ((x for x in [1, 2, 3]), "returned a generator instead"),
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        ([1.0, float("nan"), 2.0], "returned nan for completion 1 of 3"),
        ([1.0, 2.0, float("-inf")], "returned -inf for completion 2 of 3"),
        ([1.0, 1e39, 2.0], r"returned 1e\+39 for completion 1 of 3. Return a finite number of at most 1e\+18"),
        ([1.0, 10**400, 2.0], "returned a int for completion 1 of 3. Return a finite number of at most"),
        (["secret", 1.0, 2.0], "returned a str of length 6 for completion 0 of 3"),
        ([1.0, {"secret": 1}, 2.0], "returned a dict of length 1 for completion 1"),
        ([1.0, 1j, 2.0], "returned a complex for completion 1"),
        (torch.zeros(3, 2), r"returned a list of length 2 for completion 0"),
        (torch.tensor(1.0), r"returned a Tensor of shape \(\) instead"),
        (torch.tensor([1.0, float("inf"), 1.0]), "returned inf for completion 1 of 3"),
        ([torch.zeros(2), 1, 1], r"returned a Tensor of shape \(2,\) for completion 0"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ValueError, match=f"Reward function 'mine' {message}") as caught:
        check_rewards("mine", values, 3)
    assert "secret" not in str(caught.value)


def half(completions, **kwargs):
    return [0.5] * len(completions)


async def half_async(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.5] * len(completions)


def test_checked_wraps_both_kinds():
    assert checked(half)(completions=["a"]) == [0.5]
    wrapped: Any = checked(half)
    assert wrapped.__name__ == "half"
    assert asyncio.run(checked(half_async)(completions=["a", "b"])) == [0.5, 0.5]
    assert inspect.iscoroutinefunction(type(checked(half_async)).__call__)
    assert pickle.loads(pickle.dumps(checked(half)))(completions=["a"]) == [0.5]
    with pytest.raises(ValueError, match="'<lambda>' returned 0 rewards for 1"):
        checked(lambda completions, **kwargs: [])(completions=["a"])


@pytest.mark.parametrize("name", list(REWARDS))
def test_our_rewards_hold_the_contract(name):
    from sapo_trl.rewards import load_reward

    needed = {"soft_overlong": {"max_completion_len": 8}, "cosine_length": {"max_len": 8}}
    reward = load_reward(name, **needed.get(name, {}))
    rows = {
        "prompts": ["p"] * 4,
        "completions": ["", "\ud800\x00", r"\boxed{1}", "<think>"],
        "completion_ids": [[], [1], [1] * 9, [1, 1]],
        "answer": ["1", "", "1", "B"],
        "gym_entry": [repr(("chain_sum", {}, {"question": "1 + 0", "answer": "1", "metadata": {}}))] * 4,
    }
    assert len(checked(reward)(**rows)) == 4


def test_what_may_run_beside_the_others_does():
    """Two functions in threads and two coroutine functions of 0.3 s each take about 0.3 s together, not 1.2 s."""

    def slow(completions, **kwargs):
        time.sleep(0.3)
        return [1.0]

    slow.run_in_thread = True

    async def slow_async(completions, **kwargs):
        await asyncio.sleep(0.3)
        return [2.0]

    start = time.perf_counter()
    results = run_rewards([slow, slow_async, slow, slow_async], list("abcd"), {"completions": ["x"]})
    assert results == [[1.0], [2.0], [1.0], [2.0]]
    assert time.perf_counter() - start < 0.9


def test_synchronous_functions_run_in_the_main_thread_one_after_the_other():
    events = []

    def make(name, in_thread):
        def reward(completions, **kwargs):
            events.append((name, "begins", threading.current_thread() is threading.main_thread()))
            time.sleep(0.05)
            events.append((name, "ends", threading.current_thread() is threading.main_thread()))
            return [float(len(name))]

        reward.run_in_thread = in_thread
        return reward

    names = ["first", "threaded", "last"]
    functions = [make("first", False), make("threaded", True), make("last", False)]
    pending = start_rewards(functions, names, {"completions": ["x"]})
    time.sleep(0.2)
    assert events == [("threaded", "begins", False), ("threaded", "ends", False)]  # the rest waits for `result`
    assert pending.result() == [[5.0], [8.0], [4.0]]
    order = [("first", "begins", True), ("first", "ends", True), ("last", "begins", True), ("last", "ends", True)]
    assert events[2:] == order


def test_signals_and_connections_work_in_a_users_reward():
    database = sqlite3.connect(":memory:")  # refuses to be used in another thread

    def limited(completions, **kwargs):
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 5)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        return [0.25 for _ in completions]

    def stored(completions, **kwargs):
        return [float(database.execute("select 3").fetchone()[0]) for _ in completions]

    def graded(completions, **kwargs):
        """As many people write it: whatever fails scores 0."""
        from math_verify import parse, verify

        try:
            return [float(verify(parse("$1/2$"), parse(f"${text}$"))) for text in completions]
        except Exception:
            return [0.0 for _ in completions]

    functions = [limited, stored, functools.partial(graded, unused=1)]
    results = run_rewards(functions, ["limited", "stored", "graded"], {"completions": ["0.5", "2"]})
    assert results == [[0.25, 0.25], [3.0, 3.0], [1.0, 0.0]]


def test_a_partial_or_an_object_may_ask_for_a_thread():
    class Judge:
        run_in_thread = True

        def __call__(self, completions, **kwargs):
            return [float(threading.current_thread() is threading.main_thread())]

    def where(completions, offset=0.0, **kwargs):
        return [offset + float(threading.current_thread() is threading.main_thread())]

    here, there = functools.partial(where, offset=2.0), functools.partial(where, offset=4.0)
    there.run_in_thread = True
    results = run_rewards([Judge(), here, there], ["judge", "here", "there"], {"completions": ["x"]})
    assert results == [[0.0], [3.0], [4.0]]


def test_our_rewards_that_wait_for_the_verifier_run_in_threads():
    waiting = {name for name, reward in REWARDS.items() if getattr(reward, "run_in_thread", False)}
    assert {"cosine_length", "length"} <= waiting <= {"accuracy", "cosine_length", "length", "reasoning_gym"}


def test_every_function_has_a_name_of_its_own():
    class Judge:
        def __call__(self, completions, **kwargs):
            return [1.0]

    names = unique_names(
        [
            functools.partial(half, weight=1),
            functools.partial(half, weight=2),
            half,
            lambda **_: [],
            lambda **_: [],
            Judge(),
            Judge(),
            "half_2",
            functools.partial(functools.partial(half_async), weight=1),
        ]
    )
    expected = ["half", "half_2", "half_3", "<lambda>", "<lambda>_2", "Judge", "Judge_2", "half_2_2", "half_async"]
    assert names == expected
    assert reward_name(functools.partial(Judge())) == "Judge" and unique_names([]) == []


def test_nothing_scored_is_a_list_of_none():
    """Whether a rollout without any reward can be trained on is the trainer's question."""
    nothing = run_rewards([lambda completions, **_: [None, None], half], ["judge", "half"], {"completions": ["x", "y"]})
    assert nothing == [[None, None], [0.5, 0.5]]


def test_a_failure_in_the_main_thread_waits_for_the_threads():
    finished = []

    def slow(completions, **kwargs):
        time.sleep(0.2)
        finished.append(True)
        return [1.0]

    slow.run_in_thread = True

    def broken(completions, **kwargs):
        raise ValueError

    with pytest.raises(RuntimeError, match="'broken' failed: ValueError"):
        run_rewards([slow, broken], ["slow", "broken"], {"completions": ["x"]})
    assert finished == [True]


def test_an_interrupt_in_a_reward_is_no_failed_reward():
    def interrupted(completions, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rewards([interrupted], ["interrupted"], {"completions": ["x"]})


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
@pytest.mark.parametrize("own_loop", [True, False])
def test_what_would_end_the_loop_is_a_failed_reward(error, own_loop):
    """Its thread would be gone, and the result awaited for ever."""

    async def ends(completions, **kwargs):
        raise error

    loop = None
    if not own_loop:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
    with pytest.raises(RuntimeError, match="'ends' failed") as failed:
        run_rewards([ends], ["ends"], {"completions": ["x"]}, loop)
    assert error.__name__ in str(failed.value.__cause__)
    assert loop is None or loop.is_running()


def test_what_a_reward_does_to_messages_nobody_else_sees():
    given = {"prompts": [[{"role": "user", "content": [{"type": "text", "text": "2+2"}]}]], "answer": ["4"]}
    mine = own_lists(given)
    mine["prompts"][0][0]["content"][0]["text"] = mine["answer"][0] = "5"
    mine["prompts"][0][0]["role"] = "system"
    assert given == {"prompts": [[{"role": "user", "content": [{"type": "text", "text": "2+2"}]}]], "answer": ["4"]}
    picture = object()
    assert own_lists({"images": [[picture]]})["images"][0][0] is picture


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("reward", 99.0, "the run has a metric of this name"),
        ("loss", 1.0, "the run has a metric of this name"),
        ("rewards/logs/mean", 1.0, "the run has a metric of this name"),
        ("pass_at_4", 1.0, "the run has a metric of this name"),
        ("gate/leak_neg", 1.0, "the run has a metric of this name"),
        ("mine", "much", "got a str instead of a number"),
        ("mine", torch.zeros(2), "instead of a number"),
    ],
)
def test_a_metric_of_the_runs_own_is_not_overwritten(name, value, message):
    def logs(completions, log_metric, **kwargs):
        log_metric(name, value)
        return [1.0]

    with pytest.raises(RuntimeError, match="'logs' failed") as failed:
        run_rewards([logs], ["logs"], {"completions": ["x"], "log_metric": check_logged})
    assert message in str(failed.value.__cause__)


def test_numbers_of_every_kind_are_logged_and_names_of_ones_own():
    for value in (1, 0.5, True, torch.tensor(2.0), np.float32(3)):
        check_logged("mine", value)
    for name in ("gate/mine", "verdict/right_frac", "gym/error_frac", "rewarded"):
        check_logged(name, 1.0)


def test_logs_arrive_in_the_order_of_the_functions_and_in_this_thread():
    seen = []

    def log(name, value):
        seen.append((name, value, threading.current_thread() is threading.main_thread()))

    def first(completions, log_extra, log_metric, **kwargs):
        time.sleep(0.1)
        log_metric("m", 1.0)
        log_extra("column", ["first"])
        return [1.0]

    async def second(completions, log_extra, log_metric, **kwargs):
        log_extra("column", ["second"])
        log_metric("m", 2.0)
        return [1.0]

    kwargs = {"completions": ["x"], "log_extra": log, "log_metric": log}
    run_rewards([first, second], ["first", "second"], kwargs)
    assert seen == [
        ("column", ["first"], True), ("m", 1.0, True), ("column", ["second"], True), ("m", 2.0, True),
    ]  # fmt: skip
    assert kwargs["log_extra"] is log


def test_a_failure_names_its_function():
    def broken(completions, **kwargs):
        raise KeyError("secret completion")

    with pytest.raises(RuntimeError, match=r"'mine' failed: KeyError \(see the cause\)") as caught:
        run_rewards([half, broken, broken], ["half", "mine", "other"], {"completions": ["x"]})
    assert isinstance(caught.value.__cause__, KeyError)
    assert "secret" not in str(caught.value)


def test_a_broken_contract_names_its_function():
    with pytest.raises(ValueError, match="'mine' returned nan for completion 0 of 1"):
        run_rewards([half, lambda **_: [float("nan")]], ["half", "mine"], {"completions": ["x"]})


def test_coroutines_run_in_the_loop_that_is_given():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def where(completions, **kwargs):
        return [float(asyncio.get_running_loop() is loop)]

    try:
        assert run_rewards([where], ["where"], {"completions": ["x"]}, loop=loop) == [[1.0]]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_rewards_that_grade_share_one_grading():
    """accuracy and cosine_length in two threads, one batch: their verdicts agree."""
    from sapo_trl.rewards import load_reward

    rows = {
        "completions": [rf"\boxed{{{n}}} " for n in range(20)],
        "answer": [str(n - n % 2) for n in range(20)],
        "completion_ids": [[1] * 4] * 20,
    }
    rewards = [load_reward("accuracy"), load_reward("cosine_length", max_len=8)]
    accuracy, cosine = run_rewards(rewards, ["accuracy", "cosine_length"], rows)
    assert accuracy == [1.0, 0.0] * 10
    assert cosine == pytest.approx([0.75, -0.75] * 10)


def test_a_reward_that_compares_completions_needs_them_on_one_process(tmp_path):
    args = sapo_config(tmp_path, num_generations=8, per_device_train_batch_size=4, num_mini_batches=2)
    plan = replace(batch_plan(args), num_processes=2)  # four of the eight on each
    with pytest.raises(ValueError, match="length_reward compares.*a rollout's 4 completions of a process.*the 8 of a"):
        check_whole_groups([LengthReward()], args, plan)
    check_whole_groups([AccuracyReward()], args, plan)
    check_whole_groups([LengthReward()], args, replace(plan, completions_per_rollout=16))
