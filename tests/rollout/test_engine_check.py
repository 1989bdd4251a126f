"""The check of every rollout engine: does it hold the policy's weights?

Engines here are functions with a model of their own, which they bring up to date or not.
"""

import pytest
import torch
from conftest import plain_logps, prompts, sapo_config, tiny_model

from sapo_trl import SAPOTrainer
from sapo_trl.monitor.guard import collapse_alarms

FIELDS = {
    "num_mini_batches": 2,
    "max_steps": 8,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}


class Engine:
    """Random completions, scored by a copy of the policy that is synced before every rollout up to `last_sync`."""

    def __init__(self, tokenizer, last_sync: int, dtype=torch.float32, gives_logprobs: bool = True):
        self.model, self.tokenizer = tiny_model(tokenizer).to(dtype), tokenizer
        self.last_sync, self.gives_logprobs, self.rollouts = last_sync, gives_logprobs, 0

    def __call__(self, prompts, trainer):
        if self.rollouts <= self.last_sync:
            self.model.load_state_dict(trainer.model.state_dict())
        g = torch.Generator().manual_seed(self.rollouts)
        self.rollouts += trainer.model.training
        prompt_ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        completion_ids = [torch.randint(3, 200, (3 + i % 4,), generator=g).tolist() for i in range(len(prompts))]
        logprobs = [self.logps(*pair) for pair in zip(prompt_ids, completion_ids, strict=True)]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": logprobs if self.gives_logprobs else None,
        }

    def logps(self, prompt, completion):
        ones = torch.ones(1, len(completion), dtype=torch.long)
        batch = {"prompt_ids": torch.tensor([prompt]), "prompt_mask": torch.ones(1, len(prompt))}
        return plain_logps(
            self.model, batch | {"completion_ids": torch.tensor([completion]), "completion_mask": ones}, 1
        )[0].tolist()


def trained(tmp_path, tokenizer, engine, **fields):
    rewards = lambda completions, completion_ids, **_: [float(sum(ids) % 3) for ids in completion_ids]  # noqa: E731
    config = sapo_config(tmp_path, **(FIELDS | {"on_collapse": "stop"} | fields))
    trainer = SAPOTrainer(
        tiny_model(tokenizer), rewards, config, prompts(), prompts(4), processing_class=tokenizer, rollout_func=engine
    )
    trainer.train()
    checks = [r.get("sampling/engine_check") for r in trainer.state.log_history if "loss" in r]
    return trainer, checks


WAYS = [
    {"old_logprobs": "trainer"},  # the rows of the old-log-prob pass
    {"old_logprobs": "sampler"},  # a pass over one row
    {"num_mini_batches": 1},  # the same: on-policy, no old-log-prob pass
]


@pytest.mark.parametrize("fields", WAYS)
def test_an_engine_with_stale_weights_ends_the_run(tmp_path, tokenizer, capsys, fields):
    steps = fields.get("num_mini_batches", 2)
    trainer, checks = trained(tmp_path, tokenizer, Engine(tokenizer, 1), engine_check_every=3, **fields)
    measured = [(i // steps, value) for i, value in enumerate(checks) if value is not None]
    assert [rollout for rollout, _ in measured] == [0, 3]  # not in the first with stale weights: that is the second
    assert measured[0][1] < 1e-4 and measured[1][1] > 1
    (alarm,) = collapse_alarms(trainer)
    assert alarm.signal == "sampling/engine_check" and trainer.state.global_step == 4 * steps
    assert "the engine does not hold the policy's weights" in capsys.readouterr().out


@pytest.mark.parametrize("fields", WAYS)
def test_an_engine_in_bfloat16_passes(tmp_path, tokenizer, fields):
    fields |= {"engine_check_every": 1, "max_steps": 4}
    trainer, checks = trained(tmp_path, tokenizer, Engine(tokenizer, 99, torch.bfloat16), **fields)
    measured = [value for value in checks if value is not None]
    assert len(measured) == 4 // fields.get("num_mini_batches", 2) and not collapse_alarms(trainer)
    assert min(measured) > 1e-2 and max(measured) < 0.9


def test_the_check_changes_no_number_and_no_evaluation(tmp_path, tokenizer):
    fields = {"old_logprobs": "sampler", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    logs = []
    for every in (0, 1):
        trainer, checks = trained(tmp_path, tokenizer, Engine(tokenizer, 99), engine_check_every=every, **fields)
        assert [value is not None for value in checks] == [True, False, bool(every), False, bool(every), False]
        logs.append([(r.get("loss"), r.get("eval_reward"), r.get("grad_norm")) for r in trainer.state.log_history])
    assert logs[0] == logs[1] and sum(reward is not None for _, reward, _ in logs[0]) == 3


def test_an_engine_without_log_probs_cannot_be_checked(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match="nobody sees which weights it holds"):
        _, checks = trained(tmp_path, tokenizer, Engine(tokenizer, 0, gives_logprobs=False), max_steps=2)
    assert checks == [None, None]
