"""Old log-probs: who computes them, when, and that a reward's slowness changes no number."""

import dataclasses
import threading

import pytest
import torch
from conftest import length_reward, plain_logps, prompts, sapo_config, tiny_model
from trl.trainer import grpo_trainer

from sapo_trl import SAPOTrainer
from sapo_trl.update.packing import PackedForward
from sapo_trl.update.passes import NOISE_ROWS, LogProbPasses
from sapo_trl.update.update import Update

FIELDS = {"num_mini_batches": 2, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2}


def trained(tmp_path, tokenizer, reward=length_reward, moe=False, rollout_func=None, **fields):
    config = sapo_config(tmp_path, **(FIELDS | fields))
    trainer = SAPOTrainer(
        tiny_model(tokenizer, moe), reward, config, prompts(), processing_class=tokenizer, rollout_func=rollout_func
    )
    trainer.train()
    return trainer, [record for record in trainer.state.log_history if "loss" in record]


def column(log, name):
    return [record[name] for record in log]


@pytest.mark.parametrize(
    "fields",
    [{"overlap_rewards": True}, {"beta": 0.05}, {"overlap_rewards": True, "routing_replay": "r2", "moe": True}],
)
def test_passes_run_while_rewards_are_computed(tmp_path, tokenizer, monkeypatch, fields):
    """A reward that waits for the pass would wait for ever if the pass came after it; the numbers stay the same."""
    passed, record = threading.Event(), LogProbPasses.score
    last = "ref_logps" if "beta" in fields else "old_logps"

    def recorded(self, name, *args):
        record(self, name, *args)
        if name == last:
            passed.set()

    def patient(completions, **kwargs):
        assert passed.wait(60), "the passes did not start before the rewards were there"
        passed.clear()
        return length_reward(completions)

    _, plain = trained(tmp_path / "plain", tokenizer, **(fields | {"overlap_rewards": False}))
    monkeypatch.setattr(LogProbPasses, "score", recorded)
    _, overlapped = trained(tmp_path / "overlapped", tokenizer, patient, **fields)
    assert max(column(plain, "log_ratio/abs_mean")) > 1e-3
    for name in ("loss", "log_ratio/abs_mean", "grad_norm", "reward"):
        pairs = zip(column(overlapped, name), column(plain, name), strict=True) if name in plain[1] else ()
        for a, b in pairs:
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6), name


def test_zero_advantage_rows_cost_no_old_pass_unless_asked(tmp_path, tokenizer, monkeypatch):
    forwarded = []
    record = LogProbPasses.score

    def count(self, name, model, packs):
        forwarded.append(sum(len(pack) for pack in packs))
        record(self, name, model, packs)

    monkeypatch.setattr(LogProbPasses, "score", count)
    equal = lambda completions, **_: [1.0] * len(completions)  # noqa: E731
    trained(tmp_path, tokenizer, equal, max_steps=2)
    assert forwarded == [0]
    trained(tmp_path, tokenizer, equal, max_steps=2, overlap_rewards=True)
    assert forwarded[1:] == [8 + NOISE_ROWS, 0]


def stored_rollouts(model, tokenizer, drift: float):
    """A rollout engine whose log-probs are the model's, off by up to `drift`, some unknown."""

    def rollout(prompts, trainer):
        g = torch.Generator().manual_seed(len(prompts))
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        completion_ids = [torch.randint(3, 200, (5 + i % 4,), generator=g).tolist() for i in range(len(prompts))]
        logprobs = []
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
            ones = torch.ones(1, len(completion), dtype=torch.long)
            batch = {"prompt_ids": torch.tensor([prompt]), "prompt_mask": torch.ones(1, len(prompt))}
            batch |= {"completion_ids": torch.tensor([completion]), "completion_mask": ones}
            logps = plain_logps(model, batch, 1.0)[0] + drift * torch.rand(len(completion), generator=g)
            logprobs.append(logps.tolist())
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    return rollout


def test_the_rollout_engines_log_probs_replace_the_pass(tmp_path, tokenizer, monkeypatch):
    model = tiny_model(tokenizer)
    passes = []
    record = LogProbPasses.score
    monkeypatch.setattr(LogProbPasses, "score", lambda self, *args: (passes.append(args[0]), record(self, *args)))
    rewards = lambda completions, completion_ids, **_: [float(sum(ids) % 3) for ids in completion_ids]  # noqa: E731
    logs = {}
    for drift in (0.0, 0.2):
        rollout = stored_rollouts(model, tokenizer, drift)
        fields = {"old_logprobs": "sampler", "max_steps": 2, "learning_rate": 0.0}
        _, logs[drift] = trained(tmp_path, tokenizer, rewards, rollout_func=rollout, **fields)
    assert passes == ["old_logps"] * 2  # nothing but the check of the engine, once a run
    # the first mini-batch is compared with the rollout engine too: its own log-probs would give exactly 0
    assert column(logs[0.0], "log_ratio/abs_mean") == pytest.approx([0, 0], abs=1e-5)
    assert column(logs[0.2], "log_ratio/abs_mean") == pytest.approx([0.1, 0.1], abs=0.03)


def test_what_a_rollout_func_does_not_give_is_refused(tmp_path, tokenizer):
    def silent(prompts, trainer):
        return {"prompt_ids": [[5, 6]] * len(prompts), "completion_ids": [[7]] * len(prompts), "logprobs": None}

    with pytest.raises(ValueError, match="the rollout gave no log-probs"):
        trained(tmp_path, tokenizer, rollout_func=silent, old_logprobs="sampler")
    with pytest.raises(ValueError, match="can't follow a conversation with tools or a rollout_func"):
        trained(tmp_path, tokenizer, rollout_func=silent, routing_replay="r3", moe=True)


def test_engine_log_probs_that_nobody_gives_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="old_logprobs='sampler' needs log-probs from the rollout engine"):
        trained(tmp_path, tokenizer, old_logprobs="sampler")
    with pytest.raises(ValueError, match="nothing is left for vllm_importance_sampling_correction"):
        sapo_config(tmp_path, old_logprobs="sampler", use_vllm=True)
    with pytest.raises(ValueError, match="records the routes in the old-log-prob pass"):
        sapo_config(tmp_path, old_logprobs="sampler", routing_replay="r2")


@pytest.mark.parametrize("log_completions", [True, False])
def test_texts_are_gathered_only_to_be_logged(tmp_path, tokenizer, monkeypatch, log_completions):
    gathered, gather = [], grpo_trainer.gather_object

    def spy(objects):
        gathered.append(objects)
        return gather(objects)

    monkeypatch.setattr(grpo_trainer, "gather_object", spy)
    trained(tmp_path, tokenizer, max_steps=2, log_completions=log_completions)
    texts = [x for x in gathered if len(x) == 16]
    assert len(texts) == (2 if log_completions else 0) and len(gathered) > len(texts)


def test_a_run_resumed_in_a_rollouts_middle_knows_its_old_policy(tmp_path, tokenizer, monkeypatch):
    """Two mini-batches, two iterations, killed after the first step: steps 2 to 4 train parts 1, 0 and 1 of a rollout.

    It goes on with the rollout of the initial policy, whose log-probs are the old ones.
    """
    fields = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    trained(tmp_path, tokenizer, **(fields | {"max_steps": 1}))
    run, seen, old_policy = Update.run, [], tiny_model(tokenizer)

    def recorded(self, model, mini_batch, backward, dump=None):
        rows = [row for pack in mini_batch.packs for row in pack]
        seen.append((mini_batch.index, [row.old_logps for row in rows]))
        if mini_batch.index == 2:
            for row in rows:
                logps = old_policy(input_ids=row.input_ids[None]).logits[0, row.predicting].log_softmax(-1)
                expected = logps.gather(1, row.targets[:, None])[:, 0]
                torch.testing.assert_close(row.old_logps, expected, rtol=0, atol=1e-4)
        return run(self, model, mini_batch, backward)

    monkeypatch.setattr(Update, "run", recorded)
    config = sapo_config(tmp_path, **(FIELDS | fields))
    trainer = SAPOTrainer(
        tiny_model(tokenizer), length_reward, config, prompts(), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [index for index, _ in seen] == [1, 2, 3]
    assert all(olds and all(old is not None for old in olds) for _, olds in seen)
    log = [record["log_ratio/abs_mean"] for record in trainer.state.log_history if "loss" in record][1:]
    assert min(log) > 1e-3


@pytest.mark.parametrize("fields", [{}, {"overlap_rewards": True}, {"moe": True, "routing_replay": "r2"}])
@pytest.mark.parametrize("off", [0.0, 0.01])
def test_noise_without_any_update_is_measured(tmp_path, tokenizer, monkeypatch, fields, off):
    """In the first mini-batch of a rollout r is 1 by construction; the noise is what the pass before it is off by."""
    score = LogProbPasses.score

    def inexact(self, name, model, packs):
        score(self, name, model, packs)
        for row in (row for pack in packs for row in pack):
            row.old_logps = row.old_logps + off

    monkeypatch.setattr(LogProbPasses, "score", inexact)
    _, log = trained(tmp_path, tokenizer, max_tokens_per_pack=40, **fields)
    name = "log_ratio/noise_abs_mean"
    assert [name in record for record in log] == [True, False, True, False]
    assert [record[name] for record in log[::2]] == pytest.approx([off, off], abs=1e-6)
    assert column(log, "log_ratio/abs_mean")[::2] == [0.0, 0.0]


def test_noise_is_not_measured_where_passes_use_the_updates_packs(tmp_path, tokenizer):
    _, log = trained(tmp_path, tokenizer, algorithm="gspo")
    assert all("log_ratio/noise_abs_mean" not in record for record in log)


@pytest.mark.parametrize("algorithm, is_noise", [("gspo", False), ("sapo", True)])
def test_a_ratio_of_sequences_is_1_until_the_policy_moves(tmp_path, tokenizer, monkeypatch, algorithm, is_noise):
    """In bfloat16 a log-prob depends, by 1e-3, on what else is in its pack: here it does, on any machine. A pass in
    other packs than the update's shows it, and for a clip range of 3e-4 that would be movement of the policy."""
    call = PackedForward.__call__

    def rounded(self, model, inputs, *args):
        outputs = call(self, model, inputs, *args)
        return dataclasses.replace(outputs, logps=outputs.logps + 1e-3 * (inputs.targets.sum() % 101) / 101)

    monkeypatch.setattr(PackedForward, "__call__", rounded)
    fields = {"learning_rate": 0.0, "bf16": True, "max_tokens_per_pack": 96, "max_steps": 2}
    _, log = trained(tmp_path, tokenizer, algorithm=algorithm, **fields)
    off = column(log, "log_ratio/abs_mean")
    assert off[0] == 0.0 and (off[1] > 1e-5 if is_noise else off[1] == 0.0)
