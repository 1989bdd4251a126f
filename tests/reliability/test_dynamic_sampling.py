"""Dynamic sampling: no rollout has a prompt whose rewards are equal, and every prompt is taken once in a pass."""

import json
from itertools import count

import pytest
import torch
from dynamic_world import NUM, WHOLE, run
from processes import call

from sapo_trl.rollout.refill import Places, Round
from sapo_trl.rollout.rollout import Rollout
from sapo_trl.trl_seams import RepeatSampler


def expected_order(num_prompts, seed=5):
    """The prompts of TRL's order, pass after pass, without those whose rewards will be equal."""
    theirs = RepeatSampler(range(num_prompts), mini_repeat_count=1, batch_size=num_prompts, seed=seed)
    for _ in count():
        yield from (i for i in theirs if i % 3 != 0)


def prompts_of(rollout):
    """One prompt for each group of four rows, which must be its whole group."""
    groups = [rollout[start : start + 4] for start in range(0, len(rollout), 4)]
    for group in groups:
        assert len({number for number, _, _ in group}) == 1 and [n for _, n, _ in group] == [1, 2, 3, 4]
    return [group[0][0] for group in groups]


def test_the_rollouts_are_the_useful_prompts_in_trls_order(tmp_path):
    trainer = run(tmp_path, {"max_steps": 20})
    order = expected_order(NUM)
    assert [prompts_of(rollout) for rollout in trainer.seen] == [[next(order) for _ in range(8)] for _ in range(5)]
    for log in [x for x in trainer.state.log_history if "loss" in x]:
        generated = log["data/prompts"]
        assert log["data/useful_frac"] < 1 and log["data/missing_prompts"] == 0 and log["data/rounds"] > 1
        assert log["data/extra_completions"] == 4 * (generated - 8) > 0
        # over all completions generated, exactly: the share of equal prompts gives the mean of 0.5 and 7.5
        equal = log["frac_reward_zero_std"]
        assert equal == pytest.approx(1 - log["data/useful_frac"])
        assert log["reward"] == pytest.approx(0.5 * equal + 7.5 * (1 - equal))
        assert log["completions/mean_length"] == pytest.approx(2.5)
        assert (log["completions/min_length"], log["completions/max_length"]) == (1, 4)


def test_off_means_the_batches_of_trl(tmp_path):
    theirs = [*RepeatSampler(range(NUM), mini_repeat_count=1, batch_size=8, seed=5)]
    for name, fields in {"off": {"dynamic_sampling": False}, "all useful": {}}.items():
        different = lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids]  # noqa: E731
        trainer = run(tmp_path / name, fields, reward_func=different)
        assert [i for rollout in trainer.seen for i in prompts_of(rollout)] == theirs[:16]


def test_two_processes_train_on_the_same_completions_as_one(tmp_path):
    one = run(tmp_path / "one", WHOLE)
    output = tmp_path / "two.json"
    done = call("dynamic_world", "main", str(output), processes=2)
    assert [x.status for x in done] == [0, 0], done[0].err[-3000:]
    two = json.loads(output.read_text())
    assert [[(a, b) for a, b, _ in rollout] for rollout in two["seen"]] == [
        [(a, b) for a, b, _ in rollout] for rollout in one.seen
    ]
    advantages = [[x for *_, x in rollout] for rollout in one.seen]
    assert torch.tensor([[x for *_, x in rollout] for rollout in two["seen"]]).equal(torch.tensor(advantages))
    logs = [x for x in one.state.log_history if "loss" in x]
    for ours, theirs in zip(two["logs"], logs, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4) and theirs["grad_norm"] > 0


def test_a_bounded_number_of_rounds_fills_the_rest_with_equal_rewards(tmp_path):
    trainer = run(tmp_path, {"dynamic_sampling_max_rounds": 1, "max_steps": 4})
    (rollout,) = trainer.seen
    theirs = [*RepeatSampler(range(NUM), mini_repeat_count=1, batch_size=8, seed=5)][:8]
    assert prompts_of(rollout) == theirs
    equal = sum(i % 3 == 0 for i in theirs)
    log = next(x for x in trainer.state.log_history if "loss" in x)
    assert log["data/missing_prompts"] == equal > 0 and log["data/rounds"] == 1 and log["data/extra_completions"] == 0
    assert all((advantage == 0) == (number % 3 == 0) for number, _, advantage in rollout)


def test_the_deviation_of_a_batch_is_that_of_the_rollout(tmp_path):
    (rollout,) = run(tmp_path, {"scale_rewards": "batch", "max_steps": 4}).seen
    rewards = torch.tensor([float(n**2) for _, n, _ in rollout])  # 8 groups of 1, 4, 9, 16
    expected = (rewards - 7.5) / (rewards.std() + 1e-4)
    assert torch.allclose(torch.tensor([x for *_, x in rollout]), expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"multi_objective_aggregation": "normalize_then_sum"}, "sum of a completion's rewards"),
        ({"overlap_rewards": True}, "overlap_rewards has no effect with dynamic_sampling"),
        ({"dynamic_sampling": False, "dynamic_sampling_max_rounds": 3}, "has no effect with dynamic_sampling: false"),
        ({"dynamic_sampling_max_rounds": 0}, "must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, fields)


# ---- the plan of the rounds -----------------------------------------------------------------------------------------


def one_round(chosen, useful):
    return Round(chosen, Rollout(), [], useful)


def test_a_round_asks_for_what_is_missing_at_the_share_so_far():
    left = {"a": 9, "b": 12}
    places = Places({"a": 6, "b": 2}, ["a"] * 20 + ["b"] * 20, left)
    assert places.refill([]) == {"a": 6, "b": 2}
    first = one_round([0, 1, 2, 3, 4, 5, 20, 21], [True, False, True, False, True, True, False, False])
    assert places.refill([first]) == {"a": 3, "b": 2}  # 2 missing at 4 of 6; 2 at 0 of 2
    assert Places(places.wanted, places.tasks, left, unit=4).refill([first]) == {"a": 3, "b": 5}
    assert Places(places.wanted, places.tasks, {"a": 7, "b": 3}, unit=4).refill([first]) == {}
    assert Places(places.wanted, places.tasks, {"a": 7, "b": 3}).refill([first]) == {"a": 1, "b": 1}  # not had yet
    second = one_round([6, 7, 8, 22, 23], [True, True, True, True, False])
    assert places.refill([first, second]) == {"b": 2}  # 1 at 1 of 4, at most the dataset's places
    third = one_round([24, 25], [True, True])
    assert places.refill([first, second, third]) == {}
    taken, left = places.fill([first, second, third])
    assert taken == [(0, 0), (0, 2), (0, 4), (0, 5), (1, 0), (1, 1), (1, 3), (2, 0)] and left == [8, 25]
    taken, left = places.fill([first])
    assert taken == [(0, i) for i in range(8)] and left == []
