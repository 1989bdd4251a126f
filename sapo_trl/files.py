"""Writing small files whole or not at all, and keeping secrets out of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MASK = "***"
# Names whose text is a secret. `eos_token` and its like are words of a vocabulary, `max_prompt_tokens` is a count.
_SECRET = (
    r"(?:[\w-]*[_-])?(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)"
    r"(?:token|(?:api|access|secret)[_-]?key|secret|password|passwd|credentials?|authorization)"
)
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
_SECRETS_IN_TEXT = (
    # "token": "..." of JSON, or of a dictionary that was printed
    (re.compile(rf"""(["']{_SECRET}["']\s*:\s*)(["'])(?:\\.|(?!\2).)+\2""", re.IGNORECASE), rf"\1\2{MASK}\2"),
    # https://user:password@host, and ?token=... of a URL
    (re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"), rf"\1{MASK}"),
    (re.compile(rf"([?&](?:{_SECRET}|key|signature)=)[^&#\s\"']+", re.IGNORECASE), rf"\1{MASK}"),
    # keys that show by their beginning what they are: Hugging Face, OpenAI and alike, GitHub, Weights & Biases
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|wandb_v1_)[A-Za-z0-9_-]{16,}"), MASK),
)


def write_text(path: str | Path, text: str, errors: str = "strict") -> None:
    """Write UTF-8 text, its folders made; a reader, or a run that is stopped, sees the old file or the new one.

    Args:
        errors: what to do with characters that UTF-8 lacks, as for `str.encode`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", errors=errors)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    """`write_text` of JSON: two spaces of indentation and a newline at the end."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def way_back(run_folder: Path) -> str:
    """A sentence on where a run that has failed can go on."""
    steps = [int(path.name.partition("-")[2]) for path in run_folder.glob("checkpoint-*[0-9]") if path.is_dir()]
    if not steps:
        return f"{run_folder} holds no checkpoint to go on from."
    return f"checkpoint-{max(steps)} is whole: go on with resume_from_checkpoint: true."


def masked(value: Any) -> Any:
    """The same value with every secret in it replaced by `***`: what is written to a file or printed goes through here.

    Secrets are texts under a name such as `hub_token`, `api_key` or `password` (in a mapping, in JSON text, or after an
    option in a list of command-line words), passwords and keys inside URLs, and keys that show what they are.

    >>> masked({"model_init_kwargs": {"token": "abc"}, "eos_token": "</s>", "hub_token": None})
    {'model_init_kwargs': {'token': '***'}, 'eos_token': '</s>', 'hub_token': None}
    >>> masked(["--hub_token", "abc", "--wandb-api-key=abc", "https://me:abc@host/?token=abc&page=2"])
    ['--hub_token', '***', '--wandb-api-key=***', 'https://me:***@host/?token=***&page=2']
    """
    if isinstance(value, Mapping):
        return {name: MASK if _is_secret(str(name), inside) else masked(inside) for name, inside in value.items()}
    if isinstance(value, list | tuple):
        return [MASK if _follows_secret(value, i) else masked(item) for i, item in enumerate(value)]
    return _masked_text(value) if isinstance(value, str) else value


def _is_secret(name: str, value: object) -> bool:
    return isinstance(value, str) and value != "" and _SECRET_NAME.fullmatch(name) is not None


def _follows_secret(words: list | tuple, i: int) -> bool:
    """Whether word `i` of a command line is the value of a secret option: `--hub_token abc`."""
    before = words[i - 1] if i else None
    return isinstance(before, str) and before.startswith("--") and _is_secret(before[2:], words[i])


def _masked_text(text: str) -> str:
    option, equals, value = text.partition("=")
    if equals and option.startswith("--") and _is_secret(option[2:], value):
        return f"{option}={MASK}"
    for pattern, replacement in _SECRETS_IN_TEXT:
        text = pattern.sub(replacement, text)
    return text
