"""Tasks of reasoning-gym as data: `reasoning-gym/chain_sum(max_digits=2, size=1000)` in place of a dataset's name."""

from typing import Any

from datasets import Dataset

from sapo_trl.rewards import parse_entry
from sapo_trl.rewards.gym import make_task

PREFIX = "reasoning-gym/"
# Entry i of a task is drawn from seed + i: far apart, so that evaluation entries are others than training's
SEEDS = {"train": 0, "eval": 2**31}
SIZE = 1000
SEVERAL = "(whatever its scorer accepts)"  # the answer of tasks that have no single one


def is_gym(name: str) -> bool:
    """Whether a dataset's name is that of a task of reasoning-gym."""
    return name.startswith(PREFIX)


def check_gym(name: str) -> tuple[str, dict[str, Any], Any]:
    """Task, options and the task itself, of a name.

    Raises:
        ValueError: no such task or option, or reasoning-gym is not installed.
    """
    task, options = parse_entry(name.removeprefix(PREFIX))
    options = {"size": SIZE} | options
    return task, options, make_task(task, options)


def gym_rows(name: str, which: str) -> Dataset:
    """Columns `prompt`, `answer` and `gym_entry`, which the reward `reasoning_gym` reads.

    Args:
        which: `train` or `eval`, for the seed where the name has none.

    Raises:
        ValueError: what `check_gym` refuses.
    """
    task, options, _ = check_gym(name)
    options = {"seed": SEEDS[which]} | options
    made = make_task(task, options)
    entries = [made[i] for i in range(len(made))]
    return Dataset.from_list(
        [
            {
                "prompt": entry["question"],
                "answer": SEVERAL if entry["answer"] is None else str(entry["answer"]),
                "gym_entry": repr((task, options, entry)),
            }
            for entry in entries
        ]
    )
