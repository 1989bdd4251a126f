"""A run from a library: its files, its display, and several trainers in one process one after the other."""

import json
import math

import pytest
import torch
import yaml
from conftest import sapo_trainer, tiny_model
from transformers import ProgressCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from sapo_trl.cli.train import stopped
from sapo_trl.monitor import attach, collapse_alarms, record_settings
from sapo_trl.monitor.files import MetricsFile
from sapo_trl.monitor.guard import Alarm
from sapo_trl.monitor.progress import Progress


def kinds(trainer) -> list[type]:
    return [type(callback) for callback in trainer.callback_handler.callbacks]


@pytest.fixture
def make(tokenizer):
    model = tiny_model(tokenizer)
    return lambda folder, **fields: sapo_trainer(folder, tokenizer, model, num_mini_batches=2, **fields)


def test_a_run_leaves_its_files(make, tmp_path, capsys):
    trainer = make(tmp_path / "run", max_steps=2, logging_steps=1)
    attach(trainer, report=True)
    trainer.evaluate(trainer.train_dataset.select(range(4)))
    trainer.train()
    out = capsys.readouterr().out
    assert "{'loss'" not in out and "step 2/2  reward" in out
    names = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    expected = {"metrics.jsonl", "plan.json", "versions.json", "hardware.json", "resolved_config.yaml", "report.html"}
    assert expected <= names
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 2] and "eval_reward" in records[0]
    assert yaml.safe_load((tmp_path / "run/resolved_config.yaml").read_text())["num_mini_batches"] == 2
    assert json.loads((tmp_path / "run/plan.json").read_text())["completions per rollout"] == "16"


def test_attached_twice_is_attached_once(make, tmp_path):
    trainer = make(tmp_path, max_steps=1)
    attach(trainer)
    once = kinds(trainer)
    attach(trainer)
    assert kinds(trainer) == once and len(set(once)) == len(once)
    assert Progress in once and MetricsFile in once and ProgressCallback not in once
    attach(trainer, report=True)
    attach(trainer, report=True)
    assert len(kinds(trainer)) == len(once) + 1


def test_a_display_of_the_users_own_stays_alone(make, tmp_path):
    class Mine(ProgressCallback):
        pass

    for display, options in ((ProgressCallback(), {}), (Mine(), {}), (Mine(), {"disable_tqdm": True})):
        trainer = make(tmp_path, max_steps=1, callbacks=[display], **options)
        attach(trainer)
        attach(trainer)
        found = kinds(trainer)
        assert display in trainer.callback_handler.callbacks and Progress not in found and PrinterCallback not in found
        assert found.count(type(display)) == 1 and MetricsFile in found


def test_without_bars_there_are_lines_instead_of_dictionaries(make, tmp_path):
    trainer = make(tmp_path, max_steps=1, disable_tqdm=True)
    attach(trainer)
    assert Progress in kinds(trainer) and PrinterCallback not in kinds(trainer)


def test_two_trainers_one_after_the_other(make, tmp_path):
    """The first fails in its second step; each folder holds its own run."""

    def broken(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    first, second = (make(tmp_path / name, max_steps=2, logging_steps=1) for name in ("first", "second"))
    for trainer in (first, second):
        attach(trainer)
    log = first.log
    first.log = lambda logs, *rest: (log(logs, *rest), broken())
    with pytest.raises(RuntimeError, match="broken on purpose"):
        first.train()
    second.train()
    lines = {name: (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("first", "second")}
    assert [json.loads(line)["step"] for line in lines["first"]] == [1]
    assert [json.loads(line)["step"] for line in lines["second"]] == [1, 2, 2]


def test_a_loss_that_is_nan_is_told(make, tmp_path, capsys):
    trainer = make(tmp_path, max_steps=1, logging_steps=1, logging_nan_inf_filter=False)
    attach(trainer)
    usual = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: usual(*args, **kwargs) + torch.tensor(math.nan)
    trainer.train()
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert record["loss"] is None and record["nonfinite"]["loss"] == "nan"
    assert "  loss nan" in capsys.readouterr().out


def test_a_scripts_settings_are_the_ones_recorded(make, tmp_path):
    trainer = make(tmp_path, max_steps=1)
    attach(trainer)
    record_settings(trainer, {"algorithm": "sapo", "dataset_name": "gsm8k"})
    trainer.train()
    assert yaml.safe_load((tmp_path / "resolved_config.yaml").read_text())["dataset_name"] == "gsm8k"
    assert collapse_alarms(trainer) == []


def state(step: int = 0) -> TrainerState:
    return TrainerState(global_step=step, max_steps=8)


def test_train_py_says_why_it_stopped(capsys):
    accelerator = type("A", (), {"print": staticmethod(print)})
    trainer = type(
        "T", (), {"accelerator": accelerator, "args": type("X", (), {"output_dir": "runs/x"}), "state": state(4)}
    )
    assert stopped(trainer, [Alarm(4, "reward", 0.0, 0.5, "reward is gone.")]) == 3
    assert "runs/x/checkpoint-4:\n  step 4: reward is gone." in capsys.readouterr().out
