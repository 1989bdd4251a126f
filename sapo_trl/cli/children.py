"""Processes that end with the command that started them: Ctrl-C and SIGTERM reach whatever they have started too."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from threading import RLock
from typing import Any


class Children:
    """Runs commands from any thread; as a context of the main thread, SIGINT and SIGTERM end all that runs.

    Each child leads a process group of its own: `accelerate launch` passes no SIGTERM on to what it has launched. A
    signal kills the groups, for nothing of an unfinished run is kept, and raises KeyboardInterrupt.

    Attributes:
        signal: the one that has come, or 0. No other child begins after it.
    """

    def __init__(self):
        self.running: set[subprocess.Popen] = set()
        self.signal, self._lock, self._handlers = 0, RLock(), {}

    def __enter__(self) -> Children:
        self._handlers = {number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, words: Sequence[str], **options: Any) -> int:
        """Start a command and wait for it; its exit status."""
        with self._lock:
            if self.signal:
                return 128 + self.signal
            process = subprocess.Popen(words, start_new_session=True, **options)
            self.running.add(process)
        status = process.wait()
        with self._lock:
            self.running.discard(process)
        return status

    def _end(self, number: int, _: object) -> None:
        with self._lock:
            self.signal = number
            for process in self.running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        raise KeyboardInterrupt
