"""Columns that rewards depend on: `task` in a mixture, and names under which rewards get something else."""

import pytest
from conftest import length_reward, prompts, sapo_config, tiny_model
from datasets import Dataset

from sapo_trl import SAPOTrainer
from sapo_trl.data.preflight import drop_unusable_answers
from sapo_trl.rewards import REWARDS, load_reward


@pytest.mark.parametrize("column", ["prompts", "completions", "completion_ids", "log_extra", "trainer_state"])
@pytest.mark.parametrize("of", ["train", "eval"])
def test_a_column_that_no_reward_would_get_is_refused(tmp_path, tokenizer, column, of):
    other = prompts().map(lambda row: {column: "x"})
    train, held_out = (other, None) if of == "train" else (prompts(), {"hard": other})
    with pytest.raises(ValueError, match=f"the {'training' if of == 'train' else 'evaluation'} set .*{column}"):
        SAPOTrainer("no/model", length_reward, sapo_config(tmp_path), train, held_out, processing_class=tokenizer)


# ---- the column `task` ----------------------------------------------------------------------------------------------


def of_tasks(*tasks):
    return Dataset.from_list([{"prompt": f"p{i}", "answer": "1", "task": task} for i, task in enumerate(tasks)])


def train_on(tmp_path, dataset, rewards, **more):
    """A trainer, if no `model` is given of one that does not exist: whatever is refused is refused before."""
    SAPOTrainer(more.pop("model", "no/model"), rewards, sapo_config(tmp_path), dataset, **more)


@pytest.mark.parametrize(
    "tasks, names, message",
    [
        (["algebra"] * 20 + ["number theory"] * 12, ["accuracy"], "accuracy_reward scores .* 'math', and none is: the "
         r"column task holds algebra \(20 rows\), number theory \(12 rows\)"),
        (["math"] * 32, ["accuracy", "multiple_choice"], "multiple_choice_reward scores .* and none is"),
        (["math"] * 31 + [None], ["accuracy"], "no reward scores row 31, whose task is 'None'; rewards are for math"),
        (["math", "code"] * 16, ["accuracy(deadline_s=3.0)"], "no reward scores rows 1, 3, 5, 7, 9 and 11 more"),
    ],
)  # fmt: skip
def test_rows_that_no_reward_scores_are_refused_before_a_model_loads(tmp_path, tasks, names, message):
    with pytest.raises(ValueError, match=message):
        train_on(tmp_path, of_tasks(*tasks), [load_reward(name) for name in names])


def test_each_reward_says_how_many_rows_it_scores(tmp_path, tokenizer, capsys):
    rewards = [REWARDS["accuracy"], REWARDS["multiple_choice"], length_reward]
    held_out = {"maths": of_tasks("math", "math"), "code": of_tasks("code")}
    dataset = of_tasks(*["math"] * 20, *["multiple_choice"] * 10, *["code"] * 2)
    given = {"model": tiny_model(tokenizer), "processing_class": tokenizer, "eval_dataset": held_out}
    train_on(tmp_path, dataset, rewards, **given)
    scores = "accuracy_reward scores 20, multiple_choice_reward scores 10, length_reward scores 32"
    printed = capsys.readouterr().out
    assert f"train: the column task holds math (20 rows), multiple_choice (10 rows), code (2 rows); {scores}" in printed
    assert "eval maths: the column task holds math (2 rows); accuracy_reward scores 2, multiple" in printed
    with pytest.raises(ValueError, match="eval: no reward scores row 0, whose task is 'code'"):
        train_on(tmp_path, of_tasks(*["math"] * 32), REWARDS["accuracy"], eval_dataset=held_out["code"])


def test_a_column_task_means_nothing_to_rewards_without_one(tmp_path, tokenizer, capsys):
    dataset = of_tasks(*["geometry"] * 32)
    train_on(tmp_path, dataset, length_reward, model=tiny_model(tokenizer), processing_class=tokenizer)
    assert "column task" not in capsys.readouterr().out


def test_only_the_answers_of_mathematics_are_checked_as_such():
    """A puzzle's answer is a sentence: more words than any answer in mathematics has."""
    puzzle = "Zoey is a knight, Oliver is a knave, Ann is a knight and Ed is a knave"
    rows = of_tasks("logic_puzzle", "math", "logic_puzzle", "math").remove_columns("answer")
    rows = rows.add_column("answer", [puzzle, "7", "asdf(*&)", "x = = 5"])
    kept = drop_unusable_answers(rows, [REWARDS["accuracy"], REWARDS["logic_puzzle"]], max_unusable_frac=0.5)
    assert kept["prompt"][:] == ["p0", "p1", "p2"]
