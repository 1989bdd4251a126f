"""Routing replay inside real training runs of a tiny Qwen3-MoE: R2, R3, and what is only recorded."""

import pytest
from conftest import sapo_trainer, tiny_model

FIELDS = {"num_mini_batches": 4, "max_steps": 8, "logging_steps": 1, "learning_rate": 0.3, "optim": "sgd"}
FIELDS |= {"router_aux_loss_coef": 0.0, "lr_scheduler_type": "constant"}


def log_of(tmp_path, tokenizer, **fields) -> list[dict]:
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer, moe=True), **(FIELDS | fields))
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


def column(log: list[dict], name: str) -> list[float]:
    return [record[name] for record in log]


@pytest.mark.parametrize("fields", [{"algorithm": "grpo-r2"}, {"routing_replay": "r3"}, {"algorithm": "gspo"}])
def test_the_router_moves_after_the_first_mini_batch(tmp_path, tokenizer, fields):
    """Whatever is replayed, the routers' own selection is compared with the recorded one."""
    log = log_of(tmp_path, tokenizer, **fields)
    changed = column(log, "routing/changed_frac")
    assert changed[0] == changed[4] == 0
    assert all(0 < x < 1 for i, x in enumerate(changed) if i % 4)
    assert column(log, "ratio/max")[0] == pytest.approx(1, abs=1e-5)
    for record in log:
        assert 0 <= record["routing/load_min"] <= 1 / 8 <= record["routing/load_max"] <= 1
        layers = [record[f"routing/layer_{i:02d}/changed_frac"] for i in range(2)]
        assert record["routing/changed_frac"] == pytest.approx(sum(layers) / 2)


def test_r2_equals_r3_when_trainer_and_rollout_share_the_engine(tmp_path, tokenizer):
    """The same selections, recorded while generating or in the old-policy forward; only rounding differs."""
    r2 = log_of(tmp_path / "r2", tokenizer, routing_replay="r2")
    r3 = log_of(tmp_path / "r3", tokenizer, routing_replay="r3")
    free = log_of(tmp_path / "free", tokenizer)
    for name in ("ratio/mean", "log_ratio/abs_mean", "loss"):
        assert column(r2, name) == pytest.approx(column(r3, name), rel=2e-3, abs=2e-4), name
    # R3 has no record of a row's last token, which generation never forwards, and does not count it
    assert column(r2, "routing/changed_frac") == pytest.approx(column(r3, "routing/changed_frac"), rel=0.1)
    # replay changes the ratios of off-policy mini-batches, or it would do nothing
    pairs = zip(column(r2, "log_ratio/abs_mean"), column(free, "log_ratio/abs_mean"), strict=True)
    gaps = [abs(a - b) for a, b in pairs]
    assert gaps[0] == 0 and max(gaps[1:4]) > 1e-4


@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_replay_does_not_depend_on_packs_checkpointing_or_accumulation(tmp_path, tokenizer, replay):
    plain = log_of(tmp_path / "plain", tokenizer, routing_replay=replay, router_aux_loss_coef=0.01)
    variants = {
        "packs": {"max_tokens_per_pack": 40},
        "checkpointing": {"gradient_checkpointing": True},
        "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    }
    for name, fields in variants.items():
        other = log_of(tmp_path / name, tokenizer, routing_replay=replay, router_aux_loss_coef=0.01, **fields)
        for key in ("loss", "ratio/mean", "routing/changed_frac", "aux_loss"):
            assert column(other, key)[:4] == pytest.approx(column(plain, key)[:4], rel=1e-4, abs=1e-5), (name, key)


def test_a_dense_model_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"is dense; routing replay needs mixture-of-experts.*routing_replay: none"):
        sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), algorithm="grpo-r2")
