"""What a run leaves in its folder: metrics, warnings, hardware, settings and the report."""

import json
import logging
import math
import os
import re
import shlex
import sys
import warnings

import pytest
import torch
import yaml
from transformers import TrainerControl, TrainerState

from sapo_trl.monitor.files import (
    MetricsFile,
    ReportFile,
    RunFiles,
    WarningsFile,
    hardware,
    keep_old,
    record_warning,
)


@pytest.fixture
def args(tmp_path):
    """The few fields that the callbacks read."""
    fields = {"output_dir": str(tmp_path), "run_name": "a run", "num_mini_batches": 2, "num_iterations": 1}
    return type("Arguments", (), fields | {"disable_tqdm": False, "world_size": 1, "device": torch.device("cpu")})


def state(step: int = 0) -> TrainerState:
    return TrainerState(global_step=step, max_steps=8)


def test_warnings_and_loggers_are_kept(args, tmp_path, capsys, recwarn):
    (tmp_path / "warnings.jsonl").write_text('{"step": 9}\n')
    writer, run = WarningsFile(), state()
    logger = logging.getLogger("sapo_trl.somewhere")
    writer.on_train_begin(args, run, TrainerControl())
    run.global_step = 3
    warnings.warn("odd", stacklevel=1)
    warnings.warn("old", FutureWarning, stacklevel=1)
    logger.warning("pack of %d tokens did not fit", 512)
    logger.info("nothing")
    writer.on_train_end(args, run, TrainerControl())
    logger.warning("after the run")
    records = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert [(x["step"], x["source"], x["message"]) for x in records] == [
        (3, "UserWarning", "odd"),
        (3, "sapo_trl.somewhere", "pack of 512 tokens did not fit"),
    ]
    assert [str(x.message) for x in recwarn] == ["odd", "old"]  # still shown
    assert len(list(tmp_path.glob("warnings-*.jsonl"))) == 1  # of the run before


def test_hardware():
    found = hardware(torch.device("cpu"), 2)
    assert found["processes"] == 2 and found["device"] == "cpu" and found["cpu"] and found["cpu cores"] >= 1
    assert re.fullmatch(r"\d+ GiB", found["memory"])


def test_the_report_is_written_at_the_end_and_can_not_stop_the_run(args, tmp_path, capsys):
    ReportFile().on_train_end(args, state(8), TrainerControl())  # no metrics.jsonl: not a run folder
    assert "warning: no report.html, FileNotFoundError: " in capsys.readouterr().out
    assert json.loads((tmp_path / "warnings.jsonl").read_text())["source"] == "report"
    (tmp_path / "metrics.jsonl").write_text('{"step": 8, "reward": 0.5}\n')
    ReportFile().on_train_end(args, state(8), TrainerControl())
    assert "FileNotFoundError" in (tmp_path / "report.html").read_text()


def records(path) -> list[dict]:
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_what_is_not_finite_is_kept_in_valid_json(args, tmp_path):
    writer, control = MetricsFile(), TrainerControl()
    writer.on_train_begin(args, state(), control)
    logs = {"loss": math.nan, "grad_norm": -math.inf, "kl": math.inf, "reward": None, "lr": 0.5, "note": "text"}
    writer.on_log(args, state(1), control, logs)
    writer.on_log(args, state(2), control, {"loss": 0.25})
    first, second = records(tmp_path / "metrics.jsonl")
    assert first.pop("time_s") >= 0 and second.pop("time_s") >= 0
    assert first == {
        "step": 1, "loss": None, "grad_norm": None, "kl": None, "reward": None, "lr": 0.5,
        "nonfinite": {"loss": "nan", "grad_norm": "-inf", "kl": "inf", "reward": "nan"},
    }  # fmt: skip
    assert second == {"step": 2, "loss": 0.25}


def test_a_warning_is_one_line(tmp_path):
    record_warning(tmp_path / "run", 3, "verifier", 'two\nlines "quoted"')
    record_warning(tmp_path / "run", 4, "guard", "m", "grad_norm", math.nan, 0.5)
    first, second = records(tmp_path / "run/warnings.jsonl")
    assert first.pop("time") and first == {"step": 3, "source": "verifier", "message": 'two\nlines "quoted"'}
    assert (second["signal"], second["value"], second["usual"]) == ("grad_norm", None, 0.5)
    assert second["nonfinite"] == {"value": "nan"}


def test_an_evaluation_before_training_belongs_to_the_run(args, tmp_path):
    """Records of an earlier run in the folder do not; they move aside."""
    path, control = tmp_path / "metrics.jsonl", TrainerControl()
    path.write_text('{"step": 9, "reward": 0.125}\n')
    writer = MetricsFile()
    writer.on_log(args, state(), control, {"eval_reward": 0.5})
    writer.on_train_begin(args, state(), control)
    writer.on_log(args, state(1), control, {"reward": 0.75})
    writer.on_train_end(args, state(8), control)
    writer.on_log(args, state(8), control, {"eval_reward": 1.0})
    rewards = [row.get("reward", row.get("eval_reward")) for row in records(path)]
    assert rewards == [0.5, 0.75, 1.0]
    (old,) = tmp_path.glob("metrics-*.jsonl")
    assert records(old)[0] == {"step": 9, "reward": 0.125}
    writer.on_train_begin(args, state(4), control)  # resumed: appends
    writer.on_log(args, state(5), control, {"reward": 0.25})
    assert len(records(path)) == 4 and len(list(tmp_path.glob("metrics-*.jsonl"))) == 1


def test_files_moved_aside_in_one_second_do_not_replace_each_other(tmp_path):
    for number in range(3):
        (tmp_path / "metrics.jsonl").write_text(str(number))
        keep_old(tmp_path / "metrics.jsonl")
    assert sorted(path.read_text() for path in tmp_path.glob("metrics-*.jsonl")) == ["0", "1", "2"]


def test_a_run_after_one_that_failed_has_its_warnings_for_itself(args, tmp_path, recwarn):
    other = type("Arguments", (), {"output_dir": str(tmp_path / "second")})
    failed, following, control = WarningsFile(), WarningsFile(), TrainerControl()
    usual = warnings.showwarning
    failed.on_train_begin(args, state(), control)
    warnings.warn("of the first", stacklevel=1)
    following.on_train_begin(other, state(), control)  # the first never came to its end
    warnings.warn("of the second", stacklevel=1)
    logging.getLogger("sapo_trl").warning("also of the second")
    following.on_train_end(other, state(8), control)
    warnings.warn("of nobody", stacklevel=1)
    assert [row["message"] for row in records(tmp_path / "warnings.jsonl")] == ["of the first"]
    found = [row["message"] for row in records(tmp_path / "second/warnings.jsonl")]
    assert found == ["of the second", "also of the second"]
    assert warnings.showwarning is usual and len(recwarn) == 3


def test_settings_plan_and_versions(args, tmp_path):
    args.to_dict = lambda: {"algorithm": "sapo", "hub_token": "<HUB_TOKEN>", "device": args.device}
    run, control = RunFiles([("effective batch", "64 completions")]), TrainerControl()
    run.on_train_begin(args, state(), control)
    settings = yaml.safe_load((tmp_path / "resolved_config.yaml").read_text())
    assert settings == {"algorithm": "sapo", "hub_token": "***", "device": "cpu"}
    assert json.loads((tmp_path / "plan.json").read_text()) == {"effective batch": "64 completions"}
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["trl"].startswith("1.16") and versions["num_processes"] == 1
    assert versions["command"] == shlex.join(sys.argv)
    assert json.loads((tmp_path / "hardware.json").read_text())["device"] == "cpu"
    run.settings = {"algorithm": "gspo", "dataset_name": "gsm8k"}
    run.on_train_begin(args, state(), control)
    assert yaml.safe_load((tmp_path / "resolved_config.yaml").read_text()) == run.settings


def test_results_of_an_earlier_run_are_not_this_runs(args, tmp_path):
    """They move aside when a new run begins; what this process wrote before training stays, a resumed run keeps all."""
    args.to_dict = dict
    old = (
        "evaluation.json",
        "evaluation.aime.samples.jsonl",
        "completions/completions_00009.parquet",
        "dump/step_9.npz",
    )
    for name in old:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
        os.utime(tmp_path / name, (1e9, 1e9))
    run, control = RunFiles([]), TrainerControl()
    run.on_train_begin(args, state(4), control)  # resumed
    assert all((tmp_path / name).exists() for name in old)
    (tmp_path / "completions/completions_00000.parquet").write_text("before training")
    run.on_train_begin(args, state(), control)
    assert not any((tmp_path / name).exists() for name in old)
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["completions_00000.parquet"]
    assert (tmp_path / "dump").is_dir()  # empty
    patterns = ("evaluation-*.json", "evaluation.aime.samples-*.jsonl", "completions-*/*_00009.parquet", "dump-*/*.npz")
    assert [len(list(tmp_path.glob(pattern))) for pattern in patterns] == [1, 1, 1, 1]
    run.on_train_begin(args, state(), control)  # nothing of an earlier run is left
    assert len(list(tmp_path.glob("completions*"))) == 2
