"""The files of a run's output folder: settings, plan, versions, hardware, metrics, warnings and the report."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Trainer, TrainerCallback

from sapo_trl.files import masked, write_json, write_text

PACKAGES = ("sapo_trl", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "mpmath", "deepspeed")
Logs = Mapping[str, float | None]  # TRL logs None for a mean over nothing but NaN


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes, of Python and of the machine."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}


def command_line() -> str:
    """The command of this process as typed into a shell, with secrets masked."""
    return " ".join([sys.argv[0], *map(shlex.quote, masked(sys.argv[1:]))])


def hardware(device: torch.device, num_processes: int) -> dict[str, str | int]:
    """The machine of the main process; other nodes are assumed to be alike."""
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


def as_json(numbers: Logs) -> dict[str, Any]:
    """The numbers for JSON: None in place of NaN and infinities, which `nonfinite` names.

    >>> as_json({"lr": 0.5, "loss": math.nan, "kl": math.inf, "reward": None})
    {'lr': 0.5, 'loss': None, 'kl': None, 'reward': None, 'nonfinite': {'loss': 'nan', 'kl': 'inf', 'reward': 'nan'}}
    """
    odd = {name: "nan" if x is None else str(x) for name, x in numbers.items() if x is None or not math.isfinite(x)}
    return {**numbers, **dict.fromkeys(odd)} | ({"nonfinite": odd} if odd else {})


def append_record(path: Path, record: dict[str, Any]) -> str:
    """Append one line of JSON to a file, whose folder is made if need be; returns the line."""
    line = json.dumps(record, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
    return line


def record_warning(
    output_dir: str | Path,
    step: int,
    source: str,
    message: str,
    signal: str = "",
    value: float = math.nan,
    usual: float = math.nan,
) -> None:
    """Append one line to `warnings.jsonl`; to be called by the main process only."""
    record = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), "source": source}
    numbers = {"signal": signal, **as_json({"value": value, "usual": usual})} if signal else {}
    append_record(Path(output_dir) / "warnings.jsonl", {**record, "message": message, **numbers})


def keep_old(path: Path) -> Path | None:
    """Rename the file or folder of an earlier run to the time of its last record; returns the new path, if any."""
    if not path.exists():
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    number, target = 1, path.with_name(f"{path.stem}-{stamp}{path.suffix}")
    while target.exists():  # runs of a second each
        number, target = number + 1, path.with_name(f"{path.stem}-{stamp}-{number + 1}{path.suffix}")
    return path.rename(target)


def keep_old_results(folder: Path, since: float) -> None:
    """Rename what an earlier run left that a report would take for this run's: evaluations, completions and dumps.

    What was written at `since` (seconds of the epoch) or later belongs to this run and stays.
    """
    is_old = lambda path: path.stat().st_mtime < since  # noqa: E731
    for path in (folder / "evaluation.json", *sorted(folder.glob("evaluation*.samples.jsonl"))):
        if path.exists() and is_old(path):
            keep_old(path)
    for path in (folder / "completions", folder / "dump"):
        files = sorted(path.iterdir()) if path.is_dir() else []
        if any(map(is_old, files)):
            own, kept = [file.name for file in files if not is_old(file)], keep_old(path)
            path.mkdir()  # TRL has made that of the completions before training, and not again
            if kept is not None:
                for name in own:
                    (kept / name).rename(path / name)


class RunFiles(TrainerCallback):
    """Writes `resolved_config.yaml`, `plan.json`, `versions.json` and `hardware.json` when training begins.

    A new run in an old folder renames the old run's results (`keep_old_results`); a resumed one goes on with them.

    Attributes:
        plan: `BatchPlan.rows()` as a dictionary.
        settings: see `record_settings`; None: the trainer's arguments.
    """

    def __init__(self, plan: list[tuple[str, str]]):
        self.plan = dict(plan)
        self.settings: Mapping[str, Any] | None = None
        self._since = time.time()  # what this process writes before training belongs to the run

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        if state.global_step == 0:
            keep_old_results(folder, self._since)
        settings = args.to_dict() if self.settings is None else self.settings
        plain = masked(json.loads(json.dumps(settings, default=str)))
        write_text(folder / "resolved_config.yaml", yaml.safe_dump(plain, sort_keys=True))
        origin = {"command": command_line(), "num_processes": args.world_size}
        records = {
            "plan": self.plan,
            "versions": versions() | origin,
            "hardware": hardware(args.device, args.world_size),
        }
        for name, content in records.items():
            write_json(folder / f"{name}.json", content)

    def on_train_end(self, args, state, control, **kwargs):
        self._since = time.time()  # the same trainer may train once more


def record_settings(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Have `resolved_config.yaml` contain these settings, e.g. a script's with those of the model and the data."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RunFiles):
            callback.settings = settings


def recorded_settings(trainer: Trainer) -> Mapping[str, Any]:
    """What `record_settings` was given, else the trainer's arguments."""
    given = [x.settings for x in trainer.callback_handler.callbacks if isinstance(x, RunFiles) and x.settings]
    return given[0] if given else trainer.args.to_dict()


class MetricsFile(TrainerCallback):
    """Appends every log record to `metrics.jsonl` in the output folder, whatever `report_to` says.

    A record contains `step`, `time_s` (seconds since training began in this process) and the logged numbers; for NaN
    and infinities see `as_json`. A resumed run appends; a new run in an old folder renames the old file (`keep_old`).
    Evaluations before training belong to the run.
    """

    def __init__(self):
        self._started = time.perf_counter()
        self._is_training = False
        self._before = ""  # lines of evaluations before training

    def on_train_begin(self, args, state, control, **kwargs):
        self._started, self._is_training = time.perf_counter(), True
        path, before = Path(args.output_dir) / "metrics.jsonl", self._before
        self._before = ""
        if state.is_world_process_zero and state.global_step == 0 and path.exists() and path.read_text() != before:
            keep_old(path)
            if before:
                path.write_text(before)

    def on_log(self, args, state, control, logs: Logs | None = None, **kwargs):
        if not state.is_world_process_zero:
            return
        numbers = {name: x for name, x in (logs or {}).items() if x is None or isinstance(x, int | float)}
        elapsed = round(time.perf_counter() - self._started, 3)
        record = {"step": state.global_step, "time_s": elapsed, **as_json(numbers)}
        line = append_record(Path(args.output_dir) / "metrics.jsonl", record)
        if state.global_step == 0 and not self._is_training:
            self._before += line

    def on_train_end(self, args, state, control, **kwargs):
        self._is_training = False


class _LoggedWarnings(logging.Handler):
    """Passes a logger's warnings on to `record`."""

    def __init__(self, record: Callable[[str, str], None]):
        super().__init__(logging.WARNING)
        self.record = record

    def emit(self, record: logging.LogRecord) -> None:
        self.record(record.name, record.getMessage())
        if logging.lastResort is not None and not logging.root.handlers:
            logging.lastResort.handle(record)  # Python prints what no handler takes, and this handler has taken it


# Undoes what `WarningsFile` has changed for the run that is training. A run that fails never reaches on_train_end, and
# the next one must not record into its folder.
_RECORDING = ExitStack()


class WarningsFile(TrainerCallback):
    """Copies Python's warnings, and those of the `sapo_trl` loggers, to `warnings.jsonl` while a run trains.

    On the main process only. A Python warning is recorded as often as it is shown, by default once per place; those of
    deprecated names (`NOT_OF_THE_RUN`) are not recorded. A new run in an old folder renames the old file (`keep_old`).
    """

    NOT_OF_THE_RUN = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        if state.global_step == 0:
            keep_old(Path(args.output_dir) / "warnings.jsonl")
        _RECORDING.close()

        def record(source: str, text: str) -> None:
            record_warning(args.output_dir, state.global_step, source, text)

        logger, handler = logging.getLogger("sapo_trl"), _LoggedWarnings(record)
        logger.addHandler(handler)
        _RECORDING.callback(logger.removeHandler, handler)
        self._record_python_warnings(record)

    def _record_python_warnings(self, record: Callable[[str, str], None]) -> None:
        show = warnings.showwarning

        def show_and_record(message, category, filename, lineno, file=None, line=None):
            show(message, category, filename, lineno, file, line)
            if not issubclass(category, self.NOT_OF_THE_RUN):
                record(category.__name__, str(message))

        def restore() -> None:
            if warnings.showwarning is show_and_record:
                warnings.showwarning = show

        # Python documents that any callable may be assigned; the type stubs declare a function that may not be
        warnings.showwarning = show_and_record  # ty: ignore[invalid-assignment]
        _RECORDING.callback(restore)

    def on_train_end(self, args, state, control, **kwargs):
        _RECORDING.close()


class ReportFile(TrainerCallback):
    """Writes `report.html` into the output folder when training ends, also if the collapse guard has ended it."""

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
