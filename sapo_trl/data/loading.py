r"""Loading of data: any Hub dataset or local file becomes rows with `prompt` and `answer`, before any model loads.

    name ──► preset, Hub id, file or folder ──► raw columns ──► prompt, answer ──► filters ──► train, eval

- `prompt` is a list of chat messages (`prompt_format=chat`) or text (`plain`); `answer` is text (`answer_text`).
- A column name may be dotted: `reward_model.ground_truth` is the key `ground_truth` of the column `reward_model`.
- The number of rows that are left out is printed, and an error is one sentence with the numbers and the nearest fix.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.files import SUFFIXES, local_files, read_files
from sapo_trl.data.filters import sampled, say, without_shared
from sapo_trl.data.gym import check_gym, gym_rows, is_gym
from sapo_trl.data.pictures import LISTS
from sapo_trl.data.presets import PRESETS, Preset
from sapo_trl.data.rows import prepare
from sapo_trl.errors import did_you_mean
from sapo_trl.eval_sets import EvalSet
from sapo_trl.mixture import MixedSet

Tokenizer = PreTrainedTokenizerBase | ProcessorMixin  # of text, and of text and pictures
PROMPT_FORMATS = ("chat", "plain")
DEFAULT_SPLITS = {"train": "train", "eval": "test"}


def load_split(
    args: ScriptArguments, which: str = "train", tokenizer: Tokenizer | None = None, seed: int = 0
) -> Dataset | None:
    """One prepared split, or None for `which="eval"` when no evaluation dataset is named.

    `eval_size` needs both splits at once: see `load_train_and_eval`.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: what is wrong, in one sentence.
    """
    if which not in DEFAULT_SPLITS:
        raise ValueError(f"which={which!r} is not a split of the arguments. Use 'train' or 'eval'.")
    check_arguments(args)
    if which == "eval" and args.eval_dataset_name is None and args.eval_dataset_split is None:
        return None
    rows = _load(args, which, tokenizer)
    return sampled(rows, args.max_samples, seed) if which == "train" else rows


def load_set(args: ScriptArguments, one: EvalSet, tokenizer: Tokenizer | None = None) -> Dataset:
    """The problems of an evaluation set, which names its dataset or split, or leaves both to the arguments."""
    split = one.dataset_split or (args.eval_dataset_split if one.dataset_name is None else None)
    name = one.dataset_name or args.eval_dataset_name
    rows = load_split(replace(args, eval_dataset_name=name, eval_dataset_split=split, eval_size=0), "eval", tokenizer)
    assert rows is not None  # `check_sets`
    return _first(rows, one)


def check_sets(args: ScriptArguments, sets: Mapping[str, EvalSet]) -> None:
    """Refuse sets without problems, and a held-out split that no set uses.

    Raises:
        ValueError: with the nearest fix.
    """
    sharing = [name for name, one in sets.items() if _shares(one)]
    is_there = bool(args.eval_size) or args.eval_dataset_name is not None or args.eval_dataset_split is not None
    if sharing and not is_there:
        raise ValueError(f"eval_sets.{sharing[0]} has no dataset_name. Give it one, or eval_dataset_name for all.")
    if sets and is_there and not sharing:
        raise ValueError("every set of eval_sets names a dataset: remove eval_dataset_name, its split and eval_size.")


def _shares(one: EvalSet) -> bool:
    """Whether a set's problems are those that the arguments hold out."""
    return one.dataset_name is None and one.dataset_split is None


def _first(rows: Dataset, one: EvalSet) -> Dataset:
    return rows if one.num_problems is None else rows.take(min(one.num_problems, len(rows)))


def load_train_and_eval(
    args: ScriptArguments,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    sets: Mapping[str, EvalSet] | None = None,
    mixture: Mapping[str, MixedSet] | None = None,
) -> tuple[Dataset, Dataset | dict[str, Dataset] | None]:
    """The training split and a disjoint evaluation split (None without `eval_size`, name or split for it).

    With `sets` it is one for each of them; those without a dataset of their own share what the arguments name. With a
    `mixture` the training split is all of its datasets, with their names in a column `task`; an evaluation set under
    the name of one of them has it too, and so the rewards of that one.
    No training row has the prompt of an evaluation row: such training rows are dropped and counted.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: what is wrong, in one sentence.
    """
    check_arguments(args)
    check_sets(args, sets or {})
    rows = _load_mixture(args, mixture, tokenizer, seed) if mixture else _load(args, "train", tokenizer)
    if args.eval_size:
        rows, held_out = _hold_out(rows, args.eval_size, seed)
    else:
        held_out = load_split(args, "eval", tokenizer)
    named = {
        name: _first(held_out, one) if held_out is not None and _shares(one) else load_set(args, one, tokenizer)
        for name, one in (sets or {}).items()
    }
    for name in named.keys() & (mixture or {}).keys():
        if "task" not in named[name].column_names:
            named[name] = named[name].add_column("task", [name] * len(named[name]))
    for problems in named.values() if sets else [held_out]:
        rows = rows if problems is None else without_shared(rows, problems)
    return sampled(rows, args.max_samples, seed), named or held_out


def arguments_of(args: ScriptArguments, one: MixedSet) -> ScriptArguments:
    """The arguments that load one dataset of a mixture: its own, the run's where it leaves them out."""
    own = {name: value for name, value in vars(one).items() if value is not None and name in vars(args)}
    return replace(args, **own, dataset_train_split=one.dataset_split, eval_size=0)


def _load_mixture(
    args: ScriptArguments, mixture: Mapping[str, MixedSet], tokenizer: Tokenizer | None, seed: int
) -> Dataset:
    """The rows of all datasets, one after the other; a column that one of them lacks is None there."""
    parts: list[Dataset] = []
    for name, one in mixture.items():
        own = arguments_of(args, one)
        rows = sampled(_load(own, "train", tokenizer), own.max_samples, seed)
        if "task" in rows.column_names:
            say(f"train: the column task of datasets.{name} gives way to the dataset's name")
            rows = rows.remove_columns("task")
        rows = rows.add_column("task", [name] * len(rows))
        for part, other in zip(parts, mixture):
            for column in set(part.column_names).intersection(rows.column_names):
                if part.features[column] != rows.features[column]:
                    raise ValueError(
                        f"the column {column} of datasets.{name} holds {rows.features[column]}, and that of "
                        f"datasets.{other} {part.features[column]}. Rename or remove one of them."
                    )
        parts.append(rows)
    if any("images" in part.column_names for part in parts):  # prompts of text have none, and not None
        empty = [Dataset.from_dict({"images": [[]] * len(part)}, datasets.Features(images=LISTS)) for part in parts]
        parts = [
            part if "images" in part.column_names else datasets.concatenate_datasets([part, none], axis=1)
            for part, none in zip(parts, empty, strict=True)
        ]
    return datasets.concatenate_datasets(parts)


def _load(args: ScriptArguments, which: str, tokenizer: Tokenizer | None) -> Dataset:
    if tokenizer is not None and args.prompt_format == "chat" and tokenizer.chat_template is None:
        raise ValueError("prompt_format=chat, and the tokenizer has no chat template. Use prompt_format=plain.")
    source = _source(args, which)
    raw = _read(source, which)
    if which == "eval" and args.eval_dataset_name not in (None, args.dataset_name):
        given = {"prompt": source.prompt_column, "answer": source.answer_column}
        names = raw.column_names
        own = [role for role, name in given.items() if role in names and name.split(".")[0] not in names]
        source = replace(source, **{f"{role}_column": role for role in own})
    return prepare(raw, source, args, which, tokenizer)


def _hold_out(rows: Dataset, size: int, seed: int) -> tuple[Dataset, Dataset]:
    if size >= len(rows):
        raise ValueError(
            f"eval_size={size} leaves nothing of {len(rows)} prompts to train on. Set less than {len(rows)}."
        )
    say(f"eval: {size} of {len(rows)} training prompts are held out (eval_size, seed {seed})")
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(sorted(order[size:])), rows.select(sorted(order[:size]))


def check_enough_prompts(num_prompts: int, prompts_per_rollout: int) -> None:
    """Refuse a training set from which not even one rollout can be drawn: training would end after 0 steps."""
    if num_prompts < prompts_per_rollout:
        raise ValueError(
            f"The training set has {num_prompts} prompts and one rollout takes {prompts_per_rollout} different ones, "
            f"so that no step would run. Give at least {prompts_per_rollout} prompts, or make the rollout smaller: "
            "prompts per rollout = per_device_train_batch_size × processes × steps_per_generation / num_generations."
        )


def count_prompts(args: ScriptArguments) -> int | None:
    """Prompts of the training set, before rows are filtered, at most `max_samples`; None where only the Hub could tell.

    Raises:
        ValueError, OSError: a local file that can't be read.
    """
    source = None if args.dataset_name is None else _source(args, "train")
    here = source is not None and (is_gym(source.path) or Path(source.path).expanduser().exists())
    counts = [args.max_samples, len(_read(source, "train")) - args.eval_size if source is not None and here else None]
    return min((count for count in counts if count is not None), default=None)


# ---- which dataset -------------------------------------------------------------------------------------------------


def check_arguments(args: ScriptArguments) -> None:
    """Refuse what is wrong in the arguments alone.

    Raises:
        ValueError: with the nearest fix.
    """
    if args.prompt_format not in PROMPT_FORMATS:
        raise ValueError(
            f"prompt_format={args.prompt_format!r} is not known.{did_you_mean(args.prompt_format, PROMPT_FORMATS)} "
            f"Use one of {', '.join(PROMPT_FORMATS)}."
        )
    for name in (args.dataset_name, args.eval_dataset_name):
        if name is not None and is_gym(name):
            check_gym(name)
    if args.prompt_template is not None and "{prompt}" not in args.prompt_template:
        raise ValueError("prompt_template has no {prompt}, so that every prompt would be the same text. Add {prompt}.")
    if args.system_prompt is not None and args.prompt_format == "plain":
        raise ValueError("system_prompt needs chat messages, and prompt_format=plain has none. Use prompt_format=chat.")
    for name, value, least in (
        ("eval_size", args.eval_size, 0),
        ("max_samples", args.max_samples, 1),
        ("max_prompt_tokens", args.max_prompt_tokens, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}={value} is less than {least}. Set it to {least} or more, or leave it out.")
    if args.eval_size and (args.eval_dataset_name is not None or args.eval_dataset_split is not None):
        raise ValueError(
            f"eval_size={args.eval_size} holds out training prompts, and eval_dataset_name={args.eval_dataset_name}, "
            f"eval_dataset_split={args.eval_dataset_split} name other ones. Keep one of the two."
        )


def _source(args: ScriptArguments, which: str) -> Preset:
    """The dataset that the arguments name, with its columns and split.

    `dataset_config` and the column names describe `dataset_name`. Another evaluation dataset shares the column names,
    unless it is a preset, which knows its own, or lacks them and has a column `prompt` or `answer`.
    """
    name, split = args.dataset_name, args.dataset_train_split
    if which == "eval":
        name, split = args.eval_dataset_name or args.dataset_name, args.eval_dataset_split
    if name is None:
        raise ValueError(f"dataset_name is not set. Use a preset ({', '.join(PRESETS)}), a Hub id, or a local file.")
    preset = PRESETS.get(name.lower())
    if preset is not None and Path(name).exists():
        raise ValueError(
            f"{name} is a preset ({preset.path} on the Hub) and also a file or folder here. Write ./{name} for the "
            f"local one; for the preset, rename the local one, or write {preset.path} and its columns."
        )
    source = preset or Preset(name, split=None, keep=None)
    source = replace(source, split=split or (source.split if which == "train" else source.eval_split))
    if preset is not None and source.split is None:
        raise ValueError(
            f"{name} has no held-out split. Use eval_size to hold out training prompts, or another dataset."
        )
    if name == args.dataset_name:
        source = replace(source, config=args.dataset_config or source.config)
    if name == args.dataset_name or preset is None:
        source = replace(source, prompt_column=args.prompt_column or source.prompt_column)
        if args.answer_column is not None:  # the preset's extraction is for the preset's own column
            source = replace(source, answer_column=args.answer_column, extract=str.strip)
    return source


def _read(source: Preset, which: str) -> Dataset:
    name, default_split = source.path, DEFAULT_SPLITS[which]
    if is_gym(name):
        if source.config is not None or source.split is not None:
            raise ValueError(f"{name} has neither splits nor a dataset_config: write {name.split('(')[0]}(size=1000).")
        return gym_rows(name, which)
    if name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        if source.config is not None:
            raise ValueError(f"dataset_config={source.config} is for Hub datasets, and {name} is local. Leave it out.")
        files = local_files(Path(name).expanduser(), source.split, default_split)
        if len(files) > 1:
            say(f"{which}: reading {', '.join(p.name for p in files)} of {name}")
        return read_files(files)
    if "/" not in name:
        raise ValueError(
            f"{name!r} is not a preset.{did_you_mean(name.lower(), PRESETS)} Use a preset ({', '.join(PRESETS)}), a "
            f"Hub id with its owner (owner/{name}), or a local {', '.join(SUFFIXES)} file or folder."
        )
    return _read_hub(name, source.config, source.split or default_split)


def _read_hub(name: str, config: str | None, split: str) -> Dataset:
    try:
        return datasets.load_dataset(name, config, split=split)
    except ConnectionError as error:
        raise ConnectionError(
            f"{name} can't be reached on the Hub ({error}). Without a network, give dataset_name a local "
            f"{', '.join(SUFFIXES)} file, or a folder of them."
        ) from error
    except DatasetNotFoundError as error:
        raise ValueError(
            f"{name} is not on the Hub, or is private. Check the name, or log in: hf auth login."
        ) from error
    except ValueError as error:  # an unknown configuration or split; datasets lists the ones there are
        raise ValueError(f"{name} (config {config}, split {split}) can't be loaded: {error}") from error
