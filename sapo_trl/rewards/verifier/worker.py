"""The processes in which answers are graded: a nursery that forks, and the workers that it forks.

The nursery imports sympy and math-verify once, warms them up, and then only waits: on request it forks a worker (some
milliseconds, memory shared) or ends one. It is started as a fresh interpreter, so neither CUDA nor the trainer's
threads are ever forked, and no training script is imported a second time. It goes when the trainer goes, however that
ended: its control socket closes, or its parent changes; and the kernel ends the workers with it.

Messages are lines of JSON, escaped to ASCII: lone surrogates and null bytes survive, and nothing is ever unpickled.
"""

import contextlib
import ctypes
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import warnings

from sapo_trl.rewards.grading.grader import grade
from sapo_trl.rewards.grading.policy import Grade, GraderOptions

PARENT_CHECK_S = 1.0
_PR_SET_PDEATHSIG = 1
# One of each kind, so that the parser's tables are built once, in the nursery, and not in every worker.
_WARM_UP = [
    (r"\frac{x+1}{2}-\sqrt{3}", r"\frac{x}{2}+\frac{1}{2}-\sqrt{3}"),
    (r"2^{10}\pi", r"1024\pi+0"),
    (r"\sin^2 x+\ln 2", r"1-\cos^2 x+\ln 2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&\frac{8}{2}\end{pmatrix}"),
    ("2x+3y=7", "7-3y=2x"),
    (r"\binom{5}{2}+3!", "4^2"),
    (r"(1,\sqrt{2})", r"(1, \sqrt{8}/2)"),
]


def grade_safely(text: str, gold: object, options: GraderOptions) -> tuple[Grade, bool]:
    """The grade, and whether this process is spent: after a failed allocation nothing in it can be trusted."""
    try:
        return grade(text, gold, options), False
    except MemoryError:
        return Grade("error"), True
    except Exception:  # whatever an answer makes sympy raise is an outcome of the answer, and it is counted
        return Grade("error"), False


def work(connection: socket.socket, memory_bytes: int) -> None:
    """Grades what comes over the connection until it closes, one line of result per answer, in order."""
    with connection, connection.makefile("rb") as jobs:
        for line in jobs:
            job = json.loads(line)
            options = GraderOptions(**job["options"])
            for text, gold in job["items"]:
                result, spent = grade_safely(text, gold, options)
                reply = [result.verdict, result.extracted, result.capped]
                connection.sendall(json.dumps(reply).encode() + b"\n")
                if spent or peak_memory_bytes() > memory_bytes // 2:
                    connection.sendall(b'"bye"\n')  # a fresh worker takes over before memory runs out
                    return


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far (macOS counts in bytes, Linux in KiB)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _become_worker(connection: socket.socket, memory_bytes: int) -> None:
    """The life of a forked worker. It never returns into the nursery's code."""
    try:
        _die_with_parent()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(ValueError, OSError):  # macOS refuses it; there the deadline is the only bound
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        work(connection, memory_bytes)
    except BaseException:  # the parent went, or memory is gone: there is nobody left to tell
        os._exit(1)
    os._exit(0)


def _die_with_parent() -> None:
    """Asks the kernel (Linux) to end this process when its parent ends: a busy worker cannot look for itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(control_fd: int, parent_pid: int, memory_bytes: int) -> None:
    """The nursery: says when it is ready, then forks and ends workers on request."""
    logging.disable(logging.CRITICAL)  # math-verify logs the text that it fails to parse
    warnings.simplefilter("ignore")
    children: set[int] = set()
    with socket.socket(fileno=control_fd) as control:
        control.sendall(json.dumps(_prepare()).encode() + b"\n")
        try:
            _serve_requests(control, parent_pid, memory_bytes, children)
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)


def _prepare() -> str:
    """Imports and warms up what every worker needs; "ready", or what is missing."""
    try:
        for gold, answer in _WARM_UP:
            grade(rf"\boxed{{{answer}}}", gold)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ready"


def _serve_requests(control: socket.socket, parent_pid: int, memory_bytes: int, children: set[int]) -> None:
    while os.getppid() == parent_pid:
        if not select.select([control], [], [], PARENT_CHECK_S)[0]:
            continue
        request, fds, _, _ = socket.recv_fds(control, 64, 1)
        if not request:
            return
        pid = int(request)
        if pid:
            _end(pid, children)
        else:
            pid = _fork(control, socket.socket(fileno=fds[0]), memory_bytes)
            children.add(pid)
        control.sendall(b"%d\n" % pid)


def _fork(control: socket.socket, connection: socket.socket, memory_bytes: int) -> int:
    pid = os.fork()
    if pid == 0:
        control.close()
        _become_worker(connection, memory_bytes)
    connection.close()
    return pid


def _end(pid: int, children: set[int]) -> None:
    """Kills and reaps. Only the nursery reaps, so a pid in `children` is never somebody else's."""
    if pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        children.discard(pid)
