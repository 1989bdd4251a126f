"""Values typed by hand, or from an independent oracle: enumeration of every draw, and exact binomial fractions."""

from itertools import combinations

import numpy as np
import pytest

from sapo_trl.stats import mean_with_interval, paired_difference, pass_at_k, wilson_interval


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


def test_wilson_interval_has_the_published_values():
    # Newcombe 1998, Statistics in Medicine 17:857, Table I, method 3 (score): 81/263, 15/148, 0/20, 1/29.
    for right, num, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(right / num, num) == pytest.approx((low, high), abs=6e-5)


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


def test_one_right_problem_has_wilsons_interval():
    interval = mean_with_interval([1.0])
    assert (interval.low, interval.high) == pytest.approx((1 / (1 + 3.841459), 1.0), abs=1e-6)  # 1/(1 + z²)


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
