"""reasoning-gym as data and reward: its entries, its scorers in the verifier's processes, and what is refused."""

import importlib.util

import pytest

from sapo_trl.cli.parse import parse_run
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import load_split, load_train_and_eval
from sapo_trl.rewards import load_reward

SUMS = "reasoning-gym/chain_sum(min_terms=2, max_terms=2, max_digits=1, size=40)"


def scored(completions, entries, reward="reasoning_gym"):
    metrics: dict[str, float] = {}
    reward = load_reward(reward)
    values = reward(completions, gym_entry=entries, log_metric=lambda name, value: metrics.update({name: value}))
    return values, {name: value for name, value in metrics.items() if value}


def test_rows_are_the_task_and_evaluation_has_others():
    args = ScriptArguments(dataset_name=SUMS, eval_dataset_name=SUMS, system_prompt="Answer in a box.")
    train, held_out = load_train_and_eval(args)
    for row in (*train, *held_out):
        system, user = row["prompt"]
        expression = user["content"].removeprefix("State the final answer to the following arithmetic problem: ")
        left, sign, right = expression.removesuffix(" =").split()
        assert int(row["answer"]) == int(left) + int(right) * {"+": 1, "-": -1}[sign]
        assert system["content"] == "Answer in a box."
    asked = [{row["prompt"][1]["content"] for row in rows} for rows in (train, held_out)]
    assert len(held_out) == 40 and len(train) > 20 and not asked[0] & asked[1]
    assert load_split(args)["gym_entry"] == load_split(args)["gym_entry"]


def test_the_score_is_the_tasks_own():
    row = load_split(ScriptArguments(dataset_name="reasoning-gym/chain_sum(size=1, seed=1)"))[0]
    answer = row["answer"]
    completions = [
        f"\\boxed{{0}} so \\boxed{{{answer}}}",
        f"\\boxed{{0}} <answer> {answer}.0 </answer>",  # a tag says more than a box, and 4.0 is 4 for this task
        f"\\boxed{{{answer} or so}}",  # a part for what holds the answer
        f"it is {answer}",
        f"<think>\\boxed{{{answer}}}",
    ]
    values, metrics = scored(completions, [row["gym_entry"]] * 5)
    assert values == [1.0, 1.0, len(answer) / len(f"{answer} or so"), 0.0, 0.0]
    assert metrics == {"gym/no_answer_frac": 0.4}


@pytest.mark.parametrize("task", ["rearc", "isomorphic_strings", "prime_factorization", "spiral_matrix"])
def test_an_entry_reaches_another_process_as_it_is(task):
    """With its tuples (rearc), and where the text differs from process to process (isomorphic_strings)."""
    row = load_split(ScriptArguments(dataset_name=f"reasoning-gym/{task}(size=1)"))[0]
    values, metrics = scored([f"<answer>{row['answer']}</answer>"], [row["gym_entry"]])
    assert values == [1.0] and not metrics


def test_an_answer_that_a_scorer_evaluates_changes_nothing(tmp_path):
    """spiral_matrix calls `eval` on an answer in brackets; prime_factorization raises on what is no number."""
    there = tmp_path / "there"
    there.write_text("x")
    row = load_split(ScriptArguments(dataset_name="reasoning-gym/spiral_matrix(size=1)"))[0]
    removes = f"[__import__('os').remove({str(there)!r})]"
    endless = "[any(False for i in iter(int, 1))]"
    (value,), _ = scored([f"<answer>{removes}</answer>"], [row["gym_entry"]])
    assert value == 0.0 and there.exists()
    ended = scored([f"<answer>{endless}</answer>"], [row["gym_entry"]], "reasoning_gym(deadline_s=3)")
    assert ended == ([0.0], {"gym/timeout_frac": 1.0})
    row = load_split(ScriptArguments(dataset_name="reasoning-gym/prime_factorization(size=1)"))[0]
    assert scored(["\\boxed{x}"], [row["gym_entry"]]) == ([0.0], {"gym/error_frac": 1.0})


def test_a_task_without_a_single_answer_keeps_its_rows():
    rows = load_split(ScriptArguments(dataset_name="reasoning-gym/graph_color(size=2)"))
    assert len(rows) == 2 and rows["answer"][0].startswith("(")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chain_sums", "reasoning-gym has no task 'chain_sums'. Did you mean 'chain_sum'?"),
        ("chain_sum(max_digit=1)", "'max_digit' is no option of reasoning-gym/chain_sum; .* Did you mean 'max_digits'"),
        ("chain_sum(max_digits=0)", "reasoning-gym/chain_sum refuses .*: max_digits must be >= min_digits"),
        ("chain_sum(1)", "is not of the form name"),
    ],
)
def test_refused_before_anything_loads(name, message):
    words = ["--use_cpu", "true", "--bf16", "false", "--reward_funcs", "reasoning_gym"]
    with pytest.raises(ValueError, match=message):
        parse_run([*words, "--dataset_name", f"reasoning-gym/{name}"])


def test_a_split_is_refused_and_a_missing_package_named(monkeypatch):
    with pytest.raises(ValueError, match="has neither splits nor a dataset_config"):
        load_split(ScriptArguments(dataset_name=SUMS, dataset_train_split="train"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="chain_sum needs the package reasoning-gym, .*: pip install"):
        load_split(ScriptArguments(dataset_name=SUMS))
