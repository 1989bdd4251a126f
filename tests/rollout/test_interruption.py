"""Thoughts beyond the budget end in the phrase, are answered, and the phrase is not trained on."""

import copy

import pytest
import torch
from conftest import length_reward, prompts, sapo_config, tiny_model
from datasets import Dataset

from sapo_trl import SAPOTrainer
from sapo_trl.rollout.interruption import INTERRUPTION, budgets, is_thinking, phrase_tokens

OPEN = Dataset.from_list([{"prompt": f"{i}+1=" + ("<think>" if i % 2 else ""), "answer": "1"} for i in range(64)])


def trained(tmp_path, tokenizer, dataset=OPEN, **fields):
    """(trainer, rows of its one rollout) with a budget of 5 tokens and room for 14 more after the phrase."""
    longest = 5 + len(phrase_tokens(tokenizer)) + 14
    given = {"thinking_budget": [5], "max_completion_length": longest, "max_steps": 1, "logging_steps": 1}
    config = sapo_config(tmp_path, **given | {"on_collapse": "none"} | fields)
    trainer = SAPOTrainer(
        copy.deepcopy(tiny_model(tokenizer)), length_reward, config, dataset, processing_class=tokenizer
    )
    trainer.train()
    return trainer, [row for batch in trainer._rollout.mini_batches for row in batch.rows]


def test_only_open_thoughts_are_interrupted_and_the_phrase_is_not_trained_on(tmp_path, tokenizer):
    trainer, rows = trained(tmp_path, tokenizer)
    phrase, interrupted, whole = phrase_tokens(tokenizer), 0, 0
    for row in rows:
        completion, prompt = row.input_ids[row.num_prompt :], tokenizer.decode(row.input_ids[: row.num_prompt])
        ended = completion[-1].item() in trainer.eos_token_ids
        if prompt.endswith("<think>") and len(completion) > 5:
            assert completion[5 : 5 + len(phrase)].tolist() == phrase
            assert row.trained.tolist() == [i < 5 or i >= 5 + len(phrase) for i in range(len(completion))]
            assert len(completion) == 5 + len(phrase) + 14 or ended
            interrupted += 1
        else:  # goes on in the second part like any other, up to the whole length
            assert row.trained.all() and (ended or len(completion) == trainer.max_completion_length)
            whole += len(completion) > 5
    assert interrupted > 8 and whole > 8
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log["completions/interrupted_frac"] == interrupted / len(rows)


@pytest.mark.parametrize("own_loop", [True, False])
def test_with_and_without_the_own_decoding_loop(tmp_path, tokenizer, own_loop, monkeypatch):
    """The other loop, transformers', cuts at the largest budget; each completion then at its own."""
    if not own_loop:
        monkeypatch.setattr("sapo_trl.trainer.plain_generation_reason", lambda *_, **__: "not for this test")
    _, rows = trained(tmp_path, tokenizer, thinking_budget=[2, 5])
    starts = {int(row.trained.int().argmin()) for row in rows if not row.trained.all()}
    assert starts == {2, 3, 4, 5}


def test_the_answer_follows_from_the_thought_and_the_phrase(tmp_path, tokenizer):
    """Almost greedy, so that every token is the most probable one after all that stands before it."""
    _, rows = trained(tmp_path, tokenizer, temperature=1e-3)
    model, seen = tiny_model(tokenizer), 0
    for row in [row for row in rows if not row.trained.all()][:6]:
        with torch.no_grad():
            best = model(input_ids=row.input_ids[None]).logits[0].argmax(-1)
        assert best[row.predicting].equal(row.targets)
        seen += row.num_trained > 5
    assert seen


def test_budgets_are_drawn_evenly_between_the_bounds():
    torch.manual_seed(0)
    drawn = budgets([3, 6], 4000)
    assert {n: drawn.count(n) > 900 for n in {*drawn}} == dict.fromkeys((3, 4, 5, 6), True)
    assert budgets([4], 3) == [4, 4, 4]


def test_the_phrase_closes_the_thought():
    assert not is_thinking("<think>a" + INTERRUPTION) and is_thinking("<think>a</think>b<think>c")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"thinking_budget": [12]}, r"thinking_budget=\[12\] must be one number.*below max_completion_length=12"),
        ({"thinking_budget": [6, 4]}, "two in order"),
        ({"thinking_budget": []}, "one number"),
        ({"thinking_budget": [4], "routing_replay": "r3"}, "generates in two parts"),
    ],
)
def test_a_budget_that_can_not_be_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        sapo_config(tmp_path, **fields)


def test_no_tokens_left_for_an_answer_is_refused_before_anything_is_generated(tmp_path, tokenizer):
    config = sapo_config(tmp_path, thinking_budget=[4])
    with pytest.raises(ValueError, match="leave no tokens for an answer within max_completion_length=12"):
        SAPOTrainer(tiny_model(tokenizer), length_reward, config, prompts(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="completions of one turn"):
        SAPOTrainer(
            "no/model", length_reward, config, prompts(), processing_class=tokenizer, rollout_func=lambda *_: {}
        )
