"""From the raw columns of a dataset to the rows that training reads: `prompt`, `answer` and the kept columns."""

import re
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset

from sapo_trl.data.answers import answer_items, answer_text, decimal_cells
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.filters import Prompt, listed, prompt_key, say, short_enough, with_both, without_copies
from sapo_trl.data.pictures import content, picture_column, picture_lists, stored_pictures, unreadable
from sapo_trl.data.presets import Preset
from sapo_trl.errors import did_you_mean
from sapo_trl.vision import tokens_of_picture

# Usual names of the two columns, only for suggestions in errors.
USUAL_NAMES = {
    "prompt": ("problem", "question", "query", "instruction", "input"),
    "answer": ("final_answer", "solution", "ground_truth", "expected_answer", "target", "reward_model.ground_truth"),
}

_TEXT_ONLY = "Pictures go into a column `images`, and come before the text of the first user message."


def prepare(raw: Dataset, source: Preset, args: ScriptArguments, which: str, tokenizer: Any) -> Dataset:
    """`prompt`, `answer` and the kept columns of the rows that have both and pass the filters.

    Raises:
        ValueError: a column or a row that can't be used, with its name or number.
    """
    if len(raw) == 0:
        raise ValueError(f"{source.path} has no rows for {which}. Check the file, or the split.")
    prompts = _converted(raw, source, "prompt", lambda cell: _prompt(cell, source, args))
    answers = _converted(raw, source, "answer", lambda cell: _answer(cell, source))
    rows = with_both(prompts, answers, source, which)
    kept = raw.column_names if source.keep is None else source.keep
    column = picture_column(kept)
    pictures = None if column is None else picture_lists(raw, column, source.path)
    keys, tokens = [], []  # one pass over the pictures, which may be large
    for row, (prompt, own) in enumerate(zip(prompts, repeat([]) if pictures is None else stored_pictures(pictures))):
        keys.append(None if prompt is None else prompt_key(prompt, own))
        place, counted = f"{source.path}, row {row}:", own if args.max_prompt_tokens else []
        tokens.append(sum(_picture_tokens(x, place, tokenizer) for x in counted))
    rows = short_enough(rows, prompts, tokens, args, which, tokenizer)
    rows = without_copies(rows, keys, answers, which, args.drop_duplicates)
    several = [i for i, answer in enumerate(answers) if answer is not None and answer_items(answer)]
    if several:
        say(f"{which}: {len(several)} answers are lists ({listed(several)}), of which any one item is right; an answer")
        say('    that has to name all of them is one text, such as "2, 3"')
    taken = ("prompt", "answer", column)
    others = [name for name in raw.column_names if name in kept and name.strip().lower() not in taken]
    for name, used in (("prompt", source.prompt_column), ("answer", source.answer_column)):
        for other in raw.column_names:
            if other.strip().lower() == name and other != used.split(".")[0]:
                say(f"{which}: {name}s are those of the column {used}; the column {other} is left out")
    parts = [Dataset.from_dict({"prompt": prompts, "answer": answers})]
    if pictures is not None:
        parts.append(pictures)
    if others:
        parts.append(raw.select_columns(others))
    say(f"{which}: {len(rows)} prompts from {source.path}")
    return datasets.concatenate_datasets(parts, axis=1).select(rows)


def _picture_tokens(stored: Mapping[str, Any], place: str, tokenizer: Any) -> int:
    try:
        return tokens_of_picture(tokenizer, content(stored))
    except (OSError, SyntaxError) as error:
        raise unreadable(f"{place} a picture", stored, error) from error


def _converted(raw: Dataset, source: Preset, role: str, convert: Callable[[Any], Any]) -> list:
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
        hint = f" Did you mean {usual!r}?" if usual else did_you_mean(name, raw.column_names)
        columns = ", ".join(raw.column_names)
        raise ValueError(f"{source.path} has no column {name!r}, only {columns}.{hint} Set {role}_column.")
    cells, kind = raw[column][:], raw.data.schema.field(column).type
    for key in keys:
        wrong = next((c for c in cells if c is not None and not (isinstance(c, dict) and key in c)), None)
        if wrong is not None:
            inside = f"keys {', '.join(wrong)}" if isinstance(wrong, dict) else type(wrong).__name__
            raise ValueError(f"{source.path}: {role}_column={name} looks for {key!r} in {column}, which has {inside}.")
        cells = [None if cell is None else cell[key] for cell in cells]
        kind = kind.field(key).type if pa.types.is_struct(kind) else kind  # no struct: None in every row
    return decimal_cells(cells, kind)


def _answer(value: Any, source: Preset) -> str | None:
    text = answer_text(value, source.answer_column)
    return None if text is None else source.extract(text) or None


def _prompt(value: Any, source: Preset, args: ScriptArguments) -> Prompt | None:
    """Chat messages or text, with the template around the last user message and the system prompt before it."""
    column = source.prompt_column
    messages = _messages(value, column)
    if not messages or not messages[-1]["content"]:
        return None
    if any(not isinstance(m["content"], str | None) for m in messages):
        raise ValueError(f"{column} has a message whose content is not text. {_TEXT_ONLY}")
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message of {column} is from {messages[-1]['role']!r}, not from 'user'.")
    before, after = source.strip_prompt
    text = messages[-1]["content"].removeprefix(before).removesuffix(after)
    if not text.strip():
        return None
    if args.prompt_template is not None:
        text = args.prompt_template.replace("{prompt}", text)  # not str.format: \boxed{} has braces too
    messages[-1]["content"] = text
    if args.prompt_format == "plain":
        if len(messages) > 1:
            raise ValueError(f"{column} has {len(messages)} messages. Use prompt_format=chat.")
        return text
    if args.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise ValueError(f"{column} has a system message already. Leave system_prompt out.")
    return [{"role": "system", "content": args.system_prompt}, *messages]


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    """A prompt as chat messages of its own, each with role and content alone."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{\s*['\"](role|content)['\"]", value):
        raise ValueError(f"{column} is the text of a list of messages. Save the data as .jsonl, which keeps lists.")
    if isinstance(value, str | None):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or any(not isinstance(m, dict) or not {"role", "content"} <= {*m} for m in value):
        raise ValueError(f"{column} is neither text nor a list of messages with role and content.")
    return [{"role": m["role"], "content": m["content"]} for m in value]
