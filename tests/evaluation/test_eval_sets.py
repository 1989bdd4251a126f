"""Named evaluation sets while training: each with its own problems, sampling and samples per problem."""

import inspect
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import prompts, sapo_config, sapo_trainer, tiny_model
from trl.generation.vllm_generation import VLLMGeneration

from sapo_trl import SAPOTrainer
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import load_train_and_eval
from sapo_trl.eval_sets import EvalSet
from sapo_trl.evaluation.training import sampled_as
from sapo_trl.stats import scores

SETS = {
    "greedy": {"num_samples": 1, "temperature": 0, "max_completion_length": 3},
    "hot-4": {"num_samples": 4, "temperature": 2.0, "ks": [1, 2, 4]},
}


class Seen:
    """A reward under the name of accuracy that keeps what it was asked, and finds every third answer right."""

    __name__ = "accuracy_reward"

    def __init__(self):
        self.texts, self.marks = [], []

    def __call__(self, completions, completion_ids, log_extra=None, **columns):
        marks = [float(i % 3 == 0) for i in range(len(completions))]
        log_extra("extracted_answer", ["right" if mark else str(i % 2) for i, mark in enumerate(marks)])
        self.texts.append(list(zip(completions, map(len, completion_ids))))
        self.marks.append(marks)
        return marks


@pytest.fixture
def trainer(tmp_path, tokenizer):
    def build(**fields):
        config = sapo_config(tmp_path, **{"per_device_eval_batch_size": 8, "eval_sets": SETS} | fields)
        data = {"greedy": prompts(8), "hot-4": prompts(4), "plain": prompts(2)}
        rewards = Seen()
        made = SAPOTrainer(
            tiny_model(tokenizer), rewards, config, prompts(), eval_dataset=data, processing_class=tokenizer
        )
        return made, rewards

    return build


def test_each_set_is_sampled_in_its_own_way(trainer):
    made, rewards = trainer()
    before = made.generation_config
    result = made.evaluate()
    greedy, first, second, plain = rewards.texts
    assert made.generation_config is before and made.num_generations_eval == 4 and made._eval_set is None
    assert len(greedy) == len(first) == len(second) == len(plain) == 8  # 8 × 1, 4 × 4 in two batches, 2 × 4
    assert max(length for _, length in greedy) <= 3 < max(length for _, length in first + second)
    assert result["eval_greedy_completions/mean_length"] <= 3
    rewards.texts.clear()
    made.evaluate()
    assert rewards.texts[0] == greedy and rewards.texts[1] != first  # only the greedy one repeats itself
    right, answers = [x == 1 for x in rewards.marks[1] + rewards.marks[2]], []
    for marks in rewards.marks[1:3]:
        answers += ["right" if mark else str(i % 2) for i, mark in enumerate(marks)]
    expected = scores(np.array(right).reshape(4, 4), (1, 2, 4), answers)
    for name, score in expected.items():
        assert result[f"eval_hot-4_{name}"] == pytest.approx(score.mean)
        assert result[f"eval_hot-4_{name}_low"] == pytest.approx(score.low)
    assert len(expected) == 5 and "eval_greedy_pass_at_1" in result and "eval_greedy_maj_at_1" not in result
    assert result["eval_plain_pass_at_4"] == 1.0 and result["eval_plain_maj_at_4"] < 1


def test_one_set_by_its_name_or_as_data_of_its_own(trainer):
    made, rewards = trainer()
    made.evaluate("greedy")
    made.evaluate({"greedy": prompts(8)})
    made.evaluate(prompts(2))
    assert rewards.texts[0] == rewards.texts[1] and max(length for _, length in rewards.texts[2]) > 3


def test_the_best_checkpoint_may_follow_any_score(trainer):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    made, _ = trainer(**best, save_steps=1, max_steps=2, metric_for_best_model="eval_hot-4_maj_at_4")
    made.train()
    logged = [record["eval_hot-4_maj_at_4"] for record in made.state.log_history if "eval_hot-4_maj_at_4" in record]
    assert len(logged) == 2 and made.state.best_metric == pytest.approx(max(logged))


REFUSED = [
    ({"a": {"num_sample": 4}}, "eval_sets.a: unknown key 'num_sample'.*Did you mean 'num_samples'"),
    ("aime", "eval_sets is 'aime', not a mapping"),
    ({"a b": {}}, "eval_sets.a b: a name of letters"),
    ({"a": 3}, "eval_sets.a is 3, not a mapping"),
    ({"a": {"num_samples": 0}}, "eval_sets.a.num_samples 0 is less than 1"),
    ({"a": {"num_samples": 2.5}}, "eval_sets.a.num_samples 2.5 is no integer"),
    ({"a": {"ks": [1, 8]}}, "eval_sets.a.ks 8: pass@k needs k from 1 to eval_sets.a.num_samples 4"),
    ({"a": {"ks": 4}}, "eval_sets.a.ks 4 is no list of integers"),
    ({"a": {"temperature": -1}}, "eval_sets.a.temperature -1 must be 0"),
    ({"a": {"temperature": "hot"}}, "eval_sets.a.temperature 'hot' is no number"),
    ({"a": {"temperature": 0}}, "all 4 samples of a problem would be the same. Add eval_sets.a.num_samples 1"),
    ({"a": {"top_p": 1.5}}, "eval_sets.a.top_p 1.5 must be above 0"),
    ({"a": {"dataset_name": 7}}, "eval_sets.a.dataset_name 7 is no text"),
    ({"a": {"num_samples": 3}}, "no multiple of the 3, 4 samples.*Set per_device_eval_batch_size: 12"),
]


@pytest.mark.parametrize("sets, message", REFUSED, ids=str)
def test_a_wrong_set_is_refused_before_a_model_loads(tmp_path, sets, message):
    with pytest.raises(ValueError, match=message):
        sapo_config(tmp_path, eval_sets=sets, per_device_eval_batch_size=8)


@pytest.mark.parametrize(
    "metric, message",
    [
        ("eval_hot4_pass_at_1", "none of the eval_sets greedy, hot-4.*Did you mean 'eval_hot-4_pass_at_1'"),
        ("eval_hot-4_pass_at_8", "Did you mean 'eval_hot-4_pass_at_"),
        ("eval_pass_at_1", "none of the eval_sets"),
        ("hot-4_maj_at_2", None),
        ("eval_hot-4_pass_at_4_low", None),
        ("eval_greedy_completions/mean_length", None),
    ],
)
def test_the_best_metric_must_be_logged(tmp_path, metric, message):
    fields = {"eval_sets": json.dumps(SETS), "per_device_eval_batch_size": 8, "metric_for_best_model": metric}
    fields["eval_strategy"] = "steps"
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        sapo_config(tmp_path, **fields)


def test_a_set_without_data_or_effect_is_refused(tmp_path, tokenizer):
    model, fields = tiny_model(tokenizer), {"eval_sets": {"hard": {}}, "per_device_eval_batch_size": 8}
    with pytest.raises(ValueError, match="eval_sets has 'hard', and eval_dataset has hart.*Did you mean 'hart'"):
        sapo_trainer(tmp_path, tokenizer, model, eval_dataset={"hart": prompts(2)}, **fields)
    with pytest.raises(ValueError, match="eval_sets has 'hard', and eval_dataset is no mapping"):
        sapo_trainer(tmp_path, tokenizer, model, eval_dataset=prompts(2), **fields)
    fields["eval_sets"]["hard"]["temperature"] = 0.5
    with pytest.raises(ValueError, match="eval_sets sets temperature, and a rollout_func samples by itself"):
        sapo_trainer(
            tmp_path, tokenizer, model, eval_dataset={"hard": prompts(2)}, rollout_func=lambda *_: {}, **fields
        )


def test_the_data_of_sets_is_held_out_of_training(tmp_path, capsys):
    def save(name: str, numbers: range) -> str:
        rows = [{"prompt": f"{i}+1", "answer": str(i + 1)} for i in numbers]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    config = sapo_config(
        tmp_path,
        eval_sets={
            "shared": {"num_problems": 2},
            "whole": {"temperature": 0.5},
            "own": {"dataset_name": save("own.jsonl", range(10, 14))},
        },
    )
    args = ScriptArguments(save("train.jsonl", range(20)), eval_dataset_name=save("test.jsonl", range(5)))
    train, sets = load_train_and_eval(args, sets=config.evaluation_sets)
    assert {name: len(rows) for name, rows in sets.items()} == {"shared": 2, "whole": 5, "own": 4}
    assert [row[0]["content"] for row in train["prompt"]] == [f"{i}+1" for i in (*range(5, 10), *range(14, 20))]
    own = {"own": config.evaluation_sets["own"]}
    with pytest.raises(ValueError, match="every set of eval_sets names a dataset"):
        load_train_and_eval(args, sets=own)
    args = ScriptArguments(args.dataset_name)
    assert list(load_train_and_eval(args, sets=own)[1]) == ["own"]
    with pytest.raises(ValueError, match="eval_sets.whole has no dataset_name"):
        load_train_and_eval(args, sets={"whole": config.evaluation_sets["whole"]})


def test_a_set_reaches_vllm_and_leaves_it_as_it_was():
    """On a stand-in with the attributes that TRL's engine reads at each call; vLLM itself is not run here."""
    engine = SimpleNamespace(temperature=1.0, top_p=1.0, max_completion_length=8, top_k=0)
    trainer, before = SimpleNamespace(use_vllm=True, vllm_generation=engine), dict(vars(engine))
    one = EvalSet(num_samples=2, temperature=0.6, top_p=0.9, max_completion_length=32)
    with pytest.raises(ZeroDivisionError), sampled_as(trainer, one):
        assert vars(engine) == {"temperature": 0.6, "top_p": 0.9, "max_completion_length": 32, "top_k": 0}
        raise ZeroDivisionError
    assert vars(engine) == before
    names = inspect.getsource(VLLMGeneration.generate)
    assert all(f"self.{name}" in names for name in before)
