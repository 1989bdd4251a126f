"""Presets: one row in the schema of each dataset's card, and what `load_split` makes of it."""

import datasets
import pytest
from datasets import Dataset
from PIL import Image

from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import PRESETS, load_split, load_train_and_eval
from sapo_trl.data.presets import DAPO_INSTRUCTION, after_hashes, last_boxed

DEEPMATH = {
    "question": "Q",
    "final_answer": "\\frac{1}{2}",
    "difficulty": 4.5,
    "topic": "Algebra",
    "r1_solution_1": ".",
}
DAPO = {
    "prompt": f"{DAPO_INSTRUCTION[0]}Q{DAPO_INSTRUCTION[1]}",
    "solution": "34",
    "data_source": "math_dapo",
    "source_prompt": [{"content": "Q", "role": "user"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4"},
}
GSM8K = {"question": "Q", "answer": "2*700=<<2*700=1400>>1400\n#### 1,400"}
MATH = {
    "problem": "Q",
    "solution": "$\\boxed{1}$, so $\\boxed{\\frac{3}{x^{2}}}$.",
    "level": "Level 5",
    "type": "Algebra",
}
AIME24 = {"id": 60, "problem": "Q", "solution": "S", "answer": "204", "url": "u", "year": "2024"}
AIME25 = {"problem": "Q", "answer": "70", "id": "0"}
HMMT25 = {"problem_idx": 1, "problem": "Q", "answer": "103", "problem_type": ["Number Theory"]}
BEYOND = {"problem": "Q", "answer": 33124147}
MATH500 = {"problem": "Q", "solution": "S", "answer": "p - q", "subject": "Algebra", "level": 2, "unique_id": "u"}
AMC = {"id": 0, "problem": "Q", "answer": 142.0, "url": "u"}
GEOMETRY = {"images": [Image.new("RGB", (32, 32))], "problem": "<image>Q", "answer": "3 \\sqrt { 21 }"}

# preset: (which, path, config, split, raw row, answer, other columns that stay); the prompt is always Q
# fmt: off
HUB = {
    "deepmath-103k": (
        "train", "zwhe99/DeepMath-103K", None, "train", DEEPMATH, "\\frac{1}{2}", {"difficulty", "topic"}
    ),
    "dapo-math-17k": ("train", "open-r1/DAPO-Math-17k-Processed", "all", "train", DAPO, "34", set()),
    "gsm8k": ("train", "openai/gsm8k", "main", "train", GSM8K, "1400", set()),
    "math": (
        "train", "DigitalLearningGmbH/MATH-lighteval", None, "train", MATH, "\\frac{3}{x^{2}}", {"level", "type"}
    ),
    "aime24": ("eval", "HuggingFaceH4/aime_2024", None, "train", AIME24, "204", {"id"}),
    "aime25": ("eval", "math-ai/aime25", None, "test", AIME25, "70", {"id"}),
    "hmmt25": ("eval", "MathArena/hmmt_feb_2025", None, "train", HMMT25, "103", {"problem_type"}),
    "beyondaime": ("eval", "ByteDance-Seed/BeyondAIME", None, "test", BEYOND, "33124147", set()),
    "math-500": ("eval", "HuggingFaceH4/MATH-500", None, "test", MATH500, "p - q", {"subject", "level"}),
    "amc": ("eval", "AI-MO/aimo-validation-amc", None, "train", AMC, "142", {"id"}),
    "geometry3k": ("train", "hiyouga/geometry3k", None, "train", GEOMETRY, "3 \\sqrt { 21 }", {"images"}),
}
# fmt: on


@pytest.fixture
def hub(monkeypatch):
    """Let `datasets.load_dataset` return the given rows; yields (set the rows, the calls made)."""
    calls = []

    def serve(*rows):
        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            return Dataset.from_list(list(rows))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def test_every_preset_has_a_row_here():
    assert set(HUB) == set(PRESETS)


@pytest.mark.parametrize("preset", sorted(HUB))
def test_preset(preset, hub):
    which, path, config, split, row, answer, kept = HUB[preset]
    calls = hub(row)
    name = {"dataset_name": preset} if which == "train" else {"eval_dataset_name": preset.upper()}
    rows = load_split(ScriptArguments(**name), which)
    assert calls == [((path, config), {"split": split})]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Q"}]
    assert rows[0]["answer"] == answer
    assert set(rows.column_names) == {"prompt", "answer"} | kept


@pytest.mark.parametrize("preset", ["gsm8k", "math"])
def test_the_held_out_split_of_a_training_preset(preset, hub):
    calls = hub(HUB[preset][4])
    load_split(ScriptArguments(eval_dataset_name=preset), "eval")
    assert calls[0][1] == {"split": "test"}


def test_a_preset_without_a_held_out_split_says_so():
    with pytest.raises(ValueError, match="deepmath-103k has no held-out split. Use eval_size"):
        load_split(ScriptArguments(eval_dataset_name="deepmath-103k"), "eval")


@pytest.mark.parametrize("name", ["gsm8k", "MATH"])
def test_a_preset_that_is_also_here_is_asked_about(name, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "train.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    message = rf"{name} is a preset \({PRESETS[name.lower()].path} on the Hub\) and also .* here. Write \./{name} for"
    with pytest.raises(ValueError, match=message):
        load_split(ScriptArguments(dataset_name=name))
    assert load_split(ScriptArguments(dataset_name=f"./{name}"))["answer"][:] == ["2"]


def test_the_arguments_override_a_preset(hub):
    calls = hub({**DAPO, "source_prompt": [{"role": "user", "content": "P"}], "solution": "#### 3"})
    args = ScriptArguments(
        dataset_name="dapo-math-17k",
        dataset_config="en",
        dataset_train_split="train[:10%]",
        prompt_column="source_prompt",
        answer_column="solution",
    )
    rows = load_split(args)
    assert calls == [(("open-r1/DAPO-Math-17k-Processed", "en"), {"split": "train[:10%]"})]
    assert rows[0]["prompt"][0]["content"] == "P"
    assert rows[0]["answer"] == "#### 3"


def test_another_answer_column_is_taken_as_it_is(hub):
    hub({**GSM8K, "gold": "7"})
    assert load_split(ScriptArguments("gsm8k", answer_column="gold"))[0]["answer"] == "7"


def test_an_evaluation_preset_keeps_its_columns_beside_a_dataset_with_other_ones(hub, tmp_path):
    path = tmp_path / "eigene.csv"
    path.write_text("frage,antwort\n1+1,2\n")
    hub(AIME25)
    args = ScriptArguments(str(path), prompt_column="frage", answer_column="antwort", eval_dataset_name="aime25")
    train, held_out = load_train_and_eval(args)
    assert (train[0]["answer"], held_out[0]["answer"]) == ("2", "70")


def test_an_extraction_that_finds_nothing_counts_as_no_answer(hub, capsys):
    hub(*({"question": f"Q{i}", "answer": f"#### {i}"} for i in range(3)), {"question": "Q", "answer": "no mark"})
    assert load_split(ScriptArguments("gsm8k"))["answer"][:] == ["0", "1", "2"]
    assert "1 without an answer (answer; the first is row 3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} and \boxed{\frac{1}{2}", None),  # the last box never closes: no earlier one stands in for it
        ("no box", None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{}", ""),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


def test_after_hashes_takes_the_last_mark():
    assert after_hashes("#### 1\nno,\n#### -2,345 ") == "-2345"
    assert after_hashes("12") is None
