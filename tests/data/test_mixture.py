"""Mixtures: a fixed ratio in every rollout, rewards, prompts and lengths by dataset, mistakes refused early."""

import json
from collections import Counter

import pytest
import torch
from conftest import length_reward, prompts, sapo_config, tiny_model
from datasets import Dataset

from sapo_trl import SAPOTrainer
from sapo_trl.cli.parse import parse_run
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import load_train_and_eval
from sapo_trl.data.mixing import mixed_rewards
from sapo_trl.data.preflight import check_rewards_of, drop_unusable_answers
from sapo_trl.eval_sets import EvalSet
from sapo_trl.mixture import MixedSet, apportion, read_mixture
from sapo_trl.rewards import load_reward
from sapo_trl.rewards.contract import TaskReward, reward_name
from sapo_trl.rewards.running import run_rewards
from sapo_trl.rollout.prompts import Pool, PromptSource
from sapo_trl.trl_seams import RepeatSampler

SHARES = {"math": 0.5, "code": 0.3, "logic": 0.2}


def test_shares_become_whole_prompts_by_the_largest_remainder():
    assert apportion(16, SHARES) == {"math": 8, "code": 5, "logic": 3}
    assert apportion(10, SHARES) == {"math": 5, "code": 3, "logic": 2}
    assert apportion(4, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) == {"a": 2, "b": 1, "c": 1}


# ---- the order of prompts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_one_dataset_comes_in_the_order_of_trl(shuffle):
    """Up to the prompts at the end of a pass that fill no rollout: TRL leaves them out, here they come next."""
    theirs = RepeatSampler(range(10), mini_repeat_count=1, batch_size=5, shuffle=shuffle, seed=7)
    source = PromptSource([""] * 10, {"": 1.0}, 7 if shuffle else None)
    ours = [source.take(source.counts(5)) for _ in range(6)]
    assert [row for rows in ours for row in rows] == [*theirs, *theirs, *theirs]


def test_every_rollout_has_the_ratio_and_every_pass_every_prompt_once():
    tasks = ["math"] * 20 + ["code"] * 7 + ["logic"] * 5
    source = PromptSource(tasks, SHARES, seed=3)
    rollouts = [source.take(source.counts(16)) for _ in range(70)]
    assert {tuple(sorted(Counter(tasks[row] for row in rows).items())) for rows in rollouts} == {
        (("code", 5), ("logic", 3), ("math", 8))
    }
    taken = [row for rows in rollouts for row in rows]
    for name, size in Counter(tasks).items():
        own = [row for row in taken if tasks[row] == name]
        passes = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(passes) > 10 and all(len({*one}) == size for one in passes)
        assert len({tuple(one) for one in passes}) > 10  # each in an order of its own
    first = [tasks[row] for row in rollouts[0]]
    assert {*first[:5]} == {*first[-5:]} == {*SHARES}  # no process gets one dataset alone


def test_a_source_goes_on_from_its_state():
    tasks = ["a", "b", "a", "b", "b"]
    source, other = (PromptSource(tasks, {"a": 0.5, "b": 0.5}, seed=1) for _ in range(2))
    for _ in range(5):
        source.take(source.counts(4))
    other.restore(json.loads(json.dumps(source.state())))
    assert [other.take(other.counts(4)) for _ in range(5)] == [source.take(source.counts(4)) for _ in range(5)]


# ---- rewards by dataset ---------------------------------------------------------------------------------------------


def seen_task(completions, task=("absent",), **kwargs):
    return [float(len(x)) for x in task] if len(task) == len(completions) else [-1.0] * len(completions)


def test_each_dataset_has_its_functions_and_weights():
    sets = {
        "math": MixedSet(reward_funcs=["accuracy", "length"], reward_weights=[1.0, 0.5]),
        "puzzles": MixedSet(reward_funcs=["multiple_choice"]),
        "usual": MixedSet(),
    }
    functions, weights = mixed_rewards(sets, ["accuracy"], None)
    assert [(reward_name(f), f.tasks) for f in functions] == [
        ("accuracy_reward", ("math", "usual")), ("multiple_choice_reward", ("puzzles",)), ("length_reward", ("math",)),
    ]  # fmt: skip
    assert weights == [1.0, 1.0, 0.5]
    given = {
        "completions": [r"\boxed{7}", r"\boxed{B}", r"\boxed{3}", r"\boxed{C}"],
        "answer": ["7", "B", "4", "B"],
        "task": ["math", "puzzles", "usual", "puzzles"],
    }
    assert run_rewards(functions[:2], ["a", "b"], given) == [[1.0, None, 0.0, None], [None, 1.0, None, 0.0]]


def test_only_a_function_for_all_kinds_sees_the_column_task():
    own = TaskReward(seen_task, ("b",))
    assert own(["x", "y"], task=["a", "b"]) == [None, 1.0]

    async def later(completions, **kwargs):
        return [2.0] * len(completions)

    (values,) = run_rewards([TaskReward(later, ("b",))], ["later"], {"completions": ["x", "y"], "task": ["a", "b"]})
    assert values == [None, 2.0]
    logged = {}
    grader = TaskReward(load_reward("accuracy"), ("b",))
    grader(["0", r"\boxed{1}"], answer=["1", "1"], task=["a", "b"], log_extra=logged.__setitem__)
    assert logged == {"verdict": [None, "right"], "extracted_answer": [None, "1"]}


# ---- loading --------------------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    numbers = [{"prompt": f"{i}+1=", "answer": str(i + 1), "level": i} for i in range(12)]
    letters = [{"question": f"choose {i}", "answer": "AB"[i % 2]} for i in range(6)]
    return write(tmp_path / "numbers.jsonl", numbers), write(tmp_path / "letters.jsonl", letters)


def test_a_mixture_is_one_training_set_with_prompts_of_each_dataset(files):
    numbers, letters = files
    sets = {
        "sums": MixedSet(dataset_name=numbers, max_samples=8, system_prompt="Add."),
        "letters": MixedSet(dataset_name=letters, prompt_column="question", prompt_template="{prompt}?"),
    }
    rows, held_out = load_train_and_eval(ScriptArguments(eval_size=3), seed=1, mixture=sets)
    assert len(rows) + len(held_out) == 14
    both = [*rows, *held_out]
    assert Counter(row["task"] for row in both) == {"sums": 8, "letters": 6}
    for row in both:
        texts = [message["content"] for message in row["prompt"]]
        assert (texts[0] == "Add.") == (row["task"] == "sums") and (row["level"] is None) == (row["task"] == "letters")
        assert texts[-1].endswith("=" if row["task"] == "sums" else "?")
    graded = TaskReward(load_reward("accuracy"), ("sums",))
    bad = Dataset.from_list([{"prompt": "p", "answer": "x = = 5", "task": task} for task in ("sums", "letters")])
    assert drop_unusable_answers(bad, [graded], 1.0)["task"][:] == ["letters"]


def test_an_evaluation_set_under_the_name_of_a_dataset_is_scored_by_its_rewards(files, tmp_path):
    numbers, letters = files
    mixture = {
        "sums": MixedSet(dataset_name=numbers, reward_funcs=["repetition"]),
        "letters": MixedSet(dataset_name=letters, prompt_column="question", reward_funcs=["accuracy"]),
    }
    other = EvalSet(dataset_name=write(tmp_path / "other.jsonl", [{"prompt": "1+7=", "answer": "8"}]))
    _, held_out = load_train_and_eval(ScriptArguments(), sets={"sums": other, "more": other}, mixture=mixture)
    functions, _ = mixed_rewards(mixture, [], None)
    scored = {
        name: [func(["8"], completion_ids=[[1]], **{column: rows[column][:] for column in rows.column_names})
               for func in functions]
        for name, rows in held_out.items()
    }  # fmt: skip
    assert [[x is None for x in values] for values in scored["sums"]] == [[False], [True]]
    assert [[x is None for x in values] for values in scored["more"]] == [[False], [False]]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"a": {"dataset_nam": "x"}}, "datasets.a: unknown key 'dataset_nam'.*Did you mean 'dataset_name'"),
        ({"a": {"share": 0.5}, "b": {"share": 0.6}}, r"add up to 0.5 \+ 0.6 = 1.1, not to 1"),
        ({"a": {"share": 1.0}, "b": {}}, "datasets.b has no share and others have"),
        ({"a": {"share": 0}}, "datasets.a.share 0 must be a number above 0"),
        ({"a b": {}}, "a name of letters, digits"),
        ({"a": {"max_completion_length": 13}}, "more than the run's max_completion_length 12"),
        ({"a": {"reward_weights": [1.0]}}, "reward_weights holds 1 numbers for 0 reward_funcs of its own"),
        ({"a": {"reward_funcs": "accuracy"}}, "must be a list of texts"),
        ({"a": {"dataset_name": 3}}, "datasets.a.dataset_name 3 is no text"),
        (["a"], "not a mapping"),
        ({"a": "gsm8k"}, "datasets.a is 'gsm8k', not a mapping"),
    ],
)
def test_a_wrong_mixture_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_mixture(given, 12)


@pytest.mark.parametrize(
    "words, message",
    [
        ({"dataset_name": "gsm8k"}, "dataset_name=gsm8k has no effect beside datasets"),
        ({"datasets": {"a": {}}}, "datasets.a has no dataset_name"),
        ({"datasets": {"a": {"dataset_name": "x", "reward_funcs": ["acuracy"]}}}, "datasets.a: 'acuracy' is no reward"),
        ({"datasets": {"a": {"dataset_name": "x", "prompt_template": "none"}}}, "datasets.a: prompt_template has no"),
    ],
)
def test_the_command_refuses_a_wrong_mixture_before_anything_is_read(tmp_path, words, message):
    given = {"datasets": {"a": {"dataset_name": "x"}}, "use_cpu": True, "bf16": False, "output_dir": str(tmp_path)}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(given | words))
    with pytest.raises(ValueError, match=message):
        parse_run(["--config", str(path)])


def test_an_evaluation_set_of_one_dataset_needs_the_columns_of_its_rewards_only():
    def runs_tests(completions, tests, **kwargs):
        return []

    rewards = [TaskReward(length_reward, ("math",)), TaskReward(runs_tests, ("code",))]
    rows = Dataset.from_list([{"prompt": "1+1=", "answer": "2", "task": "math"}])
    check_rewards_of(rewards, rows, adds_columns=False)
    for other in (rows.remove_columns("task"), Dataset.from_list([rows[0] | {"task": "code"}])):
        with pytest.raises(ValueError, match="missing a required argument: 'tests'"):
            check_rewards_of(rewards, other, adds_columns=False)


# ---- in training ----------------------------------------------------------------------------------------------------

MIXED = {"sums": {"share": 0.5, "max_completion_length": 3}, "others": {"share": 0.5}}


def mixed_prompts(num=64):
    return prompts(num).add_column("task", ["sums" if i < num // 4 else "others" for i in range(num)])


@pytest.mark.parametrize(
    "dataset, more, message",
    [
        (prompts(), {}, "no column 'task'"),
        (prompts().add_column("task", ["sum"] * 64), {}, "holds 'sum', which is none.*Did you mean 'sums'"),
        (mixed_prompts(8), {}, "datasets.sums has 2 prompts, and one rollout takes 4"),
        (mixed_prompts().to_iterable_dataset(), {}, "not a stream"),
        (mixed_prompts(), {"datasets": MIXED | {"sums": {"share": 0.01}, "others": {"share": 0.99}}}, "none of the 8"),
        (mixed_prompts(), {"datasets": {"sums": {"reward_funcs": ["length"]}}, "reward_weights": [1.0]}, "no effect"),
    ],
)  # fmt: skip
def test_a_training_set_that_does_not_fit_is_refused_before_a_model_loads(tmp_path, dataset, more, message):
    with pytest.raises(ValueError, match=message):
        SAPOTrainer("no/model", length_reward, sapo_config(tmp_path, **{"datasets": MIXED} | more), dataset)


def test_a_mixture_in_training(tmp_path, tokenizer, capsys):
    """The ratio of every rollout, the length of each dataset, and its metrics, counted by hand from the completions."""
    seen = []

    def reward(completions, completion_ids, task, **kwargs):
        seen.append((list(task), [len(ids) for ids in completion_ids]))
        return [float(len(x) % 5) for x in completions]

    config = sapo_config(tmp_path, datasets=MIXED, max_steps=8, logging_steps=4, per_device_train_batch_size=8)
    trainer = SAPOTrainer(tiny_model(tokenizer), reward, config, mixed_prompts(), processing_class=tokenizer)
    assert "8: sums 4, others 4" in capsys.readouterr().out
    trainer.train()
    assert len(seen) == 2
    for (tasks, lengths), log in zip(seen, [x for x in trainer.state.log_history if "loss" in x], strict=True):
        assert Counter(tasks) == {"sums": 16, "others": 16}
        short = [n for task, n in zip(tasks, lengths, strict=True) if task == "sums"]
        assert max(short) == 3 and max(lengths) == 12
        assert log["data/sums/length"] == pytest.approx(sum(short) / 16)
        parts = [log[f"data/{name}/reward"] for name in MIXED]
        assert parts[0] != parts[1] and sum(parts) / 2 == pytest.approx(log["reward"])
        assert 0 < log["data/others/accuracy"] < 1
    assert torch.isfinite(torch.tensor(log["loss"]))


def test_no_prompt_comes_twice_in_a_rollout_and_each_comes_once_a_pass():
    pool = Pool([*range(5)], seed=3)
    rollouts = [pool.take(4) for _ in range(25)]
    assert all(len({*rollout}) == 4 for rollout in rollouts)
    assert Counter(row for rollout in rollouts for row in rollout) == dict.fromkeys(range(5), 20)
    first = pool.take(2)
    assert not {*first} & {*pool.take(3, without=first)}
    again = Pool([*range(5)], seed=3)
    again.restore(pool.state())
    assert again.take(5) == pool.take(5)
