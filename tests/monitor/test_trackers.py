"""Histograms, and the same names in every tracker."""

import importlib
import json
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import sapo_trainer, tiny_model

from sapo_trl.monitor import attach
from sapo_trl.monitor.trackers import raw_histogram

# transformers puts these into wandb's summary, and leaves them out of trackio
RUN_TOTALS = {f"train/{x}" for x in ("train_runtime", "train_loss", "total_flos")}
RUN_TOTALS |= {"train/train_samples_per_second", "train/train_steps_per_second"}
HISTOGRAMS = {"log_ratio": (np.array([1, 5, 2]), np.array([-1.0, -0.5, 0.5, 2.0]))}


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
        attach(trainer)
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
