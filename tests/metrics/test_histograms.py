"""Quantiles read off fixed bins."""

import numpy as np
import pytest
import torch

from sapo_trl.metrics.histograms import counts_by_class, quantiles
from sapo_trl.metrics.step import CLASSES, DISTRIBUTIONS
from sapo_trl.metrics.tokens import quantile_metrics


def test_quantiles_are_right_to_half_a_bin():
    x = torch.cat([torch.randn(400, generator=torch.Generator().manual_seed(0)) * 10.0**k for k in (-5, -2, 1)])
    counts = counts_by_class(x, torch.zeros(len(x), dtype=torch.long), 1)[0]
    levels = (0.01, 0.25, 0.75, 0.99)
    exact = np.quantile(x.numpy(), levels, method="inverted_cdf")
    assert quantiles(counts, levels) == pytest.approx(exact, rel=0.0255, abs=1.1e-6)


def test_a_token_that_a_clip_cuts_off_has_both_weights_zero():
    """3 of 10 tokens are cut: what 10% lie below is exactly 0, and an effective weight is never negative."""
    cut = torch.tensor([1.0] * 3 + [0.0] * 7)
    classes = torch.full((10,), CLASSES.index(("pos", "expansive")))
    lost, gained = (counts_by_class(x, classes, len(CLASSES)) for x in (cut, -cut))
    values = quantile_metrics(torch.stack([torch.zeros_like(lost), lost, gained]))
    assert len(DISTRIBUTIONS) == 3 and values["gate/weight_pos_p10"] == 0 == values["gate/pull_expansive_p10"]
    assert values["gate/pull_pos_p99"] == 1
