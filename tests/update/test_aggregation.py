"""Averages over prompts: the loss and gradient of a rollout are those of its prompts alone, averaged."""

from dataclasses import replace

import pytest
import torch
from conftest import one_update, padded_rollout, relative_error, sapo_trainer, tiny_model

from sapo_trl.rollout.rows import rows_from_padded


@pytest.fixture
def update(tmp_path, tokenizer):
    """(loss, gradients) of rows in groups of four, under an aggregation and perhaps the filter."""
    model = tiny_model(tokenizer)

    def _update(rows, aggregation, **fields):
        given = {"algorithm": "grpo", "num_mini_batches": 1, "loss_aggregation": aggregation, "on_collapse": "none"}
        trainer = sapo_trainer(tmp_path, tokenizer, model, **given | fields)
        own = [replace(row, group_tokens=None) for row in rows]
        tokens = trainer._count_prompts(own, float(sum(row.num_trained for row in own)), 4)
        loss, grads, _ = one_update(trainer, {"num_items_in_batch": tokens}, own)
        return loss, grads

    return _update


@pytest.fixture
def rows(tokenizer):
    rows = rows_from_padded(padded_rollout(tiny_model(tokenizer)))
    lengths = [sum(row.num_trained for row in rows[start : start + 4]) for start in (0, 4)]
    assert lengths[0] != lengths[1]
    return rows


def averaged(*parts):
    losses, grads = zip(*parts, strict=True)
    mean = {name: torch.stack([each[name] for each in grads]).mean(0) for name in grads[0]}
    return sum(losses) / len(losses), mean


def test_the_average_of_prompts(update, rows):
    """Over one prompt's tokens TRL's mean over tokens is the oracle, as `dapo` in the parity tests."""
    loss, grads = update(rows, "prompt-mean")
    expected, mean = averaged(*(update(part, "rollout-token-mean") for part in (rows[:4], rows[4:])))
    assert loss == pytest.approx(expected, abs=1e-6) and relative_error(grads, mean) < 1e-5
    other, _ = update(rows, "rollout-token-mean")
    assert abs(other - expected) > 1e-3


@pytest.mark.parametrize("bonus", [0.0, 0.01])
@pytest.mark.parametrize("aggregation", ["prompt-mean", "rollout-token-mean", "token-mean", "sequence-mean"])
def test_the_filter_leaves_a_prompt_of_equal_rewards_out_of_the_average(update, rows, aggregation, bonus):
    silent = [*rows[:4], *(replace(row, advantage=0.0) for row in rows[4:])]
    loss, grads = update(silent, aggregation, zero_variance_filter=True, entropy_coef=bonus)
    expected, alone = update(rows[:4], aggregation, entropy_coef=bonus)
    assert loss == pytest.approx(expected, abs=1e-6) and relative_error(grads, alone) < 1e-5
    whole, _ = update(silent, aggregation, entropy_coef=bonus)
    assert abs(whole - expected) > 1e-3


def test_an_unknown_aggregation_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="loss_aggregation='prompt' is unknown.*Did you mean 'prompt-mean'"):
        sapo_trainer(tmp_path, tokenizer, None, loss_aggregation="prompt")
