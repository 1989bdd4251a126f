"""Answers made to hang, crash or blow up a verifier: nothing escapes, and time and memory are bounded."""

import io
import re
import sys
import threading
import time

import psutil
import pytest

from sapo_trl.rewards import REWARDS, VERDICTS, AccuracyReward, VerifierOptions
from sapo_trl.rewards.verifier import limits
from sapo_trl.rewards.verifier.pool import Verifier, _Worker

DEADLINE_S = 0.4  # what is tested is that it holds; training uses 2 s
MEMORY_MB = 768


def _nested(opening: str, middle: str, closing: str, levels: int) -> str:
    return opening * levels + middle + closing * levels


def _rows(environment: str, *rows: str) -> str:
    return rf"\begin{{{environment}}}" + r"\\".join(rows) + rf"\end{{{environment}}}"


HOSTILE_BOXES: list[str] = [  # what goes into a box
    *(f"{b}^{{{b}^{{{b}^{{{b}^{{{b}}}}}}}}}" for b in (2, 5, 9, 99)), r"5^{5^{5^{5^5}}-4}", "10^{10^{10}}",
    "9^{9^{9}}-9^{9^{9}}", "2^{2^{40}}", r"(2^{2^{30}}) \bmod 7", "x^{x^{x^{x^{x}}}}", "99999^{99999^{9}}",
    r"(1+10^{-9})^{10^{12}}", "0.5^{10^{9}}", r"\sqrt{10^{10^{8}}}",
    *("3" + "!" * n for n in (3, 10, 300)), "(10^9)!", "100000!", r"\frac{(10^7)!}{(10^7-1)!}", "((20!)!)!",
    *(rf"\binom{{{n}}}{{{n // 2}}}" for n in (20000, 2000000, 10**9)),
    *(rf"\{f}({7**3000}, {3**4000})" for f in ("gcd", "operatorname{lcm}")), r"\gcd(10^{10^7}, 7^{10^7})",
    *(_nested(r"\frac{1}{1+", "x", "}", n) for n in (10, 24, 60, 150)),
    *(_nested(r"\frac{", "1}{2", "}{3}", n) for n in (24, 60)),
    *(_nested(r"\sqrt{1+", "x", "}", n) for n in (12, 40, 120)), *(_nested("(", "x+1", ")^2", n) for n in (6, 12, 30)),
    *(_rows("pmatrix", *["&".join(["x+1"] * n)] * n) for n in (6, 12)), _rows("pmatrix", "1&2", "3&4") + "^{10^{9}}",
    _rows("pmatrix", "&" * 400),
    r"\det" + _rows("pmatrix", *("&".join(f"a_{{{i}{j}}}" for j in range(9)) for i in range(9))),
    *(r"\cup".join(f"({i},{i + 1})" for i in range(n)) for n in (20, 100)),
    *(r"\{" + ",".join(map(str, range(n))) + r"\}" for n in (50, 400)), _nested(r"\{", "1", r"\}", 60),
    "9" * 1400, "0." + "3" * 1400, "1" * 700 + "." + "1" * 700, rf"\frac{{{'7' * 600}}}{{{'3' * 600}}}",
    "1e400", "1e99999", "0x" + "f" * 500, r"0.\overline{" + "12" * 150 + "}", "1,234" * 100, "٣٤٥",
    r"\sum_{n=1}^{\infty}\frac{1}{n^{n}}", r"\sum_{n=1}^{10^9} n^n", r"\prod_{n=1}^{10^8}\frac{n+1}{n}",
    r"\sum_{i=1}^{100}\sum_{j=1}^{100}\sum_{k=1}^{100} i^j", r"\lim_{x\to 0}\sin(1/x)^{x^{1/x}}",
    r"\int_0^1 \sin(x^{-7})^{x} dx", r"\int \int \int e^{x^2 y^3} dx dy dz", r"\int_0^\infty \frac{e^{-x^x}}{\sin x}dx",
    r"x^7+3x^5+x^2=\sin x+e^{x}", "x=x=x=x", "=" * 400, "<" * 400, r"\pm" * 200 + "1", r"\frac" * 300,
    "{" * 700, "}" * 700, "(" * 700, "[" * 1400, "\\" * 1401, "$" * 1400, "^" * 1000, "_" * 1000, "-" * 1400,
    r"\left(" * 200, " " * 1400 + "1", "1 " * 700, "a" * 1400, "1+" * 600, "," * 1400, ";,;" * 400, "and " * 300,
    r"\text{" * 200, "\x00", "5\x00", "\ud800", "5\udfff", "\u202e15", "\u0661\u0662", "𝟝", "５", "e\u0301" * 400,
    "ﷺ" * 400, "\r\n\t5", "__import__('os').system('exit')", "exec(1)", "().__class__.__bases__", "lambda: 0",
    r"\input{/etc/passwd}",
]  # fmt: skip


def hostile_texts() -> list[str]:
    """What stands around a box, or in the place of one."""
    texts: list[str] = [r"\[" * 20_000, r"\(" * 20_000, "$" * 20_000]
    texts += ["$ " * 500_000, "\x00" * 1_000_000, "\ud800" * 100_000]
    texts += [_nested(r"\boxed{", "5", "}", 20_000), r"\boxed{" * 20_000, r"\boxed{5}" * 50_000, r"\boxed" * 100_000]
    texts += [
        "answer is " * 100_000,
        "wait " * 200_000 + r"\boxed{1}",
        "a" * 1_000_000,
        "<think>" * 100_000,
        "</think>" * 100_000,
    ]
    texts += ["{" * 1_000_000, "\n" * 1_000_000, r"\frac{1}{2}" * 50_000, "final answer is $" * 50_000, "1," * 400_000]
    return texts + [rf"$\boxed{{{box}}}$" for box in HOSTILE_BOXES]


class _PeakMemory:
    """Largest resident memory of this process's descendants while the block runs, per process, in MiB.

    A child between fork and exec shares this process's memory, which is not its own: it is known by the command line.
    """

    def __enter__(self):
        self.peak, self._done = 0, threading.Event()
        self._command = psutil.Process().cmdline()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            for child in psutil.Process().children(recursive=True):
                try:
                    if child.cmdline() != self._command:  # read before the memory: an exec can't be undone
                        self.peak = max(self.peak, child.memory_info().rss >> 20)
                except psutil.NoSuchProcess:
                    continue

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


GOLDS = ["5", r"\frac{\sqrt{2}}{3}", "x^2+1", r"\begin{pmatrix}1\\2\end{pmatrix}"]


@pytest.mark.parametrize("off_main", [False, True])
def test_hostile_answers_are_scored_in_bounded_time_and_memory(off_main, capsys):
    texts = hostile_texts()
    golds = [GOLDS[row % len(GOLDS)] for row in range(len(texts))]
    assert len(texts) >= 100
    verifier = Verifier(VerifierOptions(workers=2, memory_mb=MEMORY_MB))
    grades = []

    def judge():
        grades.extend(verifier.verify(texts, golds, deadline_s=DEADLINE_S))

    mine = psutil.Process().memory_info().rss
    start = time.perf_counter()
    with _PeakMemory() as memory:
        if off_main:
            thread = threading.Thread(target=judge)
            thread.start()
            thread.join()
        else:
            judge()
    wall = time.perf_counter() - start
    grown = (psutil.Process().memory_info().rss - mine) >> 20
    verifier.close()
    counts = {name: sum(grade.verdict == name for grade in grades) for name in VERDICTS}
    with capsys.disabled():
        where = "another thread" if off_main else "the main thread"
        print(f"\n{len(texts)} hostile answers in {where}: {wall:.1f} s, worker peak {memory.peak} MiB,", end=" ")
        print(f"trainer grew {grown} MiB, {counts}")
    assert len(grades) == len(texts)
    assert counts["right"] <= 3  # "５" and "\r\n\t5" are fives
    assert wall < len(texts) * DEADLINE_S / 2 + 10  # as if every single one had run to its deadline
    assert memory.peak <= MEMORY_MB + 64
    assert grown < 100


def test_format_rewards_are_quick_on_hostile_texts():
    """They run in the trainer's own process, where nothing could stop them."""
    texts = hostile_texts()
    rows = {"completions": texts, "answer": ["B"] * len(texts), "completion_ids": [[1] * 50] * len(texts)}
    for name in (
        "boxed_format",
        "think_format",
        "tag_count",
        "language_consistency",
        "multiple_choice",
        "logic_puzzle",
    ):
        start = time.perf_counter()
        assert len(REWARDS[name](**rows)) == len(texts)
        assert time.perf_counter() - start < 8, name


def test_known_killers_of_other_verifiers():
    """Right answers beside the attacks keep their reward; the attacks cost nothing but themselves."""
    boxes = [r"\binom{20000}{10000}", "3" + "!" * 300, r"5^{5^{5^{5^5}}-4}", _nested(r"\frac{1}{1+", "x", "}", 24)]
    completions = [[{"role": "assistant", "content": rf"\boxed{{{box}}}"}] for box in ["5", *boxes, "5.0"]]
    assert AccuracyReward(deadline_s=DEADLINE_S)(completions, answer=["5"] * 6) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


# The grading process itself, but answers that begin with RUN are programs, graded by how they end
INSIDE = """
import sys
from sapo_trl.rewards.grading.policy import Grade
from sapo_trl.rewards.verifier import worker
usual = worker.grade
def grade(text, *rest):
    if not text.startswith("RUN "):
        return usual(text, *rest)
    try:
        exec(text[4:], {})
    except Exception as error:
        return Grade("wrong", f"{type(error).__name__}: {error}")
    return Grade("right", "it ran")
worker.grade = grade
worker.serve(*map(int, sys.argv[1:]))
"""
PROGRAMS = {
    "pass": "it ran",
    "import os; os.write(os.open({file!r}, os.O_CREAT | os.O_WRONLY), b'x')": "open is refused here",
    "import os; os.remove({there!r})": "os.remove is refused here",
    "import socket; socket.create_connection(('127.0.0.1', 9))": "Operation not permitted",
    "import socket; socket.socketpair()": "Operation not permitted",
    "import os; os.fork()": "Operation not permitted|Resource temporarily unavailable",
    "import subprocess; subprocess.run(['/bin/true'])": "Operation not permitted|Resource temporarily unavailable",
    "import os; os.posix_spawn('/bin/true', ['true'], {{}})": "Operation not permitted|temporarily unavailable",
    "import os; os.execv('/bin/true', ['true'])": "Operation not permitted",
    "import threading; threading.Thread(target=print).start()": "can't start new thread",
    "x = 'x' * 2**31": "MemoryError",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
def test_a_program_inside_a_worker_gets_no_file_no_process_and_no_connection(tmp_path, monkeypatch, recwarn):
    inside, wrapper, file = tmp_path / "inside.py", tmp_path / "python", tmp_path / "written"
    inside.write_text(INSIDE)
    wrapper.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} {inside} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(wrapper))
    verifier = Verifier(VerifierOptions(workers=1, memory_mb=MEMORY_MB))
    for program, told in PROGRAMS.items():
        (grade,) = verifier.verify(["RUN " + program.format(file=str(file), there=str(inside))], ["1"])
        assert re.search(told, grade.extracted), (program, grade)
    assert not file.exists() and inside.exists()
    # an answer that switches its deadline off has two seconds more, and the next answer a new worker
    endless = "RUN import signal; signal.setitimer(signal.ITIMER_PROF, 0)\nwhile True: pass"
    grades = verifier.verify([endless, r"\boxed{5}"], ["1", "5"], deadline_s=0.1)
    assert [grade.verdict for grade in grades] == ["timeout", "right"]
    verifier.close()
    assert not [x for x in recwarn if "does not limit" in str(x.message)]


def test_a_limit_that_the_system_lacks_is_told(monkeypatch):
    def refuse(*_):
        raise ValueError

    monkeypatch.setattr(limits.resource, "setrlimit", refuse)
    monkeypatch.setattr(limits.platform, "machine", lambda: "riscv64")
    kinds = ["RLIMIT_CORE", "RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_CPU", "RLIMIT_AS"]
    assert limits.restrict(1) == [*kinds, "system calls"]
    worker = _Worker(MEMORY_MB)
    monkeypatch.setattr(worker, "replies", io.StringIO('["RLIMIT_AS"]\n["right", "1", false, false]\n'))
    with pytest.warns(match="does not limit the verifier's workers by: RLIMIT_AS"):
        assert worker.ask([], 5.0) == ["right", "1", False, False]
    worker.end()
