"""Costs of the reward room, as ratios to math-verify called in a loop: what `scripts/benchmark.py rewards` prints."""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from sapo_trl.rewards import VerifierOptions
from sapo_trl.rewards.verifier.pool import Verifier

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
    """Medians over the repetitions, in seconds, for one batch of `answers` answers."""

    answers: int
    serial_s: float
    one_worker_s: float
    two_workers_s: float
    attacked_s: float
    right_beside_attacks: int

    @property
    def one_worker_ratio(self) -> float:
        return self.one_worker_s / self.serial_s

    def summary(self) -> str:
        return (
            f"{self.answers} answers: math-verify in a loop {self.serial_s:.2f} s, verifier with one worker "
            f"{self.one_worker_s:.2f} s ({self.one_worker_ratio:.2f}x), with two {self.two_workers_s:.2f} s; "
            f"with {len(_ATTACKS)} attacks among them {self.attacked_s:.2f} s, {self.right_beside_attacks} right."
        )


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
        pool.verify([r"\boxed{1}"], ["1"])
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
    return RewardBenchmark(answers, medians["serial"], medians[1], medians[2], attacked_s, right)


def _attack(pool: Verifier, answers: int) -> tuple[float, int]:
    texts, golds = example_batch(answers, first=900_000)
    for place, attack in enumerate(_ATTACKS):
        texts.insert(place * answers // len(_ATTACKS), rf"\boxed{{{attack}}}")
        golds.insert(place * answers // len(_ATTACKS), r"\sqrt{2}")
    grades = []
    seconds = _seconds(lambda: grades.extend(pool.verify(texts, golds)))
    return seconds, sum(grade.verdict == "right" for grade in grades)


def _serial(texts: list[str], golds: list[str]) -> None:
    from math_verify import parse, verify  # sympy is imported where it is measured, not by everyone

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for text, gold in zip(texts, golds, strict=True):
        verify(parse(f"${gold}$", parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
