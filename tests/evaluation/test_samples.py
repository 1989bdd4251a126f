"""The file of samples: what is in it, and that a killed evaluation goes on to the samples it would have had."""

import json
from functools import partial

import pytest
from conftest import tiny_model
from datasets import Dataset

from sapo_trl.evaluation.evaluate import compare, summarise
from sapo_trl.evaluation.samples import collect, read_samples
from sapo_trl.evaluation.sampling import sample_completions
from sapo_trl.tiny import chat

DATASET = Dataset.from_dict({"prompt": [chat(f"{i}+1?") for i in range(5)], "answer": ["1", "2", "3", "4", "5"]})


def parity(prompts, completions, completion_ids, answer, level, log_extra=None, **columns):
    """1 for an even number of tokens; reads everything that TRL gives a reward."""
    log_extra("verdict", ["even" if len(ids) % 2 == 0 else None for ids in completion_ids])
    log_extra("extracted_answer", answer)
    assert len(prompts) == len(completions) == len(answer) == len(level)
    return [None if prompt == "none" else float(len(ids) % 2 == 0) for prompt, ids in zip(prompts, completion_ids)]


class Killed(Exception):
    """What ends a call in the middle."""


@pytest.fixture(scope="module")
def engine(tokenizer):
    return partial(sample_completions, tiny_model(tokenizer), tokenizer, max_new_tokens=6, temperature=1.5)


@pytest.fixture
def dataset():
    return DATASET.add_column("level", list(range(5)))


def test_every_sample_is_kept(engine, dataset, tmp_path):
    path = tmp_path / "new/folder/result.samples.jsonl"
    samples = collect(engine, dataset, parity, num_samples=3, batch_size=6, path=path)
    assert read_samples(path) == samples and len(samples) == 15
    assert [(x.problem, x.sample) for x in samples] == [(i, j) for i in range(5) for j in range(3)]
    assert all(x.prompt == chat(f"{x.problem}+1?") and x.answer == str(x.problem + 1) for x in samples)
    assert all(x.verdict == ("even" if x.reward else None) and x.reward == 1 - x.num_tokens % 2 for x in samples)
    assert not any(x.truncated for x in samples if x.num_tokens < 6) and any(x.truncated for x in samples)
    assert len({x.seed for x in samples}) == 3  # units of two problems, the last of one
    unit = engine([chat("2+1?"), chat("3+1?")], 3, seed=samples[6].seed)  # another call gives the same samples
    assert [x.text for row in unit for x in row] == [x.completion for x in samples[6:12]]
    result = summarise(samples, ks=(1, 3))
    assert result.num_correct == tuple(sum(x.reward for x in samples[i : i + 3]) for i in range(0, 15, 3))


@pytest.mark.parametrize("torn", ["", '{"problem": 2, "sam', '{"problem": 2}'])
def test_a_killed_evaluation_goes_on_as_if_it_had_not_been(engine, dataset, tmp_path, torn):
    calls = []

    def killed_in_the_second(prompts, num_samples, seed):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise Killed
        return engine(prompts, num_samples, seed=seed)

    arguments = {"num_samples": 2, "batch_size": 4, "seed": 3}
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    expected = collect(engine, dataset, parity, path=whole, **arguments)
    with pytest.raises(Killed):
        collect(killed_in_the_second, dataset, parity, path=part, **arguments)
    assert part.read_bytes() == b"".join(whole.read_bytes().splitlines(keepends=True)[:4])
    lines = whole.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:5]) + torn)  # one sample of the second unit was written, and part of the next
    assert collect(killed_in_the_second, dataset, parity, path=part, **arguments) == expected
    assert calls == [2, 2, 2, 1] and part.read_bytes() == whole.read_bytes()
    assert collect(None, dataset, parity, path=part, **arguments) == expected  # nothing is left to sample


@pytest.mark.parametrize("change", [{"seed": 4}, {"made_by": "another model"}, {"batch_size": 2}, {"num_samples": 1}])
def test_samples_of_another_run_are_put_aside(engine, dataset, tmp_path, change, capsys):
    path = tmp_path / "samples.jsonl"
    arguments = {"num_samples": 2, "batch_size": 4, "path": path}
    collect(engine, dataset, parity, **arguments)
    before = path.read_bytes()
    collect(engine, dataset, parity, **arguments | change)
    assert (tmp_path / "samples.jsonl.old").read_bytes() == before
    assert path.read_bytes() != before and "another model or other options" in capsys.readouterr().out


def test_what_is_no_file_of_samples_is_named_with_its_line(dataset, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"prompt": "1+1", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"samples.jsonl, line 1, is not a sample"):
        collect(None, dataset, parity, num_samples=1, path=path)
    assert path.exists()


@pytest.mark.parametrize("name", ["completions", "completion_ids", "log_extra"])
def test_a_column_that_a_reward_gets_anyway_is_refused(dataset, name):
    with pytest.raises(ValueError, match=f"column '{name}'"):
        collect(None, dataset.add_column(name, ["x"] * 5), parity, num_samples=1)


def test_the_paired_difference_and_the_problems_that_turned(engine, dataset):
    samples = collect(engine, dataset, parity, num_samples=2)
    marks = {0: (0, 0), 1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (1, 1)}

    def marked(rewards: dict) -> list:
        return [type(x)(**vars(x) | {"reward": float(rewards[x.problem][x.sample])}) for x in samples]

    after = marks | {0: (1, 1), 2: (1, 1), 4: (0, 1)}
    found = compare(marked(marks), marked(after))
    assert (found.gained, found.lost) == ((0, 2), (4,))
    assert found.difference.mean == pytest.approx((1 + 0.5 - 0.5) / 5)
    assert found.difference.low < 0.2 < found.difference.high
    assert "problems gained       2 [0, 2]" in found.table() and "+0.200" in found.table()
    with pytest.raises(ValueError, match="5 problems and the evaluation 4; the first that differs: past the shorter"):
        compare(marked(marks), marked(after)[:8])


def test_a_reward_that_breaks_the_contract_is_named(engine, dataset):
    def nan_reward(completions, **columns):
        return [float("nan")] * len(completions)

    with pytest.raises(ValueError, match="'nan_reward' returned nan"):
        collect(engine, dataset, nan_reward, num_samples=1)


def test_lines_are_plain_json(engine, dataset, tmp_path):
    path = tmp_path / "samples.jsonl"
    collect(engine, dataset, parity, num_samples=1, path=path)
    row = json.loads(path.read_text().splitlines()[3])
    assert list(row) == [
        "problem", "sample", "prompt", "completion", "answer", "reward", "verdict", "extracted_answer", "num_tokens",
        "truncated", "seed", "run",
    ]  # fmt: skip
    assert row["problem"] == 3 and row["prompt"] == [{"role": "user", "content": "3+1?"}]
