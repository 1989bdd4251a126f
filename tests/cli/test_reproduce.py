"""The end-to-end command keeps what is there and sums it up; every script is its command."""

import importlib
import importlib.util
import json
import os
from pathlib import Path

import pytest

from sapo_trl.cli import reproduce
from sapo_trl.cli.threads import bound_threads

ROOT = Path(__file__).parents[2]


def evaluation(correct: list[int], length: float) -> dict:
    mean = sum(correct) / (4 * len(correct))
    interval = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "confidence": 0.95}
    return {"pass_at_1": interval, "num_correct": correct, "num_samples": 4, "mean_length_tokens": length}


def test_resumed_phases_are_kept_and_summed_up(tmp_path, capsys):
    start, run = tmp_path / "cold-start-seed5", tmp_path / "gspo-seed5"
    files = {
        start / "test.jsonl": "",
        start / "evaluation.json": json.dumps(evaluation([1, 2, 3], 20.0)),
        run / "model.safetensors": "",
        run / "hardware.json": '{"cpu": "a cpu"}',
        run / "resolved_config.yaml": "num_mini_batches: 2\n",
        run / "metrics.jsonl": '{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.75}\n',
        run / "evaluation.json": json.dumps(evaluation([3, 3, 4], 31.5)),
        tmp_path / "summary.json": json.dumps({"algorithm": "gspo", "seed": 5, "seconds": {"cold start": 7.5}}),
    }
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    options = ["--output_dir", str(tmp_path), "--seeds", "5", "--algorithms", "gspo", "--resume"]
    assert reproduce.main(options) == 0
    assert capsys.readouterr().out.count(": kept") == 4
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["pass_at_1_before"], summary["pass_at_1_after"]) == (0.5, pytest.approx(10 / 12))
    assert summary["pass_at_1_after_interval"] == pytest.approx([10 / 12 - 0.1, 10 / 12 + 0.1])
    # per problem 1/4 -> 3/4, 2/4 -> 3/4, 3/4 -> 4/4
    assert summary["difference"]["mean"] == pytest.approx((2 + 1 + 1) / 12)
    assert summary["mean_length_tokens"] == [20.0, 31.5] and summary["seconds"] == {"cold start": 7.5}
    assert summary["machine"] == {"cpu": "a cpu"} and "routing" not in summary
    assert {"report.html", "curves.png", "curves.csv"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("cores", "allowed", "load", "threads"),
    [(2, 2, 0.3, 2), (2, 2, 13.4, 1), (64, 64, 3.0, 4), (16, 2, 5.0, 2), (8, 8, 5.6, 2)],
)
def test_threads_are_the_free_cores(monkeypatch, cores, allowed, load, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that what is set is undone
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert bound_threads().startswith(f"threads: {threads} ({cores} cores, load {load}")
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert bound_threads() == "threads: 3, by OMP_NUM_THREADS" and os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    "name", ["train", "check", "evaluate", "cold_start", "reproduce", "filter_by_pass_rate", "plot", "lab", "compare"]
)
def test_a_script_is_its_command(name):
    path = ROOT / f"scripts/{name}.py"
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main is importlib.import_module(f"sapo_trl.cli.{name}").main
    assert len(path.read_text().splitlines()) <= 20


def test_a_start_folder_replaces_the_cold_start(tmp_path, monkeypatch, capsys):
    start, commands = tmp_path / "start", []
    (start / "model").mkdir(parents=True)
    (start / "train.jsonl").touch()
    options = ["--start", str(start), "--output_dir", str(tmp_path / "out"), "--config", "configs/tiny-moe/sapo.yaml"]
    with pytest.raises(SystemExit):
        reproduce.parse_arguments(options)
    assert f"--start {start} has no test.jsonl" in capsys.readouterr().err
    (start / "test.jsonl").touch()
    with pytest.raises(SystemExit):
        reproduce.parse_arguments([*options, "--moe"])
    assert "--moe says what the cold start makes" in capsys.readouterr().err

    monkeypatch.setattr(reproduce.subprocess, "call", lambda words: commands.append(words) or 1)
    assert reproduce.main(options) == 1
    (evaluation,) = commands  # no cold start before it
    assert evaluation[evaluation.index("--model") + 1] == f"{start}/model"
    assert evaluation[evaluation.index("--dataset_name") + 1] == f"{start}/test.jsonl"
    assert evaluation[evaluation.index("--config") + 1] == "configs/tiny-moe/sapo.yaml"  # its length and reward
