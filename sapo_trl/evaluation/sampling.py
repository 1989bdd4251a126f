"""Sampling of completions by transformers' generate, without disturbing the training run that it is part of."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import prepare_multimodal_messages

from sapo_trl.model import render, without_adapters
from sapo_trl.rollout.generation import plain_model_reason, unfinished_only
from sapo_trl.rollout.outside import plain_sampling
from sapo_trl.vision import placeholders, text_tokenizer

Prompt = str | list[dict[str, str]]  # raw text, or chat messages


@dataclass(frozen=True)
class Completion:
    """One sampled answer: its text without special tokens, its length with the end token, and whether it was cut."""

    text: str
    num_tokens: int
    truncated: bool
    ids: tuple[int, ...] | None = None  # of its tokens, the end token included; None where the engine gives none


@contextmanager
def _evaluating(model: PreTrainedModel, seed: int) -> Generator[None]:
    """Evaluation mode and a random stream of its own, so that training continues as if nothing had happened."""
    was_training = model.training
    # A trainer with the experts' load-balancing loss leaves this on, but the loss can't be computed while generating.
    router_logits = model.config.to_dict().get("output_router_logits", False)
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    if router_logits:
        model.config.output_router_logits = False
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)
        if router_logits:
            model.config.output_router_logits = True


def _read_rows(ids: torch.Tensor, eos_ids: set[int], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
    """ids: generated tokens, shape (B, T), right-padded after the first end token."""
    completions = []
    for row in ids.tolist():
        end = next((index for index, token in enumerate(row) if token in eos_ids), None)
        kept = row if end is None else row[: end + 1]
        text = str(tokenizer.decode(kept, skip_special_tokens=True))
        completions.append(Completion(text, len(kept), end is None, tuple(kept)))
    return completions


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    prompts: Sequence[Prompt],
    num_samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 256,
    seed: int = 0,
    images: Sequence[list[Any]] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[Completion]]:
    """`num_samples` completions of each prompt, in the prompts' order, from plain softmax sampling; 0 is greedy.

    The result is the same for the same arguments, `batch_size` (in completions) included, which changes the order of
    the draws.

    Args:
        tokenizer: of a vision-language model its processor.
        images: the pictures of each prompt, which come before its first user message; empty: none has any.
        chat_template_kwargs: what the chat template reads besides the messages.
    """
    process, tokenizer = tokenizer, text_tokenizer(tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        suppress_tokens=placeholders(model.config) or None,
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    images = images or [[]] * len(prompts)
    texts = [
        render(tokenizer, cast(Any, prepare_multimodal_messages)(prompt, own) if own else prompt, chat_template_kwargs)
        for prompt, own in zip(prompts, images, strict=True)
    ]
    rows = [pair for pair in zip(texts, images, strict=True) for _ in range(num_samples)]
    completions: list[Completion] = []
    own_loop = nullcontext() if plain_model_reason(model) else unfinished_only(model)
    with _evaluating(model, seed), own_loop, plain_sampling(without_adapters(model)):
        for first in range(0, len(rows), batch_size):
            text, pictures = zip(*rows[first : first + batch_size], strict=True)
            # The chat template already holds the special tokens.
            batch = process(
                text=list(text),
                padding=True,
                padding_side="left",
                add_special_tokens=False,
                return_tensors="pt",
                **({"images": list(pictures)} if any(pictures) else {}),
            ).to(model.device)
            inputs = {name: batch[name] for name in batch if name != "token_type_ids"}
            # `generate` comes from a mixin that the type PreTrainedModel does not name
            ids = cast(Any, model).generate(**inputs, generation_config=config)
            completions += _read_rows(ids[:, batch["input_ids"].shape[1] :], set(ends), tokenizer)
    return [completions[first : first + num_samples] for first in range(0, len(completions), num_samples)]
