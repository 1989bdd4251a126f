"""What the samples of an evaluation say: Pass@1 with its interval, pass@k and maj@k, and against a baseline.

    samples = collect(partial(sample_completions, model, tokenizer), dataset, accuracy_reward, num_samples=16)
    print(summarise(samples, ks=(1, 16)).table())

Pass@1 is the share of right samples averaged over problems (avg@k in other reports) at the given sampling temperature,
as the paper measures it (16 samples per problem). Intervals count problems, not samples: see `sapo_trl.stats`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from sapo_trl.evaluation.samples import Sample
from sapo_trl.stats import Interval, paired_difference, scores
from sapo_trl.text import visible


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. Counts and fractions are over completions unless they say otherwise."""

    pass_at_1: Interval  # mean over problems of the share of right samples, which is avg@num_samples
    scores: dict[str, Interval]  # pass_at_<k>; maj_at_<k> where the reward logs `extracted_answer`
    num_problems: int
    num_samples: int  # per problem
    num_correct: tuple[int, ...]  # per problem, in the dataset's order: what a paired comparison needs
    mean_reward: float | None  # of those with a verdict
    ungraded_frac: float  # the reward gave None (no verdict); counted as wrong
    mean_length_tokens: float
    truncated_frac: float  # cut at the longest length
    seconds: float  # of this call, which may have gone on from kept samples
    verdicts: dict[str, int] | None = None  # how the grader decided, where it says so

    def per_problem(self) -> np.ndarray:
        """Share of right samples, shape (problems,)."""
        return np.array(self.num_correct) / self.num_samples

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)

    def table(self) -> str:
        """The numbers for a terminal, one per line."""
        named = {name.replace("_at_", "@"): score for name, score in self.scores.items() if name != "pass_at_1"}
        rows = [
            (f"Pass@1 (avg@{self.num_samples})", str(self.pass_at_1)),
            *((name, str(score)) for name, score in named.items()),
            ("intervals", f"{self.pass_at_1.confidence:.0%}, over problems"),
            ("problems × samples", f"{self.num_problems} × {self.num_samples}"),
            ("mean reward", "none" if self.mean_reward is None else f"{self.mean_reward:.3f}"),
            ("mean length (tokens)", f"{self.mean_length_tokens:.1f}"),
            ("truncated", f"{self.truncated_frac:.1%}"),
            ("ungraded", f"{self.ungraded_frac:.1%}"),
            *((f"verdict {visible(name)}", str(count)) for name, count in (self.verdicts or {}).items()),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        return "\n".join(f"{name:22s}{value}" for name, value in rows)


def summarise(
    samples: Sequence[Sample], ks: Sequence[int] = (1,), confidence: float = 0.95, seconds: float = 0.0
) -> Evaluation:
    """The numbers of all samples of an evaluation, as `collect` and `read_samples` give them."""
    right = right_of(samples)
    known = [sample.reward for sample in samples if sample.reward is not None]
    extracted = [sample.extracted_answer for sample in samples]
    verdicts = Counter(sample.verdict for sample in samples if sample.verdict is not None)
    found = scores(right, sorted({1, *ks}), extracted if any(x is not None for x in extracted) else None, confidence)
    return Evaluation(
        pass_at_1=found["pass_at_1"],
        scores=found,
        num_problems=len(right),
        num_samples=right.shape[1],
        num_correct=tuple(right.sum(axis=1).tolist()),
        mean_reward=sum(known) / len(known) if known else None,
        ungraded_frac=1 - len(known) / len(samples),
        mean_length_tokens=sum(sample.num_tokens for sample in samples) / len(samples),
        truncated_frac=sum(sample.truncated for sample in samples) / len(samples),
        seconds=seconds,
        verdicts=dict(verdicts) or None,
    )


def right_of(samples: Sequence[Sample]) -> np.ndarray:
    """Whether each sample is right, (problems, samples), bool.

    Raises:
        ValueError: problems with different numbers of samples, as in the file of an evaluation that is not finished.
    """
    counts = Counter(sample.problem for sample in samples)
    if not counts or len(set(counts.values())) > 1:
        raise ValueError(
            f"{len(samples)} samples of {len(counts)} problems are not the same number for each. Finish the evaluation."
        )
    return np.array([sample.reward == 1.0 for sample in samples]).reshape(len(counts), -1)


@dataclass(frozen=True)
class Comparison:
    """An evaluation against a baseline on the same problems."""

    difference: Interval  # mean over problems of share of right samples here − in the baseline
    gained: tuple[int, ...]  # problems that more than half of the samples solve here, and not in the baseline
    lost: tuple[int, ...]  # the other way round

    def table(self) -> str:
        """The numbers for a terminal."""
        low, high = self.difference.low, self.difference.high
        rows = [("difference of Pass@1", f"{self.difference.mean:+.3f} [{low:+.3f}, {high:+.3f}]")]
        for name in ("gained", "lost"):
            problems = vars(self)[name]
            rows.append((f"problems {name}", f"{len(problems)} {list(problems) if problems else ''}".rstrip()))
        return "\n".join(f"{name:22s}{value}" for name, value in rows)


def compare(baseline: Sequence[Sample], samples: Sequence[Sample], confidence: float = 0.95) -> Comparison:
    """The paired difference of two evaluations; they may have different numbers of samples.

    Raises:
        ValueError: the problems are not the same ones in the same order.
    """
    refuse_other_problems(problems_of(baseline), problems_of(samples))
    before, after = (right_of(each).mean(axis=1) for each in (baseline, samples))
    turned = [np.flatnonzero((x > 0.5) & (y <= 0.5)).tolist() for x, y in ((after, before), (before, after))]
    return Comparison(paired_difference(before, after, confidence), *map(tuple, turned))


def problems_of(source: Dataset | Sequence[Sample]) -> list[tuple[Any, Any]]:
    """(prompt, answer) of each problem, in the dataset's order."""
    if isinstance(source, Dataset):
        rows = source.to_list()
        return [(row["prompt"], row.get("answer")) for row in rows]
    return list({sample.problem: (sample.prompt, sample.answer) for sample in source}.values())


def refuse_other_problems(baseline: Sequence[tuple[Any, Any]], ours: Sequence[tuple[Any, Any]]) -> None:
    """Raise unless both are the same problems in the same order.

    Raises:
        ValueError: with the first that differs.
    """
    if list(baseline) != list(ours):
        first = next((i for i, pair in enumerate(zip(baseline, ours)) if pair[0] != pair[1]), "past the shorter one")
        raise ValueError(
            f"the baseline has {len(baseline)} problems and the evaluation {len(ours)}; the first that differs: "
            f"{first}. Evaluate both on the same problems."
        )
