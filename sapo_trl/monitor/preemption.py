"""Signals: a run that is asked to end finishes its optimizer step, saves, and says how to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption(TrainerCallback):
    """SIGTERM, SIGUSR1 and the first Ctrl-C end training after the optimizer step that is running, with a checkpoint.

    A second signal ends the process at once, with status 128 + its number. A request of any process counts for all: the
    trainer takes `is_requested` into the reduction of each step's metrics and sets `is_agreed`.

    Attributes:
        is_requested: this process got a signal.
        is_agreed: some process did, and all know.
        stopped_at: the step after which the run ended before its last one, or None.
    """

    def __init__(self):
        self.is_requested = self.is_agreed = False
        self.stopped_at: int | None = None

    @contextmanager
    def installed(self) -> Generator[None]:
        """Inside, the signals are handled here; only in the main thread, as Python allows handlers nowhere else."""
        self.is_requested = self.is_agreed = False
        self.stopped_at = None
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._handle) for number in SIGNALS} if is_main else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_agreed and state.global_step < state.max_steps:  # else the run is at its end anyway
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            os._exit(128 + number)
        self.is_requested = True
        name = signal.Signals(number).name
        # os.write and not print: a handler may interrupt a print
        os.write(2, f"{name}: the optimizer step is finished and saved first; once more ends at once\n".encode())
