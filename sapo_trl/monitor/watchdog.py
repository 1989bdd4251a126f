"""The hang watchdog: a limit for every phase of a run, and the stacks of all threads of all processes past it."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

HUNG = 5  # exit status
# How often a process looks whether another one hangs, and how long it waits for the others' stacks before it ends.
POLL_S = 2.0
# A library that holds the interpreter lock keeps this thread from running; C code prints the stacks, so much later.
GRACE_S = 30.0


class Watchdog:
    """Watches the phases of one process; `phase` is the only thing to call.

    Past a limit the phase, the step and the stacks of all threads are printed and written to
    `hang_process_<i>.txt` in the run's folder. Every process that sees such a file adds its own stacks. Then the run
    ends with status `HUNG`, or goes on if `stops` is False.

    Args:
        limits: phase -> seconds; 0 turns one off.
        folder: the run's folder, shared between processes.
    """

    def __init__(self, limits: dict[str, float], stops: bool, folder: Path, process: int):
        self.limits, self.stops, self.folder, self.process = limits, stops, folder, process
        self._phases: list[tuple[str, int, float]] = []  # name, step, deadline; the innermost last
        self._reported: set[Path] = set()
        self._thread: threading.Thread | None = None

    @contextmanager
    def phase(self, name: str, step: int) -> Generator[None]:
        """Inside, the phase's limit counts; phases may lie in each other."""
        limit = self.limits.get(name, 0.0)
        if not limit:
            yield
            return
        self._start()
        self._phases.append((name, step, time.monotonic() + limit))
        if sys.__stderr__ is not None:  # not sys.stderr, which in a notebook has no file descriptor
            faulthandler.dump_traceback_later(limit + GRACE_S, exit=self.stops, file=sys.__stderr__)
        try:
            yield
        finally:
            self._phases.pop()
            faulthandler.cancel_dump_traceback_later()

    def _start(self) -> None:
        if self._thread is None:
            for path in self.folder.glob("hang_process_*.txt"):  # of an earlier run
                self._reported.add(path)
            self._thread = threading.Thread(target=self._watch, name="hang watchdog", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while True:
            time.sleep(POLL_S / 4)
            late = [(name, step) for name, step, deadline in list(self._phases) if time.monotonic() > deadline]
            others = set(self.folder.glob("hang_process_*.txt")) - self._reported - {self._path}
            if late or (others and self._phases):
                self._report(*(late[-1] if late else self._phases[-1][:2]), is_own=bool(late))
                self._reported |= others
                if self.stops:
                    time.sleep(2 * POLL_S)  # the other processes write theirs
                    os._exit(HUNG)
                self._phases[:] = [(name, step, float("inf")) for name, step, _ in self._phases]

    @property
    def _path(self) -> Path:
        return self.folder / f"hang_process_{self.process}.txt"

    def _report(self, phase: str, step: int, is_own: bool) -> None:
        limit = self.limits[phase]
        what = (
            f"hangs: phase {phase!r} of step {step} has passed its limit of {limit:g} s"
            if is_own
            else (f"is in phase {phase!r} of step {step} while another process hangs")
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("w") as file:
            for stream in filter(None, (sys.__stderr__, file)):
                print(f"process {self.process} {what}. Stacks of its threads:", file=stream, flush=True)
                faulthandler.dump_traceback(stream, all_threads=True)
