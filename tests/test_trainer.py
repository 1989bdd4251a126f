"""The trainer from outside: training really runs, objectives can be replaced, cards and files say what they should."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import prompts, sapo_config, sapo_trainer, tiny_model

from sapo_trl import SAPOTrainer
from sapo_trl.monitor import attach
from sapo_trl.objective import LossInputs
from sapo_trl.stats import mean_with_interval

PAGE = Path(__file__).parent.parent / "docs/algorithms.md"


@pytest.mark.parametrize("name", ["sapo", "gspo", "cispo"])
def test_training_is_off_policy_and_steps_are_counted(tmp_path, tokenizer, name):
    """Two rollouts of two mini-batches: the first step of each is on-policy, the second is not."""
    trainer = sapo_trainer(
        tmp_path,
        tokenizer,
        tiny_model(tokenizer),
        algorithm=name,
        num_mini_batches=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
    )
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    log = [record for record in trainer.state.log_history if "loss" in record]
    drift = [record["log_ratio/abs_mean"] for record in log]
    assert drift[0] == drift[2] == 0 and min(drift[1], drift[3]) > 1e-3
    assert [("reward" in record) for record in log] == [True, False, True, False]  # rollouts
    assert log[0]["ratio/max"] == 1 and log[1]["ratio/max"] > 1
    assert all(record["effective_update_ratio"] <= 1 for record in log)
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_two_iterations_reuse_the_rollout_and_remember_old_log_probs(tmp_path, tokenizer):
    trainer = sapo_trainer(
        tmp_path,
        tokenizer,
        tiny_model(tokenizer),
        num_mini_batches=2,
        num_iterations=2,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
    )
    trainer.train()
    log = [record for record in trainer.state.log_history if "loss" in record]
    assert ["reward" in record for record in log] == [True, False, False, False]
    drift = [record["log_ratio/abs_mean"] for record in log]
    assert drift[0] == 0 and min(drift[1:]) > 1e-3 and drift[2] > drift[1]


def test_evaluation_reports_the_reward(tmp_path, tokenizer):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), per_device_eval_batch_size=8)
    result = trainer.evaluate(prompts(6))
    assert 0 <= result["eval_reward"] <= 4 and result["eval_loss"] == pytest.approx(result["eval_loss"])


def test_evaluation_gives_pass_at_1_with_its_interval(tmp_path, tokenizer):
    """Right answers are dealt out by hand: of the two completions of a problem 0, 1, 2, 0, ... are right."""
    config = sapo_config(tmp_path, per_device_eval_batch_size=8, num_generations_eval=2)
    count = iter(range(10_000))

    def accuracy_reward(completions, **kwargs):
        return [float(i % 2 < (i // 2) % 3) for i in (next(count) for _ in completions)]

    model = tiny_model(tokenizer)
    trainer = SAPOTrainer(model, accuracy_reward, config, prompts(), processing_class=tokenizer)
    result = trainer.evaluate(prompts(12))
    assert result["eval_pass_at_1"] == pytest.approx(0.5)
    expected = mean_with_interval([0, 0.5, 1] * 4)
    assert (result["eval_pass_at_1_low"], result["eval_pass_at_1_high"]) == pytest.approx((expected.low, expected.high))


def test_the_training_rewards_interval_is_over_prompts(tmp_path, tokenizer):
    """Four prompts of four completions with means 0, 1, 2 and 5: 2 +- 1.96 * 2.1602/2."""
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), num_mini_batches=2, max_steps=2, logging_steps=1)
    trainer.reward_funcs = [lambda completions, **_: [float(x) for x in (0, 1, 2, 5) for _ in range(4)]]
    trainer.train()
    record = trainer.state.log_history[0]
    assert (record["reward_low"], record["reward_high"]) == pytest.approx((2 - 2.1170, 2 + 2.1170), abs=1e-3)


def test_custom_objective_by_argument_is_used(tmp_path, tokenizer):
    seen = []

    def objective(tokens: LossInputs, config):
        seen.append(tokens.policy_logps.shape)
        return tokens.log_ratio.exp() * tokens.advantages

    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), objective=objective, max_steps=1)
    trainer.train()
    assert seen and trainer.state.log_history[0]["effective_update_ratio"] == pytest.approx(1.0)
    assert trainer._plan.skips_zero_advantage is False  # nobody knows what a custom objective does with A = 0


def test_the_documented_subclass_trains(tmp_path, tokenizer):
    """The example is taken out of its page and executed."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    (example,) = [block for block in blocks if "class " in block and "token_objective" in block]
    assert len(example.strip().splitlines()) <= 12
    namespace: dict = {}
    exec(compile(example, PAGE.name, "exec"), namespace)
    (kind,) = [value for value in namespace.values() if isinstance(value, type) and value.__module__ == "builtins"]
    assert issubclass(kind, SAPOTrainer)
    config = sapo_config(tmp_path, max_steps=2, learning_rate=1e-2, logging_steps=1)
    reward = lambda completions, **_: [len(c) % 3 for c in completions]  # noqa: E731
    trainer = kind(tiny_model(tokenizer), reward, config, prompts(), processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    "name, title, paper",
    [("sapo", "Soft Adaptive Policy Optimization", "2511.20347"), ("gspo", "Group Sequence Policy", "2507.18071")],
)
def test_model_card_names_the_algorithm_and_its_paper(tmp_path, tokenizer, name, title, paper):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), algorithm=name)
    trainer.create_model_card(model_name="x")
    card = (tmp_path / "README.md").read_text()
    assert f"trained with {name.upper()} ([{title}" in card and f"huggingface.co/papers/{paper}" in card
    assert "sapo-trl" in card and f"- {name}" in card and "GRPO" not in card


def test_metrics_file_and_progress_lines(tmp_path, tokenizer, capsys):
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_steps=3, logging_steps=1, learning_rate=1e-6)
    attach(trainer)
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records[:3]] == [1, 2, 3] and records[0]["reward"] >= 0
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_steps=1, logging_steps=1)
    attach(trainer)
    trainer.train()  # a new run in the same folder: the old records are kept beside it
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    assert len(list(tmp_path.glob("metrics-*.jsonl"))) == 1
    shown = capsys.readouterr().out
    assert re.search(r"step 3/3 .*lr (1e-06|[3-7]\.\d+e-07)", shown), shown


def test_a_resumed_run_starts_on_its_own_mini_batch(tmp_path, tokenizer):
    """After 6 of 8 steps with 4 mini-batches, the next one is mini-batch 2 of the saved rollout."""
    fields = {
        "num_mini_batches": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_steps=6, **fields).train()
    resumed = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), max_steps=8, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    log = [record for record in resumed.state.log_history if record["step"] > 6 and "loss" in record]
    assert [record["step"] for record in log] == [7, 8]
    assert ["mini_batch_2/ratio/max" in log[0], "mini_batch_3/ratio/max" in log[1]] == [True, True]
    assert not any("reward" in record for record in log)  # no new rollout
    assert resumed._step == 8


def test_lora_trains_the_adapter_only(tmp_path, tokenizer):
    from peft import LoraConfig

    config = sapo_config(tmp_path, max_steps=2, learning_rate=1e-2, logging_steps=1, beta=0.01)
    trainer = SAPOTrainer(
        tiny_model(tokenizer),
        lambda completions, **_: [float(len(c) % 3) for c in completions],
        config,
        prompts(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved and all("lora_" in name for name in moved)
    assert [record["kl"] for record in trainer.state.log_history if "kl" in record][1] > 0
