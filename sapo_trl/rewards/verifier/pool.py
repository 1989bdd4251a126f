"""Grades batches of answers in killable processes, each answer under a deadline of processor time.

An answer that needs more than its processor seconds costs one worker, which the kernel ends (see `worker`), and is a
`timeout`; processor time does not pass while the machine is busy with something else. A worker that ends in any other
way was interrupted: its answer is graded again, once, before it counts as an `error`. One verifier per process.
"""

import atexit
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import IO, cast

from sapo_trl.rewards.grading.policy import DEFAULT_OPTIONS, Grade, GraderOptions
from sapo_trl.rewards.grading.texts import visible_part

DEADLINE_S = 2.0  # of processor time: a thousand times what a usual answer takes
CROWDED = 4  # a batch may take this many times the processor time that its answers may
MAX_CHARS = 65536  # about 16k tokens after the thought; the answer is at the end, so the end is what is kept
MAX_TRIES = 2  # of an answer whose worker was interrupted
CACHE_SIZE = 8192


@dataclass(frozen=True)
class VerifierOptions:
    """Size of the verifier.

    Args:
        workers: Processes; None is the cores of this machine, shared between its ranks, four at most.
        memory_mb: Address space of a worker (Linux).
        batch_s: Seconds for a batch, besides what its answers may take in proportion to their number.
    """

    workers: int | None = None
    memory_mb: int = 1024
    batch_s: float = 60.0

    def num_workers(self) -> int:
        if self.workers is not None:
            return max(1, self.workers)
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return max(1, min(4, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))


class _Worker:
    """A grading process; see `worker`."""

    def __init__(self, memory_mb: int):
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.lacking: list[str] | None = None  # limits that the system does not have, once the process is ready
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sapo_trl.rewards.verifier.worker", str(os.getpid()), str(memory_mb << 20)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,  # Ctrl-C is for the trainer, which then ends this one in order
            env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.replies = cast(IO[str], self.process.stdout)

    def ask(self, job: list, timeout_s: float) -> list | None:
        """The worker's reply; None if it ended, or took too long by the clock on the wall."""
        timer = threading.Timer(timeout_s, self.process.kill)
        timer.start()
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            if self.lacking is None:
                self.lacking = json.loads(self.replies.readline() or "null")
                if missing := ", ".join(self.lacking or ()):
                    warnings.warn(f"this system does not limit the verifier's workers by: {missing}", stacklevel=2)
            return None if self.lacking is None else json.loads(self.replies.readline() or "null")
        except (OSError, ValueError):
            return None
        finally:
            timer.cancel()

    def end(self) -> int:
        """Ends the process; its exit status, which is negative where a signal had ended it already."""
        self.process.kill()
        return self.process.wait()


class Verifier:
    """A pool of grading processes; see the module. `verify` is the only method that others need."""

    def __init__(self, options: VerifierOptions = VerifierOptions()):
        self.options = options
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple, Grade] = OrderedDict()
        self._workers: dict[int, _Worker] = {}  # of every thread
        self._end = 0.0  # of the batch; 0 once it was given up
        # A thread for each worker. The kernel ends a worker with its thread, so these stay as long as the verifier.
        self._threads = ThreadPoolExecutor(options.num_workers(), "verifier")

    def verify(
        self,
        texts: Sequence[str],
        golds: Sequence[object],
        options: GraderOptions | None = DEFAULT_OPTIONS,
        prefilled: list[bool] | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> list[Grade]:
        """One grade per text. Equal questions are graded once, also across calls. `deadline_s` is processor time.

        Without `options`, `golds` holds entries of reasoning-gym, whose own scorers grade.
        """
        thoughts = prefilled if prefilled is not None else [False] * len(texts)
        seen = [visible_part(text, thought) for text, thought in zip(texts, thoughts, strict=True)]
        digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in seen]
        keys = [(digest, _sendable(gold), options, deadline_s) for digest, gold in zip(digests, golds, strict=True)]
        sent = None if options is None else asdict(options)
        with self._lock:
            new = {key: row for row, key in enumerate(keys) if key not in self._cache}
            jobs = [[seen[row][-MAX_CHARS:], key[1], sent, deadline_s] for key, row in new.items()]
            fresh = dict(zip(new, self._run(jobs, deadline_s) if jobs else [], strict=True))
            grades = [fresh[key] if key in fresh else self._cache[key] for key in keys]
            self._cache |= {key: grade for key, grade in fresh.items() if grade.verdict not in ("timeout", "error")}
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        rows = zip(grades, seen, strict=True)
        return [replace(grade, capped=grade.capped or len(text) > MAX_CHARS) for grade, text in rows]

    def close(self) -> None:
        """Ends all processes. A later `verify` starts new ones."""
        self._end = 0.0
        while self._workers:
            self._workers.popitem()[1].end()

    def _run(self, jobs: list[list], deadline_s: float) -> list[Grade]:
        allowed = CROWDED * deadline_s * len(jobs) / self.options.num_workers()
        self._end = time.monotonic() + self.options.batch_s + allowed
        try:
            return list(self._threads.map(self._grade, jobs))
        except BaseException:  # an interrupt: no worker may carry an unfinished job into the next batch
            self.close()
            raise

    def _grade(self, job: list) -> Grade:
        """One grade, whatever happens to the worker of this thread."""
        thread = threading.get_ident()
        for _ in range(MAX_TRIES):
            if time.monotonic() > self._end:
                return Grade("timeout")
            worker = self._workers[thread] = self._workers.get(thread) or _Worker(self.options.memory_mb)
            reply = worker.ask(job, self._end - time.monotonic())
            if reply is not None:
                verdict, extracted, capped, score, spent = reply
                if spent:
                    self._workers.pop(thread).end()
                extracted = extracted.encode("utf-8", "replace").decode()  # printable everywhere
                return Grade(verdict, extracted, capped, score)
            self._workers.pop(thread, None)
            if worker.end() in (-signal.SIGPROF, -signal.SIGXCPU):
                return Grade("timeout")
        if worker.lacking is None:
            raise RuntimeError(
                "The verifier's process does not start. It needs mpmath and a POSIX system (Linux or macOS). Try "
                "`python -c 'import sapo_trl.rewards.verifier.worker'`, or train with another reward function."
            )
        return Grade("timeout" if time.monotonic() > self._end else "error")


def _sendable(gold: object) -> object:
    """The reference answer as JSON can carry it and a key can hold it; what is none of these is unusable anyway."""
    if isinstance(gold, (list, tuple)):
        return tuple(map(_sendable, gold))
    return None if isinstance(gold, bool) or not isinstance(gold, (str, Real)) else str(gold)


_verifier: Verifier | None = None
_verifier_lock = threading.Lock()


def configure_verifier(options: VerifierOptions | None = None) -> Verifier:
    """The verifier of this process, made at the first call; with options, one that has them in place of another."""
    global _verifier
    with _verifier_lock:
        if _verifier is None or (options is not None and options != _verifier.options):
            _close_at_exit()
            _verifier = Verifier(options or VerifierOptions())
        return _verifier


def _forget_in_child() -> None:
    """A forked child of the trainer has no part in its parent's verifier: it makes its own when it needs one."""
    global _verifier, _verifier_lock
    _verifier, _verifier_lock = None, threading.Lock()


@atexit.register
def _close_at_exit() -> None:
    if _verifier is not None:
        _verifier.close()


os.register_at_fork(after_in_child=_forget_in_child)
