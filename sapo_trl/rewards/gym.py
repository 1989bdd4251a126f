"""reasoning-gym's own scorers as a reward: https://github.com/open-thought/reasoning-gym, an extra.

Several of its scorers evaluate what they are given as Python, so no answer is scored in the trainer's process: that
happens in the verifier's, under a deadline, where nothing can be written, removed, started or connected to.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from sapo_trl.errors import did_you_mean
from sapo_trl.rewards.grading.extraction import find_boxes
from sapo_trl.rewards.grading.policy import Grade
from sapo_trl.rewards.grading.texts import completion_text, prefilled_thoughts
from sapo_trl.rewards.mixtures import ANSWER_TAG
from sapo_trl.rewards.verifier.pool import configure_verifier

DEADLINE_S = 10.0  # of processor time: the first answer of a process waits for the import, 1 to 2 seconds


def make_task(name: str, options: dict[str, Any]) -> Any:
    """A task of reasoning-gym, `ProceduralDataset`: `task[i]` is an entry, `task.score_answer(text, entry)` 0 to 1.

    Raises:
        ValueError: reasoning-gym is not installed, has no such task, or the task refuses the options.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(
            f"reasoning-gym/{name} needs the package reasoning-gym, which is not installed: "
            "pip install -e '.[reasoning-gym]'."
        )
    from reasoning_gym.factory import DATASETS, create_dataset  # an extra, and a second to import

    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {name!r}.{did_you_mean(name, DATASETS)}")
    options_of: Any = DATASETS[name][1]
    known = [f.name for f in fields(options_of)]
    for option in options:
        if option not in known:
            raise ValueError(
                f"{option!r} is no option of reasoning-gym/{name}; known: {', '.join(known)}."
                f"{did_you_mean(option, known)}"
            )
    try:
        return create_dataset(name, **options)
    except (AssertionError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"reasoning-gym/{name} refuses its options {options}: {error}") from error


@lru_cache(maxsize=64)
def _task_of(name: str, options: str) -> Any:
    return make_task(name, ast.literal_eval(options))


def score(text: str, entry: str) -> Grade:
    """What a task's own scorer gives the answer in a text: the last `<answer>`, else the last box. For the verifier.

    Args:
        entry: the Python literal `(task, options, entry)`; JSON would make lists of tuples, which scorers compare.
    """
    tagged, (boxes, _) = ANSWER_TAG.findall(text), find_boxes(text)
    if not tagged and not boxes:
        return Grade("no_answer", score=0.0)
    answer = tagged[-1].strip() if tagged else text[boxes[-1].inside : boxes[-1].stop].strip()
    name, options, row = ast.literal_eval(entry)
    return Grade("scored", answer, score=float(_task_of(name, repr(options)).score_answer(answer, row)))


@dataclass(frozen=True)
class ReasoningGym:
    """The task's own score of the answer, 0 to 1, often with parts for nearly right ones; 0 without an answer.

    A scorer that fails on an answer, or needs more than `deadline_s` of processor time, gives 0; `gym/error_frac` and
    `gym/timeout_frac` count both. The column `gym_entry` comes with `dataset_name: reasoning-gym/<task>`.
    """

    deadline_s: float = DEADLINE_S
    __name__ = "reasoning_gym_reward"
    run_in_thread = True  # it waits for the verifier

    def __call__(
        self,
        completions: list,
        gym_entry: list[str],
        prompts: list | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs,
    ) -> list[float | None]:
        texts = [completion_text(completion) for completion in completions]
        thoughts = prefilled_thoughts(len(texts), prompts, None)
        grades = configure_verifier().verify(texts, gym_entry, None, thoughts, self.deadline_s)
        if log_metric is not None:
            for verdict in ("no_answer", "timeout", "error"):
                log_metric(f"gym/{verdict}_frac", sum(x.verdict == verdict for x in grades) / max(1, len(grades)))
        return [grade.score or 0.0 for grade in grades]
