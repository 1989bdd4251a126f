"""Checks that need no model, and run before one is loaded, so that a mistake costs seconds."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset

from sapo_trl.config import BatchPlan, SAPOConfig
from sapo_trl.data.loading import check_enough_prompts
from sapo_trl.errors import did_you_mean
from sapo_trl.model import check_model_path
from sapo_trl.rewards import check_golds
from sapo_trl.rewards.accuracy import AccuracyReward
from sapo_trl.rewards.lengths import CosineLength


def check_before_loading(
    model: object, args: SAPOConfig, plan: BatchPlan, train_dataset: object, has_rollout_func: bool
) -> bool:
    """Refuse what can be refused without loading the model; returns whether the training set has images."""
    check_old_logprobs(args, has_rollout_func)
    if isinstance(model, str):
        check_model_path(model)
    carries_images = check_train_dataset(train_dataset, plan, args.world_size)
    if carries_images and args.overlap_rewards:
        raise ValueError(
            "overlap_rewards=True, but the training set has images, and TRL hands those over after the rewards. Remove "
            "overlap_rewards."
        )
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


def drop_unusable_answers(dataset: Dataset, rewards: Sequence[object], max_unusable_frac: float) -> Dataset:
    """The training set without rows whose answer is not even equal to its own boxed form; prints their number.

    Only if a reward grades answers. Rank 0 checks, so that every process drops the same rows.

    Raises:
        ValueError: more than `max_unusable_frac` of the answers are unusable.
    """
    column = next((name for name in ("answer", "solution") if name in dataset.column_names), None)
    if column is None or not any(isinstance(reward, AccuracyReward | CosineLength) for reward in rewards):
        return dataset
    message: list = [[], None]  # unusable rows, the error
    if PartialState().is_main_process:
        try:
            report = check_golds(dataset[column], max_unusable_frac=max_unusable_frac)
            print(report.summary(), flush=True)
            message = [report.unusable_rows, None]
        except ValueError as error:
            message = [[], str(error)]
    unusable, failure = broadcast_object_list(message)
    if failure is not None:
        raise ValueError(failure)
    gone = set(unusable)
    return dataset.select([i for i in range(len(dataset)) if i not in gone]) if gone else dataset
