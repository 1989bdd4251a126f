"""Checks that need no model: run before one is loaded, so that a wrong path costs seconds and not a queue slot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset

from sapo_trl.config import BatchPlan
from sapo_trl.data.loading import check_enough_prompts
from sapo_trl.errors import did_you_mean, nearest
from sapo_trl.rewards import check_golds
from sapo_trl.rewards.accuracy import AccuracyReward
from sapo_trl.rewards.lengths import CosineLength

# owner/name on the Hub; anything with another shape can only be a path
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def check_model_path(name: str) -> None:
    """Raise if `name` must be a local folder and is none.

    A name that fits a Hub id and whose first part is no local folder is left to the Hub.

    Raises:
        ValueError: with the nearest existing sibling.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
            raise ValueError(
                f"the model folder {name} has no config.json; is it the folder that save_pretrained wrote?"
            )
        return
    parent = path.parent
    if _HUB_ID.match(name) and not (len(path.parts) > 1 and Path(path.parts[0]).is_dir()):
        return
    while not parent.is_dir():
        parent = parent.parent
    missing = path.relative_to(parent).parts[0]
    close = nearest(missing, [entry.name for entry in parent.iterdir() if entry.is_dir()])
    hint = f" Nearest: {parent / close}." if close else ""
    raise ValueError(f"the model {name} does not exist: {parent} holds no {missing!r}.{hint}")


def check_train_dataset(dataset: object, plan: BatchPlan, num_processes: int) -> bool:
    """Whether the training set carries images.

    Streams are only checked for their columns: their length is unknown. What is no dataset, such as a list, is left to
    TRL, which says so.

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
        # a pack of text alone would leave the vision tower out of the processes' common backward pass
        raise ValueError(
            f"the training set has the column {images[0]!r}, and images train on one process; this run has "
            f"{num_processes}. Start one process, or drop the column."
        )
    return bool(images)


def drop_unusable_answers(dataset: Dataset, rewards: Sequence[object], max_unusable_frac: float) -> Dataset:
    """The training set without rows whose answer is not right even against its own boxed form; prints the count.

    Only where a reward grades answers. Rank 0 checks, so that every process drops the same rows.

    Raises:
        ValueError: more than `max_unusable_frac` of the answers are unusable.
    """
    if not any(isinstance(reward, AccuracyReward | CosineLength) for reward in rewards):
        return dataset
    message: list = [[], None]  # unusable rows, the error
    if PartialState().is_main_process:
        try:
            report = check_golds(dataset["answer"], max_unusable_frac=max_unusable_frac)
            print(report.summary(), flush=True)
            message = [report.unusable_rows, None]
        except ValueError as error:
            message = [[], str(error)]
    unusable, failure = broadcast_object_list(message)
    if failure is not None:
        raise ValueError(failure)
    gone = set(unusable)
    return dataset.select([i for i in range(len(dataset)) if i not in gone]) if gone else dataset
