"""The verifier's processes: deadlines, interruptions, threads, orphans, speed."""

import multiprocessing
import os
import resource
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
from sapo_trl.rewards.verifier import worker
from sapo_trl.rewards.verifier.pool import MAX_CHARS, Verifier

# Against SLOW, SLOW + 1 takes minutes of processor time: four million roots, with 500 bits.
SLOW = r"\sum_{k=1}^{2000}\sum_{j=1}^{2000}\sqrt{k+j}"
ATTACKS = [
    r"5^{5^{5^{5^5}}-4}", r"10^{10^{10^{10}}}", r"\binom{200000000}{100000000}", r"99999^{99999^{9}}", "(10^9)!",
    r"2^{2^{2^{2^{2^{2}}}}}",
]  # fmt: skip


def slow_answer(number: int) -> str:
    return rf"\boxed{{{SLOW}+{number}}}"


@pytest.fixture
def verifier():
    made = Verifier(VerifierOptions(workers=2))
    made.verify([r"\boxed{1}", r"\boxed{2}"], ["1", "2"])  # started, so that tests time the work and not the start
    yield made
    made.close()


def pids_of(verifier: Verifier) -> list[int]:
    return [running.process.pid for running in verifier._workers.values()]


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
    for place, box in enumerate(ATTACKS):
        texts.insert(41 * place, rf"\boxed{{{box}}}")
        golds.insert(41 * place, r"\sqrt{2}")
    crowd = crowding()
    start = time.perf_counter()
    grades = verifier.verify(texts, golds, deadline_s=2.0)
    wall = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n250 answers and 6 attacks on 2 workers: {wall:.2f} s (machine slowed {crowd:.1f}x)")
    assert sum(grade.verdict == "right" for grade in grades) == 250
    assert {grade.verdict for grade in grades} == {"right", "wrong"}  # not even a timeout
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
            verify(parse(g, parsing_timeout=0), parse(t, parsing_timeout=0), timeout_seconds=0)
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
    texts = [r"\boxed{1}", slow_answer(1), r"\boxed{2}", slow_answer(2), r"\boxed{3}"]
    grades = verifier.verify(texts, ["1", SLOW, "2", SLOW, "4"], deadline_s=0.5)
    assert [grade.verdict for grade in grades] == ["right", "timeout", "right", "timeout", "wrong"]


def test_the_deadline_counts_processor_time(verifier):
    """A worker that is stopped for longer than its deadline has not used it up."""
    pids = pids_of(verifier)

    def stop_for_a_while() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    stopper = threading.Thread(target=stop_for_a_while)
    stopper.start()
    time.sleep(0.2)
    start = time.perf_counter()
    grades = verifier.verify([rf"\boxed{{{n}}}" for n in range(4)], ["0", "1", "2", "4"], deadline_s=0.3)
    assert [grade.verdict for grade in grades] == ["right", "right", "right", "wrong"]
    assert time.perf_counter() - start > 1.0 and pids_of(verifier) == pids
    stopper.join()


def _burn(until: float) -> None:
    while time.monotonic() < until:
        pass


def test_verdicts_do_not_depend_on_the_load(verifier):
    """Answers that need half of their deadline, on an idle machine and beside four processes that never rest."""
    sums = (r"\sum_{k=1}^{50}\sum_{j=1}^{#}\sqrt{k+j}", r"\sum_{j=1}^{#}\sum_{k=1}^{50}\sqrt{k+j}")
    half = [[text.replace("#", str(n)) for text in sums] for n in (40, 41)]
    texts, golds = normal_batch(40)
    texts += [rf"\boxed{{{answer}}}" for _, answer in half] + [slow_answer(1)]
    golds += [gold for gold, _ in half] + [SLOW]
    idle = [grade.verdict for grade in verifier.verify(texts, golds, deadline_s=1.0)]
    assert idle == ["right"] * 42 + ["timeout"]
    until = time.monotonic() + 4
    burners = [multiprocessing.get_context("spawn").Process(target=_burn, args=(until,)) for _ in range(4)]
    for burner in burners:
        burner.start()
    fresh = [f"{text} " for text in texts]  # not from the cache
    busy = [grade.verdict for grade in verifier.verify(fresh, golds, deadline_s=1.0)]
    for burner in burners:
        burner.kill()
        burner.join()
    assert busy == idle


def test_the_batch_is_bounded_as_a_whole():
    """Also where a worker neither works nor ends."""
    verifier = Verifier(VerifierOptions(workers=1, batch_s=1.0))
    verifier.verify([r"\boxed{1}"], ["1"])
    os.kill(pids_of(verifier)[0], signal.SIGSTOP)
    start = time.perf_counter()
    grades = verifier.verify([rf"\boxed{{{n}}}" for n in range(12)], ["1"] * 12, deadline_s=0.02)
    assert {grade.verdict for grade in grades} == {"timeout"}
    assert 1.0 < time.perf_counter() - start < 6
    assert verifier.verify([r"\boxed{1} "], ["1"])[0].verdict == "right"
    verifier.close()


def test_memory_of_a_worker_is_limited(monkeypatch):
    """By the kernel; and a worker that could not allocate is not asked again."""
    verifier = Verifier(VerifierOptions(workers=1, memory_mb=400))
    verifier.verify([r"\boxed{1}"], ["1"])
    if sys.platform == "linux":
        assert psutil.Process(pids_of(verifier)[0]).rlimit(resource.RLIMIT_AS) == (400 << 20, 400 << 20)
    verifier.close()

    def exhaust(*_):
        raise MemoryError

    monkeypatch.setattr(worker, "grade", exhaust)
    result, spent = worker.grade_safely(r"\boxed{1}", "1", {})
    assert (result.verdict, spent) == ("error", True)


def test_same_verdicts_in_every_thread(verifier):
    texts, golds = normal_batch(24)
    texts.append(slow_answer(1))
    golds.append(SLOW)
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


def test_workers_outlive_the_thread_that_asked_first():
    """Reward functions run in threads that end with their batch; the kernel must not end the workers with them."""
    verifier = Verifier(VerifierOptions(workers=1))
    thread = threading.Thread(target=verifier.verify, args=([r"\boxed{1}"], ["1"]))
    thread.start()
    thread.join()
    before = pids_of(verifier)
    time.sleep(0.2)
    assert verifier.verify([r"\boxed{2}"], ["2"])[0].verdict == "right"
    assert pids_of(verifier) == before
    verifier.close()


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


def test_killed_idle_workers_are_replaced(verifier):
    for pid in pids_of(verifier):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert [grade.verdict for grade in verifier.verify([r"\boxed{8}", r"\boxed{9}"], ["8", "9"])] == ["right", "right"]


@pytest.mark.parametrize(("kills", "verdict"), [(1, "right"), (2, "error")])
def test_an_answer_whose_worker_is_killed_is_graded_again(verifier, kills, verdict):
    """Once: an answer that ends two workers (here: a signal, as after a stack overflow) is an error of that answer."""
    gold = r"\sum_{k=1}^{100}\sum_{j=1}^{80}\sqrt{k+j}"  # some seconds beside the same sum in another order
    answer = r"\sum_{j=1}^{80}\sum_{k=1}^{100}\sqrt{k+j}"
    texts = [rf"\boxed{{{answer}}}", *[rf"\boxed{{{n}}}" for n in range(20)]]

    def kill_the_busy() -> None:
        killed: set[int] = set()
        while len(killed) < kills:
            for pid in set(pids_of(verifier)) - killed:
                if psutil.pid_exists(pid) and psutil.Process(pid).cpu_times().user > 0.4:
                    os.kill(pid, signal.SIGSEGV)
                    killed.add(pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_the_busy)
    killer.start()
    grades = verifier.verify(texts, [gold, *map(str, range(20))], deadline_s=30.0)
    killer.join()
    assert [grade.verdict for grade in grades] == [verdict] + ["right"] * 20


def test_a_verifier_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    verifier = Verifier(VerifierOptions(workers=1))
    with pytest.raises(RuntimeError, match="does not start. It needs mpmath and a POSIX system"):
        verifier.verify([r"\boxed{1}"], ["1"])


SCRIPT = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run as a shell's background job
    from sapo_trl.rewards.verifier.pool import configure_verifier, VerifierOptions
    print("imported", flush=True)
    verifier = configure_verifier(VerifierOptions(workers=2))
    print(verifier.verify([r"\\boxed{1}"] * 2 + [r"\\boxed{2}"], ["1"] * 3)[0].verdict, flush=True)
    print(*[worker.process.pid for worker in verifier._workers.values()], flush=True)
    if sys.argv[1] == "hang":
        slow = r"\\sum_{k=1}^{2000}\\sum_{j=1}^{2000}\\sqrt{k+j}"
        verifier.verify([rf"\\boxed{{{slow}+{n}}}" for n in (1, 2)], [slow] * 2, deadline_s=60)
    if sys.argv[1] == "raise":
        raise SystemExit(3)
"""


def _start(tmp_path, mode: str) -> tuple[subprocess.Popen, list[int]]:
    """A plain script without a main guard, run until it has printed its processes."""
    script = tmp_path / "train_like.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen([sys.executable, str(script), mode], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
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
    rest, _ = process.communicate()
    assert process.wait(timeout=20) == (3 if mode == "raise" else 0)
    assert rest == ""  # the script ran once: no worker imported it again
    assert _gone(pids, 5)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_a_killed_trainer(tmp_path, sig):
    """Also the worker that is deep in big-integer arithmetic at that moment."""
    process, pids = _start(tmp_path, "hang")
    time.sleep(0.5)
    pids += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(set(pids)) == 2
    process.send_signal(sig)
    process.communicate(timeout=20)
    assert _gone(pids, 5)


def test_a_forked_child_makes_its_own(verifier):
    """A data loader's worker, say, is a fork of the trainer: it must not talk over its parent's sockets."""
    from sapo_trl.rewards.verifier.pool import configure_verifier

    mine = configure_verifier()
    pid = os.fork()
    if pid == 0:
        own = configure_verifier()
        ok = own is not mine and own.verify([r"\boxed{3}"], ["3"])[0].verdict == "right"
        own.close()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert mine.verify([r"\boxed{4}"], ["4"])[0].verdict == "right"


def test_workers_carry_neither_torch_nor_a_gpu(verifier):
    for pid in pids_of(verifier):
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
