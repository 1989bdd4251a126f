"""Values typed by hand, or from an independent oracle: enumeration of every draw, and exact binomial fractions."""

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest

from sapo_trl.stats import (
    avg_at_k,
    maj_at_k,
    mean_with_interval,
    paired_difference,
    pass_at_k,
)


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (5, 2, 1, 0.4),
        (5, 2, 3, 0.9),  # 1 − C(3,3)/C(5,3) = 1 − 1/10
        (5, 0, 5, 0.0),
        (4, 4, 2, 1.0),
        (6, 3, 4, 1.0),  # 4 draws from 3 wrong ones must hit a right one
        (16, 4, 8, 1 - 495 / 12870),  # C(12,8) / C(16,8)
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(num_samples, num_correct, k, expected):
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_equals_the_enumeration_of_all_draws():
    marks = [1, 0, 0, 1, 0, 0, 0]
    for k in range(1, 8):
        draws = list(combinations(marks, k))
        expected = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k(7, 2, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_an_array_is_one_value_per_problem():
    np.testing.assert_allclose(pass_at_k(np.array([5, 5, 4]), np.array([2, 0, 1]), 2), [0.7, 0.0, 0.5])
    np.testing.assert_allclose(pass_at_k(5, np.array([2, 0]), 3), [0.9, 0.0])
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)  # the binomials have 30,000 digits


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_an_impossible_k(k):
    with pytest.raises(ValueError, match=f"k={k}.*fewest here is 4"):
        pass_at_k(np.array([8, 4]), np.array([1, 1]), k)


@pytest.mark.parametrize("num_correct", [6, -1])
def test_pass_at_k_refuses_impossible_counts(num_correct):
    with pytest.raises(ValueError, match="may be swapped"):
        pass_at_k(5, num_correct, 1)


def test_avg_at_k_by_hand():
    assert avg_at_k(16, 4) == 0.25
    np.testing.assert_allclose(avg_at_k(4, np.array([1, 0, 4])), [0.25, 0.0, 1.0])
    with pytest.raises(ValueError, match="may be swapped"):
        avg_at_k(4, 5)


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"),
    [
        (["7", "7", "8", "9"], [1, 1, 0, 0], 1, 0.5),
        (["7", "7", "8", "9"], [1, 1, 0, 0], 4, 1.0),  # 2 : 1 : 1
        (["7", "8", "8"], [1, 0, 0], 3, 0.0),
        (["7", "8", "9"], [1, 0, 0], 3, 1 / 3),  # a tie of three
        (["1/2", "0.5", "3", "3"], [1, 1, 0, 0], 4, 0.5),  # two ways to write the right answer vote together: 2 : 2
        (["7", None, None, None], [1, 0, 0, 0], 2, 0.5),  # drawn in half of the pairs, and then alone with a vote
        ([None, None], [0, 0], 1, 0.0),
    ],
)
def test_maj_at_k_by_hand(answers, right, k, expected):
    assert maj_at_k(answers, [bool(x) for x in right], k) == pytest.approx(expected, abs=1e-12)


def test_maj_at_k_equals_the_enumeration_of_all_draws():
    answers = ["a", "b", "a'", "c", None, "b", "a", "c", "b", None]
    right = [answer in ("a", "a'") for answer in answers]

    def share_of_wins(draw) -> float:
        votes = Counter("right" if right[i] else answers[i] for i in draw if answers[i] is not None)
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        return ("right" in winners) / max(1, len(winners))

    for k in range(1, 11):
        draws = list(combinations(range(10), k))
        assert maj_at_k(answers, right, k) == pytest.approx(sum(map(share_of_wins, draws)) / comb(10, k), abs=1e-12)


@pytest.mark.parametrize(("right", "k"), [([True], 1), ([True, False], 0), ([True, False], 3)])
def test_maj_at_k_refuses_what_cannot_be_drawn(right, k):
    with pytest.raises(ValueError, match=f"k={k}.*2 answers and {len(right)} marks"):
        maj_at_k(["7", "8"], right, k)


def test_interval_of_many_problems_is_the_normal_one():
    values = np.array([0.0] * 300 + [1.0] * 100)  # variance 3/16, standard error √(3/16 / 399)
    interval = mean_with_interval(values)
    half_width = 1.959964 * np.sqrt(3 / 16 / 399)
    assert interval.mean == 0.25
    assert (interval.low, interval.high) == pytest.approx((0.25 - half_width, 0.25 + half_width), abs=0.004)
    assert interval == mean_with_interval(values)  # seeded


def test_interval_counts_problems_not_samples():
    half, narrow = mean_with_interval([0.0, 1.0] * 8), mean_with_interval([0.0, 1.0] * 128)
    assert (half.high - half.low) / (narrow.high - narrow.low) == pytest.approx(4.0, rel=0.1)  # √16


def test_interval_covers_the_truth_about_as_often_as_it_says():
    # 30 problems × 16 samples, difficulties from Beta(0.6, 0.9), whose mean is 0.4.
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(400):
        shares = rng.binomial(16, rng.beta(0.6, 0.9, size=30)) / 16
        interval = mean_with_interval(shares, num_resamples=1000)
        hits += interval.low <= 0.4 <= interval.high
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize("values", [[1.0], [0.0], [1.0] * 12, [0.0] * 12, [0.5] * 12])
def test_no_interval_of_zero_width(values):
    interval = mean_with_interval(values)
    assert interval.low <= interval.mean <= interval.high
    assert interval.high - interval.low > 0.2


def test_one_right_problem_says_little():
    interval = mean_with_interval([1.0], num_resamples=100_000)
    low = 1 - 0.975 ** (5 / 4)  # the weight of the problem is Beta(1, 4/5): P(weight < x) = 1 − (1 − x)^(4/5) = 0.025
    assert (interval.low, interval.high) == (pytest.approx(low, abs=2e-3), 1.0)


def test_no_right_problem_among_forty():
    interval = mean_with_interval([0.0] * 40, num_resamples=100_000)
    # The unseen problem's weight is Beta(4/5, 40), whose 97.5 % quantile, by integrating the density, is 0.0783. With a
    # weight of 1 it would be the exact interval of 0 of 40, up to 1 − 0.025^(1/40) = 0.088.
    assert interval.low == 0.0 and interval.high == pytest.approx(0.0783, abs=0.001)


NUM = 30  # problems, of 16 samples each


def few_solved(rng, share: float, rate: float) -> np.ndarray:
    return np.where(rng.random(NUM) < share, rate, 0.0)


# name -> (true rates of the problems, their mean)
TRUTHS = {
    "near 0": (lambda rng: rng.beta(0.05, 1, NUM), 0.05 / 1.05),
    "nearer 0": (lambda rng: rng.beta(0.02, 1, NUM), 0.02 / 1.02),
    "small": (lambda rng: rng.beta(0.2, 6, NUM), 0.2 / 6.2),
    "near 1": (lambda rng: 1 - rng.beta(0.07, 1, NUM), 1 - 0.07 / 1.07),
    "spread": (lambda rng: rng.beta(0.6, 0.9, NUM), 0.4),
    "at both ends": (lambda rng: rng.beta(0.3, 0.3, NUM), 0.5),
    "all alike": (lambda rng: np.full(NUM, 0.3), 0.3),
    "one in twelve, solved half the time": (lambda rng: few_solved(rng, 1 / 12, 0.5), 1 / 24),
    "one in ten, all or nothing": (lambda rng: few_solved(rng, 0.1, 1.0), 0.1),
    "half, all or nothing": (lambda rng: few_solved(rng, 0.5, 1.0), 0.5),
}
# name -> (rates before and after, mean of their difference)
CHANGES = {
    "none": (lambda rng: (rates := rng.beta(0.6, 0.9, NUM), rates), 0.0),
    "none near 0": (lambda rng: (rates := rng.beta(0.05, 1, NUM), rates), 0.0),
    "a tenth everywhere": (lambda rng: (rates := 0.8 * rng.random(NUM), rates + 0.1), 0.1),
    "from 0": (lambda rng: (np.zeros(NUM), rng.beta(0.05, 1, NUM)), 0.05 / 1.05),
    "to 1": (lambda rng: (1 - rng.beta(0.05, 1, NUM), np.ones(NUM)), 0.05 / 1.05),
    "one in ten learnt": (lambda rng: (np.zeros(NUM), few_solved(rng, 0.1, 1.0)), 0.1),
    "learnt and forgotten": (lambda rng: flipped(rng.random(NUM)), 0.05),
    "unrelated": (lambda rng: (rng.random(NUM), rng.random(NUM)), 0.0),
}


def flipped(draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the problems 5 % are forgotten, 10 % learnt and half of the rest solved both times."""
    both = draw > 0.575
    return 1.0 * ((draw < 0.05) | both), 1.0 * ((draw > 0.05) & (draw < 0.15) | both)


def sampled(rng, rates: np.ndarray) -> np.ndarray:
    return rng.binomial(16, rates) / 16


@pytest.mark.parametrize("name", TRUTHS)
def test_the_interval_covers_the_truth(name):
    """At least 93 % of 1000 evaluations, where the plain bootstrap covers as few as 80 %."""
    draw, mean = TRUTHS[name]
    rng = np.random.default_rng(11)
    intervals = [mean_with_interval(sampled(rng, draw(rng)), num_resamples=500) for _ in range(1000)]
    assert sum(interval.low <= mean <= interval.high for interval in intervals) >= 930


@pytest.mark.parametrize("num", [10, NUM])
def test_the_interval_covers_every_rate_of_all_or_nothing(num):
    """Problems of which all samples are right, or none: the binomial sum over the numbers of solved problems, exact for
    any number of samples (with one, for every model), at rates from 0 to 1 with both ends."""
    intervals = [mean_with_interval([1.0] * solved + [0.0] * (num - solved)) for solved in range(num + 1)]
    for rate in np.linspace(0, 1, 401):
        chances = [comb(num, i) * rate**i * (1 - rate) ** (num - i) for i in range(num + 1)]
        covered = sum(p for p, interval in zip(chances, intervals) if interval.low <= rate <= interval.high)
        assert covered >= 0.935, rate


@pytest.mark.parametrize("name", CHANGES)
def test_the_paired_interval_covers_the_truth(name):
    draw, mean = CHANGES[name]
    rng = np.random.default_rng(12)
    pairs = [[sampled(rng, rates) for rates in draw(rng)] for _ in range(1000)]
    intervals = [paired_difference(*pair, num_resamples=500) for pair in pairs]
    assert sum(interval.low <= mean <= interval.high for interval in intervals) >= 930


def test_the_interval_is_hardly_wider_than_the_bootstrap_where_that_holds():
    rng = np.random.default_rng(13)
    values = sampled(rng, np.random.default_rng(14).beta(2, 2, 256))
    interval = mean_with_interval(values)
    half_width = 1.959964 * values.std(ddof=1) / np.sqrt(256)
    assert 0.97 < (interval.high - interval.low) / (2 * half_width) < 1.06


@pytest.mark.parametrize("values", [[], [[0.5, 0.5]], [0.5, 1.2], [0.5, float("nan")]])
def test_interval_refuses_what_is_not_one_share_per_problem(values):
    with pytest.raises(ValueError, match="one number within"):
        mean_with_interval(values)


def test_paired_difference_cancels_the_difficulty():
    before = np.linspace(0.0, 0.8, 40)
    after = before + np.tile([0.1, 0.2], 20)
    difference = paired_difference(before, after)
    assert difference.mean == pytest.approx(0.15)
    # Standard error of ±0.05 around the mean: 0.05/√39 = 0.0080; of the unpaired means about 0.05.
    assert (difference.low, difference.high) == pytest.approx((0.1343, 0.1657), abs=0.002)
    assert paired_difference(after, before).mean == pytest.approx(-0.15)


def test_paired_difference_of_one_problem_claims_nothing():
    difference = paired_difference([0.25], [0.75])
    assert difference.mean == 0.5
    assert difference.low < 0 < difference.high


def test_paired_difference_refuses_different_problems():
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([0.5, 0.5], [0.5])
