"""What we rely on in TRL, held still: a release that moves any of it fails here, by name, before it trains wrongly."""

import hashlib
import inspect

import pytest
import torch
import trl
from conftest import length_reward, prompts, sapo_trainer, tiny_model
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction

from sapo_trl.rollout.rollout import Rollout

# Names of overridden or called private methods -> start of the sha256 of their source in TRL 1.16.0.
# A mismatch asks for reading the new source against sapo_trl/trainer.py, then for the new hash.
OVERRIDDEN = {
    "__init__": "18f01b7a46c9",
    "training_step": "9e18632f7dd8",
    "_prepare_inputs": "f824e7fb0714",
    "_generate_and_score_completions": "1fa48922792d",
    "_generate_single_turn": "e0f02e4fc094",
    "_calculate_rewards": "736ae29b0838",
    "_get_per_token_logps_and_entropies": "ea73c3909275",
    "compute_loss": "a2d6ef8bd29c",
    "_compute_loss": "80295546bbdb",
    "prediction_step": "008b55545107",
    "log": "1e7772819cc8",
    "_get_train_sampler": "36497afb4d31",
    # transformers 5.23
    "save_model": "705727ee10c8",
    "_load_from_checkpoint": "a2804e8d93a2",
    "_load_optimizer_and_scheduler": "5c1772becdfd",
    "_load_best_model": "0e183d55a9db",
}


def digest(method) -> str:
    return hashlib.sha256(inspect.getsource(method).encode()).hexdigest()[:12]


def test_version():
    assert trl.__version__.startswith("1.16.")


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_source_of_what_we_build_on(name):
    assert digest(getattr(GRPOTrainer, name)) == OVERRIDDEN[name]


def test_signatures():
    names = lambda f: list(inspect.signature(f).parameters)  # noqa: E731
    assert names(GRPOTrainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"]
    assert names(GRPOTrainer._prepare_inputs) == ["self", "generation_batch"]
    assert names(GRPOTrainer._calculate_rewards) == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert names(ChunkedLogProbFunction.forward)[1:] == [
        "hidden", "weight", "bias", "targets", "temperature", "chunk_size",
        "final_logit_softcapping", "logit_scale", "outputs",
    ]  # fmt: skip


def test_keys_of_a_rollout(tmp_path, tokenizer):
    """The dictionary that `rows_from_padded` reads, from a real generation."""
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    trainer.model.train()
    batch = [row for row in prompts(8) for _ in range(4)]
    rollout = Rollout()
    with trainer._fills(rollout):
        output = trainer._generate_and_score_completions(batch)
    assert set(output) == {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
    }  # fmt: skip
    assert output["advantages"].shape == (32,)
    assert output["num_items_in_batch"] == output["completion_mask"].sum()


def test_advantages_are_what_the_stage_map_says(tmp_path, tokenizer):
    """A = (r - mean_G r)/(std_G r + 1e-4), std with G - 1."""
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    trainer.model.train()
    rollout = Rollout()
    with trainer._fills(rollout):
        output = trainer._generate_and_score_completions([row for row in prompts(8) for _ in range(4)])
    rewards = rollout.rewards[:, 0].view(-1, 4).double()
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    torch.testing.assert_close(
        output["advantages"].double(), ((rewards - mean) / (std + 1e-4)).flatten(), rtol=1e-5, atol=1e-6
    )


def test_every_field_of_grpo_config_is_known():
    """A new field of TRL must be honoured or refused, not inherited unseen."""
    assert hashlib.sha256(" ".join(sorted(GRPOConfig.__dataclass_fields__)).encode()).hexdigest()[:12] == "ee64c101c3e2"


def test_reward_keyword_arguments(tmp_path, tokenizer):
    """`log_metric`, `log_extra`, `trainer_state` and the dataset's columns reach a reward function."""
    seen = {}

    def reward(completions, answer, **kwargs):
        seen.update(kwargs, answer=answer)
        return length_reward(completions)

    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer))
    trainer.reward_funcs[0] = reward
    trainer.model.train()
    rollout = Rollout()
    with trainer._fills(rollout):
        trainer._generate_and_score_completions([row for row in prompts(2) for _ in range(4)])
    assert {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric"} <= set(seen)
    assert seen["answer"] == ["1"] * 4 + ["2"] * 4
