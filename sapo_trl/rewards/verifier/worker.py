"""A grading process without CUDA, torch or the training script: it answers one line of JSON with one.

The kernel ends it: past the processor time of an answer (SIGPROF, which no arithmetic can put off), and with the thread
of the trainer that started it; `limits` has what else it may not do. Nothing is ever unpickled; ASCII lines keep lone
surrogates and null bytes.
"""

import ctypes
import json
import os
import signal
import sys

from sapo_trl.rewards.grading.grader import grade
from sapo_trl.rewards.grading.policy import Grade, GraderOptions
from sapo_trl.rewards.gym import score
from sapo_trl.rewards.verifier.limits import allow_seconds, refuse_changes, restrict


def grade_safely(text: str, gold: object, options: dict | None) -> tuple[Grade, bool]:
    """The grade, and whether this process is spent: after a failed allocation nothing in it can be trusted.

    Without options `gold` is an entry of reasoning-gym.
    """
    try:
        return score(text, str(gold)) if options is None else grade(text, gold, GraderOptions(**options)), False
    except Exception as error:  # whatever an answer makes the arithmetic raise is an outcome of it, and counted
        return Grade("error"), isinstance(error, MemoryError)


def serve(parent_pid: int, memory_bytes: int) -> None:
    """Says that it is ready, by the limits that it lacks, then grades what comes in until there is no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    lacking = restrict(memory_bytes)
    sys.addaudithook(refuse_changes)
    grade(r"\boxed{\sqrt{2}\pi}", r"\frac{2\pi}{\sqrt{2}}")  # imports and warms up what every answer needs
    # null: the trainer went before the kernel was told
    print(json.dumps(lacking if os.getppid() == parent_pid else None), flush=True)
    for line in sys.stdin:
        text, gold, options, deadline_s = json.loads(line)
        allow_seconds(deadline_s)
        signal.setitimer(signal.ITIMER_PROF, deadline_s)
        result, spent = grade_safely(text, gold, options)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps([result.verdict, result.extracted, result.capped, result.score, spent]), flush=True)


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
