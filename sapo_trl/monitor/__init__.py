"""Monitoring of a run: live view, files, histograms for trackers, and the collapse guard."""

from __future__ import annotations

from typing import Any, Protocol

from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from sapo_trl.batch_plan import BatchPlan
from sapo_trl.monitor.files import MetricsFile, ReportFile, RunFiles, WarningsFile, record_settings
from sapo_trl.monitor.guard import collapse_alarms
from sapo_trl.monitor.progress import Progress
from sapo_trl.monitor.trackers import Histograms, TrackerHistograms

__all__ = ["Monitored", "ReportFile", "attach", "collapse_alarms", "record_settings"]


class Monitored(Protocol):
    """The parts of a `SAPOTrainer` that `attach` needs."""

    args: Any
    plan: BatchPlan
    callback_handler: CallbackHandler

    def histograms(self) -> Histograms: ...


def attach(trainer: Monitored, report: bool = False) -> None:
    """Have a run write its files, show its progress and send histograms to its trackers; calling it twice is harmless.

    Args:
        report: write `report.html` when training ends.
    """
    handler = trainer.callback_handler
    present = {type(callback) for callback in handler.callbacks}
    if MetricsFile not in present:
        _replace_progress(handler, trainer.args.disable_tqdm)
        # trainer.histograms is looked up at every call: a test or a user may put another one there
        trackers = TrackerHistograms(lambda: trainer.histograms(), handler)
        for callback in (RunFiles(trainer.plan.rows()), MetricsFile(), WarningsFile(), trackers):
            handler.add_callback(callback)
    if report and ReportFile not in present:
        handler.add_callback(ReportFile())


def _replace_progress(handler: CallbackHandler, disable_tqdm: bool) -> None:
    """Replace the display that transformers added by `Progress`, unless the user has a display of their own.

    transformers adds its display after the user's callbacks. In a notebook that is a table, which stays.
    """
    usual = PrinterCallback if disable_tqdm else ProgressCallback
    displays = [callback for callback in handler.callbacks if type(callback) is usual]
    if displays:
        handler.callbacks.remove(displays[-1])
        if not any(isinstance(x, ProgressCallback | PrinterCallback | Progress) for x in handler.callbacks):
            handler.add_callback(Progress())
