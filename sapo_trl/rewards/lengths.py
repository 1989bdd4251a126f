"""Rewards for the length of a completion, in tokens as TRL counts them (`completion_ids`), and for repetition."""

import math
from dataclasses import dataclass, field
from itertools import groupby

from sapo_trl.rewards.accuracy import grade_completions, reward_of
from sapo_trl.rewards.grading.policy import DEFAULT_OPTIONS, GraderOptions


def _needed(name: str, value: int | None, reward: str) -> int:
    if value is None or value <= 0:
        raise ValueError(
            f"{name}={value} of the reward {reward} must be a positive number of tokens, such as {name}=1024."
        )
    return value


@dataclass(frozen=True)
class SoftOverlong:
    """0 up to `max_completion_len - soft_punish_cache` tokens, then falling to -1 at `max_completion_len`.

    Soft overlong punishment of DAPO (https://arxiv.org/abs/2503.14476, eq. 13); TRL's function does the arithmetic.

    >>> SoftOverlong(max_completion_len=100, soft_punish_cache=20)(completion_ids=[[1] * 80, [1] * 90, [1] * 101])
    [0.0, -0.5, -1.0]
    """

    max_completion_len: int | None = field(default=None, metadata={"required": True})
    soft_punish_cache: int = 0
    __name__ = "soft_overlong_reward"

    def __post_init__(self):
        if self.max_completion_len is not None and not 0 <= self.soft_punish_cache <= self.max_completion_len:
            raise ValueError(
                f"soft_punish_cache={self.soft_punish_cache} must lie between 0 and max_completion_len="
                f"{self.max_completion_len}: it is the last stretch of the allowed length."
            )

    def __call__(self, completion_ids: list, **kwargs) -> list[float]:
        from trl.rewards import get_soft_overlong_punishment  # here, because TRL takes seconds to import

        limit = _needed("max_completion_len", self.max_completion_len, "soft_overlong")
        return get_soft_overlong_punishment(limit, self.soft_punish_cache)(completion_ids)


@dataclass(frozen=True)
class CosineLength:
    r"""Right answers earn more when short, wrong ones lose less when long, along a cosine of the length.

    r = low + (high - low)·(1 + cos(π·|y|/max_len))/2 with (low, high) = (0.5, 1) if right, and (-0.5, -1) if wrong:
    "Demystifying Long Chain-of-Thought" (https://arxiv.org/abs/2502.03373, appendix C.1), as TRL implements it, but
    judged by our verifier and against the column `answer`. None where that answer is unusable.

    >>> CosineLength(max_len=100)([r"\boxed{1}", r"\boxed{2}"], answer=["1", "1"], completion_ids=[[0] * 50, [0] * 50])
    [0.75, -0.75]
    """

    max_len: int | None = field(default=None, metadata={"required": True})
    min_value_wrong: float = -1.0
    max_value_wrong: float = -0.5
    min_value_correct: float = 0.5
    max_value_correct: float = 1.0
    grader: GraderOptions = DEFAULT_OPTIONS
    __name__ = "cosine_length_reward"
    run_in_thread = True  # it waits for the verifier

    def __call__(
        self, completions: list, answer: list, completion_ids: list, prompts: list | None = None, **kwargs
    ) -> list[float | None]:
        limit = _needed("max_len", self.max_len, "cosine_length")
        grades = grade_completions(completions, answer, prompts, self.grader)
        return [self._value(reward_of(g), len(ids) / limit) for g, ids in zip(grades, completion_ids, strict=True)]

    def _value(self, correct: float | None, progress: float) -> float | None:
        if correct is None:
            return None
        long, short = (self.min_value_correct, self.max_value_correct)
        if not correct:
            long, short = (self.max_value_wrong, self.min_value_wrong)
        return long + (short - long) * (1 + math.cos(min(progress, 1.0) * math.pi)) / 2  # stays at the end past max_len


@dataclass(frozen=True)
class LengthReward:
    r"""Within the answers to one prompt: +0.5 for the shortest, -0.5 for the longest; a wrong answer earns at most 0.

    λ = 0.5 - (|y| - min)/(max - min), and min(0, λ) for a wrong answer: the length reward of Kimi k1.5
    (https://arxiv.org/abs/2501.12599, section 2.3.3). Equal prompts that follow each other form a group.

    >>> LengthReward()([r"\boxed{1}"] * 2 + [r"\boxed{2}"], ["1"] * 3, [[0] * 10, [0] * 30, [0] * 20], ["p"] * 3)
    [0.5, -0.5, 0.0]
    """

    grader: GraderOptions = DEFAULT_OPTIONS
    __name__ = "length_reward"
    run_in_thread = True  # it waits for the verifier
    compares_completions = True  # of one prompt: they must lie on one process

    def __call__(
        self, completions: list, answer: list, completion_ids: list, prompts: list | None = None, **kwargs
    ) -> list[float | None]:
        if prompts is None:
            raise ValueError("The reward length compares the completions of one prompt: it needs `prompts`.")
        correct = [reward_of(grade) for grade in grade_completions(completions, answer, prompts, self.grader)]
        rewards: list[float | None] = []
        for _, group in groupby(range(len(prompts)), key=prompts.__getitem__):  # equal neighbours
            rows = list(group)
            sizes = [len(completion_ids[row]) for row in rows]
            rewards += [_kimi(correct[row], len(completion_ids[row]), min(sizes), max(sizes)) for row in rows]
        return rewards


def _kimi(correct: float | None, size: int, shortest: int, longest: int) -> float | None:
    if correct is None:
        return None
    value = 0.5 - (size - shortest) / (longest - shortest) if longest > shortest else 0.0
    return value if correct else min(0.0, value)


@dataclass(frozen=True)
class Repetition:
    """0 without a repeated n-gram of tokens, down to `max_penalty` for nothing but repetition.

    Repetition penalty of "Demystifying Long Chain-of-Thought" (https://arxiv.org/abs/2502.03373, appendix C.2); TRL's
    function does the arithmetic. TRL's default n-gram of 3 tokens punishes ordinary prose; 20 only punishes loops.

    >>> Repetition(ngram_size=2)(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]])
    [0.0, -0.75]
    """

    ngram_size: int = 20
    max_penalty: float = -1.0
    __name__ = "repetition_reward"

    def __post_init__(self):
        if self.ngram_size < 1 or self.max_penalty > 0:
            raise ValueError(
                f"ngram_size={self.ngram_size} must be at least 1 and max_penalty={self.max_penalty} at most 0."
            )

    def __call__(self, completion_ids: list, **kwargs) -> list[float]:
        from trl.rewards import get_repetition_penalty_reward  # here, because TRL takes seconds to import

        return get_repetition_penalty_reward(self.ngram_size, self.max_penalty)(completion_ids)
