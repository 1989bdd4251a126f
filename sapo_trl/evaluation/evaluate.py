"""Evaluation: sample several completions per problem, grade them, report Pass@1 with its interval, pass@k and maj@k.

Pass@1 is the share of right samples averaged over problems (avg@k in other reports) at the given sampling temperature,
as the paper measures it (16 samples per problem). Its interval counts problems, not samples: see `sapo_trl.stats`.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sapo_trl.evaluation.sampling import Completion, sample_completions
from sapo_trl.rewards import accuracy_reward
from sapo_trl.stats import Interval, maj_at_k, mean_with_interval, pass_at_k
from sapo_trl.text import visible


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. Counts and fractions are over completions unless they say otherwise."""

    pass_at_1: Interval  # mean over problems of the share of right samples
    pass_at_k: dict[int, float]  # k -> mean over problems of the unbiased estimate
    num_problems: int
    num_samples: int  # per problem
    num_correct: tuple[int, ...]  # per problem, in the dataset's order: what a paired comparison needs
    ungraded_frac: float  # the reward gave None (no verdict); counted as wrong
    mean_length_tokens: float
    truncated_frac: float  # cut at max_new_tokens
    seconds: float
    verdicts: dict[str, int] | None = None  # how the grader decided, where it says so
    maj_at_k: dict[int, float] | None = None  # k -> mean over problems, where the reward logs `extracted_answer`

    def per_problem(self) -> np.ndarray:
        """Share of right samples, shape (problems,)."""
        return np.array(self.num_correct) / self.num_samples

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON; the keys of `pass_at_k` become text there."""
        return asdict(self)

    def table(self) -> str:
        """The numbers for a terminal, one per line."""
        interval = self.pass_at_1
        rows = [
            ("Pass@1", f"{interval.mean:.3f}"),
            (f"{interval.confidence:.0%} interval", f"[{interval.low:.3f}, {interval.high:.3f}]"),
            *((f"pass@{k}", f"{value:.3f}") for k, value in self.pass_at_k.items() if k != 1),
            *((f"maj@{k}", f"{value:.3f}") for k, value in (self.maj_at_k or {}).items() if k != 1),
            ("problems × samples", f"{self.num_problems} × {self.num_samples}"),
            ("mean length (tokens)", f"{self.mean_length_tokens:.1f}"),
            ("truncated", f"{self.truncated_frac:.1%}"),
            ("ungraded", f"{self.ungraded_frac:.1%}"),
            *((f"verdict {visible(name)}", str(count)) for name, count in (self.verdicts or {}).items()),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        return "\n".join(f"{name:22s}{value}" for name, value in rows)


def _grade(
    reward: Callable[..., list[float | None]], dataset: Dataset, samples: list[list[Completion]]
) -> tuple[list[float | None], dict[str, list]]:
    """One reward per completion, problem by problem, and the columns that the reward logged.

    Calls TRL's reward signature: completions (texts, or chats for chat prompts) and every column repeated to match.
    """
    per_problem = len(samples[0])
    logged: dict[str, list] = {}
    columns = {
        name: [value for value in dataset[name] for _ in range(per_problem)]
        for name in dataset.column_names
        if name != "completion"
    }
    completions = [
        completion.text if isinstance(prompt, str) else [{"role": "assistant", "content": completion.text}]
        for prompt, row in zip(dataset["prompt"], samples, strict=True)
        for completion in row
    ]
    prompts = columns.pop("prompt")
    rewards = reward(prompts=prompts, completions=completions, log_extra=logged.__setitem__, **columns)
    return rewards, logged


def _vote(answers: list, right: np.ndarray, ks: Sequence[int]) -> dict[int, float]:
    """maj@k averaged over problems. answers: one per completion, problem by problem; right: (problems, samples)."""
    rows = np.array(answers, dtype=object).reshape(right.shape)
    return {k: sum(maj_at_k(*pair, k) for pair in zip(rows.tolist(), right.tolist())) / len(right) for k in ks}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward: Callable[..., list[float | None]] = accuracy_reward,
    num_samples: int = 16,
    ks: Sequence[int] = (1,),
    confidence: float = 0.95,
    **sampling: Any,
) -> Evaluation:
    """Sample, grade and summarise. `dataset` has columns prompt and answer; `sampling` goes to `sample_completions`.

    A completion is right when its reward is 1. `reward` has TRL's signature.
    """
    if len(dataset) == 0:
        raise ValueError("The evaluation dataset has 0 problems, so there is no mean. Check its file and split.")
    if max(ks) > num_samples:  # before the sampling, which may take hours
        raise ValueError(
            f"pass@{max(ks)} needs at least {max(ks)} samples per problem, and num_samples={num_samples}. "
            f"Set num_samples={max(ks)}, or leave {max(ks)} out of ks."
        )
    start = time.perf_counter()
    samples = sample_completions(model, tokenizer, dataset["prompt"], num_samples, **sampling)
    rewards, logged = _grade(reward, dataset, samples)
    right = np.array([value == 1.0 for value in rewards]).reshape(len(dataset), num_samples)
    num_correct = right.sum(axis=1)
    flat = [completion for row in samples for completion in row]
    return Evaluation(
        pass_at_1=mean_with_interval(num_correct / num_samples, confidence),
        pass_at_k={k: float(np.mean(pass_at_k(num_samples, num_correct, k))) for k in ks},
        num_problems=len(dataset),
        num_samples=num_samples,
        num_correct=tuple(num_correct.tolist()),
        ungraded_frac=sum(value is None for value in rewards) / len(rewards),
        mean_length_tokens=sum(completion.num_tokens for completion in flat) / len(flat),
        truncated_frac=sum(completion.truncated for completion in flat) / len(flat),
        seconds=time.perf_counter() - start,
        verdicts=dict(Counter(map(str, logged["verdict"]))) if "verdict" in logged else None,
        maj_at_k=_vote(logged["extracted_answer"], right, ks) if "extracted_answer" in logged else None,
    )
