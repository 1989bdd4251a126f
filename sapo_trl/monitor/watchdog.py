"""The hang watchdog: a limit for every phase of a run, and the stacks of all threads of all processes past it.

And the sentence with which a process ends whose peer has died (`peers_named`).
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import DistError

from sapo_trl.files import way_back

HUNG = 5  # exit status
# How often a process looks whether another one hangs, and how long it waits for the others' stacks before it ends.
POLL_S = 0.5
OTHERS_S = 4.0
# A library that holds the interpreter lock keeps this thread from running; C code prints the stacks, so much later.
GRACE_S = 30.0
# What gloo says in a plain RuntimeError; NCCL's errors have a class of their own
PEER_GONE = ("gloo", "closed by peer", "reset by peer", "Broken pipe")


class PeerError(RuntimeError):
    """Another process of the run has ended."""


@contextmanager
def peers_named(process: int, processes: int, folder: Path) -> Generator[None]:
    """Inside, a collective that fails because another process is gone says so, and what to do.

    Raises:
        PeerError: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        gone = isinstance(error, DistError) or any(text in str(error) for text in PEER_GONE)
        if processes == 1 or not gone:
            raise
        raise PeerError(
            f"process {process} lost its connection to another of the {processes} processes of this run, which ended "
            f"first: what that one printed last says why. {way_back(folder)} ({error})"
        ) from error


@dataclass
class _Phase:
    name: str
    step: int
    deadline: float


class Watchdog:
    """Watches the phases of one process; `phase` says where it is, `close` when it is done.

    Past a limit the phase, the step and the stacks of all threads are printed and written to
    `hang_process_<i>.txt` in the run's folder. Every other process that sees such a file prints its own stacks and
    writes them to `hang_other_<i>.txt`. Then the run ends with status `HUNG`, or goes on if `stops` is False.

    Args:
        limits: phase -> seconds; 0 turns one off.
        folder: the run's folder, shared between processes.
    """

    def __init__(self, limits: dict[str, float], stops: bool, folder: Path, process: int):
        self.limits, self.stops, self.folder, self.process = limits, stops, folder, process
        self._phases: list[_Phase] = []  # the innermost last
        self._seen: set[tuple[Path, int]] = set()  # reports and when they were written
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    @contextmanager
    def phase(self, name: str, step: int) -> Generator[None]:
        """Inside, the phase's limit counts; phases may lie in each other."""
        limit = self.limits.get(name, 0.0)
        if not limit:
            yield
            return
        if self._thread is None:
            self._seen = self._reports()  # those of an earlier run
            self._closed.clear()
            self._thread = threading.Thread(target=self._watch, name="hang watchdog", daemon=True)
            self._thread.start()
        self._phases.append(_Phase(name, step, time.monotonic() + limit))
        self._arm()
        try:
            yield
        finally:
            self._phases.pop()
            self._arm()

    def close(self) -> None:
        """End the thread, until the next phase."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _arm(self) -> None:
        """Have C code print the stacks when the innermost phase is much too late."""
        faulthandler.cancel_dump_traceback_later()
        if self._phases and sys.__stderr__ is not None:  # not sys.stderr, which in a notebook has no file descriptor
            seconds = self._phases[-1].deadline - time.monotonic() + GRACE_S
            if 0 < seconds < math.inf:
                faulthandler.dump_traceback_later(seconds, exit=self.stops, file=sys.__stderr__)

    def _reports(self) -> set[tuple[Path, int]]:
        found = set()
        try:
            for path in self.folder.glob("hang_process_*.txt"):
                found.add((path, path.stat().st_mtime_ns))
        except OSError:  # the file, or the whole folder, was deleted in between: this thread watches on
            pass
        return found

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            phases = list(self._phases)
            late = [phase for phase in phases if time.monotonic() > phase.deadline]
            own = self.folder / f"hang_process_{self.process}.txt"
            others = {(path, at) for path, at in self._reports() - self._seen if path != own}
            if not late and not others:
                continue
            self._report(late[-1] if late else None, phases)
            self._seen |= others
            if self.stops:
                # what was printed before must not be lost, nor may a print that hangs keep the process alive
                threading.Thread(target=sys.stdout.flush, daemon=True).start()
                # the others end before the one that hangs, or their collectives would fail on its closed connection
                time.sleep(OTHERS_S if late else OTHERS_S / 8)
                os._exit(HUNG)
            for phase in phases:
                phase.deadline = math.inf

    def _report(self, late: _Phase | None, phases: list[_Phase]) -> None:
        if late is not None:
            what = (
                f"hangs: phase {late.name!r} of step {late.step} has passed its limit of {self.limits[late.name]:g} s"
            )
        else:
            where = f"in phase {phases[-1].name!r} of step {phases[-1].step}" if phases else "between two phases"
            what = f"is {where} while another process hangs"
        self.folder.mkdir(parents=True, exist_ok=True)
        kind = "other" if late is None else "process"
        with (self.folder / f"hang_{kind}_{self.process}.txt").open("w") as file:
            for stream in filter(None, (sys.__stderr__, file)):
                print(f"process {self.process} {what}. Stacks of its threads:", file=stream, flush=True)
                faulthandler.dump_traceback(stream, all_threads=True)
