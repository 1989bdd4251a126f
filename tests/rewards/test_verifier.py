"""The verifier's processes: deadlines, crashes, threads, orphans, speed."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from sapo_trl.rewards import GraderOptions, VerifierOptions
from sapo_trl.rewards.grading.grader import grade
from sapo_trl.rewards.verifier.pool import MAX_CHARS, Verifier

ENDLESS = [r"5^{5^{5^{5^5}}-4}", r"10^{10^{10^{10}}}", r"\binom{200000000}{100000000}", r"99999^{99999^{9}}", "(10^9)!"]


@pytest.fixture
def verifier():
    made = Verifier(VerifierOptions(workers=2))
    made.verify([r"\boxed{1}"], ["1"])  # started, so that tests time the work and not the import of sympy
    yield made
    made.close()


def normal_batch(size: int, first: int = 3) -> tuple[list[str], list[str]]:
    """Answers as they come: integers mostly, fractions, roots and expressions, after a page of thought."""
    kinds = [
        (r"{n}", "{n}"),
        (r"{n}.0", "{n}"),
        (r"\frac{{{n}}}{{7}}", r"\frac{{{n}}}{{7}}"),
        (r"{n}\sqrt{{2}}", r"\sqrt{{2}} \cdot {n}"),
        (r"x^2 + {n}x", r"x(x+{n})"),
        (r"({n}, 2)", r"({n},2)"),
        (r"{n}", "{n}"),
        (r"{n}\pi", r"{n}\pi"),
    ]
    rows = [
        (text.format(n=n + first), gold.format(n=n + first))
        for n in range(size)
        for text, gold in [kinds[n % len(kinds)]]
    ]
    return ["We look at the cases. " * 150 + rf"So it is $\boxed{{{text}}}$." for text, _ in rows], [g for _, g in rows]


def crowding() -> float:
    """How many times longer than its processor time a second of work takes right now: 1 on a quiet machine."""
    start, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.3:
        pass
    return max(1.0, (time.perf_counter() - start) / 0.3)


def test_a_batch_survives_its_attacks(verifier, capsys):
    texts, golds = normal_batch(250)
    for place, box in enumerate([*ENDLESS, r"2^{2^{2^{2^{2^{2}}}}}"]):
        texts.insert(41 * place, rf"\boxed{{{box}}}")
        golds.insert(41 * place, r"\sqrt{2}")
    crowd = crowding()
    start = time.perf_counter()
    grades = verifier.verify(texts, golds, deadline_s=2.0)
    wall = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n250 answers and 6 attacks on 2 workers: {wall:.2f} s (machine slowed {crowd:.1f}x)")
    assert sum(grade.verdict == "right" for grade in grades) == 250
    assert wall < 6.0 * crowd


def test_cost_beside_serial_math_verify(verifier, capsys):
    """One worker costs at most 1.2 times math-verify called in a loop: the better of two tries."""
    from math_verify import parse, verify

    one = Verifier(VerifierOptions(workers=1))
    one.verify([r"\boxed{1}"], ["1"])
    serial, ours, two = [], [], []
    for trial in range(2):
        fresh, golds = normal_batch(250, first=1000 * trial + 1003)  # new numbers: no answer comes from a cache
        wrapped = [f"${gold}$" for gold in golds]
        serial.append(_seconds(lambda f=fresh, w=wrapped: [
            verify(parse(g, parsing_timeout=None), parse(t, parsing_timeout=None), timeout_seconds=None)
            for t, g in zip(f, w, strict=True)
        ]))  # fmt: skip
        ours.append(_seconds(lambda f=fresh, g=golds: one.verify(f, g)))
        two.append(_seconds(lambda f=fresh, g=golds: verifier.verify(f, g)))
    one.close()
    with capsys.disabled():
        print(
            f"\n250 answers: serial math-verify {min(serial):.2f} s, one worker {min(ours):.2f} s, two {min(two):.2f} s"
        )
    assert min(ours) < 1.2 * min(serial)
    assert all(grade.verdict == "right" for grade in verifier.verify(fresh, golds))


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_timeouts_hit_the_right_answers(verifier):
    texts = [r"\boxed{1}", rf"\boxed{{{ENDLESS[0]}}}", r"\boxed{2}", rf"\boxed{{{ENDLESS[1]}}}", r"\boxed{3}"]
    grades = verifier.verify(texts, ["1", r"\sqrt{2}", "2", r"\sqrt{3}", "4"], deadline_s=0.5)
    assert [grade.verdict for grade in grades] == ["right", "timeout", "right", "timeout", "wrong"]


def test_the_batch_is_bounded_as_a_whole():
    verifier = Verifier(VerifierOptions(workers=1, batch_s=1.0))
    start = time.perf_counter()
    grades = verifier.verify([rf"\boxed{{{ENDLESS[0]}+{n}}}" for n in range(12)], [r"\sqrt{2}"] * 12, deadline_s=0.5)
    assert {grade.verdict for grade in grades} == {"timeout"}
    assert time.perf_counter() - start < 6  # start of the processes included
    verifier.close()


def test_memory_of_a_worker_is_limited():
    """An answer that allocates without end is an error or a timeout; the ones after it are graded."""
    verifier = Verifier(VerifierOptions(workers=1, memory_mb=400))
    bombs = [r"2^{2^{33}}"]
    grades = verifier.verify([rf"\boxed{{{bombs[0]}}}", r"\boxed{7}"], [r"\sqrt{2}", "7"], deadline_s=3.0)
    assert grades[0].verdict in ("error", "timeout")
    assert grades[1].verdict == "right"
    verifier.close()


def test_same_verdicts_in_every_thread(verifier):
    texts, golds = normal_batch(24)
    texts.append(rf"\boxed{{{ENDLESS[0]}}}")
    golds.append(r"\sqrt{2}")
    expected = ["right"] * 24 + ["timeout"]
    results: dict[int, list[str]] = {}

    def judge(number: int) -> None:
        rows = [f"{text} {number}" for text in texts]
        results[number] = [grade.verdict for grade in verifier.verify(rows, golds, deadline_s=0.5)]

    threads = [threading.Thread(target=judge, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), expected)


def test_equal_questions_are_asked_once(verifier):
    texts, golds = normal_batch(40)
    verifier.verify(texts, golds)
    asked = []
    verifier._run = lambda items, *_: asked.append(items)  # must not be called
    assert all(grade.verdict == "right" for grade in verifier.verify(texts * 3, golds * 3))
    assert asked == []


def test_options_reach_the_worker_and_are_part_of_the_question(verifier):
    assert verifier.verify([r"\boxed{50\%}"], ["50"])[0].verdict == "wrong"
    assert verifier.verify([r"\boxed{50\%}"], ["50"], GraderOptions(percent="same_number"))[0].verdict == "right"


def test_long_texts_are_cut_and_counted(verifier):
    long = "x" * (3 * MAX_CHARS)
    grades = verifier.verify([long + r"\boxed{5}", r"\boxed{5}" + long, r"\boxed{5}"], ["5"] * 3)
    assert [(grade.verdict, grade.capped) for grade in grades] == [
        ("right", True),
        ("no_answer", True),
        ("right", False),
    ]


def test_thoughts_are_not_answers_where_the_prompt_opened_them(verifier):
    texts = [r"so \boxed{5}", r"so \boxed{4}</think>\boxed{5}"]
    assert [g.verdict for g in verifier.verify(texts, ["5"] * 2, prefilled=[True, True])] == ["no_answer", "right"]
    assert [g.verdict for g in verifier.verify(texts, ["5"] * 2, prefilled=[False, False])] == ["right", "right"]


@pytest.mark.parametrize("victim", ["worker", "nursery"])
def test_killed_processes_are_replaced(verifier, victim):
    pid = verifier._workers[0].pid if victim == "worker" else verifier._nursery.pid
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert [grade.verdict for grade in verifier.verify([r"\boxed{8}", r"\boxed{9}"], ["8", "9"])] == ["right", "right"]


def test_a_crash_is_an_error_of_one_answer(verifier):
    """A worker that dies while it works on an answer (here: by a signal, as after a stack overflow)."""
    texts = [rf"\boxed{{{ENDLESS[0]}}}", *[rf"\boxed{{{n}}}" for n in range(20)]]
    golds = [r"\sqrt{2}", *map(str, range(20))]

    def kill_the_slow_one() -> None:
        time.sleep(0.6)
        for worker in list(verifier._workers):
            if worker.slow:
                os.kill(worker.pid, signal.SIGSEGV)

    killer = threading.Thread(target=kill_the_slow_one)
    killer.start()
    grades = verifier.verify(texts, golds, deadline_s=5.0)
    killer.join()
    assert [grade.verdict for grade in grades] == ["error"] + ["right"] * 20


SCRIPT = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run as a shell's background job
    from sapo_trl.rewards.verifier.pool import configure_verifier, VerifierOptions
    print("imported", flush=True)
    verifier = configure_verifier(VerifierOptions(workers=2))
    print(verifier.verify([r"\\boxed{1}"] * 2 + [r"\\boxed{2}"], ["1"] * 3)[0].verdict, flush=True)
    print(verifier._nursery.pid, *[worker.pid for worker in verifier._workers], flush=True)
    if sys.argv[1] == "hang":
        verifier.verify([r"\\boxed{5^{5^{5^{5^5}}-4}}"], [r"\\sqrt{2}"], deadline_s=60)
    if sys.argv[1] == "raise":
        raise SystemExit(3)
"""


def _start(tmp_path, mode: str) -> tuple[subprocess.Popen, list[int]]:
    """A plain script without a main guard, run until it has printed its processes."""
    script = tmp_path / "train_like.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen([sys.executable, str(script), mode], stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline().strip() for _ in range(3)]
    assert lines[:2] == ["imported", "right"]
    return process, [int(pid) for pid in lines[2].split()]


def _gone(pids: list[int], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("mode", ["return", "raise"])
def test_processes_end_with_a_script_without_main_guard(tmp_path, mode):
    process, pids = _start(tmp_path, mode)
    rest = process.stdout.read()
    assert process.wait(timeout=20) == (3 if mode == "raise" else 0)
    assert rest == ""  # the script ran once: no worker imported it again
    assert _gone(pids, 5)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_a_killed_trainer(tmp_path, sig):
    """Also the worker that is deep in big-integer arithmetic at that moment."""
    process, pids = _start(tmp_path, "hang")
    time.sleep(0.5)
    pids += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(sig)
    process.wait(timeout=20)
    process.stdout.close()
    assert _gone(pids, 5)


def test_a_forked_child_makes_its_own(verifier):
    """A data loader's worker, say, is a fork of the trainer: it must not talk over its parent's sockets."""
    from sapo_trl.rewards.verifier.pool import get_verifier

    mine = get_verifier()
    pid = os.fork()
    if pid == 0:
        own = get_verifier()
        ok = own is not mine and own.verify([r"\boxed{3}"], ["3"])[0].verdict == "right"
        own.close()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert mine.verify([r"\boxed{4}"], ["4"])[0].verdict == "right"


def test_workers_carry_neither_torch_nor_a_gpu(verifier):
    pid = verifier._nursery.pid
    maps = Path(f"/proc/{pid}/maps").read_text() if sys.platform == "linux" else ""
    assert "torch" not in maps
    assert psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] == ""


def test_size_follows_cores_and_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert VerifierOptions().num_workers() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert VerifierOptions().num_workers() == 4
    assert VerifierOptions(workers=7).num_workers() == 7


def test_the_grader_alone_agrees_with_the_pool(verifier):
    texts, golds = normal_batch(16)
    assert [grade(t, g) for t, g in zip(texts, golds, strict=True)] == verifier.verify(texts, golds)
