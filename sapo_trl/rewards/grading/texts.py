"""From what TRL hands to a reward function to plain text.

A completion is a string, or a list of chat messages whose last assistant message is what the reader sees. Rewards work
on text only, so this small room is the one place that knows both shapes. It also knows where a thought ends: chat
templates such as Qwen3-Thinking's put the opening `<think>` into the prompt, and the completion then holds only
`thought</think>answer`.
"""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


def message_text(content: object) -> str:
    """Text of one message: a string, None (a pure tool call) or a list of `{"type": "text", "text": ...}` blocks."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(block["text"] for block in content if block["type"] == "text")
    return ""


def completion_text(completion: str | list[dict]) -> str:
    """Text of a completion, of whichever of TRL's two shapes.

    >>> completion_text([{"role": "assistant", "content": "2"}]), completion_text("3")
    ('2', '3')
    """
    if isinstance(completion, str):
        return completion
    spoken = [message for message in completion if "role" not in message or message["role"] == "assistant"]
    return message_text(spoken[-1]["content"]) if spoken else ""


def opens_thought(prompt: str | list[dict]) -> bool:
    """Whether the prompt itself ends with an opened thought, which the completion goes on with.

    >>> opens_thought("<|im_start|>assistant\\n<think>\\n"), opens_thought("What is 1 + 1?")
    (True, False)
    """
    if not prompt:
        return False
    text = prompt if isinstance(prompt, str) else message_text(prompt[-1]["content"])
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
    if prefilled and not closed:
        return ""
    return tail.partition(THINK_OPEN)[0]
