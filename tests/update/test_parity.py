"""Our loss and gradient against TRL's own branch, on the same inputs: TRL 1.16 is the oracle."""

import copy

import pytest
import torch
from conftest import (
    PLAIN,
    gradients,
    length_reward,
    one_update,
    padded_rollout,
    plain_logps,
    prompts,
    relative_error,
    sapo_config,
    sapo_trainer,
    tiny_model,
)
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from sapo_trl import SAPOTrainer, trainer_rollout
from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.baselines import Cispo, Clip, Vespo
from sapo_trl.objective import LossInputs, SoftGate
from sapo_trl.rollout.rows import rows_from_padded
from sapo_trl.tiny import build_tokenizer
from sapo_trl.tiny_tools import calculator, give_calls
from sapo_trl.update.aggregation import MiniBatchCounts, row_weights

# those whose loss TRL has too; the others' numbers are typed by hand in tests/test_objective.py
WITH_ORACLE = (SoftGate, Clip, Cispo, Vespo)
ALGORITHM_NAMES = [name for name, row in ALGORITHMS.items() if row.objective in WITH_ORACLE and name != "grpo-r2"]


def trl_side(tmp_path, tokenizer, model, batch, **fields):
    """(loss, gradients) of TRL's `_compute_loss`."""
    vllm = fields.pop("use_vllm", False)
    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        steps_per_generation=4,
        **PLAIN,
        **fields,
    )
    trainer = GRPOTrainer(copy.deepcopy(model), length_reward, config, prompts(), processing_class=tokenizer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.use_vllm = vllm  # no engine here: only the loss reads it
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradients(trainer.model)


def our_side(tmp_path, tokenizer, model, batch, **fields):
    """(loss, gradients, metrics) of one mini-batch through the packed update."""
    of_engine = {name: fields.pop(name) for name in [*fields] if "vllm" in name}
    trainer = sapo_trainer(tmp_path, tokenizer, model, **fields)
    vars(trainer.args).update(of_engine)  # no engine here: only the loss reads them
    return one_update(trainer, batch)


def drift(name: str) -> float:
    return 0.05 if name == "vespo" else 0.3


def tolerance_of(name: str) -> float:
    """One weight for all tokens of a row takes up the rounding in which two forward passes differ: VESPO exponentiates
    a sum, GSPO a mean, which on a CPU without AVX-512 comes to 1.01e-6.

    On the same log-probs both are held to 1e-6 as well: `test_every_algorithm_on_the_same_log_probs`.
    """
    return {"vespo": 5e-6, "gspo": 2e-6}.get(name, 1e-6)


def trl_fields(name: str, **fields) -> dict:
    algorithm = ALGORITHMS[name]
    own = {"loss_type": algorithm.loss_type, "importance_sampling_level": algorithm.level}
    own |= {key: value for key, value in algorithm.options.items() if key in ("epsilon", "epsilon_high")}
    return own | fields


def assert_equal(tmp_path, tokenizer, model, batch, name, **fields):
    tolerance = tolerance_of(name)
    expected_loss, expected = trl_side(tmp_path, tokenizer, model, batch, **trl_fields(name, **fields))
    loss, actual, values = our_side(tmp_path, tokenizer, model, batch, algorithm=name, **fields)
    assert loss == pytest.approx(expected_loss, rel=tolerance, abs=1e-6)
    assert relative_error(actual, expected) <= tolerance
    return values


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("name", ALGORITHM_NAMES)
def test_every_algorithm(tmp_path, tokenizer, name, moe):
    model = tiny_model(tokenizer, moe)
    batch = padded_rollout(model, drift=drift(name))
    values = assert_equal(tmp_path, tokenizer, model, batch, name, router_aux_loss_coef=0.0)
    assert values["log_ratio/abs_mean"] > 0.03  # off-policy, or the comparison says nothing


@pytest.mark.parametrize("name", ALGORITHM_NAMES)
def test_every_algorithm_on_the_same_log_probs(tmp_path, tokenizer, name):
    """The gradient with respect to the log-probs themselves, without a model in between."""
    model = tiny_model(tokenizer)
    batch = padded_rollout(model, tool_mask=True)
    logps = (batch["old_per_token_logps"] + 0.3 * torch.randn(batch["completion_mask"].shape)).requires_grad_()
    config = GRPOConfig(
        output_dir=str(tmp_path),
        num_generations=4,
        max_completion_length=12,
        steps_per_generation=4,
        **PLAIN,
        **trl_fields(name),
    )
    trainer = GRPOTrainer(model, length_reward, config, prompts(), processing_class=tokenizer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, torch.zeros_like(logps), None)
    expected_loss = trainer._compute_loss(trainer.model, batch)
    (expected,) = torch.autograd.grad(expected_loss, logps)

    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    rows = torch.arange(8)[:, None].expand(mask.shape)[mask]
    algorithm = ALGORITHMS[name]
    tokens = LossInputs(
        logps[mask], batch["old_per_token_logps"][mask], batch["advantages"][rows], rows, 8, algorithm.level
    )
    counts = MiniBatchCounts(8, float(mask.sum()), float(batch["num_items_in_batch"]), 4, 12)
    weights = row_weights(algorithm.aggregation, mask.sum(1), counts, torch.ones(8))[rows]
    objective = sapo_config(tmp_path, algorithm=name).build_objective()
    loss = -(weights * objective.surrogate(tokens)).sum()
    (actual,) = torch.autograd.grad(loss, logps)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert (actual - expected).norm() <= 1e-6 * expected.norm()
    assert actual[batch["advantages"] != 0].abs().sum() > 0


@pytest.mark.parametrize("name", ALGORITHM_NAMES)
def test_tool_mask_and_kl(tmp_path, tokenizer, name):
    model = tiny_model(tokenizer)
    assert_equal(tmp_path, tokenizer, model, padded_rollout(model, tool_mask=True, drift=drift(name)), name, beta=0.04)


@pytest.mark.parametrize("name", ["sapo", "grpo", "gspo"])
def test_bias_corrected_kl(tmp_path, tokenizer, name):
    model = tiny_model(tokenizer)
    assert_equal(tmp_path, tokenizer, model, padded_rollout(model), name, beta=0.1, use_bias_correction_kl=True)


def vllm_ratio(batch, mode: str, cap: float) -> torch.Tensor:
    """TRL's importance ratio, (B, T) or (B, 1), written out from its documentation."""
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * mask
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    return ratio.clamp(max=cap) if mode.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("name", ["sapo", "gspo", "cispo", "vespo"])
def test_vllm_importance_ratio(tmp_path, tokenizer, name, mode):
    if name == "vespo" and mode.startswith("sequence"):
        with pytest.raises(ValueError, match="vespo"):
            sapo_trainer(
                tmp_path,
                tokenizer,
                tiny_model(tokenizer),
                algorithm=name,
                use_vllm=True,
                vllm_importance_sampling_mode=mode,
            )
        return
    model = tiny_model(tokenizer)
    batch = padded_rollout(model, tool_mask=True, drift=drift(name))
    batch["importance_sampling_ratio"] = vllm_ratio(batch, mode, cap=1.05)
    fields = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.05, "use_vllm": True}
    values = assert_equal(tmp_path, tokenizer, model, batch, name, **fields)
    assert 0 < values["sampling/lost_frac"] < 1


@pytest.mark.parametrize("name", ["sapo", "grpo", "dapo"])
def test_router_aux_loss(tmp_path, tokenizer, name):
    model = tiny_model(tokenizer, moe=True)
    values = assert_equal(tmp_path, tokenizer, model, padded_rollout(model), name, router_aux_loss_coef=0.05)
    assert values["aux_loss"] > 0.5  # top-2 of 8: 2 when balanced


@pytest.mark.parametrize("name", ["sapo", "gspo", "dr-grpo", "cispo"])
def test_entropy_mask_and_bonus(tmp_path, tokenizer, name):
    model = tiny_model(tokenizer)
    batch = padded_rollout(model, tool_mask=True)
    assert_equal(tmp_path, tokenizer, model, batch, name, top_entropy_quantile=0.4)
    assert_equal(tmp_path, tokenizer, model, batch, name, entropy_coef=0.02)
    assert_equal(tmp_path, tokenizer, model, batch, name, entropy_coef=0.02, top_entropy_quantile=0.4)


@pytest.mark.parametrize("name", ["sapo", "grpo"])
def test_off_policy_sequence_mask(tmp_path, tokenizer, name):
    model = tiny_model(tokenizer)
    assert_equal(tmp_path, tokenizer, model, padded_rollout(model), name, off_policy_mask_threshold=0.05)


def test_two_sided_clip_temperature_and_temperatures(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    batch = padded_rollout(model, temperature=0.7)
    assert_equal(tmp_path, tokenizer, model, batch, "grpo", delta=1.4, temperature=0.7)
    assert_equal(
        tmp_path, tokenizer, model, batch, "sapo", temperature=0.7, sapo_temperature_pos=3.0, sapo_temperature_neg=7.0
    )
    batch = padded_rollout(model, temperature=0.7, drift=drift("vespo"))
    assert_equal(tmp_path, tokenizer, model, batch, "vespo", vespo_k_pos=1.5, vespo_lambda_neg=2.5, temperature=0.7)


def test_zero_advantage_rows_leave_the_forward_pass_and_change_nothing(tmp_path, tokenizer):
    model = tiny_model(tokenizer)
    values = assert_equal(tmp_path, tokenizer, model, padded_rollout(model), "sapo")
    assert values["update/skipped_rows_frac"] == 1 / 8
    assert values["update/trained_tokens"] == 46.0  # 53 without the 7 of the row with A = 0


def calls_a_calculator(generate):
    """Every second completion of a first turn is replaced by a call, which no untrained model would write."""

    def single_turn(self, prompt_ids, *args, **kwargs):
        ids, logprobs = generate(self, prompt_ids, *args, **kwargs)
        called = self.processing_class("</call>")["input_ids"]
        if not any(str(called)[1:-1] in str(prompt) for prompt in prompt_ids):
            call = self.processing_class("<call>7*3+8%20</call><|im_end|>")["input_ids"]
            ids = [call if i % 2 else row for i, row in enumerate(ids)]
        return ids, logprobs

    return single_turn


def test_a_rollout_with_calls_of_a_tool(tmp_path, monkeypatch):
    """Rows as TRL makes them in a chat of two turns: what the tool said is in the context and not in the loss."""
    batches = []
    record = lambda batch, *rest: batches.append(batch) or rows_from_padded(batch, *rest)  # noqa: E731
    monkeypatch.setattr(trainer_rollout, "rows_from_padded", record)
    generate = SAPOTrainer._generate_single_turn
    monkeypatch.setattr(SAPOTrainer, "_generate_single_turn", calls_a_calculator(generate))
    tokenizer = give_calls(build_tokenizer())
    model = tiny_model(tokenizer)
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i} mod 9?"}]} for i in range(8)])
    config = sapo_config(
        tmp_path, max_completion_length=60, max_steps=1, num_mini_batches=1, max_tool_calling_iterations=1
    )
    reward = lambda completions, **_: [float(len(str(x)) % 5) for x in completions]  # noqa: E731
    SAPOTrainer(copy.deepcopy(model), reward, config, chats, processing_class=tokenizer, tools=[calculator]).train()

    (batch,) = batches
    said = batch["completion_ids"][(batch["completion_mask"] * (1 - batch["tool_mask"])).bool()]
    assert tokenizer.decode(said) == 4 * "\n<|im_start|>tool\n9<|im_end|>\n<|im_start|>assistant\n"
    logps = plain_logps(model, batch, 1.0).detach()
    noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(3))
    batch["old_per_token_logps"] = (logps + 0.3 * noise) * batch["completion_mask"]
    batch["advantages"] = torch.tensor([1.2, -0.7, 0.4, -1.5, 0.3, 0.9, -0.2, 2.0])
    batch["num_items_in_batch"] = 4 * (batch["completion_mask"] * batch["tool_mask"]).sum()
    values = assert_equal(tmp_path, tokenizer, model, batch, "sapo")
    own = (batch["completion_mask"] * batch["tool_mask"]).bool()  # nor is it in the metrics
    assert values["log_ratio/abs_mean"] == pytest.approx(0.3 * noise[own].abs().mean().item(), rel=1e-4)
