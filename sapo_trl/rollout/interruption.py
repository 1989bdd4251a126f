"""Thoughts that are too long are ended by a phrase, as in ScaleRL (arXiv 2510.13786), so that an answer follows.

The phrase is text that the policy did not write, so its tokens are not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sapo_trl.rewards.grading.texts import THINK_CLOSE, THINK_OPEN

INTERRUPTION = f"\nOkay, time is up. Let me stop thinking and formulate a final answer now.\n{THINK_CLOSE}\n\n"


def phrase_tokens(tokenizer: Any) -> list[int]:
    """The phrase as token ids."""
    return tokenizer(INTERRUPTION, add_special_tokens=False)["input_ids"]


def budgets(bounds: Sequence[int], num: int) -> list[int]:
    """Tokens after which each of `num` completions is interrupted, drawn evenly between the bounds."""
    low, high = bounds[0], bounds[-1]
    return torch.randint(low, high + 1, (num,)).tolist() if high > low else [low] * num


def is_thinking(text: str) -> bool:
    """Whether the last thought that a prompt with its completion opens is not closed.

    >>> is_thinking("Use <think></think>.<think>Let me"), is_thinking("<think>a</think>So"), is_thinking("So")
    (True, False, False)
    """
    return text.rfind(THINK_OPEN) > text.rfind(THINK_CLOSE)


def cut(
    completions: Sequence[list[int]], logprobs: Sequence[list] | None, limits: Sequence[int]
) -> tuple[list[list[int]], list[list] | None]:
    """The completions, and their log-probs where the engine gave any, up to each one's limit."""
    short = [ids[:limit] for ids, limit in zip(completions, limits, strict=True)]
    return short, None if logprobs is None else [x[:limit] for x, limit in zip(logprobs, limits, strict=True)]
