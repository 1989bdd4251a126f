"""Rows that are left out: empty, too long, repeated, or shared with the evaluation set.

Their counts and row numbers are printed. Texts of prompts and answers are not, because datasets are often private.
"""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.pictures import picture_key, stored_pictures
from sapo_trl.data.presets import Preset
from sapo_trl.vision import text_tokenizer

Prompt = str | list[dict[str, str]]  # raw text, or chat messages
SHOWN = 5  # row numbers in a line

# Full-width Latin letters, digits and signs, as Chinese and Japanese texts write them, and the full-width space
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def say(line: str) -> None:
    """Print on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def say_left_over(num_prompts: int, prompts_per_rollout: int) -> None:
    """Tell of the prompts of a pass over the training set that do not fill a rollout."""
    if left := num_prompts % prompts_per_rollout:
        say(f"train: a rollout takes {prompts_per_rollout} prompts, so each pass leaves out {left} of {num_prompts}")


def listed(rows: Sequence[int]) -> str:
    """Row numbers for a sentence, the first few.

    >>> listed([7]), listed([3, 4]), listed(range(9))
    ('row 7', 'rows 3, 4', 'rows 0, 1, 2, 3, 4 and 4 more')
    """
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:SHOWN]))}{more}"


def with_both(prompts: Sequence[Prompt | None], answers: Sequence[str | None], source: Preset, which: str) -> list[int]:
    """The rows that have a prompt and an answer.

    Raises:
        ValueError: more than half of them lack one.
    """
    no_prompt = [i for i, prompt in enumerate(prompts) if prompt is None]
    no_answer = [i for i, answer in enumerate(answers) if answer is None and prompts[i] is not None]
    counts = [
        f"{len(rows)} without {role} ({column}; the first is row {rows[0]})"
        for role, column, rows in (
            ("a prompt", source.prompt_column, no_prompt),
            ("an answer", source.answer_column, no_answer),
        )
        if rows
    ]
    if counts:
        line = f"{which}: {source.path} has {' and '.join(counts)} among {len(prompts)} rows"
        if len(no_prompt) + len(no_answer) > len(prompts) / 2:
            raise ValueError(f"{line}: more than half. Check prompt_column and answer_column.")
        say(f"{line}; they are dropped")
    return [i for i, answer in enumerate(answers) if answer is not None and prompts[i] is not None]


def short_enough(
    rows: list[int], prompts: Sequence, pictures: Sequence[int], args: ScriptArguments, which: str, tokenizer: Any
) -> list[int]:
    """The rows whose prompt, under the chat template, has at most `max_prompt_tokens` tokens, those of its pictures
    included.

    Args:
        pictures: tokens of every prompt's pictures.
        tokenizer: or the processor of a vision-language model.

    Raises:
        ValueError: no row is short enough, or there is no tokenizer to count with.
    """
    limit, chat = args.max_prompt_tokens, args.prompt_format == "chat"
    if limit is None or not rows:
        return rows
    if tokenizer is None:
        raise ValueError(f"max_prompt_tokens={limit} counts tokens: pass the model's tokenizer.")
    texts, tokenizer = [prompts[i] for i in rows], text_tokenizer(tokenizer)
    if chat:
        texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in texts]
    ids = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    lengths = [len(own) + pictures[i] for i, own in zip(rows, ids, strict=True)]
    long = [i for i, length in zip(rows, lengths) if length > limit]
    if len(long) == len(rows):
        raise ValueError(
            f"{which}: all {len(rows)} prompts are longer than max_prompt_tokens={limit}; the shortest has "
            f"{min(lengths)} tokens. Set max_prompt_tokens={max(lengths)} to keep every prompt."
        )
    if long:
        say(
            f"{which}: {len(long)} of {len(rows)} prompts are longer than max_prompt_tokens={limit} (the longest has "
            f"{max(lengths)}), {listed(long)}; they are dropped"
        )
    return [i for i, length in zip(rows, lengths) if length <= limit]


def prompt_key(prompt: Prompt, pictures: Sequence[Mapping[str, Any]] = ()) -> str:
    """A key for comparing prompts: every message except the system's, without case, width and white space.

    The whole conversation counts, so two chats that end in the same question are different prompts; so does every byte
    of its pictures.
    """
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt if m["role"] != "system")
    text = " ".join(unicodedata.normalize("NFC", prompt.translate(_NARROW)).casefold().split())
    return f"{text} {picture_key(pictures)}" if pictures else text


def prompt_keys(dataset: Dataset) -> list[str]:
    """`prompt_key` of every row."""
    return [prompt_key(*pair) for pair in zip(dataset["prompt"], stored_pictures(dataset), strict=True)]


def without_copies(rows: list[int], keys: Sequence, answers: Sequence, which: str, drop: bool) -> list[int]:
    """Print how many prompts occur more than once; returns the rows that are kept, which are all unless `drop`.

    All rows of a prompt except its first are dropped, and the first too if the answers of the rows differ.

    Args:
        keys: `prompt_key` of every prompt.
    """
    groups: dict[str, list[int]] = {}
    for i in rows:
        groups.setdefault(keys[i], []).append(i)
    repeated = [group for group in groups.values() if len(group) > 1]
    if not repeated:
        return rows
    copies = sorted(i for group in repeated for i in group[1:])
    unlike = [group for group in repeated if len({answers[i] for i in group}) > 1]
    line = f"{which}: {len(repeated)} prompts stand more than once ({len(copies)} copies, {listed(copies)})"
    if unlike:
        line += f", {len(unlike)} of them with different answers (the first: {listed(unlike[0])})"
    if not drop:
        say(f"{line}; they are kept. drop_duplicates: true drops the copies, and prompts with different answers")
        return rows
    say(f"{line}; the copies, and prompts with different answers, are dropped")
    gone = {*copies, *(group[0] for group in unlike)}
    return [i for i in rows if i not in gone]


def without_shared(train: Dataset, held_out: Dataset) -> Dataset:
    """The training rows whose prompt is not an evaluation prompt.

    Raises:
        ValueError: none is left.
    """
    seen = set(prompt_keys(held_out))
    kept = [i for i, key in enumerate(prompt_keys(train)) if key not in seen]
    if not kept:
        raise ValueError(
            f"All {len(train)} training prompts are among the {len(held_out)} evaluation prompts. Name another "
            "evaluation dataset or split, or use eval_size."
        )
    if len(kept) < len(train):
        say(f"train: {len(train) - len(kept)} of {len(train)} prompts are also evaluation prompts; they are dropped")
    return train.select(kept)


def sampled(rows: Dataset, max_samples: int | None, seed: int) -> Dataset:
    """A random sample rather than the first rows: many datasets are sorted by subject or difficulty."""
    if max_samples is None or max_samples >= len(rows):
        return rows
    say(f"train: {max_samples} of {len(rows)} prompts are kept (max_samples, seed {seed})")
    return rows.select(sorted(np.random.default_rng(seed).permutation(len(rows))[:max_samples]))
