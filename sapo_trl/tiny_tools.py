"""A tool for the tiny model: a pocket calculator, and how calls of it are written (`configs/tiny/calculator.yaml`)."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerFast

# Qwen3's chat format with calls as short as they can be, because this tokenizer spells them byte by byte. What the tool
# can do is not in the prompt: the cold start teaches it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% set given = call['function']['arguments'] %}"
    "{{ '<call>' ~ (given['expression'] if 'expression' in given else call['function']['name'] ~ given) ~ '</call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The way back, from text to messages, for transformers' `parse_response`
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": r"</call>\s*",
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": "calculator", "arguments": {"expression": "{content}"}},
            },
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def calculator(expression: str) -> int:
    """
    A pocket calculator, which goes from left to right.

    Args:
        expression: Whole numbers with + - * and %, which is the remainder: 7*3+8%20 is 29 % 20.

    Returns:
        The result.
    """
    if not re.fullmatch(r"[0-9]{1,9}([-+*%][0-9]{1,9}){0,20}", expression):
        raise ValueError(f"{expression:.40} is not of numbers with + - * %")
    value = 0
    for sign, digits in re.findall(r"(^|[-+*%])([0-9]+)", expression):
        number = int(digits)
        steps = {"": number, "+": value + number, "-": value - number, "*": value * number}
        value = value % number if sign == "%" else steps[sign]
    return value


def give_calls(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, with the formats of calls and their results; both are saved with it."""
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    return tokenizer


def with_calculator(prompt: str, boxed: str) -> list[dict]:
    """A model answer that calls the calculator: the messages after a prompt of the kind `modular`.

    >>> [message["content"] for message in with_calculator("7 *3 +8 mod 20?", "\\\\boxed{9}")]
    ['', '9', '\\\\boxed{9}']
    """
    expression = prompt.replace(" mod ", "%").replace(" ", "").rstrip("?")
    function = {"name": "calculator", "arguments": {"expression": expression}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "calculator", "content": str(calculator(expression))},
        {"role": "assistant", "content": boxed},
    ]


def answered(text: str) -> str:
    """A first turn with the answer that its call would lead to; another text as it is."""
    called = re.fullmatch(r"<call>(.*)</call>", text, re.DOTALL)
    try:
        return f"\\boxed{{{calculator(called[1])}}}" if called else text
    except (ValueError, ZeroDivisionError):
        return text
