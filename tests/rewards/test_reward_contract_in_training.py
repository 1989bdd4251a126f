"""A user's reward that misbehaves stops a real training run with an error that names it, the row and the value."""

import functools
import math
import signal
import threading

import pytest
import torch
from conftest import prompts, sapo_config, tiny_model

from sapo_trl import SAPOTrainer
from sapo_trl.rewards.contract import check_scores

BAD = {
    "raises": (lambda n: 1 / 0, "ZeroDivisionError"),
    "dict": (lambda n: {"reward": 1.0}, "a dict of length 1"),
    "none": (lambda n: None, "a NoneType"),
    "nan": (lambda n: [0.0, math.nan] * (n // 2), "nan for completion 1 of 32"),
    "inf": (lambda n: [0.0] * (n - 1) + [math.inf], "inf for completion 31 of 32"),
    "short": (lambda n: [0.0] * (n - 1), "31 rewards for 32 completions"),
    "text": (lambda n: ["1.0"] * n, "a str of length 3 for completion 0"),
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("case", BAD)
def test_named_error(tmp_path, tokenizer, case, asynchronous):
    make, message = BAD[case]

    def my_reward(completions, **kwargs):
        return make(len(completions))

    async def my_async_reward(completions, **kwargs):
        return make(len(completions))

    reward = my_async_reward if asynchronous else my_reward
    trainer = SAPOTrainer(
        tiny_model(tokenizer), reward, sapo_config(tmp_path, max_steps=1), prompts(), processing_class=tokenizer
    )
    with pytest.raises((ValueError, RuntimeError), match=f"'{reward.__name__}'.*{message}"):
        trainer.train()


def test_none_for_single_rows_is_allowed(tmp_path, tokenizer):
    def partly(completions, **kwargs):
        return [None if i % 4 == 0 else float(i % 3) for i in range(len(completions))]

    def whole(completions, **kwargs):
        kwargs["log_metric"]("mine", 2.5)
        return [1.0 for _ in completions]

    config = sapo_config(tmp_path, max_steps=1, logging_steps=1)
    trainer = SAPOTrainer(tiny_model(tokenizer), [partly, whole], config, prompts(), processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["mine"] == 2.5 and math.isfinite(trainer.state.log_history[0]["loss"])


def test_a_reward_of_weight_0_scores_nothing(tmp_path, tokenizer):
    """A completion that no counted function scores has no reward, whatever is logged beside it."""

    def judge(completions, **kwargs):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    def logged(completions, **kwargs):
        return [float(i) for i in range(len(completions))]

    config = sapo_config(tmp_path, max_steps=1, logging_steps=1, reward_weights=[1.0, 0.0])
    trainer = SAPOTrainer(tiny_model(tokenizer), [judge, logged], config, prompts(), processing_class=tokenizer)
    trainer.train()
    (logs, _) = trainer.state.log_history
    assert (logs["rewards/unscorable_frac"], logs["reward"], logs["grad_norm"]) == (0.5, 1.0, 0.0)
    held_out = trainer.evaluate(prompts(2))  # 8 completions
    assert held_out["eval_rewards/unscorable_frac"] == 0.5 and held_out["eval_reward"] == 1.0
    assert held_out["eval_rewards/logged/mean"] == 3.5  # of all, scored by another or not


def test_rewards_that_all_have_weight_0_are_refused(tmp_path):
    config = sapo_config(tmp_path, reward_weights=[0.0])
    with pytest.raises(ValueError, match=r"reward_weights=\[0.0\] counts no reward"):
        SAPOTrainer("no-such/model", lambda completions, **_: [1.0], config, prompts())


def test_a_reward_models_nan_is_named():
    rewards = torch.tensor([[1.0, 0.5], [torch.nan, torch.nan], [2.0, 0.5]])
    with pytest.raises(ValueError, match="Reward model 'scorer' gave nan for completion 1 of 3"):
        check_scores(rewards, {0: "scorer"})
    check_scores(rewards, {})  # a function's is None


def test_what_a_reward_does_to_its_lists_nobody_else_sees(tmp_path, tokenizer):
    seen = []

    def clears(prompts, completions, completion_ids, answer, **kwargs):
        rewards = [float(i % 3) for i in range(len(completions))]
        completion_ids[0].clear()
        for values in (prompts, completions, completion_ids, answer):
            values.clear()
        return rewards

    def looks(prompts, completions, completion_ids, answer, **kwargs):
        seen.extend([len(x) for x in (prompts, completions, completion_ids, answer)] + [min(map(len, completion_ids))])
        return [0.0] * len(completions)

    config = sapo_config(tmp_path, max_steps=1, logging_steps=1)
    trainer = SAPOTrainer(tiny_model(tokenizer), [clears, looks], config, prompts(), processing_class=tokenizer)
    trainer.train()
    assert seen[:4] == [32] * 4 and seen[4] > 0
    assert trainer.state.log_history[0]["rewards/clears/mean"] == pytest.approx(31 / 32)  # 11 · 0 + 11 · 1 + 10 · 2


def test_a_users_reward_runs_in_the_main_thread(tmp_path, tokenizer):
    """It may set a time limit by signal, which Python allows in the main thread only; one that asks for it may not."""
    seen = {}

    def limited(completions, scale, **kwargs):
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.signal(signal.SIGALRM, before)
        seen["limited"] = threading.current_thread() is threading.main_thread()
        return [scale * (i % 3) for i in range(len(completions))]

    def waiting(completions, **kwargs):
        seen["waiting"] = threading.current_thread() is threading.main_thread()
        return [0.0] * len(completions)

    waiting.run_in_thread = True
    config = sapo_config(tmp_path, max_steps=1, logging_steps=1)
    rewards = [functools.partial(limited, scale=0.5), waiting]
    trainer = SAPOTrainer(tiny_model(tokenizer), rewards, config, prompts(), processing_class=tokenizer)
    trainer.train()
    assert seen == {"limited": True, "waiting": False}
    # 32 completions: eleven times 0, eleven times 0.5, ten times 1
    assert trainer.state.log_history[0]["rewards/limited/mean"] == pytest.approx(15.5 / 32)
