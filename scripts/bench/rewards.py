"""Agreement and cost of the verifier beside math-verify and TRL: what `scripts/benchmark.py rewards` prints."""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sapo_trl.rewards import VerifierOptions
from sapo_trl.rewards.verifier.pool import Verifier

SUITE = Path(__file__).parents[2] / "tests" / "verdicts" / "cases.jsonl"
BATCH = 250
REPEATS = 5
_ATTACKS = (
    r"5^{5^{5^{5^5}}-4}", r"10^{10^{10^{10}}}", r"\binom{200000000}{100000000}", r"99999^{99999^{9}}", "(10^9)!",
    r"2^{2^{2^{2^{2^{2}}}}}",
)  # fmt: skip
# (answer, gold), with a number in the place of #: what a batch of mathematics looks like
_KINDS = (
    ("#", "#"), ("#", "#"), ("#.0", "#"), ("#", "#"), (r"\frac{#}{7}", r"\frac{#}{7}"),
    (r"#\sqrt{2}", r"\sqrt{2} \cdot #"),
    ("x^2 + #x", "x(x+#)"), ("(#, 2)", "(#,2)"), (r"#\pi", r"#\pi"), (r"\frac{#}{2}", "#/2"),
)  # fmt: skip


@dataclass(frozen=True)
class RewardBenchmark:
    """Times are medians over the repetitions, in seconds, for one batch of `answers` answers.

    `agreement` is the share of the suite's labels that each verifier meets, `families` the same by family as
    (met by ours, by math-verify, by TRL, cases), and `suite_s` the processor seconds that each takes for the suite.
    """

    answers: int
    serial_s: float
    one_worker_s: float
    two_workers_s: float
    attacked_s: float
    right_beside_attacks: int
    agreement: dict[str, float]
    families: dict[str, tuple[int, int, int, int]]
    suite_s: dict[str, float]

    @property
    def one_worker_ratio(self) -> float:
        return self.one_worker_s / self.serial_s

    def summary(self) -> str:
        head = ("family", *self.agreement, "cases")
        rows = [head, *((name, *row) for name, row in self.families.items())]
        table = "\n".join(f"{name:40s}" + "".join(f"{value!s:>12}" for value in values) for name, *values in rows)
        shares = ", ".join(
            f"{name} {share:.1%} ({self.suite_s[name]:.1f} CPU s)" for name, share in self.agreement.items()
        )
        return (
            f"{table}\nagreement: {shares}\n"
            f"{self.answers} answers: math-verify in a loop {self.serial_s:.2f} s, verifier with one worker "
            f"{self.one_worker_s:.2f} s ({self.one_worker_ratio:.2f}x), with two {self.two_workers_s:.2f} s; "
            f"with {len(_ATTACKS)} attacks among them {self.attacked_s:.2f} s, {self.right_beside_attacks} right."
        )


def read_suite(path: Path = SUITE) -> list[dict]:
    """The labelled cases; see `tests/verdicts/README.md`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def judge_ours(cases: list[dict]) -> list[bool]:
    verifier = Verifier()
    grades = verifier.verify([case["completion"] for case in cases], [case["gold"] for case in cases])
    verifier.close()
    return [grade.verdict == "right" for grade in grades]


def judge_math_verify(cases: list[dict]) -> list[bool]:
    from math_verify import parse, verify  # sympy is imported where it is measured, not by everyone

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    judged = []
    for case in cases:
        right = False
        with contextlib.suppress(Exception):  # what it lets escape is no verdict
            right = bool(verify(parse(f"${case['gold']}$"), parse(case["completion"])))
        judged.append(right)
    return judged


def judge_trl(cases: list[dict]) -> list[bool]:
    from trl.rewards import accuracy_reward

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    judged = []
    for case in cases:
        right = False
        with contextlib.suppress(Exception):
            right = accuracy_reward([[{"content": case["completion"]}]], [f"${case['gold']}$"])[0] == 1.0
        judged.append(right)
    return judged


def measure_agreement(cases: list[dict]) -> tuple[dict[str, float], dict[str, tuple], dict[str, float]]:
    """Shares of the labels met, counts by family, and seconds, of the three verifiers."""
    judged = {"sapo_trl": _timed(judge_ours, cases)}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), _by_processor_time) as processes:
        others = {"math-verify": judge_math_verify, "TRL": judge_trl}
        judged |= zip(others, processes.map(_timed, others.values(), [cases] * 2), strict=True)
    shares, seconds = {}, {name: spent for name, (_, spent) in judged.items()}
    families: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for place, (name, (verdicts, _)) in enumerate(judged.items()):
        met = [right == (case["verdict"] == "right") for case, right in zip(cases, verdicts, strict=True)]
        shares[name] = sum(met) / len(cases)
        for case, hit in zip(cases, met, strict=True):
            families[case["family"]][place] += hit
    for case in cases:
        families[case["family"]][3] += 1
    return shares, {name: tuple(row) for name, row in families.items()}, seconds


def _by_processor_time() -> None:
    """From here on math-verify's deadlines are seconds of the processor: a busy machine makes no answer wrong."""
    for name, value in {"SIGALRM": signal.SIGPROF, "alarm": lambda s: signal.setitimer(signal.ITIMER_PROF, s)}.items():
        setattr(signal, name, value)


def _timed(judge: Callable[[list[dict]], list[bool]], cases: list[dict]) -> tuple[list[bool], float]:
    """Verdicts, and processor seconds of this process and of those that it ended."""
    start = sum(os.times()[:4])
    return judge(cases), sum(os.times()[:4]) - start


def example_batch(size: int, first: int) -> tuple[list[str], list[str]]:
    """Completions and gold answers of a usual mixture; another `first` gives other numbers."""
    rows = [_KINDS[row % len(_KINDS)] for row in range(size)]
    thought = "We look at each of the cases in turn and add them up. " * 60
    texts = [f"{thought}Hence $\\boxed{{{a.replace('#', str(first + row))}}}$." for row, (a, _) in enumerate(rows)]
    return texts, [gold.replace("#", str(first + row)) for row, (_, gold) in enumerate(rows)]


def benchmark_rewards(answers: int = BATCH, repeats: int = REPEATS) -> RewardBenchmark:
    """Measures the verifier beside serial math-verify; every repetition has numbers of its own, so no cache helps."""
    pools = {size: Verifier(VerifierOptions(workers=size)) for size in (1, 2)}
    for pool in pools.values():
        pool.verify([r"\boxed{1}", r"\boxed{2}"], ["1", "2"])
    times: dict[object, list[float]] = {"serial": [], 1: [], 2: []}
    for repeat in range(repeats):
        texts, golds = example_batch(answers, first=1000 + 10_000 * repeat)
        times["serial"].append(_seconds(lambda t=texts, g=golds: _serial(t, g)))
        for size, pool in pools.items():
            times[size].append(_seconds(lambda p=pool, t=texts, g=golds: p.verify(t, g)))
    attacked_s, right = _attack(pools[2], answers)
    for pool in pools.values():
        pool.close()
    medians = {key: statistics.median(values) for key, values in times.items()}
    agreement = measure_agreement(read_suite())
    return RewardBenchmark(answers, medians["serial"], medians[1], medians[2], attacked_s, right, *agreement)


def _attack(pool: Verifier, answers: int) -> tuple[float, int]:
    texts, golds = example_batch(answers, first=900_000)
    for place, attack in enumerate(_ATTACKS):
        texts.insert(place * answers // len(_ATTACKS), rf"\boxed{{{attack}}}")
        golds.insert(place * answers // len(_ATTACKS), r"\sqrt{2}")
    grades = []
    seconds = _seconds(lambda: grades.extend(pool.verify(texts, golds)))
    return seconds, sum(grade.verdict == "right" for grade in grades)


def _serial(texts: list[str], golds: list[str]) -> None:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for text, gold in zip(texts, golds, strict=True):
        verify(parse(f"${gold}$", parsing_timeout=0), parse(text, parsing_timeout=0), timeout_seconds=0)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
