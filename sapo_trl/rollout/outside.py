"""What comes from outside during a rollout: the output of a `rollout_func`, and the settings that shape sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sapo_trl.model import has_text_only, render, text_config

# What a model's own generation config may say without changing the distribution that tokens are drawn from.
_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache")
# Difference of log-probs, over the whole vocabulary, up to which two computations of one distribution are the same.
SAME_DISTRIBUTION = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def checked_rollout(rollout_func: Callable) -> Callable:
    """The function with its output checked; a log-prob too many would slide every later row onto foreign values."""

    @functools.wraps(rollout_func)
    def call(prompts: list, trainer: Any) -> dict[str, Any]:
        output = rollout_func(prompts, trainer)
        name = getattr(rollout_func, "__name__", type(rollout_func).__name__)
        return check_rollout(output, len(prompts), name, text_config(trainer.model).vocab_size)

    return call


def check_rollout(output: Any, num_prompts: int, name: str, vocabulary: int) -> dict[str, Any]:
    """The output of a `rollout_func`, with arrays and tensors as lists; every row of it fits its completion.

    Args:
        vocabulary: size of the model's vocabulary.

    Raises:
        ValueError: names the function, the row and both lengths.
    """
    if not isinstance(output, Mapping):
        raise ValueError(f"rollout_func {name!r} returned {_kind(output)}, not a mapping.")
    rows_of = ("prompt_ids", "completion_ids", "logprobs", "env_mask")
    plain = {key: _plain(value) if key in rows_of else value for key, value in output.items()}
    for key in ("prompt_ids", "completion_ids"):
        rows = plain.get(key)
        if not isinstance(rows, list) or len(rows) != num_prompts:
            raise ValueError(f"rollout_func {name!r}: {key} is {_kind(rows)}; give {num_prompts}, one per prompt.")
        for row, ids in enumerate(rows):
            if not isinstance(ids, list) or not ids:
                raise ValueError(
                    f"rollout_func {name!r}: {key} of row {row} is not a list of at least one token id, but "
                    f"{_kind(ids)}."
                )
            wrong = next((x for x in ids if not _is_id(x, vocabulary)), None)
            if wrong is not None:
                raise ValueError(
                    f"rollout_func {name!r}: {key} of row {row} holds {wrong!r}; token ids are 0 to {vocabulary - 1}."
                )
    widths = [len(ids) for ids in plain["completion_ids"]]
    _check_widths(plain.get("logprobs"), widths, "logprobs", name, _is_logprob, "a log-prob is at most 0")
    _check_widths(plain.get("env_mask"), widths, "env_mask", name, (0, 1).__contains__, "a mask is 0 or 1")
    for key, rows in plain.items():
        if key not in rows_of and isinstance(rows, list) and len(rows) != num_prompts:  # TRL hands them to the rewards
            raise ValueError(f"rollout_func {name!r}: {key} is {_kind(rows)}, and there are {num_prompts} prompts.")
    return plain


def _plain(value: Any) -> Any:
    """Arrays and tensors, also inside lists, as lists of numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


def _check_widths(
    rows: Any, widths: list[int], key: str, name: str, is_right: Callable[[Any], bool], rule: str
) -> None:
    if rows is None:
        return
    if not isinstance(rows, list) or len(rows) != len(widths):
        raise ValueError(f"rollout_func {name!r}: {key} is {_kind(rows)}, and there are {len(widths)} completions.")
    for row, (values, width) in enumerate(zip(rows, widths, strict=True)):
        if not isinstance(values, list) or len(values) != width:
            raise ValueError(
                f"rollout_func {name!r}: row {row} has {width} completion tokens and {_kind(values)} as {key}. Give "
                "one per completion token."
            )
        for place, value in enumerate(values):
            if not is_right(value):
                found = value if isinstance(value, int | float) else _kind(value)
                raise ValueError(f"rollout_func {name!r}: {key} of row {row}, token {place} is {found}; {rule}.")


def _is_id(value: Any, vocabulary: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary


def _is_logprob(value: Any) -> bool:
    """None and NaN say that a token's log-prob is not known; rounding may lift one above 0."""
    return value is None or (isinstance(value, int | float) and not value > 1e-3)


def _kind(value: Any) -> str:
    size = f" of length {len(value)}" if hasattr(value, "__len__") else ""
    return f"a {type(value).__name__}{size}"


@contextmanager
def plain_sampling(model: PreTrainedModel) -> Generator[None]:
    """Inside, the model's own generation config says nothing about sampling.

    transformers fills what a caller leaves out from it: Qwen's says top_k 20 and top_p 0.95, others min_p,
    suppress_tokens or no_repeat_ngram_size, and all of them bias the ratio.
    """
    own = model.generation_config
    kept = {name: vars(own).get(name) for name in _TOKEN_FIELDS}
    model.generation_config = GenerationConfig(**{name: value for name, value in kept.items() if value is not None})
    try:
        yield
    finally:
        model.generation_config = own


def short_row(tokenizer: PreTrainedTokenizerBase, prompt: str | list) -> Tensor:
    """Tokens of a prompt, at least 16 of them, (T,); of a few words where the prompt holds pictures."""
    text = render(tokenizer, prompt) if has_text_only(prompt) else "a picture"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] or [0]
    return torch.tensor(ids * (1 + 16 // len(ids)))


@torch.no_grad()
def sampling_difference(
    model: PreTrainedModel, config: GenerationConfig, ids: Tensor, temperature: float, num_tokens: int = 4
) -> tuple[float, str]:
    """(largest difference of log-probs between what `generate` draws from and softmax(logits / temperature), where).

    A few tokens are generated and the distribution of each is compared over the whole vocabulary; the random state is
    as it was afterwards.

    Args:
        ids: a prompt, (T,).
        config: the one that rollouts use.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    limits = {"max_new_tokens": num_tokens, "max_length": None}
    told = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    short = GenerationConfig(**{**config.to_dict(), **limits, **told})
    with torch.random.fork_rng(devices=devices), plain_sampling(model):
        out: Any = model.generate(  # ty: ignore[not-callable]
            input_ids=ids[None].to(model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            generation_config=short,
        )
    model.train(was_training)
    worst, where = 0.0, ""
    for i, (drawn, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        plain = (logits.float() / temperature).log_softmax(-1)
        difference = (drawn.float().log_softmax(-1) - plain).abs().nan_to_num(nan=torch.inf).max().item()
        if difference > worst:
            worst, where = difference, f"token {i} of a completion"
    return worst, where


def check_sampling(model: PreTrainedModel, config: GenerationConfig, ids: Tensor, temperature: float) -> None:
    """Raise if tokens are drawn from another distribution than the log-probs of the ratio describe.

    Raises:
        ValueError: the size of the bias, and the settings that may cause it.
    """
    worst, where = sampling_difference(model, config, ids, temperature)
    if worst <= SAME_DISTRIBUTION.get(model.dtype, 0.2):
        return
    usual = GenerationConfig().to_dict()
    skipped = {"max_new_tokens", "max_length", "temperature", "do_sample", "transformers_version", "disable_compile"}
    given = [
        f"{name}={value}"
        for name, value in config.to_dict().items()
        if value is not None and value != usual.get(name) and name not in skipped and not name.endswith("token_id")
    ]
    raise ValueError(
        f"rollouts are drawn from another distribution than the log-probs of the ratio: they differ by {worst:.3g} at "
        f"{where}. Likely: {', '.join(given) or 'a logits processor of the model'}. Remove it from generation_kwargs."
    )
