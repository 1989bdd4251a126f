"""From what TRL hands to a reward function to plain text: a string, or the last message of the assistant."""

import ast
import json
from contextlib import suppress

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def message_text(content: object) -> str:
    """Text of one message: a string, None (a pure tool call) or a list of `{"type": "text", "text": ...}` blocks."""
    if isinstance(content, list):
        blocks = [block for block in content if isinstance(block, dict) and block.get("type") == "text"]
        return "".join(str(block.get("text", "")) for block in blocks)
    return content if isinstance(content, str) else ""


def completion_text(completion: str | list[dict]) -> str:
    """Text of a completion, of whichever of TRL's two shapes."""
    messages = [message for message in completion if isinstance(message, dict)] if isinstance(completion, list) else []
    spoken = [message for message in messages if message.get("role", "assistant") == "assistant"]
    return message_text(spoken[-1].get("content")) if spoken else message_text(completion)


def opens_thought(prompt: str | list[dict]) -> bool:
    """Whether the prompt ends with an opened thought, as the chat template of Qwen3-Thinking's does."""
    text = prompt if isinstance(prompt, str) else message_text(prompt[-1]["content"]) if prompt else ""
    return text.rstrip().endswith(THINK_OPEN)


def prefilled_thoughts(num_rows: int, prompts: list | None, prefilled: bool | None) -> list[bool]:
    """Per row: was `<think>` part of the prompt? An explicit `prefilled` wins over what the prompts' text shows."""
    if prefilled is not None or prompts is None:
        return [bool(prefilled)] * num_rows
    return [opens_thought(prompt) for prompt in prompts]


def visible_part(text: str, prefilled: bool = False) -> str:
    """What the reader sees: the text after the last closed thought and before one that is still open.

    >>> visible_part("<think>maybe 4</think>It is 5."), visible_part("<think>maybe 4"), visible_part("maybe", True)
    ('It is 5.', '', '')
    """
    _, closed, tail = text.rpartition(THINK_CLOSE)
    return "" if prefilled and not closed else tail.partition(THINK_OPEN)[0]


def listed_texts(text: str) -> list[str] | None:
    r"""The items of `['3', '\\frac{1}{2}']`: a list of texts that Python or JSON wrote out. None for any other text.

    Only what comes out the same when it is written again: a hand-written backslash would be read as an escape.
    """
    if not text.startswith(("['", '["')):
        return None
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        items = ast.literal_eval(text)
        forms = (str(items), json.dumps(items), json.dumps(items, ensure_ascii=False))
        if "".join(text.split()) in ("".join(form.split()) for form in forms):
            return items if all(isinstance(item, str) for item in items) else None
    return None
