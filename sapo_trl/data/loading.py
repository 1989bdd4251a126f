r"""Data: any Hub dataset or local file becomes rows with `prompt` and `answer`, before any model loads.

    name ──► preset, Hub id, file or folder ──► raw columns ──► prompt, answer ──► filters ──► train, eval

- `prompt` is a list of chat messages (`prompt_format=chat`) or text (`plain`); `answer` is text (`answer_text`).
- A column name may be dotted: `reward_model.ground_truth` is the key `ground_truth` of the column `reward_model`.
- Every row that is left out is counted and printed, and an error is one sentence with the numbers and the nearest fix.
  No prompt or answer text is ever printed: datasets are often private.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sapo_trl.cli.arguments import ScriptArguments
from sapo_trl.data.files import SUFFIXES, answer_text, local_files, nearest, read_files
from sapo_trl.data.presets import PRESETS, Preset

PROMPT_FORMATS = ("chat", "plain")
DEFAULT_SPLITS = {"train": "train", "eval": "test"}
# What other datasets call the two columns: only ever a suggestion in an error.
USUAL_NAMES = {
    "prompt": ("problem", "question", "query", "instruction", "input"),
    "answer": ("final_answer", "solution", "ground_truth", "expected_answer", "target", "reward_model.ground_truth"),
}


def load_split(
    args: ScriptArguments, which: str = "train", tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0
) -> Dataset | None:
    """One prepared split, or None for `which="eval"` when no evaluation dataset is named.

    `eval_size` needs both splits at once: see `load_train_and_eval`.
    """
    if which not in ("train", "eval"):
        raise ValueError(f"which={which!r} is not a split of the arguments. Use 'train' or 'eval'.")
    _check_arguments(args, tokenizer)
    source = _source(args, which)
    if source is None:
        return None
    rows = _prepare(_read(source, which), source, args, which, tokenizer)
    return _limit(rows, args.max_samples, seed) if which == "train" else rows


def load_train_and_eval(
    args: ScriptArguments, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0
) -> tuple[Dataset, Dataset | None]:
    """The training split and a disjoint evaluation split (None without `eval_size`, name or split for it).

    No training row has the prompt text of an evaluation row: such training rows are dropped and counted.
    """
    _check_arguments(args, tokenizer)
    source = _source(args, "train")
    rows = _prepare(_read(source, "train"), source, args, "train", tokenizer)
    if args.eval_size:
        rows, held_out = _hold_out(rows, args.eval_size, seed)
    else:
        held_out = load_split(args, "eval", tokenizer)
    if held_out is not None:
        rows = _drop_shared(rows, held_out)
    return _limit(rows, args.max_samples, seed), held_out


def check_enough_prompts(dataset: Dataset, prompts_per_rollout: int) -> None:
    """Refuse a training set from which not even one rollout can be drawn: training would end after 0 steps."""
    if len(dataset) < prompts_per_rollout:
        raise ValueError(
            f"The training set has {len(dataset)} prompts and one rollout takes {prompts_per_rollout} different ones, "
            f"so that no step would run. Give at least {prompts_per_rollout} prompts, or make the rollout smaller: "
            "prompts per rollout = per_device_train_batch_size × processes × steps_per_generation / num_generations."
        )


# ---- which dataset -------------------------------------------------------------------------------------------------


def _check_arguments(args: ScriptArguments, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if args.prompt_format not in PROMPT_FORMATS:
        raise ValueError(
            f"prompt_format={args.prompt_format!r} is not known.{nearest(args.prompt_format, PROMPT_FORMATS)} "
            f"Use one of {', '.join(PROMPT_FORMATS)}."
        )
    if args.prompt_template is not None and "{prompt}" not in args.prompt_template:
        raise ValueError("prompt_template has no {prompt}, so that every prompt would be the same text. Add {prompt}.")
    if args.system_prompt is not None and args.prompt_format == "plain":
        raise ValueError("system_prompt needs chat messages, and prompt_format=plain has none. Use prompt_format=chat.")
    if args.max_prompt_tokens is not None and tokenizer is None:
        raise ValueError(f"max_prompt_tokens={args.max_prompt_tokens} counts tokens: pass the model's tokenizer.")
    if tokenizer is not None and args.prompt_format == "chat" and tokenizer.chat_template is None:
        raise ValueError("prompt_format=chat, and the tokenizer has no chat template. Use prompt_format=plain.")
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


def _source(args: ScriptArguments, which: str) -> Preset | None:
    """The dataset that the arguments name with its columns and split; None for an evaluation set that isn't named.

    `dataset_config` and the column names describe `dataset_name`. Another evaluation dataset shares the column names,
    unless it is a preset, which knows its own.
    """
    name, split = args.dataset_name, args.dataset_train_split
    if which == "eval":
        name, split = args.eval_dataset_name or args.dataset_name, args.eval_dataset_split
        if args.eval_dataset_name is None and split is None:
            return None
    if name is None:
        raise ValueError(f"dataset_name is not set. Use a preset ({', '.join(PRESETS)}), a Hub id, or a local file.")
    preset = PRESETS.get(name.lower())
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


def _say(line: str) -> None:
    """Print on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


# ---- reading -------------------------------------------------------------------------------------------------------


def _read(source: Preset, which: str) -> Dataset:
    name, default_split = source.path, DEFAULT_SPLITS[which]
    if name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        if source.config is not None:
            raise ValueError(f"dataset_config={source.config} is for Hub datasets, and {name} is local. Leave it out.")
        files = local_files(Path(name).expanduser(), source.split, default_split)
        if len(files) > 1:
            _say(f"{which}: reading {', '.join(p.name for p in files)} of {name}")
        return read_files(files)
    if "/" not in name:
        raise ValueError(
            f"{name!r} is not a preset.{nearest(name.lower(), PRESETS)} Use a preset ({', '.join(PRESETS)}), a Hub id "
            f"with its owner (owner/{name}), or a local {', '.join(SUFFIXES)} file or folder."
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
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"{name} is not on the Hub, or is private. Check the name, or log in: hf auth login."
        ) from error
    except ValueError as error:  # an unknown configuration or split; datasets lists the ones there are
        raise ValueError(f"{name} (config {config}, split {split}) can't be loaded: {error}") from error


# ---- rows → prompt, answer -----------------------------------------------------------------------------------------


def _prepare(
    raw: Dataset, source: Preset, args: ScriptArguments, which: str, tokenizer: PreTrainedTokenizerBase | None
) -> Dataset:
    """`prompt`, `answer` and the kept columns of the rows that have both and pass the length filter."""
    if len(raw) == 0:
        raise ValueError(f"{source.path} has no rows for {which}. Check the file, or the split.")
    prompts = _texts(raw, source, "prompt", lambda value: _prompt(value, source, args))
    answers = _texts(raw, source, "answer", lambda value: _answer(value, source))
    no_prompt = [i for i, prompt in enumerate(prompts) if prompt is None]
    no_answer = [i for i, answer in enumerate(answers) if answer is None and prompts[i] is not None]
    _report_empty(len(raw), no_prompt, no_answer, source, which)
    left_out = {*no_prompt, *no_answer}
    rows = [i for i in range(len(raw)) if i not in left_out]
    if args.max_prompt_tokens is not None:
        rows = _short_enough(rows, prompts, args, which, tokenizer)
    others = raw.column_names if source.keep is None else source.keep
    others = [name for name in raw.column_names if name in others and name not in ("prompt", "answer")]
    parts = [Dataset.from_dict({"prompt": prompts, "answer": answers})]
    if others:
        parts.append(raw.select_columns(others))
    _say(f"{which}: {len(rows)} prompts from {source.path}")
    return datasets.concatenate_datasets(parts, axis=1).select(rows)


def _texts(raw: Dataset, source: Preset, role: str, convert: Callable) -> list:
    """`convert` of every cell of the prompt or answer column; an error says which row."""
    texts = []
    for i, cell in enumerate(_cells(raw, source, role)):
        try:
            texts.append(convert(cell))
        except ValueError as error:
            raise ValueError(f"{source.path}, row {i}: {error}") from error
    return texts


def _cells(raw: Dataset, source: Preset, role: str) -> list:
    """The cells of a column, dots in its name leading into nested columns."""
    name = source.prompt_column if role == "prompt" else source.answer_column
    column, *keys = [name] if name in raw.column_names else name.split(".")
    if column not in raw.column_names:
        usual = next((n for n in USUAL_NAMES[role] if n.split(".")[0] in raw.column_names), None)
        hint = nearest(name, raw.column_names) or (f" Did you mean {usual}?" if usual else "")
        columns = ", ".join(raw.column_names)
        raise ValueError(f"{source.path} has no column {name!r}, only {columns}.{hint} Set {role}_column.")
    cells = raw[column][:]
    for key in keys:
        wrong = next((c for c in cells if c is not None and not (isinstance(c, dict) and key in c)), None)
        if wrong is not None:
            inside = f"keys {', '.join(wrong)}" if isinstance(wrong, dict) else type(wrong).__name__
            raise ValueError(f"{source.path}: {role}_column={name} looks for {key!r} in {column}, which has {inside}.")
        cells = [None if cell is None else cell[key] for cell in cells]
    return cells


def _answer(value, source: Preset) -> str | None:
    text = answer_text(value, source.answer_column)
    return None if text is None else source.extract(text) or None


def _prompt(value, source: Preset, args: ScriptArguments) -> list[dict] | str | None:
    """Chat messages or text, with the template around the last user message and the system prompt before it."""
    messages = [{"role": "user", "content": value}] if isinstance(value, str | None) else value
    if not isinstance(messages, list) or any(
        not isinstance(m, dict) or not {"role", "content"} <= {*m} for m in messages
    ):
        raise ValueError(f"{source.prompt_column} is neither text nor a list of messages with role and content.")
    if not messages or not messages[-1]["content"]:
        return None
    if any(not isinstance(m["content"], str | None) for m in messages):
        raise ValueError(
            f"{source.prompt_column} has a message whose content is not text, and this loader reads text only. Images "
            "go through SAPOTrainer itself, in a column `images`."
        )
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"the last message of {source.prompt_column} is from {messages[-1]['role']!r}, not from 'user'."
        )
    before, after = source.strip_prompt
    text = messages[-1]["content"].removeprefix(before).removesuffix(after)
    if not text.strip():
        return None
    if args.prompt_template is not None:
        text = args.prompt_template.replace("{prompt}", text)  # not str.format: \boxed{} has braces too
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    messages[-1]["content"] = text
    if args.prompt_format == "plain":
        if len(messages) > 1:
            raise ValueError(f"{source.prompt_column} has {len(messages)} messages. Use prompt_format=chat.")
        return text
    if args.system_prompt is not None:
        if messages[0]["role"] == "system":
            raise ValueError(f"{source.prompt_column} has a system message already. Leave system_prompt out.")
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    return messages


def _report_empty(total: int, no_prompt: list[int], no_answer: list[int], source: Preset, which: str) -> None:
    """Count the rows without a prompt or an answer; refuse when that is more than half of them."""
    counts = [
        f"{len(rows)} without {role} ({column}; the first is row {rows[0]})"
        for role, column, rows in (
            ("a prompt", source.prompt_column, no_prompt),
            ("an answer", source.answer_column, no_answer),
        )
        if rows
    ]
    if not counts:
        return
    line = f"{which}: {source.path} has {' and '.join(counts)} among {total} rows"
    if len(no_prompt) + len(no_answer) > total / 2:
        raise ValueError(f"{line}: more than half. Check prompt_column and answer_column.")
    _say(f"{line}; they are dropped")


def _short_enough(
    rows: list[int], prompts: list, args: ScriptArguments, which: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The rows whose prompt, under the chat template, has at most `max_prompt_tokens` tokens."""
    chat = args.prompt_format == "chat"
    texts = [prompts[i] for i in rows]
    if chat:
        texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in texts]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=not chat)["input_ids"]]
    short = [i for i, length in zip(rows, lengths) if length <= args.max_prompt_tokens]
    if not short:
        raise ValueError(
            f"{which}: all {len(rows)} prompts are longer than max_prompt_tokens={args.max_prompt_tokens}; the "
            f"shortest has {min(lengths)} tokens. Set max_prompt_tokens={max(lengths)} to keep every prompt."
        )
    if len(short) < len(rows):
        _say(
            f"{which}: {len(rows) - len(short)} of {len(rows)} prompts are longer than max_prompt_tokens="
            f"{args.max_prompt_tokens} (the longest has {max(lengths)}); they are dropped"
        )
    return short


# ---- train and eval ------------------------------------------------------------------------------------------------


def _hold_out(rows: Dataset, size: int, seed: int) -> tuple[Dataset, Dataset]:
    if size >= len(rows):
        raise ValueError(
            f"eval_size={size} leaves nothing of {len(rows)} prompts to train on. Set less than {len(rows)}."
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(sorted(order[size:])), rows.select(sorted(order[:size]))


def _drop_shared(train: Dataset, held_out: Dataset) -> Dataset:
    seen = {_user_text(prompt) for prompt in held_out["prompt"]}
    kept = [i for i, prompt in enumerate(train["prompt"]) if _user_text(prompt) not in seen]
    if not kept:
        raise ValueError(
            f"All {len(train)} training prompts are among the {len(held_out)} evaluation prompts. Name another "
            "evaluation dataset or split, or use eval_size."
        )
    if len(kept) < len(train):
        _say(f"train: {len(train) - len(kept)} of {len(train)} prompts are also evaluation prompts; they are dropped")
    return train.select(kept)


def _user_text(prompt: list[dict] | str) -> str:
    """What two prompts are compared by: the last user message, however its white space is laid out."""
    return " ".join((prompt if isinstance(prompt, str) else prompt[-1]["content"]).split())


def _limit(rows: Dataset, max_samples: int | None, seed: int) -> Dataset:
    """A random sample rather than the first rows: many datasets are sorted by subject or difficulty."""
    if max_samples is None or max_samples >= len(rows):
        return rows
    _say(f"train: {max_samples} of {len(rows)} prompts are kept (max_samples, seed {seed})")
    return rows.select(sorted(np.random.default_rng(seed).permutation(len(rows))[:max_samples]))
