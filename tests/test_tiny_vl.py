"""The tiny vision-language world: answers against the pixels, and its way from cold start to a trained model."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sapo_trl.cli import cold_start as cold_start_cli
from sapo_trl.cli import evaluate, train
from sapo_trl.evaluation.sampling import sample_completions
from sapo_trl.tiny import chat, make_problems
from sapo_trl.tiny_vl import COLOURS, KINDS, MAX_ANSWER_TOKENS, build_model, build_processor
from sapo_trl.vision import placeholders

ROOT = Path(__file__).parents[1]


def read(picture, colour) -> np.ndarray:
    """Where a picture has a colour, (pixels high, pixels wide)."""
    return (np.asarray(picture) == colour).all(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_in_the_pixels(kind):
    for problem in make_problems(60, 3, kinds=[kind], generators=KINDS):
        seen = {name: read(problem.picture, colour) for name, colour in COLOURS.items()}
        if kind == "counting":
            centres = seen[problem.prompt[-2]][8::16, 8::16]
            found = int(centres.sum())
        elif kind == "bars":
            heights = {name: int(mask.any(1).sum()) // 8 for name, mask in seen.items()}
            a, b, c = re.findall("[rgb]", problem.prompt)
            found = heights[a] * heights[b] + heights[c]
        else:
            found = sum(int(mask.sum()) for mask in seen.values()) // 64
        assert problem.answer == str(found)
        assert problem.direct == f"\\boxed{{{found}}}" and problem.steps.endswith(problem.direct)
        assert len(problem.steps) - len("boxed") + 2 <= MAX_ANSWER_TOKENS  # \boxed is a token, and so is the end


def test_the_splits_share_no_picture():
    train_set, test_set = (make_problems(400, 5, split=split, generators=KINDS) for split in ("train", "test"))
    assert not {p.key for p in train_set} & {p.key for p in test_set}
    assert [p.key for p in train_set] == [p.key for p in make_problems(400, 5, generators=KINDS)]


def test_placeholders_are_never_sampled():
    """A model that likes nothing else still samples none of them."""
    processor = build_processor()
    model = build_model(processor.tokenizer)
    ids = placeholders(model.config)
    assert processor.tokenizer.convert_ids_to_tokens(ids) == [
        "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
    ]  # fmt: skip
    model.lm_head = copy.deepcopy(model.lm_head)  # tied to the embedding before
    with torch.no_grad():
        model.model.language_model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    problem = make_problems(1, 0, generators=KINDS)[0]
    drawn = sample_completions(
        model, processor, [chat(problem.prompt)], 64, max_new_tokens=8, images=[[problem.picture]]
    )
    tokens = {token for (*samples,) in drawn for sample in samples for token in sample.ids}
    assert len(tokens) > 100 and not tokens.intersection(ids)  # every token is as likely as another


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vl")
    assert cold_start_cli.main([
        "--vl", "--output_dir", str(folder), "--steps", "2", "--num_train", "24", "--num_test", "4"
    ]) == 0  # fmt: skip
    return folder


def arguments(world, *more: str) -> list[str]:
    files = ["--model_name_or_path", str(world / "model"), "--dataset_name", str(world / "train.jsonl")]
    files += ["--eval_dataset_name", str(world / "test.jsonl"), "--output_dir", str(world / "run")]
    small = ["--per_device_train_batch_size", "8", "--num_generations", "4", "--num_mini_batches", "2"]
    small += ["--max_steps", "2", "--eval_steps", "2", "--per_device_eval_batch_size", "16", "--write_report", "false"]
    return ["--config", str(ROOT / "configs/tiny-vl/sapo.yaml"), *files, *small, *more]


def test_from_the_cold_start_to_an_evaluation(world, capsys):
    row = json.loads((world / "train.jsonl").read_text().splitlines()[0])
    assert row.keys() == {"prompt", "answer", "kind", "image"} and (world / row["image"]).is_file()
    assert train.main(arguments(world)) == 0
    told = capsys.readouterr().out
    assert "segments layout (pictures and text with full attention)" in told
    assert "<|vision_start|>, <|vision_end|>, <|image_pad|>, <|video_pad|> are never sampled" in told
    logs = [json.loads(line) for line in (world / "run/metrics.jsonl").read_text().splitlines()]
    assert any("eval_accuracy_reward" in str(log) or "eval_reward" in str(log) for log in logs)
    result = world / "result.json"
    assert evaluate.main([
        "--model", str(world / "run"), "--dataset_name", str(world / "test.jsonl"), "--max_new_tokens", "8",
        "--num_samples", "2", "--output", str(result),
    ]) == 0  # fmt: skip
    assert json.loads(result.read_text())["num_problems"] == 4


def test_what_can_not_be_is_refused_before_the_model_loads(world, tmp_path, capsys):
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    rows[5]["image"] = "gone.png"
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(row | {"image": str(world / row["image"])}) + "\n" for row in rows))
    assert train.main([*arguments(world), "--dataset_name", str(bad)]) == 1
    assert f"{bad}, row 5: there is no picture" in capsys.readouterr().err
    test = ["--model", str(world / "model"), "--dataset_name", str(world / "test.jsonl")]
    assert evaluate.main([*test, "--engine", "openai", "--base_url", "http://127.0.0.1:1"]) == 1
    assert "--engine openai gets no pictures here" in capsys.readouterr().err
    assert cold_start_cli.main(["--vl", "--moe", "--output_dir", str(tmp_path)]) == 1
    assert "--vl goes neither with --moe" in capsys.readouterr().err
