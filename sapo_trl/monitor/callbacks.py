"""What a run shows and keeps while it trains: `metrics.jsonl`, warnings, hardware, histograms, and a live view."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import platform
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from sapo_trl.monitor.guard import Alarm, CollapseGuard, record_warning

# name in the log -> label; a label appears once its number was logged
SHOWN = {
    "reward": "reward",
    "eval_reward": "eval",
    "eval_pass_at_1": "Pass@1",
    "effective_update_ratio": "eur",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "grad_norm": "grad",
    "learning_rate": "lr",
}


def short(value: float) -> str:
    """Three significant digits, never 0.000 for a number that is not 0.

    >>> short(1e-6), short(0.8571), short(41.25), short(0.0)
    ('1e-06', '0.857', '41.2', '0')
    """
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Two units at most.

    >>> duration(8.4), duration(125), duration(7322), duration(200000)
    ('8 s', '2 min 05 s', '2 h 02 min', '2 d 07 h')
    """
    whole = round(seconds)
    for name, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part:02d} {smaller}"
    return f"{whole} s"


def keep_old(path: Path) -> None:
    """Move the file of an earlier run aside, under the time of its last record."""
    if path.exists():
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        path.rename(path.with_name(f"{path.stem}-{stamp}{path.suffix}"))


class MetricsFile(TrainerCallback):
    """Appends every log record to `metrics.jsonl` in the output folder, whatever `report_to` says.

    A record holds `step`, `time_s` (seconds since the start of this process's training) and the logged numbers; NaN
    and infinities, which JSON lacks, become null. A resumed run appends; a new run in an old folder keeps the old file
    under the time of its last record. `hardware.json` says where the (latest part of the) run took place.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        if state.global_step == 0:
            keep_old(folder / "metrics.jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hardware.json").write_text(json.dumps(hardware(args.device, args.world_size), indent=2) + "\n")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        elapsed = time.perf_counter() - getattr(self, "_started", time.perf_counter())
        numbers = {k: v if math.isfinite(v) else None for k, v in logs.items() if isinstance(v, (int, float))}
        record = {"step": state.global_step, "time_s": round(elapsed, 3), **numbers}
        path = Path(args.output_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def hardware(device: torch.device, num_processes: int) -> dict[str, str | int]:
    """What the main process runs on; other nodes are taken to be alike."""
    found: dict[str, str | int] = {"processes": num_processes, "device": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["accelerator"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["accelerators of this node"] = torch.cuda.device_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    found |= {"cpu": _cpu_name(), "cpu cores": os.cpu_count() or 0, "torch threads": torch.get_num_threads()}
    return found | ({"memory": f"{memory / 2**30:.0f} GiB"} if memory else {})


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class WarningsFile(TrainerCallback):
    """Copies Python's warnings, and what the `sapo_trl` loggers warn of, to `warnings.jsonl` while a run trains.

    The main process only. A Python warning is recorded as often as it is shown: by default once per place; what is
    deprecated (`NOT_OF_THE_RUN`) is shown and not recorded. A new run in an old folder keeps the old file.
    """

    NOT_OF_THE_RUN = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        if state.global_step == 0:
            keep_old(Path(args.output_dir) / "warnings.jsonl")
        record = lambda source, text: record_warning(args.output_dir, state.global_step, source, text)  # noqa: E731
        show = self._usual_show = warnings.showwarning

        def show_and_record(message, category, filename, lineno, file=None, line=None):
            show(message, category, filename, lineno, file, line)
            if not issubclass(category, self.NOT_OF_THE_RUN):
                record(category.__name__, str(message))

        warnings.showwarning = show_and_record
        self._handler = _Recorder(record)
        logging.getLogger("sapo_trl").addHandler(self._handler)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            warnings.showwarning = self._usual_show
            logging.getLogger("sapo_trl").removeHandler(self._handler)


class ReportFile(TrainerCallback):
    """Writes `report.html` into the output folder when training ends, also when the collapse guard has ended it."""

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        from sapo_trl.report.build import write_report  # matplotlib takes seconds to load
        from sapo_trl.report.runs import load_run

        try:
            path = write_report([load_run(args.output_dir)], Path(args.output_dir) / "report.html")
            print(f"report: {path}", flush=True)
        except Exception as error:  # the model is not saved yet: no page is worth losing it
            record_warning(args.output_dir, state.global_step, "report", f"{type(error).__name__}: {error}")
            print(f"warning: no report.html, {type(error).__name__}: {error}", flush=True)


class _Recorder(logging.Handler):
    def __init__(self, record: Callable[[str, str], None]):
        super().__init__(logging.WARNING)
        self.record = record

    def emit(self, record: logging.LogRecord) -> None:
        self.record(record.name, record.getMessage())
        if not logging.root.handlers:  # Python prints a warning that no handler takes; now one has taken it
            logging.lastResort.handle(record)


class Progress(TrainerCallback):
    """The numbers that matter while a run trains, the last of each: a panel with a bar on a terminal; plain lines
    elsewhere, at most one each `SECONDS_BETWEEN_LINES`.

    tok/s counts trained tokens over whole rollouts, by `step_time`; the time left is that of the steps so far.
    """

    SECONDS_BETWEEN_LINES = 5.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._last: dict[str, str] = {}
        self._printed = float("-inf")
        self._live = None
        self._is_main = state.is_world_process_zero
        self._began = time.monotonic(), state.global_step
        self._paces: deque[tuple[float, float]] = deque(maxlen=args.num_mini_batches * args.num_iterations)
        self._title = args.run_name or Path(args.output_dir).name
        if self._is_main and sys.stderr.isatty():
            self._live = open_live()

    def on_step_end(self, args, state, control, **kwargs):
        if self._live is not None:
            self._live.update(self._panel(state))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self._is_main or not SHOWN.keys() & logs.keys():  # the closing record has run times only
            return
        self._last |= {label: short(logs[name]) for name, label in SHOWN.items() if logs.get(name) is not None}
        if "Pass@1" in self._last:
            self._last.pop("eval", None)
        if "update/trained_tokens" in logs and logs.get("step_time"):
            self._paces.append((logs["update/trained_tokens"], logs["step_time"]))
            tokens, seconds = map(sum, zip(*self._paces))
            self._last["tok/s"] = f"{tokens / seconds:,.0f}"
        if self._live is not None:
            self._live.update(self._panel(state))
        elif time.monotonic() - self._printed > self.SECONDS_BETWEEN_LINES or state.global_step == state.max_steps:
            self._printed = time.monotonic()
            shown = "  ".join(f"{label} {value}" for label, value in self._last.items())
            left = f"  left {self._left(state)}" if state.global_step < state.max_steps else ""
            print(f"step {state.global_step}/{state.max_steps}  {shown}{left}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self._live is not None:
            self._live.update(self._panel(state))
            close_live(self._live)

    def _left(self, state) -> str:
        began, first = self._began
        done = state.global_step - first
        return duration((time.monotonic() - began) / done * (state.max_steps - state.global_step)) if done else "?"

    def _panel(self, state) -> Panel:
        bar = Table.grid(expand=True)  # a bar alone does not end its line
        bar.add_row(ProgressBar(total=state.max_steps, completed=state.global_step))
        numbers = [Text.assemble((f"{label} ", "dim"), (value, "bold")) for label, value in self._last.items()]
        title = f"{self._title}  step {state.global_step}/{state.max_steps}  left {self._left(state)}"
        return Panel(Group(bar, Columns(numbers, padding=(0, 3))), title=Text(title), title_align="left")


def open_live() -> Live:
    """A started `Live` on stderr. What others print appears above it; a stdout that goes elsewhere stays there.

    The cursor stays visible, so that even a killed process leaves a usable terminal.
    """
    console = Console(stderr=True)
    live = Live(console=console, redirect_stdout=sys.stdout.isatty(), refresh_per_second=4)
    live.start()
    console.show_cursor(True)
    atexit.register(live.stop)  # a crash does not reach on_train_end
    return live


def close_live(live: Live) -> None:
    live.stop()
    atexit.unregister(live.stop)


def raw_histogram(counts: np.ndarray, edges: np.ndarray) -> dict[str, float | int | list[float]]:
    """TensorBoard's form of B bins: counts (B,), edges (B+1,).

    A bucket begins where the one before it ends, so an empty one carries the first edge. Sums are those of the bins'
    centres: the values themselves are gone.
    """
    counts, edges = np.asarray(counts, dtype=np.float64), np.asarray(edges, dtype=np.float64)
    if edges.shape != (len(counts) + 1,) or not np.isfinite(edges).all():
        raise ValueError(f"{len(counts)} counts need {len(counts) + 1} finite edges; got {edges.tolist()}.")
    centres = (edges[:-1] + edges[1:]) / 2
    return {
        "min": float(edges[0]),
        "max": float(edges[-1]),
        "num": int(counts.sum()),
        "sum": float(counts @ centres),
        "sum_squares": float(counts @ centres**2),
        "bucket_limits": edges.tolist(),
        "bucket_counts": [0.0, *counts.tolist()],
    }


class TrackerHistograms(TrainerCallback):
    """Logs histograms, as `train/<name>`, to those of wandb, trackio and TensorBoard that `report_to` names.

    histograms: gives name -> (counts (B,), edges (B+1,)) of the last step, empty where there is nothing new.
    handler: the trainer's `callback_handler`, whose TensorBoard writer is used.
    """

    def __init__(self, histograms: Callable[[], dict[str, tuple[np.ndarray, np.ndarray]]], handler: CallbackHandler):
        self.histograms, self.handler = histograms, handler

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in logs:
            return
        found = {f"train/{name}": pair for name, pair in self.histograms().items()}
        if found and "tensorboard" in args.report_to:
            self._to_tensorboard(found, state.global_step)
        for name in ("wandb", "trackio") if found else ():
            if name in args.report_to:
                module = import_module(name)  # only where it is reported to
                tracked = {key: module.Histogram(np_histogram=pair) for key, pair in found.items()}
                module.log(tracked | {"train/global_step": state.global_step})

    def _to_tensorboard(self, found: dict[str, tuple[np.ndarray, np.ndarray]], step: int) -> None:
        from transformers.integrations import TensorBoardCallback

        for callback in self.handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, pair in found.items():
                    callback.tb_writer.add_histogram_raw(name, **raw_histogram(*pair), global_step=step)


def show_our_progress(trainer) -> None:
    """Replace transformers' printed dictionaries by `Progress`, keep `metrics.jsonl` and `warnings.jsonl`, and give the
    trackers histograms."""
    for usual in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(usual)
    for callback in (MetricsFile(), WarningsFile(), Progress()):
        trainer.add_callback(callback)
    trainer.add_callback(TrackerHistograms(trainer.histograms, trainer.callback_handler))


def collapse_alarms(trainer) -> list[Alarm]:
    """What the guard ended the run for; empty if it did not."""
    guards = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, CollapseGuard)]
    return [alarm for guard in guards for alarm in guard.stopped_by]
