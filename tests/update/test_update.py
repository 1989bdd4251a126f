"""The update: invariances, hostile rows, rollouts that are planned once, and what is skipped."""

import itertools
import math

import pytest
import torch
from conftest import one_update, padded_rollout, relative_error, sapo_trainer, tiny_model

from sapo_trl.model import layout_of
from sapo_trl.rollout.rows import Row, equal_reward_rows, reward_interval, rows_from_padded
from sapo_trl.update.attention import packed_attention
from sapo_trl.update.head import add_token_head
from sapo_trl.update.packing import PackedForward, pack_inputs, plan_packs

CPU = torch.device("cpu")


HARD = {"beta": 0.05, "entropy_coef": 0.01, "top_entropy_quantile": 0.5}


WEIGHTS_OF_ROWS = ("sapo-sequence", "sapo-adaptive", "topr", "m2po")


@pytest.mark.parametrize(
    ("name", "fields", "moe"),
    [
        *itertools.product(["sapo", "gspo", "dapo"], [{}, HARD], [False, True]),
        *((name, {}, False) for name in WEIGHTS_OF_ROWS),
    ],
)
def test_gradients_do_not_depend_on_the_cut(tmp_path, tokenizer, name, fields, moe):
    """One pack of eight rows, eight packs of one, and two in between: same loss, gradient and metrics."""
    extra = {"router_aux_loss_coef": 0.05} if moe else {}
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer, moe), algorithm=name, **fields, **extra)
    batch = padded_rollout(trainer.model, tool_mask=True)
    results = {}
    for budget in (10_000, 40, 25, 1):
        trainer._forward.max_tokens = budget
        results[budget] = one_update(trainer, batch)
    loss, whole, metrics = results[10_000]
    assert metrics["update/packs"] == 1 and results[1][2]["update/packs"] >= 7
    for other_loss, other, other_metrics in results.values():
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert relative_error(other, whole) < 2e-6
        for key in metrics.keys() - {"update/packs"}:
            assert other_metrics[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6), key


def test_layouts_agree(tmp_path, tokenizer):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    batch = padded_rollout(trainer.model, tool_mask=True)
    _, packed, _ = one_update(trainer, batch)
    assert trainer._forward.layout == "segments"
    trainer._forward.layout = "padded"
    _, padded, _ = one_update(trainer, batch)
    assert relative_error(packed, padded) < 1e-6


def row_logps(model, rows, layout="segments"):
    with torch.no_grad(), packed_attention(model, layout):
        inputs = pack_inputs(rows, layout, 0, CPU)
        out = model(**inputs.model_inputs, predict=inputs.predict, targets=inputs.targets)
    return out.logps.split([row.num_trained for row in rows])


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_changing_one_row_leaves_the_others_bit_equal(tokenizer, moe):
    model = tiny_model(tokenizer, moe)
    batch = padded_rollout(model)
    add_token_head(model, 1.0)
    rows = sorted(rows_from_padded(batch), key=len, reverse=True)
    before = row_logps(model, rows)
    rows[2].input_ids = rows[2].input_ids.flip(0)
    after = row_logps(model, rows)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b) == (i != 2)


@pytest.mark.parametrize("left_in", ["attention_mask", "use_cache"])
def test_a_mask_or_cache_left_in_is_caught(tokenizer, left_in):
    """Either makes transformers' packed logits silently wrong by 0.7; here both are errors."""
    model = tiny_model(tokenizer)
    add_token_head(model, 1.0)
    rows = sorted(rows_from_padded(padded_rollout(model)), key=len, reverse=True)
    inputs = pack_inputs(rows, "segments", 0, CPU)
    extra = {"attention_mask": torch.zeros(1, 1, 61, 61)} if left_in == "attention_mask" else {"use_cache": True}
    with packed_attention(model, "segments"), pytest.raises((ValueError, TypeError)):
        model(**inputs.model_inputs, **extra, predict=inputs.predict, targets=inputs.targets)


def test_generation_is_untouched_by_the_token_head(tokenizer):
    model = tiny_model(tokenizer)
    ids = torch.randint(3, 200, (2, 6))
    plain = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    add_token_head(model, 0.7)
    assert torch.equal(plain, model.generate(input_ids=ids, max_new_tokens=8, do_sample=False))


def row_of(length: int, num_prompt: int = 1, prompt_key: int | None = None) -> Row:
    ids = torch.arange(3, 3 + length)
    return Row(ids, num_prompt, torch.ones(length - num_prompt, dtype=torch.bool), 1.0, prompt_key)


def lengths_of(packs) -> list[list[int]]:
    return [[len(row) for row in pack] for pack in packs]


def test_plan_packs():
    plan = lambda lengths, *args, **kwargs: lengths_of(plan_packs([row_of(n) for n in lengths], *args, **kwargs))  # noqa: E731
    assert plan([], 10) == []
    assert plan([30, 4, 5, 4], 9) == [[30], [5, 4], [4]]  # longer than the budget: a pack of its own
    assert plan([3, 3, 3, 3], 100, num_packs=2) == [[3, 3], [3, 3]]
    assert plan([9, 3], 20, num_packs=3) == [[9], [3], []]
    # balanced by cost: with c = 1 a row of 9 costs 90, three of 5 cost 30 each
    assert plan([9, 5, 5, 5], 0, 0.0, num_packs=2) == [[9, 5], [5, 5]]
    assert plan([9, 5, 5, 5], 0, 1.0, num_packs=2) == [[9], [5, 5, 5]]
    for budget in (1, 7, 50):
        assert sorted(n for pack in plan([5, 1, 9, 9, 2, 7], budget) for n in pack) == [1, 2, 5, 7, 9, 9]


def test_layout_falls_back_aloud(tokenizer):
    model = tiny_model(tokenizer)
    assert layout_of(model)[0] == "segments"
    model.config.attention_dropout = 0.1
    assert layout_of(model) == ("padded", "attention_dropout=0.1")
    model.config.attention_dropout, model.config.attn_pdrop = 0.0, 0.2  # as GPT-2 calls it
    assert layout_of(model) == ("padded", "attn_pdrop=0.2")
    model.config.attn_pdrop, model.config.layer_types = 0.0, ["full_attention", "linear_attention"]
    assert layout_of(model) == ("padded", "layers of kind linear_attention carry state across rows")
    model.config.layer_types, model.config._attn_implementation = None, "flash_attention_2"
    assert layout_of(model)[0] == "flash"
    model.config._attn_implementation, model.config.sliding_window = "sdpa", 128  # without layer_types: every layer
    assert layout_of(model) == ("padded", "sliding_window=128")


def test_prompt_tuning_is_refused(tokenizer):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model(tokenizer), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(NotImplementedError, match="PROMPT_TUNING puts virtual tokens before every row"):
        layout_of(model)


def test_hostile_rows_give_finite_gradients(tmp_path, tokenizer):
    """Old log-probs of -inf and -200, an empty completion, a fully masked one, a masked extreme: and one honest row."""
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    batch = padded_rollout(trainer.model, tool_mask=True)
    batch["old_per_token_logps"][0, 0] = float("-inf")
    batch["old_per_token_logps"][1, 0] = -200.0
    batch["old_per_token_logps"][2, 2] = float("-inf")  # tool_mask is 0 there
    batch["completion_mask"][5] = 0
    batch["tool_mask"][6] = 0
    _, grads, metrics = one_update(trainer, batch)
    assert all(g.isfinite().all() for g in grads.values())
    clamped = metrics["log_ratio/clamped_frac"] * metrics["update/trained_tokens"]
    assert clamped == pytest.approx(2)
    assert metrics["update/skipped_rows_frac"] == 3 / 8  # A = 0, empty, masked


def test_masked_tokens_move_nothing(tmp_path, tokenizer):
    """Whatever old log-prob a tool token carries, the gradient is the same, bit for bit."""
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    batch = padded_rollout(trainer.model, tool_mask=True)
    _, before, _ = one_update(trainer, batch)
    batch["old_per_token_logps"] += 50.0 * (1 - batch["tool_mask"])
    _, after, _ = one_update(trainer, batch)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_mini_batch_of_zero_advantage_rows_steps_with_zero_gradients(tmp_path, tokenizer):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    batch = padded_rollout(trainer.model)
    batch["advantages"].zero_()
    loss, grads, metrics = one_update(trainer, batch)
    assert loss == 0 and metrics["update/skipped_rows_frac"] == 1
    assert grads.keys() == dict(trainer.model.named_parameters()).keys()  # zeros, never None: AdamW's momentum goes on
    assert all(not g.any() for g in grads.values())


@pytest.mark.parametrize("masked", [1, 8])
@pytest.mark.parametrize("fields", [{}, {"max_tokens_per_pack": 16}])
def test_rows_without_a_trained_token_are_routed_and_move_nothing_else(tmp_path, tokenizer, masked, fields):
    """As `mask_truncated_completions` leaves them; a pack may have no other rows, and the routers' loss counts them."""
    model = tiny_model(tokenizer, moe=True)
    trainer = sapo_trainer(tmp_path, tokenizer, model, num_mini_batches=1, on_collapse="none", **fields)
    assert trainer._plan.counts_all_rows
    batch = padded_rollout(model)
    rows = rows_from_padded(batch | {"tool_mask": batch["completion_mask"] * (torch.arange(8) >= masked)[:, None]})
    loss, grads, values = one_update(trainer, {"num_items_in_batch": sum(row.num_trained for row in rows)}, rows)
    assert math.isfinite(loss) and all(grad.isfinite().all() for grad in grads.values())
    assert ("ratio/max" in values) == (masked < 8) and values["aux_loss"] > 0


def test_equal_rewards_are_found_whatever_rounding_says():
    rewards = torch.tensor([0.1] * 8 + [0.7, 0.7, 0.7, 0.70001, 0.7, 0.7, 0.7, 0.7])
    assert equal_reward_rows(rewards, 8).tolist() == [True] * 8 + [False] * 8
    unscored = torch.tensor([0.7, float("nan"), 0.7, 0.7, 0.7, float("nan"), 0.6, 0.7] + [float("nan")] * 4)
    assert equal_reward_rows(unscored, 4).tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert reward_interval(unscored[:8], 4) == pytest.approx((0.68333 - 0.03267, 0.68333 + 0.03267), abs=1e-4)


def test_more_packs_never_break_the_budget(tmp_path, tokenizer):
    """Rows of one prompt of 900 tokens: balancing into three packs would repeat it, so one stays empty."""
    forward = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))._forward
    forward.max_tokens = 1000
    rows = [row_of(910, 900, key) for key in (0, 0, 0, 1, 1, 1)]
    plan = forward.plan(rows)
    assert lengths_of(plan) == [[910] * 3] * 2
    assert lengths_of(forward._extended(plan, rows, 3)) == [[910] * 3] * 2 + [[]]
    assert lengths_of(forward._extended([[rows[0], rows[3]]], [rows[0], rows[3]], 2)) == [[910], [910]]


def test_one_token_rows_and_budgets_below_a_row(tmp_path, tokenizer):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_tokens_per_pack=1)
    rows = [Row(torch.tensor([5, 6]), 1, torch.tensor([True]), 1.0) for _ in range(2)]
    loss, grads, _ = one_update(trainer, {"num_items_in_batch": 2}, rows)
    assert loss == pytest.approx(-2.0)  # f(1) = 2 for tau = 1, A = 1
    assert sum(g.abs().sum() for g in grads.values()) > 0


def test_gradient_checkpointing_changes_nothing(tmp_path, tokenizer):
    plain = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    batch = padded_rollout(plain.model)
    checkpointed = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), gradient_checkpointing=True)
    checkpointed.model.gradient_checkpointing_enable()
    assert checkpointed.model.is_gradient_checkpointing
    assert relative_error(one_update(checkpointed, batch)[1], one_update(plain, batch)[1]) < 1e-6


def test_forward_is_what_was_planned(tmp_path, tokenizer, monkeypatch):
    """Tokens that reach the model = tokens of active rows, no padding."""
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_tokens_per_pack=40)
    batch = padded_rollout(trainer.model)
    seen = []
    call = PackedForward.__call__

    def spy(self, model, inputs, router_logits=False):
        seen.append(inputs.model_inputs["input_ids"].numel())
        return call(self, model, inputs, router_logits)

    monkeypatch.setattr(PackedForward, "__call__", spy)
    _, _, metrics = one_update(trainer, batch)
    active = [row for row in rows_from_padded(batch) if row.advantage != 0]
    assert sum(seen) == sum(len(row) for row in active) == metrics["update/forwarded_tokens"]
    assert max(seen) <= 40
