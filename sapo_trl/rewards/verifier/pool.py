"""Grades batches of answers in killable processes, each answer under a deadline.

math-verify stops itself by SIGALRM, which works in the main thread only and cannot interrupt big-integer arithmetic.
Here the parent kills: an answer that runs past its deadline costs one worker, which is replaced in milliseconds (see
`worker`), and is a `timeout`; one that crashes or exhausts its worker is an `error`. The rest of the worker's answers
are graded by its successor. A worker that is slow on one answer is paused and leaves its seat to another one: quick
answers come first, and the slow ones get the machine, and their whole deadline, when those are through.

One verifier per training process, started at the first use and ended with the process. Any thread may call it.
"""

import atexit
import contextlib
import hashlib
import importlib.util
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from dataclasses import asdict, dataclass, field

from sapo_trl.rewards.grading.policy import DEFAULT_OPTIONS, VERDICTS, Grade, GraderOptions
from sapo_trl.rewards.grading.texts import visible_part

DEADLINE_S = 2.0  # a thousand times what a usual answer takes
BATCH_S = 60.0
MAX_CHARS = 65536  # about 16k tokens after the thought; the answer is at the end, so the end is what is kept
MAX_CHUNK = 8  # answers per message: fewer cost messages, more wait behind a slow one
SLOW_S = 0.25
POLL_S = 0.02
CROWD = 3  # processes per seat at most, the slow ones counted: six endless answers on two seats end together
START_S = 120.0  # importing sympy from a cold network disk
SEND_S = 10.0
CACHE_SIZE = 8192
STARVED_SHARE = 0.02  # of a core: a worker that got less was waiting for the machine, not lost in its answer ...
STARVED_FACTOR = 2  # ... and gets up to this many deadlines

# Runs in a fresh interpreter. The two packages are entered by path, without their __init__: a grading process needs
# neither torch nor transformers, whatever the package imports at its top.
_BOOT = """
import json, sys, types
start = json.loads(sys.argv[1])
sys.path[:] = start["path"]
for name, folder in start["packages"]:
    package = types.ModuleType(name)
    package.__path__ = [folder]
    sys.modules[name] = package
from sapo_trl.rewards.verifier import worker
worker.serve(start["fd"], start["parent"], start["memory_bytes"])
"""


@dataclass(frozen=True)
class VerifierOptions:
    """Size of the verifier. `workers` is None: the cores of this machine, shared between its ranks, four at most."""

    workers: int | None = None
    memory_mb: int = 1024
    batch_s: float = BATCH_S

    def num_workers(self) -> int:
        if self.workers is not None:
            return max(1, self.workers)
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return max(1, min(4, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))


@dataclass(eq=False)
class _Worker:
    """A worker as the parent sees it. `todo` holds what it was sent and has not answered, oldest first."""

    pid: int
    connection: socket.socket
    unread: bytes = b""
    todo: deque = field(default_factory=deque)
    since: float = 0.0
    slow: bool = False
    paused: bool = False
    cpu_s: float = 0.0  # its processor time when it was resumed


class Verifier:
    """A pool of grading processes; see the module. `verify` is the only method that others need."""

    def __init__(self, options: VerifierOptions = VerifierOptions()):
        self.options = options
        self._size = options.num_workers()
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple, Grade] = OrderedDict()
        self._workers: list[_Worker] = []
        self._nursery: subprocess.Popen | None = None
        self._control: socket.socket | None = None
        self._selector = selectors.DefaultSelector()

    def verify(
        self,
        texts: list[str],
        golds: list[object],
        options: GraderOptions = DEFAULT_OPTIONS,
        prefilled: list[bool] | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> list[Grade]:
        """One grade per text. Equal questions are graded once, also across calls."""
        thoughts = prefilled if prefilled is not None else [False] * len(texts)
        seen = [visible_part(text, thought) for text, thought in zip(texts, thoughts, strict=True)]
        keys = [(_digest(text), _sendable(gold), options, deadline_s) for text, gold in zip(seen, golds, strict=True)]
        with self._lock:
            new = {key: row for row, key in enumerate(keys) if key not in self._cache}
            items = [(seen[row][-MAX_CHARS:], key[1]) for key, row in new.items()]
            fresh = dict(zip(new, self._run(items, options, deadline_s) if items else [], strict=True))
            grades = [fresh[key] if key in fresh else self._cache[key] for key in keys]
            self._remember(fresh)
        return [
            Grade(grade.verdict, grade.extracted, grade.capped or len(text) > MAX_CHARS)
            for grade, text in zip(grades, seen, strict=True)
        ]

    def close(self) -> None:
        """Ends all processes. A later `verify` starts new ones."""
        with self._lock:
            self._abandon()

    def _remember(self, fresh: dict[tuple, Grade]) -> None:
        """Keeps verdicts, but not those that a busy machine may have caused."""
        self._cache.update({key: grade for key, grade in fresh.items() if grade.verdict not in ("timeout", "error")})
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)

    def _run(self, items: list[tuple], options: GraderOptions, deadline_s: float) -> list[Grade]:
        """Grades every item, whatever happens to the workers."""
        grades: list[Grade | None] = [None] * len(items)
        waiting = deque(range(len(items)))
        end = time.monotonic() + self.options.batch_s
        try:
            while None in grades:
                if not waiting and not self._busy():  # the nursery was lost, and the workers' answers with it
                    waiting.extend(row for row, grade in enumerate(grades) if grade is None)
                self._hand_out(items, waiting, options)
                self._collect(grades, waiting, deadline_s)
                self._end_overdue(grades, waiting, deadline_s)
                if time.monotonic() > end:
                    break
        finally:  # also on an interrupt: no worker may carry an unfinished job into the next batch
            for worker in self._busy():
                self._dismiss(worker)
        return [grade if grade is not None else Grade("timeout") for grade in grades]

    def _hand_out(self, items: list[tuple], waiting: deque, options: GraderOptions) -> None:
        """Sends work to idle workers, and starts workers while there is work and a seat."""
        while waiting:
            idle = next((worker for worker in self._workers if not worker.todo), None)
            if idle is None:
                seated = sum(not worker.slow for worker in self._workers)
                if seated >= self._size or len(self._workers) >= CROWD * self._size:
                    return
                idle = self._start_worker()
            chunk_size = max(1, min(MAX_CHUNK, len(waiting) // (2 * self._size)))
            chunk = [waiting.popleft() for _ in range(min(chunk_size, len(waiting)))]
            job = {"items": [items[row] for row in chunk], "options": asdict(options)}
            idle.todo.extend(chunk)
            idle.since = time.monotonic()
            try:
                idle.connection.sendall(json.dumps(job).encode() + b"\n")
            except OSError:  # it died while idle, which no answer is to blame for
                waiting.extendleft(reversed(idle.todo))
                self._dismiss(idle)
                return

    def _collect(self, grades: list, waiting: deque, deadline_s: float) -> None:
        """Waits for replies, at most until the next worker becomes slow or overdue, and reads them."""
        now = time.monotonic()
        running = [worker for worker in self._busy() if not worker.paused]
        limits = [worker.since + (deadline_s if worker.slow else min(SLOW_S, deadline_s)) for worker in running]
        for key, _ in self._selector.select(max(POLL_S, min(limits, default=now) - now)):
            worker = key.data
            if worker not in self._workers:
                continue
            try:
                data = worker.connection.recv(1 << 16)
            except OSError:
                data = b""
            if worker.paused:
                _send_signal(worker.pid, signal.SIGCONT)  # it had answered just when it was stopped
            worker.since, worker.slow, worker.paused = time.monotonic(), False, False
            *lines, worker.unread = (worker.unread + data).split(b"\n")
            retired = b'"bye"' in lines
            for line in lines[: -1 if retired else None]:
                grades[worker.todo.popleft()] = _read_reply(line)
            if retired or not data:
                if worker.todo and not retired:
                    grades[worker.todo.popleft()] = Grade("error")
                waiting.extendleft(reversed(worker.todo))
                self._dismiss(worker)

    def _end_overdue(self, grades: list, waiting: deque, deadline_s: float) -> None:
        """Kills workers past the deadline; the answer they were at is to blame, the ones behind it go on."""
        now = time.monotonic()
        if all(worker.paused for worker in self._busy()):
            self._resume(now)
        for worker in [worker for worker in self._busy() if not worker.paused]:
            if now - worker.since >= deadline_s and not self._is_starved(worker, now, deadline_s):
                grades[worker.todo.popleft()] = Grade("timeout")
                waiting.extendleft(reversed(worker.todo))
                self._dismiss(worker)
            elif now - worker.since >= SLOW_S and not worker.slow:
                worker.slow = worker.paused = True
                _send_signal(worker.pid, signal.SIGSTOP)

    def _resume(self, now: float) -> None:
        """Lets the slow answers go on, each with a whole deadline: the quick ones are through."""
        for worker in self._busy():
            worker.paused, worker.since, worker.cpu_s = False, now, _cpu_seconds(worker.pid)
            _send_signal(worker.pid, signal.SIGCONT)

    @staticmethod
    def _is_starved(worker: _Worker, now: float, deadline_s: float) -> bool:
        """Whether an overdue worker hardly ran: on a crowded machine that is no verdict on its answer."""
        if not worker.slow or now - worker.since >= STARVED_FACTOR * deadline_s:
            return False
        return _cpu_seconds(worker.pid) - worker.cpu_s < STARVED_SHARE * (now - worker.since)

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.todo]

    def _start_worker(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            pid = self._ask_nursery(b"0", [theirs.fileno()])
        ours.settimeout(SEND_S)
        worker = _Worker(pid, ours)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _dismiss(self, worker: _Worker) -> None:
        if worker not in self._workers:  # the nursery was lost meanwhile, and everything with it
            return
        self._workers.remove(worker)
        self._selector.unregister(worker.connection)
        worker.connection.close()
        worker.todo.clear()
        if self._control is not None:
            try:
                self._ask_nursery(b"%d" % worker.pid, [])
            except OSError:
                self._abandon()

    def _ask_nursery(self, request: bytes, fds: list[int]) -> int:
        """One request, one number in reply. A nursery that was killed is started again, once."""
        if self._control is None:
            self._start_nursery()
        try:
            socket.send_fds(self._control, [request], fds)
            return int(_read_line(self._control))
        except OSError:
            self._abandon()
            if request != b"0":
                return 0
            self._start_nursery()
            socket.send_fds(self._control, [request], fds)
            return int(_read_line(self._control))

    def _start_nursery(self) -> None:
        if os.name != "posix" or importlib.util.find_spec("math_verify") is None:
            raise RuntimeError(
                "The verifier needs math-verify and a POSIX system (Linux or macOS): its processes are forked and "
                "killed. Install it with `pip install math-verify`, or train with another reward function."
            )
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_S)
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of sapo_trl.rewards
        start = {
            "path": [entry or os.getcwd() for entry in sys.path],
            "packages": [["sapo_trl", os.path.dirname(here)], ["sapo_trl.rewards", here]],
            "fd": theirs.fileno(),
            "parent": os.getpid(),
            "memory_bytes": self.options.memory_mb << 20,
        }
        with theirs:
            self._nursery = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(start)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the trainer, which then ends this one in order
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            )
        try:
            answer = json.loads(_read_line(self._control))
        except OSError as error:
            answer = f"no answer ({type(error).__name__})"
        if answer != "ready":
            self._abandon()
            raise RuntimeError(
                f"The verifier's process did not start: {answer}. Check that `import math_verify` works."
            )

    def _abandon(self) -> None:
        """Lets go of everything at once: the nursery sees its socket close, ends its workers and itself."""
        for worker in self._workers:
            self._selector.unregister(worker.connection)
            worker.connection.close()
            worker.todo.clear()
        self._workers.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._nursery is not None:
            try:
                self._nursery.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._nursery.kill()
                self._nursery.wait()
            self._nursery = None


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _sendable(gold: object) -> str | int | float | None:
    """The gold as JSON can carry it and a key can hold it; what is none of these is unusable anyway."""
    if isinstance(gold, (list, tuple)) and len(gold) == 1:
        gold = gold[0]
    return gold if isinstance(gold, (str, int, float)) and not isinstance(gold, bool) else None


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        data = connection.recv(4096)
        if not data:
            raise ConnectionError("the verifier's process is gone")
        line += data
    return line


def _read_reply(line: bytes) -> Grade:
    """A reply of a worker; anything but the expected kind of message counts as the failure of that answer."""
    try:
        verdict, extracted, capped = json.loads(line)
    except ValueError:
        return Grade("error")
    if verdict not in VERDICTS:
        return Grade("error")
    printable = str(extracted).encode("utf-8", "replace").decode()  # a lone surrogate would break tables and logs
    return Grade(verdict, printable, bool(capped))


def _send_signal(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):  # it may have ended in this very moment
        os.kill(pid, number)


def _cpu_seconds(pid: int) -> float:
    """Processor time of a process (Linux); elsewhere infinite, so that nobody counts as starved."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()  # behind the name, which may hold spaces
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


_verifier: Verifier | None = None
_verifier_lock = threading.Lock()


def get_verifier() -> Verifier:
    """The verifier of this process, made at the first call."""
    return configure_verifier(None)


def configure_verifier(options: VerifierOptions | None) -> Verifier:
    """Makes the verifier of this process with these options, ending one that has others."""
    global _verifier
    with _verifier_lock:
        if _verifier is None or (options is not None and options != _verifier.options):
            if _verifier is not None:
                _verifier.close()
            _verifier = Verifier(options or VerifierOptions())
        return _verifier


def _forget_in_child() -> None:
    """A forked child of the trainer has no part in its parent's verifier: it makes its own when it needs one."""
    global _verifier, _verifier_lock
    _verifier, _verifier_lock = None, threading.Lock()


def _close_at_exit() -> None:
    if _verifier is not None:
        _verifier.close()


atexit.register(_close_at_exit)
os.register_at_fork(after_in_child=_forget_in_child)
