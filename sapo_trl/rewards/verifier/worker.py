"""A grading process: a fresh interpreter without CUDA, torch or the training script, which answers one line with one.

The kernel ends it: past the processor time of an answer (SIGPROF, which no arithmetic can put off), and with the
thread of the trainer that started it. Nothing is ever unpickled; ASCII lines keep lone surrogates and null bytes.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import sys

from sapo_trl.rewards.grading.grader import grade
from sapo_trl.rewards.grading.policy import Grade, GraderOptions

_PR_SET_PDEATHSIG = 1


def grade_safely(text: str, gold: object, options: dict) -> tuple[Grade, bool]:
    """The grade, and whether this process is spent: after a failed allocation nothing in it can be trusted."""
    try:
        return grade(text, gold, GraderOptions(**options)), False
    except MemoryError:
        return Grade("error"), True
    except Exception:  # whatever an answer makes the arithmetic raise is an outcome of the answer, and it is counted
        return Grade("error"), False


def serve(connection_fd: int, parent_pid: int, memory_bytes: int) -> None:
    """Says "ready", then grades what comes over the connection until it closes."""
    if sys.platform == "linux":  # macOS refuses the limit; there the deadline is the only bound
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=connection_fd) as connection, connection.makefile("rb") as jobs:
        grade(r"\boxed{\sqrt{2}\pi}", r"\frac{2\pi}{\sqrt{2}}")  # imports and warms up what every answer needs
        if os.getppid() == parent_pid:  # else it went before the kernel was told
            connection.sendall(b'"ready"\n')
        for line in jobs:
            text, gold, options, deadline_s = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, deadline_s)
            result, spent = grade_safely(text, gold, options)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(json.dumps([result.verdict, result.extracted, result.capped, spent]).encode() + b"\n")
