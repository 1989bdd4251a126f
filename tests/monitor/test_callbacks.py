"""What a run shows and keeps: the live view, warnings, hardware, and the same names in every tracker."""

import importlib.util
import io
import json
import logging
import re
import sqlite3
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sapo_trainer, tiny_model
from rich.console import Console
from transformers import TrainerControl, TrainerState

from sapo_trl.cli.train import stopped
from sapo_trl.monitor.callbacks import (
    Progress,
    ReportFile,
    WarningsFile,
    duration,
    hardware,
    raw_histogram,
    show_our_progress,
)
from sapo_trl.monitor.guard import Alarm

LOGS = {"reward": 0.4567, "entropy": 0.25, "update/trained_tokens": 300.0, "step_time": 2.0}
# transformers puts these into wandb's summary, and leaves them out of trackio
RUN_TOTALS = {f"train/{x}" for x in ("train_runtime", "train_loss", "total_flos")}
RUN_TOTALS |= {"train/train_samples_per_second", "train/train_steps_per_second"}
HISTOGRAMS = {"log_ratio": (np.array([1, 5, 2]), np.array([-1.0, -0.5, 0.5, 2.0]))}


@pytest.fixture
def args(tmp_path):
    """The few fields that the callbacks read."""
    fields = {"output_dir": str(tmp_path), "run_name": "a run", "num_mini_batches": 2, "num_iterations": 1}
    return type("Arguments", (), fields | {"report_to": ["tensorboard"]})


def state(step: int = 0) -> TrainerState:
    return TrainerState(global_step=step, max_steps=8)


# live view


def test_the_panel_shows_every_number(args):
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(args, state(), control)
    progress.on_log(args, state(1), control, LOGS)
    progress.on_log(args, state(2), control, LOGS | {"update/trained_tokens": 100.0, "reward": None})
    progress.on_log(args, state(2), control, {"eval_reward": 0.5, "eval_pass_at_1": 0.625})
    console = Console(file=io.StringIO(), width=90)
    console.print(progress._panel(state(2)))
    lines = console.file.getvalue().splitlines()
    assert "a run  step 2/8  left " in lines[0] and "━" in lines[1]
    assert re.sub(r"\s+", " ", lines[2]) == "│ reward 0.457 entropy 0.25 tok/s 100 Pass@1 0.625 │"  # 400 tokens in 4 s


def test_plain_lines_where_there_is_no_terminal(args, capsys):
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(args, state(), control)
    for step in (1, 2, 8):
        progress.on_log(args, state(step), control, LOGS)
    progress.on_train_end(args, state(8), control)
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines()] == ["step 1/8", "step 8/8"]  # at most one each 5 s
    assert "reward 0.457  entropy 0.25  tok/s 150  left " in out and "\x1b" not in out


def test_a_terminal_gets_one_panel_and_its_cursor_back(args, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen)
    progress, control = Progress(), TrainerControl()
    progress.on_train_begin(args, state(), control)
    assert sys.stdout.__class__.__name__ != "FileProxy"  # stdout is no terminal here: it stays where it is
    progress.on_log(args, state(1), control, LOGS)
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")  # visible while it runs
    progress.on_train_end(args, state(8), control)
    assert sys.stderr is screen and "reward" in screen.getvalue()


def test_durations():
    assert [duration(x) for x in (0.4, 59.6, 3599, 86399)] == ["0 s", "1 min 00 s", "59 min 59 s", "23 h 59 min"]


# files


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


def test_train_py_says_why_it_stopped(capsys):
    accelerator = type("A", (), {"print": staticmethod(print)})
    trainer = type(
        "T", (), {"accelerator": accelerator, "args": type("X", (), {"output_dir": "runs/x"}), "state": state(4)}
    )
    assert stopped(trainer, [Alarm(4, "reward", 0.0, 0.5, "reward is gone.")]) == 3
    assert "runs/x/checkpoint-4:\n  step 4: reward is gone." in capsys.readouterr().out


# trackers


def test_histogram_in_tensorboards_form():
    form = raw_histogram(*HISTOGRAMS["log_ratio"])
    assert form["bucket_limits"] == [-1.0, -0.5, 0.5, 2.0] and form["bucket_counts"] == [0.0, 1.0, 5.0, 2.0]
    assert (form["min"], form["max"], form["num"]) == (-1.0, 2.0, 8)
    assert form["sum"] == pytest.approx(-0.75 + 0 + 2.5) and form["sum_squares"] == pytest.approx(0.5625 + 0 + 3.125)
    with pytest.raises(ValueError, match="2 counts need 3 finite edges"):
        raw_histogram(np.ones(2), np.array([0.0, 1.0]))


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, tokenizer):
    """Folder of a run of four steps that reports to all three, offline."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("WANDB_SILENT", "true")
        importlib.import_module("trackio")  # reads its folder once, into each of its modules
        for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
            for name in {"TRACKIO_DIR", "MEDIA_DIR"} & vars(module).keys():
                patch.setattr(module, name, folder / "trackio")
        trainer = sapo_trainer(
            folder / "run",
            tokenizer,
            tiny_model(tokenizer),
            num_mini_batches=2,
            logging_steps=1,
            max_steps=4,
            report_to=["tensorboard", "wandb", "trackio"],
            log_completions=True,
            num_completions_to_print=0,
        )
        trainer.histograms = lambda: HISTOGRAMS
        show_our_progress(trainer)
        trainer.train()
        importlib.import_module("wandb").finish()
    return folder


def names(folder: Path) -> set[str]:
    """Names in metrics.jsonl, with the group that transformers puts before them in a tracker."""
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {f"train/{name}" for record in records for name in record} - {"train/step", "train/time_s"}


def test_the_same_names_in_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = tracked.glob("run/runs/*/events*")
    events = EventAccumulator(str(path), {"histograms": 0}).Reload()  # 0: all of them
    assert set(events.Tags()["scalars"]) == names(tracked) and "train/effective_update_ratio" in names(tracked)
    shown = events.Histograms("train/log_ratio")
    assert [event.step for event in shown] == [1, 2, 3, 4]
    assert list(shown[0].histogram_value.bucket)[-3:] == [1.0, 5.0, 2.0]


def test_the_same_names_in_wandb_offline(tracked):
    (path,) = tracked.glob("wandb/offline-run-*/run-*.wandb")
    logged = wandb_history(path)
    assert names(tracked) - RUN_TOTALS <= logged.keys()
    assert (logged["train/log_ratio._type"], logged["train/log_ratio.values"]) == ("histogram", [1, 5, 2])
    assert logged["completions._type"] == "table-file"


def test_the_same_names_in_trackio(tracked):
    (path,) = tracked.glob("trackio/*.db")
    logged: dict = {}
    for (metrics,) in sqlite3.connect(path).execute("select metrics from metrics"):
        logged |= json.loads(metrics)
    assert names(tracked) - RUN_TOTALS <= logged.keys()
    assert logged["train/log_ratio"]["values"] == [1, 5, 2] and logged["completions"]["_type"] == "trackio.table"


def wandb_history(path: Path) -> dict:
    """Last value of every logged name: protobuf records in LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, logged, record, at = path.read_bytes(), {}, b"", 7  # 7 bytes of file header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: the block's rest is padding
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            items = Record.FromString(record).history.item
            logged |= {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            record = b""
    return logged
