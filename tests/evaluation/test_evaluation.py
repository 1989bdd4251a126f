"""The sampler and the grading, on a model whose next token is known: it can only say what its bias table holds."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset

from sapo_trl.evaluation.evaluate import summarise
from sapo_trl.evaluation.samples import Sample, collect
from sapo_trl.evaluation.sampling import Completion, sample_completions
from sapo_trl.tiny import build_model, build_tokenizer, chat


def boxed_match(completions, answer, log_extra=None, **columns):
    """1 when the boxed text is the answer to the letter; None for an answer of `?`. TRL's reward signature."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    found = [re.fullmatch(r".*\\boxed\{(.*)\}", text) for text in texts]
    if log_extra is not None:
        log_extra("verdict", ["boxed" if match else "no box" for match in found])
    return [
        None if gold == "?" else float(match is not None and match[1] == gold)
        for match, gold in zip(found, answer, strict=True)
    ]


def evaluate(engine, dataset, reward, num_samples, ks=(1,)):
    return summarise(collect(engine, dataset, reward, num_samples), ks)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture()
def model(tokenizer):
    return build_model(tokenizer, seed=3)


@pytest.fixture()
def scripted(tokenizer, monkeypatch):
    """A model that says `\\boxed{7}` or `\\boxed{8}`, each with probability 1/2, then ends."""
    model = build_model(tokenizer, seed=0)
    script = tokenizer("\\boxed{").input_ids, tokenizer("78").input_ids, tokenizer("}<|im_end|>").input_ids
    follows = {script[0][-1]: script[1], **dict.fromkeys(script[1], script[2][:1]), script[2][0]: script[2][1:]}
    follows |= dict(zip(script[0], [[token] for token in script[0][1:]]))
    plain_forward = model.forward

    def forward(*args, **kwargs):
        output = plain_forward(*args, **kwargs)
        last = kwargs["input_ids"][:, -1].tolist()
        output.logits = torch.full_like(output.logits, -1e4)
        for row, token in enumerate(last):
            output.logits[row, -1, follows.get(token, script[0][:1])] = 0.0
        return output

    monkeypatch.setattr(model, "forward", forward)
    return model


def test_the_same_seed_gives_the_same_samples_and_another_gives_others(model, tokenizer):
    prompts = [chat("1+1?"), "2+2="]
    arguments = {"num_samples": 3, "max_new_tokens": 6}
    first = sample_completions(model, tokenizer, prompts, seed=1, **arguments)
    assert [len(row) for row in first] == [3, 3]
    assert first == sample_completions(model, tokenizer, prompts, seed=1, **arguments)
    assert first != sample_completions(model, tokenizer, prompts, seed=2, **arguments)
    assert len({sample.text for row in first for sample in row}) > 1


def test_left_padding_changes_no_greedy_answer(model, tokenizer):
    prompts = [chat("7 *3?"), chat("5/2 *2 :2 *2 *3 :5? and a much longer prompt")]
    together = sample_completions(model, tokenizer, prompts, max_new_tokens=12, temperature=0)
    alone = [sample_completions(model, tokenizer, [prompt], max_new_tokens=12, temperature=0)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("training", [True, False])
def test_training_around_it_is_not_disturbed(model, tokenizer, training, monkeypatch):
    model.train(training)
    torch.manual_seed(11)
    expected, second = torch.rand(3), torch.rand(3)
    torch.manual_seed(11)
    sample_completions(model, tokenizer, ["1+1="], max_new_tokens=4)
    assert torch.equal(torch.rand(3), expected)
    assert model.training is training

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample_completions(model, tokenizer, ["1+1="], max_new_tokens=4)
    assert torch.equal(torch.rand(3), second)
    assert model.training is training


def test_a_mixture_of_experts_generates_although_its_trainer_left_router_logits_on(tokenizer):
    model = build_model(tokenizer, moe=True)
    plain = sample_completions(model, tokenizer, ["1+1=", "2"], num_samples=2, max_new_tokens=4)
    model.config.output_router_logits = True
    assert sample_completions(model, tokenizer, ["1+1=", "2"], num_samples=2, max_new_tokens=4) == plain
    assert model.config.output_router_logits is True


def test_lengths_count_the_end_token_and_truncation_is_seen(scripted, tokenizer):
    (samples,) = sample_completions(scripted, tokenizer, ["x"], num_samples=4, max_new_tokens=5)
    assert {(sample.num_tokens, sample.truncated) for sample in samples} == {(5, False)}  # \boxed { 7 } <|im_end|>
    assert {sample.text for sample in samples} <= {"\\boxed{7}", "\\boxed{8}"}
    (samples,) = sample_completions(scripted, tokenizer, ["x"], num_samples=2, max_new_tokens=4)
    assert {(sample.num_tokens, sample.truncated) for sample in samples} == {(4, True)}


def test_evaluation_measures_a_model_of_known_probability(scripted, tokenizer):
    # 7 with probability 1/2: Pass@1 is 1/2 on three problems and 0 on the fourth.
    dataset = Dataset.from_dict({"prompt": [chat(text) for text in "abcd"], "answer": ["7", "8", "7", "9"]})
    engine = partial(sample_completions, scripted, tokenizer, max_new_tokens=5, batch_size=64)
    result = evaluate(engine, dataset, boxed_match, num_samples=100, ks=(1, 2, 100))
    counts = np.array(result.num_correct)
    assert counts[3] == 0
    assert ((counts[:3] > 30) & (counts[:3] < 70)).all()
    assert result.pass_at_1.mean == pytest.approx(counts.sum() / 400)
    assert result.scores["pass_at_1"] == result.pass_at_1
    assert result.scores["pass_at_2"].mean == pytest.approx(0.75 * 0.75, abs=0.05)  # three of four problems: 1 − 1/4
    assert result.scores["pass_at_100"].mean == 0.75
    assert result.scores["pass_at_100"].low < 0.75 < result.scores["pass_at_100"].high
    assert result.pass_at_1.low < 0.375 < result.pass_at_1.high
    assert (result.mean_length_tokens, result.truncated_frac, result.ungraded_frac) == (5.0, 0.0, 0.0)
    assert result.verdicts == {"boxed": 400}
    np.testing.assert_allclose(result.per_problem(), counts / 100)


def test_plain_prompts_and_missing_verdicts(scripted, tokenizer):
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["?", "9"]})
    result = evaluate(
        partial(sample_completions, scripted, tokenizer, max_new_tokens=3), dataset, boxed_match, num_samples=2
    )
    assert result.num_correct == (0, 0)
    assert (result.ungraded_frac, result.truncated_frac) == (0.5, 1.0)
    assert result.verdicts == {"no box": 4} and "maj_at_2" not in result.scores


def test_the_result_is_plain_json_and_a_table(scripted, tokenizer):
    dataset = Dataset.from_dict({"prompt": ["a"], "answer": ["7"]})
    engine = partial(sample_completions, scripted, tokenizer, max_new_tokens=5)
    result = evaluate(engine, dataset, boxed_match, num_samples=4, ks=(1, 4))
    loaded = json.loads(json.dumps(result.to_dict()))
    assert loaded["pass_at_1"]["mean"] == result.pass_at_1.mean
    assert loaded["scores"]["pass_at_4"]["mean"] == 1.0
    assert loaded["num_correct"] == list(result.num_correct)
    assert "95%, over problems" in result.table() and "pass@4" in result.table()


def test_impossible_requests_are_refused(tokenizer):
    dataset = Dataset.from_dict({"prompt": ["a"], "answer": ["7"]})
    with pytest.raises(ValueError, match="k=8 needs"):
        evaluate(lambda prompts, num, seed: [[Completion("", 1, False, (1,))] * num], dataset, boxed_match, 4, (1, 8))
    with pytest.raises(ValueError, match="0 problems"):
        evaluate(None, dataset.select([]), boxed_match, 4)
    with pytest.raises(ValueError, match="3 samples of 2 problems are not the same number"):
        summarise([Sample(i, 0, "a", "b", "c", 1.0, None, None, 1, False, 0, "") for i in (0, 0, 1)])


def test_the_vote_is_reported_where_the_reward_names_its_answers(scripted, tokenizer):
    """7 is right for the first problem and 8 for the second: of three samples of each, at least two must say so."""

    def letters(completions, answer, log_extra, **columns):
        found = [completion[-2] for completion in completions]  # \boxed{7}
        log_extra("extracted_answer", found)
        return [float(letter == gold) for letter, gold in zip(found, answer)]

    dataset = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["7", "8"]})
    engine = partial(sample_completions, scripted, tokenizer, max_new_tokens=5)
    result = evaluate(engine, dataset, letters, num_samples=3, ks=(1, 3))
    assert result.scores["maj_at_3"].mean == sum(count >= 2 for count in result.num_correct) / 2
    assert f"maj@3                 {result.scores['maj_at_3'].mean:.3f} [" in result.table()


def test_options_of_the_chat_template_are_part_of_the_prompt(scripted, tokenizer, monkeypatch):
    template = "{{ messages[0]['content'] }}{% if enable_thinking is false %}=0{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = [{"role": "user", "content": "1+1"}]
    seen = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *a, **kw: seen.append(kw["text"]) or call(*a, **kw))
    for options in (None, {"enable_thinking": False}):
        sample_completions(scripted, tokenizer, [chat], max_new_tokens=2, chat_template_kwargs=options)
    assert seen == [["1+1"], ["1+1=0"]]
