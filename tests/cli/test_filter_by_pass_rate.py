"""`scripts/filter_by_pass_rate.py` on a tiny model: what is kept, and a call that goes on after a kill."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model

from sapo_trl.cli import evaluate, filter_by_pass_rate
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import load_split
from sapo_trl.evaluation.samples import read_samples

NUM_PROBLEMS, NUM_SAMPLES = 10, 4


def by_length(completions, answer, **columns):
    """1 for a completion whose number of characters is divisible by 3, no verdict where the answer is 5."""
    lengths = [len(completion[0]["content"]) for completion in completions]
    return [None if x == "5" else float(length % 3 == 0) for length, x in zip(lengths, answer, strict=True)]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> Path:
    """A folder with a model of random weights and ten problems, whose last line is blank."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1), "level": i} for i in range(NUM_PROBLEMS)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder


def run(world: Path, output: Path, *words: Any) -> int:
    given = ["--model", world / "model", "--dataset_name", world / "data.jsonl", "--output", output, "--num_samples",
             NUM_SAMPLES, "--batch_size", 2 * NUM_SAMPLES, "--max_completion_length", 6, "--reward",
             f"{__name__}.by_length", *words]  # fmt: skip
    return filter_by_pass_rate.main(list(map(str, given)))


@pytest.fixture
def sampled(monkeypatch) -> list[list]:
    """The prompts of every call of the engine."""
    calls: list[list] = []
    real: Callable = evaluate.sample_completions

    def counted(model, tokenizer, prompts, *args, **kwargs):
        calls.append(prompts)
        return real(model, tokenizer, prompts, *args, **kwargs)

    monkeypatch.setattr(evaluate, "sample_completions", counted)
    return calls


def test_the_rows_within_the_bounds_are_what_training_reads(world, tmp_path, sampled, capsys):
    output, instructions = tmp_path / "kept.jsonl", ["--system_prompt", "Be brief.", "--prompt_template", "Q: {prompt}"]
    assert run(world, output, "--min_pass_rate", 0.25, "--max_pass_rate", 0.5, *instructions) == 0
    right: dict[int, int] = {}
    for sample in read_samples(tmp_path / "kept.samples.jsonl"):
        right[sample.problem] = right.get(sample.problem, 0) + (sample.reward == 1)
        assert [message["content"] for message in sample.prompt] == ["Be brief.", f"Q: {sample.problem}+1="]
    inside = [i for i in range(NUM_PROBLEMS) if i != 4 and 1 <= right[i] <= 2]
    below = sum(right[i] == 0 for i in range(NUM_PROBLEMS) if i != 4)
    above = NUM_PROBLEMS - 1 - len(inside) - below
    assert inside and below + above  # else nothing is tested
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["level"] for row in rows] == inside
    assert [row["pass_rate"] for row in rows] == [right[i] / 4 for i in inside]
    counts = (
        f"{len(inside)} of 10 problems have a pass rate from 0.25 to 0.5; {below} are below, {above} above, 1 without"
    )
    assert counts in capsys.readouterr().out
    train = load_split(ScriptArguments(str(output), system_prompt="Be brief.", prompt_template="Q: {prompt}"))
    assert train is not None and train.column_names == ["prompt", "answer", "level", "pass_rate"]
    assert [prompt[1]["content"] for prompt in train["prompt"]] == [f"Q: {i}+1=" for i in inside]
    assert train["answer"][:] == [str(i + 1) for i in inside]
    calls = len(sampled)
    assert run(world, output, "--min_pass_rate", 0, "--max_pass_rate", 1, *instructions) == 0  # other bounds
    assert len(output.read_text().splitlines()) == NUM_PROBLEMS - 1 and len(sampled) == calls == 5


def test_a_killed_call_samples_only_what_is_missing(world, tmp_path, sampled, monkeypatch):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "kept.jsonl"
    assert run(world, whole) == 0
    expected = sampled.copy()
    sampled.clear()

    class KilledError(BaseException):
        """As a kill, no handler of the command catches it."""

    counted: Callable = evaluate.sample_completions

    def killed_in_the_third(*args, **kwargs):
        if len(sampled) == 2:
            raise KilledError
        return counted(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(evaluate, "sample_completions", killed_in_the_third)
        run(world, output)
    samples = tmp_path / "kept.samples.jsonl"
    assert not output.exists() and len(read_samples(samples)) == 4 * NUM_SAMPLES
    whole_samples = (tmp_path / "whole.samples.jsonl").read_bytes()
    samples.write_bytes(whole_samples[: len(samples.read_bytes()) + 40])  # a line that was being written
    sampled.clear()
    assert run(world, output) == 0
    assert sampled == expected[2:]
    assert output.read_bytes() == whole.read_bytes() and samples.read_bytes() == whole_samples


@pytest.mark.parametrize(
    "words, message",
    [
        (["--min_pass_rate", "0.9", "--max_pass_rate", "0.1"], "must be in order, between 0 and 1"),
        (["--max_pass_rate", "90"], "must be in order, between 0 and 1"),
        (["--min_pass_rate", "0.3", "--max_pass_rate", "0.4"], "no share of --num_samples 4 is from 0.3 to 0.4"),
        (["--num_samples", "0"], "--num_samples 0 is less than 1"),
        (["--baseline", "x.jsonl"], "--baseline is for sapo-trl evaluate"),
        (["--eval_sets", "{}"], "--eval_sets is for sapo-trl evaluate"),
        (["--output", "kept.json"], "name a .jsonl file for the rows that are kept"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_loads(world, tmp_path, sampled, capsys, words, message):
    assert run(world, tmp_path / "kept.jsonl", *words) == 1
    told = capsys.readouterr()
    assert message in told.out + told.err and not sampled


def test_the_dataset_is_never_written_over(world, tmp_path, sampled, monkeypatch, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "x.samples.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    (tmp_path / "link.jsonl").symlink_to(folder / "x.samples.jsonl")
    monkeypatch.chdir(tmp_path)
    for name, output, message in (
        ("data/x.samples.jsonl", folder / "x.samples.jsonl", "which is the dataset"),
        ("data/../data/x.samples.jsonl", "data/x.samples.jsonl", "which is the dataset"),
        ("link.jsonl", "data/x.samples.jsonl", "which is the dataset"),
        ("data/x.samples.jsonl", "data/x.jsonl", "x.samples.jsonl, which is the dataset"),
        ("data", "data/kept.jsonl", "lies in the folder of the dataset, data"),
    ):
        assert run(world, Path(output), "--dataset_name", name) == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["x.samples.jsonl"] and not sampled


def test_bounds_that_keep_nothing_and_rows_of_other_tasks_are_refused(world, tmp_path, sampled, capsys):
    rows = [{"prompt": "1+1=", "answer": "5"}, {"prompt": "2+2=", "answer": "5"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(world, tmp_path / "kept.jsonl", "--dataset_name", tmp_path / "data.jsonl") == 1
    told = capsys.readouterr()
    assert "0 of 2 problems have a pass rate from 0.1 to 0.9; 0 are below, 0 above, 2 without" in told.out + told.err
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row | {"task": "code"}) for row in rows))
    sampled.clear()
    assert run(world, tmp_path / "kept.jsonl", "--dataset_name", tmp_path / "data.jsonl", "--reward", "accuracy") == 1
    told = capsys.readouterr()
    assert "train: the reward accuracy_reward scores the rows whose task is 'math'" in told.out + told.err
    assert not sampled
