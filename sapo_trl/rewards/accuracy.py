"""The reward of a right answer: 1 for right, 0 for anything else, None where the reference answer is unusable.

Every answer gets a verdict with a name (see `policy.VERDICTS`). The shares of all verdicts are logged as metrics, and
verdict and extracted answer as columns of the completions table, so that a verifier that fails is seen and not
mistaken for a model that fails. When most of a batch ends in timeouts or errors, training stops with the numbers.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from sapo_trl.rewards.contract import own_rows
from sapo_trl.rewards.grading.policy import DEFAULT_OPTIONS, VERDICTS, Grade, GraderOptions
from sapo_trl.rewards.grading.texts import completion_text, prefilled_thoughts
from sapo_trl.rewards.verifier.pool import DEADLINE_S, configure_verifier

FAILED = ("timeout", "error")
NOT_MATH = Grade("other_task")  # rows of a mixture that another reward answers for; no verdict, so never counted


@dataclass(frozen=True)
class AccuracyReward:
    r"""1.0 for a right answer, 0.0 for another one, None for a row whose reference answer is unusable.

    The rule-based accuracy reward of DeepSeek-R1 (https://arxiv.org/abs/2501.12948, section 2.2.2), judged by the
    strict grader (`sapo_trl.rewards.grading.grader`) in killable processes (`sapo_trl.rewards.verifier.pool`).

    Args:
        grader: Questions of policy, see `GraderOptions`.
        deadline_s: Seconds for one answer; past it the verdict is `timeout`, and the reward 0.
        max_failed_frac: Above this share of timeouts and errors in a batch of at least `min_failed_batch`: an error.
        min_failed_batch: Smaller batches never raise.
        prefilled: Whether the prompt already opened the thought; None reads it off the prompts.

    >>> accuracy_reward([r"So \boxed{\frac{2}{4}}", r"Maybe \boxed{3}", r"\boxed{3}"], answer=["0.5", "4", ""])
    [1.0, 0.0, None]
    """

    grader: GraderOptions = DEFAULT_OPTIONS
    deadline_s: float = DEADLINE_S
    max_failed_frac: float = 0.5
    min_failed_batch: int = 16
    prefilled: bool | None = None
    __name__ = "accuracy_reward"
    own_task = "math"
    run_in_thread = True  # it waits for the verifier

    def __call__(
        self,
        completions: list,
        answer: list | None = None,
        prompts: list | None = None,
        task: list[str] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        solution: list | None = None,
        **kwargs,
    ) -> list[float | None]:
        answer = solution if answer is None else answer  # TRL's name of the column
        if answer is None:
            raise ValueError("accuracy_reward needs a column `answer` (or `solution`) with the reference answers.")
        if len(completions) != len(answer):
            raise ValueError(f"{len(completions)} completions but {len(answer)} answers. Give one per completion.")
        start = time.perf_counter()
        own = [row for row, mine in enumerate(own_rows(task, self.own_task, len(completions))) if mine]
        graded = grade_completions(
            [completions[row] for row in own],
            [answer[row] for row in own],
            [prompts[row] for row in own] if prompts is not None else None,
            self.grader,
            self.deadline_s,
            self.prefilled,
        )
        grades = dict(zip(own, graded, strict=True))
        rows = [grades.get(row, NOT_MATH) for row in range(len(completions))]
        if log_extra is not None:
            log_extra("verdict", [grade.verdict for grade in rows])
            log_extra("extracted_answer", [grade.extracted for grade in rows])
        if log_metric is not None and graded:
            for name, value in verdict_metrics(graded).items():
                log_metric(name, value)
            log_metric("verdict/time_s", time.perf_counter() - start)
        self._refuse_failure(graded)
        return [reward_of(grade) for grade in rows]

    def _refuse_failure(self, grades: list[Grade]) -> None:
        failed = [row for row, grade in enumerate(grades) if grade.verdict in FAILED]
        if len(grades) < self.min_failed_batch or len(failed) <= self.max_failed_frac * len(grades):
            return
        timeouts = sum(grade.verdict == "timeout" for grade in grades)
        raise RuntimeError(
            f"accuracy_reward could not grade {len(failed)} of {len(grades)} answers ({timeouts} timeouts, "
            f"{len(failed) - timeouts} errors; first rows {failed[:5]}), more than max_failed_frac="
            f"{self.max_failed_frac}. Rewards would be noise. Check the reference answers with check_golds, free the "
            f"machine's cores, or raise deadline_s={self.deadline_s}."
        )


def grade_completions(
    completions: list,
    answer: list,
    prompts: list | None,
    grader: GraderOptions,
    deadline_s: float = DEADLINE_S,
    prefilled: bool | None = None,
) -> list[Grade]:
    """Grades of TRL's completions; the second reward that asks about the same batch is answered from the cache."""
    texts = [completion_text(completion) for completion in completions]
    thoughts = prefilled_thoughts(len(texts), prompts, prefilled)
    return configure_verifier().verify(texts, answer, grader, thoughts, deadline_s)


def reward_of(grade: Grade) -> float | None:
    """None where the row says nothing about the completion (an unusable gold); else 1 for right, and 0."""
    return None if grade.verdict in ("gold_unusable", NOT_MATH.verdict) else float(grade.verdict == "right")


def verdict_metrics(grades: list[Grade]) -> dict[str, float]:
    """Share of every verdict, and of answers that were cut to the longest length that is read."""
    total = max(1, len(grades))
    shares = {f"verdict/{name}_frac": sum(grade.verdict == name for grade in grades) / total for name in VERDICTS}
    return {**shares, "verdict/capped_frac": sum(grade.capped for grade in grades) / total}


accuracy_reward = AccuracyReward()
