"""Checks that need no model, and run before one is loaded, so that a mistake costs seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset

from sapo_trl.config import BatchPlan, SAPOConfig
from sapo_trl.data.filters import SHOWN, listed, say
from sapo_trl.data.loading import check_enough_prompts
from sapo_trl.errors import did_you_mean
from sapo_trl.model import check_model_path
from sapo_trl.rewards import check_golds
from sapo_trl.rewards.accuracy import AccuracyReward
from sapo_trl.rewards.contract import own_rows, own_task, refuse_reserved, unique_names
from sapo_trl.rewards.lengths import CosineLength


def check_before_loading(
    model: object, reward_funcs: Any, args: SAPOConfig, plan: BatchPlan, train_dataset: object, others: dict[str, Any]
) -> bool:
    """Refuse what can be refused without loading the model; returns whether the training set has images.

    `others` are the trainer's other arguments by name, as far as they are given.
    """
    check_old_logprobs(args, others.get("rollout_func") is not None)
    if isinstance(model, str):
        check_model_path(model)
    carries_images = check_train_dataset(train_dataset, plan, args.world_size)
    if carries_images and args.overlap_rewards:
        raise ValueError(
            "overlap_rewards=True, but the training set has images, and TRL hands those over after the rewards. Remove "
            "overlap_rewards."
        )
    rewards = reward_funcs if isinstance(reward_funcs, list) else [] if reward_funcs is None else [reward_funcs]
    check_tasks(train_dataset, rewards, "train")
    held_out = others.get("eval_dataset")
    for name, dataset in (held_out if isinstance(held_out, Mapping) else {"": held_out}).items():
        if isinstance(dataset, Dataset | IterableDataset):
            refuse_reserved(dataset.column_names or [], f"the evaluation set {name}".strip())
            check_tasks(dataset, rewards, f"eval {name}".strip())
    return carries_images


def check_old_logprobs(config: SAPOConfig, has_rollout_func: bool) -> None:
    """Refuse old log-probs of an engine that gives none.

    Raises:
        ValueError: with what gives them.
    """
    if config.old_logprobs == "sampler" and not config.use_vllm and not has_rollout_func:
        raise ValueError(
            "old_logprobs='sampler' needs log-probs from the rollout engine, and transformers' generate returns none. "
            "Set use_vllm: true, pass a rollout_func, or leave old_logprobs: trainer."
        )


def check_train_dataset(dataset: object, plan: BatchPlan, num_processes: int) -> bool:
    """Check the training set; returns whether it has images.

    Of streams only the columns are checked, because their length is unknown. What is no dataset, such as a list, is
    left to TRL, which refuses it.

    Raises:
        ValueError: no `prompt` column, an empty prompt, fewer prompts than one rollout takes, images on several
            processes.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return False
    columns = dataset.column_names or []
    refuse_reserved(columns, "the training set")
    if columns and "prompt" not in columns:
        raise ValueError(
            f"the training set has no column 'prompt'; it has {', '.join(columns)}.{did_you_mean('prompt', columns)}"
        )
    if isinstance(dataset, Dataset):
        check_enough_prompts(dataset, plan.prompts_per_rollout)
        empty = next((i for i, prompt in enumerate(dataset["prompt"]) if not prompt), None)
        if empty is not None:
            raise ValueError(f"the training set's prompt of row {empty} is empty. Drop such rows.")
    images = [name for name in ("image", "images") if name in columns]
    if images and num_processes > 1:
        # a pack of text alone would leave the vision tower out of the backward pass that all processes share
        raise ValueError(
            f"the training set has the column {images[0]!r}, and images train on one process; this run has "
            f"{num_processes}. Start one process, or drop the column."
        )
    return bool(images)


def check_tasks(dataset: Any, reward_funcs: Sequence[Any], which: str) -> None:
    """Where a column `task` says which rewards score a row, print how many rows each of them scores.

    Of streams nothing is known. An evaluation set (`which` is not "train") need not have rows for every reward.

    Raises:
        ValueError: a reward scores no row, or a row is scored by no reward.
    """
    owns = {name: own_task(func) for name, func in zip(unique_names(reward_funcs), reward_funcs, strict=True)}
    if not isinstance(dataset, Dataset) or "task" not in dataset.column_names or not any(owns.values()):
        return
    tasks = list(map(str, dataset["task"]))
    counts = Counter(tasks)
    held = ", ".join(f"{task} ({count} rows)" for task, count in counts.most_common(SHOWN))
    scored = {name: len(tasks) if own is None else counts[own] for name, own in owns.items()}
    say(f"{which}: the column task holds {held}; " + ", ".join(f"{name} scores {n}" for name, n in scored.items()))
    idle = next((name for name, num in scored.items() if num == 0 and which == "train"), None)
    if idle is not None:
        raise ValueError(
            f"{which}: the reward {idle} scores the rows whose task is {owns[idle]!r}, and none is: the column task "
            f"holds {held}. Remove or rename that column, write {owns[idle]!r} in it, or leave the reward out."
        )
    left = [] if None in owns.values() else [i for i, task in enumerate(tasks) if task not in owns.values()]
    if left:
        raise ValueError(
            f"{which}: no reward scores {listed(left)}, whose task is {tasks[left[0]]!r}; rewards are for "
            f"{', '.join(map(str, owns.values()))}. Drop such rows, add a reward, or remove the column task."
        )


def drop_unusable_answers(dataset: Dataset, rewards: Sequence[object], max_unusable_frac: float) -> Dataset:
    """The training set without rows of mathematics whose answer can't be used (`check_golds`); prints their number.

    Only if a reward grades answers. Rank 0 checks, so that every process drops the same rows.

    Raises:
        ValueError: more than `max_unusable_frac` of the answers are unusable.
    """
    column = next((name for name in ("answer", "solution") if name in dataset.column_names), None)
    if column is None or not any(isinstance(reward, AccuracyReward | CosineLength) for reward in rewards):
        return dataset
    tasks = dataset["task"] if "task" in dataset.column_names else None
    own = [i for i, mine in enumerate(own_rows(tasks, AccuracyReward.own_task, len(dataset))) if mine]
    message: list = [[], None]  # unusable rows, the error
    if PartialState().is_main_process:
        try:
            report = check_golds(dataset.select(own)[column][:], max_unusable_frac=max_unusable_frac)
            print(f"{'' if tasks is None else 'rows of mathematics: '}{report.summary()}", flush=True)
            message = [[own[row] for row in report.unusable_rows], None]
        except ValueError as error:
            message = [[], str(error)]
    unusable, failure = broadcast_object_list(message)
    if failure is not None:
        raise ValueError(failure)
    gone = set(unusable)
    return dataset.select([i for i in range(len(dataset)) if i not in gone]) if gone else dataset
