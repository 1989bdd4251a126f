"""Checks that need no model, and run before one is loaded, so that a mistake costs seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sapo_trl.batch_plan import BatchPlan
from sapo_trl.config import SAPOConfig
from sapo_trl.data.filters import SHOWN, listed, say, say_left_over
from sapo_trl.data.loading import check_enough_prompts
from sapo_trl.data.mixing import check_chosen_prompts
from sapo_trl.data.pictures import check_pictures
from sapo_trl.errors import did_you_mean
from sapo_trl.model import check_model_path
from sapo_trl.rewards import REWARDS, check_golds
from sapo_trl.rewards.accuracy import AccuracyReward
from sapo_trl.rewards.contract import (
    TaskReward,
    check_reward_call,
    own_tasks,
    refuse_reserved,
    reward_name,
    unique_names,
)
from sapo_trl.rewards.lengths import CosineLength
from sapo_trl.trl_seams import loaded_from


def check_before_loading(
    model: object,
    reward_funcs: Any,
    args: SAPOConfig,
    plan: BatchPlan,
    datasets: tuple[object, object],
    trl_arguments: Mapping[str, object],
) -> bool:
    """Refuse what can be refused without loading the model; returns whether prompts have images.

    Args:
        datasets: for training and evaluation.
        trl_arguments: a `rollout_func` or an `environment_factory` among them may add to what the rewards get.
    """
    train_dataset, eval_dataset = datasets
    has_rollout_func = trl_arguments.get("rollout_func") is not None
    has_environment = trl_arguments.get("environment_factory") is not None
    adds_columns = has_rollout_func or has_environment
    if not isinstance(reward_funcs, list):
        reward_funcs = [] if reward_funcs is None else [reward_funcs]
    check_old_logprobs(args, has_rollout_func)
    check_surroundings(args, eval_dataset, has_tools=has_environment or bool(trl_arguments.get("tools")))
    check_model(model, args, trl_arguments)
    if not reward_funcs and not has_environment:
        raise ValueError("reward_funcs is empty: pass functions, or an environment that gives rewards.")
    check_train_dataset(train_dataset, args, plan, has_environment)
    if isinstance(train_dataset, Dataset) and not args.chooses_prompts:
        say_left_over(len(train_dataset), plan.prompts_per_rollout)
    weights = args.reward_weights
    if weights is not None and len(weights) != len(reward_funcs):
        raise ValueError(f"reward_weights has {len(weights)} numbers for {len(reward_funcs)} rewards. Give one each.")
    if weights and not any(weights):
        raise ValueError(f"reward_weights={weights} counts no reward, and nothing would be learned.")
    if args.chooses_prompts:
        check_chosen_prompts(train_dataset, args, plan)
    has_turns = adds_columns or bool(trl_arguments.get("tools"))
    if has_turns and any(one.max_completion_length for one in args.mixture.values()):
        raise ValueError(
            "datasets sets max_completion_length, and completions of several turns, or of a rollout_func, end by rules "
            "of their own. Remove it."
        )
    if args.thinking_budget and has_turns:
        raise ValueError(
            "thinking_budget interrupts completions of one turn: not those of tools, environments or a rollout_func. "
            "Remove it."
        )
    check_rewards_of(reward_funcs, train_dataset, adds_columns)
    check_whole_groups(reward_funcs, args, plan)
    check_tasks(train_dataset, reward_funcs, "train")
    turns = trl_arguments.get("rollout_func"), trl_arguments.get("environment_factory")
    evaluated = check_eval_datasets(eval_dataset, reward_funcs, *turns)
    images = [check_pictures(train_dataset, "training set")]
    images += [check_pictures(dataset, f"evaluation set {name}".strip()) for name, dataset in evaluated.items()]
    carries_images = any(images)
    if carries_images and args.thinking_budget:
        raise ValueError("thinking_budget interrupts completions of text, and prompts have images. Remove it.")
    check_ahead(args, train_dataset, carries_images, trl_arguments)
    if carries_images and args.overlap_rewards:
        raise ValueError(
            "overlap_rewards=True, but prompts have images, and TRL hands those over after the rewards. Remove "
            "overlap_rewards."
        )
    return carries_images


def check_model(model: object, args: SAPOConfig, trl_arguments: Mapping[str, object]) -> None:
    """Refuse a folder that is not there, a model without a head, and one from memory where files of it are needed.

    Raises:
        TypeError, ValueError: with the fix.
    """
    tokenizer: Any = trl_arguments.get("processing_class")
    if isinstance(tokenizer, str | PathLike):
        raise TypeError(f"processing_class={str(tokenizer)!r} is a name: pass AutoTokenizer.from_pretrained(it).")
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, by which a completion ends. Set tokenizer.eos_token.")
    if isinstance(model, str):
        check_model_path(model)
    elif isinstance(model, PreTrainedModel) and not model.can_generate():
        raise ValueError(f"{type(model).__name__} has no language-model head. Load it with AutoModelForCausalLM.")
    elif isinstance(model, PreTrainedModel) and not loaded_from(model.config):
        if trl_arguments.get("processing_class") is None:
            raise ValueError("the model was made in memory. Pass its tokenizer as processing_class.")
        if args.beta and trl_arguments.get("peft_config") is None:
            raise ValueError(
                f"beta={args.beta} needs a reference, which is loaded from the model's folder, and this model was made "
                "in memory. Save it and load it from there, or set beta: 0."
            )


def check_eval_datasets(
    datasets: object, reward_funcs: Sequence[Any], rollout_func: object, environment_factory: object
) -> Mapping[str, object]:
    """Check one evaluation set, or several by their names; returns them by name.

    Args:
        rollout_func, environment_factory: either may add to what the rewards get.

    Raises:
        ValueError, TypeError: names the set, and what is wrong with it or lacking for a reward.
    """
    has_environment = environment_factory is not None
    adds_columns = has_environment or rollout_func is not None
    evaluated = datasets if isinstance(datasets, Mapping) else {"": datasets}
    for name, dataset in evaluated.items():
        which = f"evaluation set {name!r}" if name else "evaluation set"
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(f"the {which} is empty. Leave it out, or give it rows.")
        check_prompts(dataset, which, has_environment)
        check_rewards_of(reward_funcs, dataset, adds_columns)
        check_tasks(dataset, reward_funcs, f"eval {name}".strip())
    return evaluated


def check_surroundings(args: SAPOConfig, eval_dataset: object, has_tools: bool) -> None:
    """Refuse fields for which something beside them is missing: evaluation data, tools, a process for each GPU.

    Raises:
        ValueError: with the nearest fix.
    """
    if eval_dataset is None and (args.eval_strategy != "no" or args.eval_on_start):
        raise ValueError(
            f"eval_strategy={args.to_dict()['eval_strategy']!r}, eval_on_start={args.eval_on_start}, and there is no "
            "evaluation set. Set eval_dataset_name or eval_size (eval_dataset in code), or eval_strategy: no."
        )
    if args.max_tool_calling_iterations is not None and not has_tools:
        raise ValueError("max_tool_calling_iterations has no effect without tools. Pass tools, or remove it.")
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16 does nothing on a CPU. Set bf16: true, or remove fp16.")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, which would cut every pack into as many parts. Start a process for "
            "each: accelerate launch --config_file configs/accelerate/ddp.yaml …, or show it one GPU: "
            "CUDA_VISIBLE_DEVICES=0."
        )


def check_rewards_of(reward_funcs: Sequence[object], dataset: object, adds_columns: bool) -> None:
    """Raise unless every reward is a function that the columns of a dataset suffice for, or a reward model.

    Raises:
        ValueError, TypeError: names the reward.
    """
    columns = dataset.column_names if isinstance(dataset, Dataset | IterableDataset) and not adds_columns else None
    for func in reward_funcs:
        if isinstance(func, str):
            if func in REWARDS:
                raise ValueError(
                    f"reward_funcs holds {func!r}, which TRL would load as a reward model. Pass the function: "
                    f"sapo_trl.rewards.REWARDS[{func!r}]."
                )
            check_model_path(func)
        elif not callable(func):
            raise TypeError(f"reward_funcs holds {func!r}, which is neither a function nor a reward model.")
        elif not isinstance(func, nn.Module) and _has_rows_of(dataset, func):
            check_reward_call(_inside(func), columns)


def check_ahead(config: SAPOConfig, dataset: object, has_images: bool, trl_arguments: Mapping[str, object]) -> None:
    """Refuse `rollouts_ahead` where it could not generate what this process would.

    Raises:
        ValueError: with the reason.
    """
    given = [x for x in ("rollout_func", "tools", "environment_factory") if trl_arguments.get(x) is not None]
    reasons = {
        f"completions come from {', '.join(given)}": bool(given),
        "prompts have images": has_images,
        "the prompts of a stream are not known ahead": not isinstance(dataset, Dataset),
        f"the device is {config.device.type}, where it needs use_vllm: true": (
            config.device.type != "cpu" and not config.use_vllm
        ),
    }
    for reason, applies in reasons.items():
        if config.rollouts_ahead and applies:
            raise ValueError(f"rollouts_ahead=1 can't be used here: {reason}. Set rollouts_ahead: 0.")


def check_old_logprobs(config: SAPOConfig, has_rollout_func: bool) -> None:
    """Refuse old log-probs of an engine that gives none.

    Raises:
        ValueError: with what gives them.
    """
    if config.old_logprobs == "sampler" and not (config.use_vllm or config.rollouts_ahead or has_rollout_func):
        raise ValueError(
            "old_logprobs='sampler' needs log-probs from the rollout engine, and transformers' generate returns none. "
            "Set use_vllm: true or rollouts_ahead: 1, pass a rollout_func, or leave old_logprobs: trainer."
        )


def check_train_dataset(dataset: object, args: SAPOConfig, plan: BatchPlan, has_environment: bool = False) -> None:
    """Check the training set. Of streams only the columns are checked, because their length is unknown.

    Raises:
        TypeError: it is no dataset; only an environment can do without.
        ValueError: what `check_prompts` refuses, fewer prompts than one rollout takes, a stream without `max_steps`.
    """
    if dataset is None and has_environment:
        return
    if not isinstance(dataset, Dataset | IterableDataset):
        splits = f": take one of its splits, {', '.join(map(str, dataset))}" if isinstance(dataset, Mapping) else ""
        raise TypeError(f"train_dataset is a {type(dataset).__name__}, no Dataset or IterableDataset{splits}.")
    if isinstance(dataset, IterableDataset) and args.max_steps < 1 and not args.chooses_prompts:
        raise ValueError("the training set is a stream, whose length is unknown. Set max_steps.")
    check_prompts(dataset, "training set", has_environment)
    if isinstance(dataset, Dataset):
        check_enough_prompts(len(dataset), plan.prompts_per_rollout)


def check_tasks(dataset: Any, reward_funcs: Sequence[Any], which: str) -> None:
    """Where a column `task` says which rewards score a row, print how many rows each of them scores.

    Of streams nothing is known. An evaluation set (`which` is not "train") need not have rows for every reward.

    Raises:
        ValueError: a reward scores no row, or a row is scored by no reward.
    """
    owns = {name: own_tasks(func) for name, func in zip(unique_names(reward_funcs), reward_funcs, strict=True)}
    if not isinstance(dataset, Dataset) or "task" not in dataset.column_names or not any(owns.values()):
        return
    tasks = list(map(str, dataset["task"]))
    counts = Counter(tasks)
    held = ", ".join(f"{task} ({count} rows)" for task, count in counts.most_common(SHOWN))
    scored = {name: sum(counts[task] for task in own) if own else len(tasks) for name, own in owns.items()}
    say(f"{which}: the column task holds {held}; " + ", ".join(f"{name} scores {n}" for name, n in scored.items()))
    idle = next((name for name, num in scored.items() if num == 0 and which == "train"), None)
    if idle is not None:
        own = " or ".join(map(repr, owns[idle]))
        raise ValueError(
            f"{which}: the reward {idle} scores the rows whose task is {own}, and none is: the column task "
            f"holds {held}. Remove or rename that column, write {own} in it, or leave the reward out."
        )
    known = {task for own in owns.values() for task in own}
    left = [] if () in owns.values() else [i for i, task in enumerate(tasks) if task not in known]
    if left:
        raise ValueError(
            f"{which}: no reward scores {listed(left)}, whose task is {tasks[left[0]]!r}; rewards are for "
            f"{', '.join(sorted(known))}. Drop such rows, add a reward, or remove the column task."
        )


def _has_rows_of(dataset: object, func: object) -> bool:
    """Whether a reward for some datasets of a mixture is asked about rows of this one."""
    if not isinstance(func, TaskReward) or not isinstance(dataset, Dataset) or "task" not in dataset.column_names:
        return True
    return not {*func.tasks}.isdisjoint(dataset.unique("task"))


def check_whole_groups(reward_funcs: Sequence[Any], args: SAPOConfig, plan: BatchPlan) -> None:
    """Raise if a reward compares the completions of a prompt, and they would lie on several processes.

    Raises:
        ValueError: names the reward and the number that has to be a multiple.
    """
    num = args.num_generations or 1
    rows = plan.completions_per_rollout // plan.num_processes
    evaluated = args.eval_strategy != "no" and args.per_device_eval_batch_size % (args.num_generations_eval or num)
    for func in reward_funcs if plan.num_processes > 1 and (rows % num or evaluated) else ():
        if getattr(_inside(func), "compares_completions", False):
            what = f"a rollout's {rows} completions" if rows % num else "per_device_eval_batch_size"
            raise ValueError(
                f"the reward {reward_name(func)} compares the completions of a prompt, which must lie on one process: "
                f"{what} of a process must be a multiple of the {num} of a prompt. Set per_device_train_batch_size, "
                "num_mini_batches or per_device_eval_batch_size so."
            )


def _inside(func: Any) -> Any:
    """The reward function of a `TaskReward`; another one as it is."""
    return func.func if isinstance(func, TaskReward) else func


def check_prompts(dataset: object, which: str, has_environment: bool) -> None:
    """Raise unless the column `prompt` holds texts or messages, none of them empty; an environment can do without it.

    Raises:
        ValueError: names the set and the first row that is not right.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        return
    columns = dataset.column_names or []
    refuse_reserved(columns, f"the {which}")
    if columns and "prompt" not in columns and not has_environment:
        raise ValueError(
            f"the {which} has no column 'prompt'; it has {', '.join(columns)}.{did_you_mean('prompt', columns)}"
        )
    if not isinstance(dataset, Dataset) or "prompt" not in columns:
        return
    for row, prompt in enumerate(dataset["prompt"]):
        if not prompt:
            raise ValueError(f"in the {which} the prompt of row {row} is empty. Drop such rows.")
        if not isinstance(prompt, str) and not _are_messages(prompt):
            raise ValueError(
                f"in the {which} the prompt of row {row} is {prompt!r:.80}: give a text, or messages with role and "
                "content."
            )


def _are_messages(prompt: object) -> bool:
    """A message has a text or parts, or calls of tools."""
    return isinstance(prompt, list) and all(
        isinstance(x, dict) and "role" in x and (x.get("content") is not None or x.get("tool_calls")) for x in prompt
    )


def drop_unusable_answers(dataset: Dataset, rewards: Sequence[Any], max_unusable_frac: float) -> Dataset:
    """The training set without rows of mathematics whose answer can't be used (`check_golds`); prints their number.

    Only if a reward grades answers. Rank 0 checks, so that every process drops the same rows.

    Raises:
        ValueError: more than `max_unusable_frac` of the answers are unusable.
    """
    column = next((name for name in ("answer", "solution") if name in dataset.column_names), None)
    graders = [func for func in rewards if isinstance(_inside(func), AccuracyReward | CosineLength)]
    if column is None or not graders:
        return dataset
    tasks = dataset["task"] if "task" in dataset.column_names else None
    graded = {task for func in graders for task in (own_tasks(func) or (AccuracyReward.own_task,))}
    own = [i for i in range(len(dataset)) if tasks is None or tasks[i] in graded]
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
