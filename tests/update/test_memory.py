"""Budgets: what fits, what happens when it does not, and that neither moves a gradient."""

import pytest
import torch
from conftest import one_update, padded_rollout, relative_error, sapo_config, sapo_trainer, tiny_model

from sapo_trl.rollout.rows import rows_from_padded
from sapo_trl.update import memory
from sapo_trl.update.memory import activation_bytes
from sapo_trl.update.packing import PackedForward


def out_of_memory_above(monkeypatch, tokens: int, in_backward: bool) -> list[int]:
    """A device on which packs of more than `tokens` tokens fail; the sizes it saw.

    In the backward pass it fails at the embedding, when the gradients of all other layers have been added.
    """
    seen, hooks, call = [], [], PackedForward.__call__

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def limited(self, model, inputs, router_logits=False):
        while hooks:
            hooks.pop().remove()
        seen.append(inputs.model_inputs["input_ids"].numel())
        outputs = call(self, model, inputs, router_logits)
        if seen[-1] > tokens and not in_backward:
            fail()
        if seen[-1] > tokens and outputs.logps.requires_grad:
            hooks.append(next(iter(model.parameters())).register_hook(fail))
        return outputs

    monkeypatch.setattr(PackedForward, "__call__", limited)
    return seen


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_pack_that_does_not_fit_is_halved_and_changes_no_gradient(tmp_path, tokenizer, monkeypatch, moe, in_backward):
    extra = {"router_aux_loss_coef": 0.05, "routing_replay": "r2"} if moe else {}
    model = tiny_model(tokenizer, moe)
    batch = padded_rollout(model, tool_mask=True)
    del batch["old_per_token_logps"]  # on-policy: old log-probs must be those of the run that succeeded
    expected_loss, expected, _ = one_update(sapo_trainer(tmp_path, tokenizer, model, **extra), batch)
    trainer = sapo_trainer(tmp_path, tokenizer, model, max_tokens_per_pack=60, **extra)
    seen = out_of_memory_above(monkeypatch, 25, in_backward)
    with pytest.warns(UserWarning, match=r"a pack of \d+ tokens did not fit into memory; from now on packs hold \d+"):
        loss, actual, metrics = one_update(trainer, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative_error(actual, expected) < 2e-6
    assert metrics["update/oom_retries"] >= 1 and max(seen) > 25 >= seen[-1]
    assert trainer._forward.max_tokens <= 30  # later rollouts are planned with the smaller budget


def test_experts_recorded_before_the_pack_that_fails(tmp_path, tokenizer, monkeypatch):
    """No router loss, so no pass before: the first pack has routes when a later one fails, and both start again."""
    model = tiny_model(tokenizer, moe=True)
    batch = padded_rollout(model, tool_mask=True)
    del batch["old_per_token_logps"]
    fields = {"router_aux_loss_coef": 0.0, "routing_replay": "r2", "max_tokens_per_pack": 36}
    _, expected, _ = one_update(sapo_trainer(tmp_path, tokenizer, model, **fields), batch)
    trainer = sapo_trainer(tmp_path, tokenizer, model, **fields)
    calls, call = [], PackedForward.__call__

    def second_fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PackedForward, "__call__", second_fails)
    with pytest.warns(UserWarning, match="did not fit"):
        _, actual, _ = one_update(trainer, batch)
    assert relative_error(actual, expected) < 2e-6


def test_a_single_row_that_does_not_fit_says_what_helps(tmp_path, tokenizer, monkeypatch):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    batch = padded_rollout(trainer.model)
    out_of_memory_above(monkeypatch, 5, in_backward=False)
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match="single row: set activation_checkpoi"):
        one_update(trainer, batch)


def test_passes_without_gradient_halve_too(tmp_path, tokenizer, monkeypatch):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    rows = rows_from_padded(padded_rollout(trainer.model))
    trainer._plan.passes.score("ref_logps", trainer.model, [rows])
    expected = [row.ref_logps for row in rows]
    out_of_memory_above(monkeypatch, 30, in_backward=False)
    with pytest.warns(UserWarning):
        trainer._plan.passes.score("ref_logps", trainer.model, [sorted(rows, key=len, reverse=True)])
    for row, logps in zip(rows, expected, strict=True):
        torch.testing.assert_close(row.ref_logps, logps, rtol=0, atol=1e-5)


def test_activation_memory_is_a_straight_line(tmp_path, tokenizer):
    """What the probe extrapolates from two sizes is there at a third."""
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    with trainer._forward.packed(trainer.model):
        low, high, far = (activation_bytes(trainer._forward, trainer.model, n) for n in (512, 1536, 4096))
    slope = (high - low) / 1024
    assert far == pytest.approx(low + slope * (4096 - 512), rel=0.02)
    assert slope > 32 * 4 * 2 * 5  # at least five hidden-sized fp32 tensors in each of two layers


def auto(tmp_path, tokenizer, monkeypatch, free: int, **fields):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    fields = {"max_steps": 2, "logging_steps": 1, "gradient_checkpointing": "auto"} | fields
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **fields)
    trainer.train()
    return trainer


def test_checkpointing_is_off_where_the_pack_fits(tmp_path, tokenizer, monkeypatch, capsys):
    enough = auto(tmp_path / "a", tokenizer, monkeypatch, 2**40, max_tokens_per_pack=2048)
    assert not enough.model.is_activation_checkpointing and not enough.args.activation_checkpointing
    assert "activation checkpointing off (wanted: 2048)" in capsys.readouterr().out
    tight = auto(tmp_path / "b", tokenizer, monkeypatch, 12 * 2**20, max_tokens_per_pack=2048)
    assert tight.model.is_activation_checkpointing and tight.args.activation_checkpointing
    assert "activation checkpointing on" in capsys.readouterr().out
    assert all(p.isfinite().all() for p in tight.model.parameters())


def test_the_largest_pack_that_fits(tmp_path, tokenizer, monkeypatch):
    few = auto(
        tmp_path / "a", tokenizer, monkeypatch, 40 * 2**20, max_tokens_per_pack="auto", gradient_checkpointing=False
    )
    more = auto(
        tmp_path / "b", tokenizer, monkeypatch, 80 * 2**20, max_tokens_per_pack="auto", gradient_checkpointing=False
    )
    assert 256 <= few._forward.max_tokens < more._forward.max_tokens < memory.MOST_TOKENS
    assert few._forward.max_tokens % 256 == 0
    forward = more._forward  # what it says fits does fit: the measured bytes are within what was free
    with forward.packed(more.model):
        held = activation_bytes(forward, more.model, forward.max_tokens)
    assert held * memory.BACKWARD_FACTOR + memory.reserved_bytes(more.model) <= memory.USABLE_FRAC * 80 * 2**20 * 1.02
    assert more._plan.memory.tokens_that_fit(more.model) == forward.max_tokens


def test_a_device_too_small_for_the_measurement(tmp_path, tokenizer, monkeypatch):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    probe = trainer._plan.memory
    out_of_memory_above(monkeypatch, 600, in_backward=False)
    assert probe.tokens_that_fit(trainer.model) == 0
    probe.engine.packs_are_collective = True
    with pytest.raises(torch.OutOfMemoryError, match="Set activation_checkpointing: true and max_tokens_per_pack: 768"):
        probe.tokens_that_fit(trainer.model)


def test_settings_of_memory(tmp_path):
    assert sapo_config(tmp_path, gradient_checkpointing=None).checkpointing_is_auto
    for given, expected in ((True, True), ("false", False), ("auto", True)):
        config = sapo_config(tmp_path, gradient_checkpointing=None, activation_checkpointing=given).for_trl()
        assert config.activation_checkpointing is config.gradient_checkpointing is expected
    assert sapo_config(tmp_path, max_tokens_per_pack="512").max_tokens_per_pack == 512
    with pytest.raises(ValueError, match="max_tokens_per_pack='some' must be a number of at least 1, or 'auto'"):
        sapo_config(tmp_path, max_tokens_per_pack="some")
    with pytest.raises(ValueError, match="activation_checkpointing='maybe' is unknown; known: true, false, auto"):
        sapo_config(tmp_path, gradient_checkpointing=None, activation_checkpointing="maybe")
    with pytest.raises(ValueError, match="contradict each other"):
        sapo_config(tmp_path, gradient_checkpointing=True, activation_checkpointing=False)
