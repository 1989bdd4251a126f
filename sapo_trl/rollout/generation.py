"""The rollout's decoding loop on a CPU: transformers' `generate` without computing what is thrown away.

transformers computes a finished row until the slowest row of its batch ends, and a prompt once for each of its
completions. Here finished rows leave the batch, and equal neighbours share one pass over their prompt. The rest is
transformers' own: `generate` prepares logits processors, stopping criteria, masks, positions and cache, and calls
`decode_unfinished` through its own argument `custom_generate`.

The result is what transformers samples with the same seed, token for token, and the random stream ends at the same
place: every step draws the noise of the whole batch, finished rows included. Only rounding differs, as between batch
sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from trl import GRPOConfig

from sapo_trl.model import has_dropout, layout_of, text_config, without_adapters
from sapo_trl.rollout.outside import plain_sampling
from sapo_trl.trl_seams import next_model_kwargs, padding_token

# Finished rows leave when they are this share of the batch. Dropping them copies the cache, as every step does anyway.
DROP_FRAC = 1 / 8

# Arguments of a model's forward pass that the loop below selects rows of
_PER_ROW = ("attention_mask", "position_ids", "past_key_values")


def plain_generation_reason(
    model: PreTrainedModel | PeftModel, args: GRPOConfig, accelerator: Accelerator, *, records_routes: bool
) -> str | None:
    """Why a trainer's rollout is left to TRL and transformers alone, as text for the announcement of a run.

    None where `unfinished_only` gives the same tokens. No forward pass is needed to find that out.

    Args:
        records_routes: the experts chosen while generating are recorded (routing replay r3).
    """
    if args.use_vllm or args.use_transformers_continuous_batching:
        return "vLLM" if args.use_vllm else "transformers' continuous batching"
    if args.generation_kwargs or args.cache_implementation:
        return "generation_kwargs or cache_implementation ask for something of their own"
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU):
        return f"processes of {accelerator.distributed_type.value} may have to generate in step"
    if records_routes:
        return "routing_replay=r3 records batches that keep their rows"
    if has_dropout(model):
        return "TRL samples with dropout on, and completions of one prompt would share its noise"
    return plain_model_reason(model)


def plain_model_reason(model: PreTrainedModel | PeftModel) -> str | None:
    """The same for a model in evaluation mode, as far as its device, forward pass and cache decide it."""
    layout, reason = layout_of(model)
    if model.device.type != "cpu":
        return f"the shrinking batch was measured on a CPU only, and this is {model.device.type}"
    if layout == "padded":
        return reason
    base = without_adapters(model)
    if text_config(base) is not base.config:
        return f"{type(base).__name__} is multimodal"
    missing = [name for name in _PER_ROW if name not in inspect.signature(type(base).forward).parameters]
    if missing:
        return f"the forward of {type(base).__name__} takes no {' and no '.join(missing)}"
    with plain_sampling(base):  # as every rollout and evaluation
        return _prepared_reason(base)


def _prepared_reason(model: Any) -> str | None:
    """Why what `generate` prepares for its decoding loop does not fit the loop below, or None."""
    prepared: dict[str, Any] = {}

    def keep(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        prepared.update(model_kwargs)
        return input_ids

    ids = torch.ones((2, 2), dtype=torch.long)
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0, custom_generate=keep
    )
    cache = prepared.get("past_key_values")
    if cache is None:
        return "use_cache: false, so that no step can go on from the one before"
    if not _selects_rows(cache):
        return f"rows of a {type(cache).__name__} cannot be dropped"
    return None


def _selects_rows(cache: Any) -> bool:
    """Whether a cache still works after one of its two rows is dropped; tried on a copy, with numbers."""
    trial, states = deepcopy(cache), torch.arange(64.0).view(2, 1, 4, 8)  # (rows, heads, tokens, width)
    old, new = states.split([3, 1], dim=2)
    try:
        trial.update(old, old, 0)
        trial.batch_select_indices(torch.tensor([1]))
        keys, values = trial.update(new[1:], new[1:], 0)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return torch.equal(keys, states[1:]) and torch.equal(values, states[1:])


@contextmanager
def unfinished_only(
    model: PreTrainedModel | PeftModel, limits: Sequence[int] = (), logps: list[Tensor] | None = None
) -> Generator[None]:
    """Context in which `model.generate` decodes with `decode_unfinished`; for sampling and greedy search only.

    Args:
        limits: tokens after which each row is finished; empty: only those of the generation config.
        logps: gets the log-probs of the tokens, one column (B,) per step, NaN for rows that had ended. With it tokens
            are drawn by `_draw`, which needs one random number for each and so leaves transformers' random stream.
    """
    base: Any = without_adapters(model)
    base.generate = partial(base.generate, custom_generate=partial(decode_unfinished, limits=limits, logps=logps))
    try:
        yield
    finally:
        del base.generate  # the class's own again


def decode_unfinished(
    model: Any,
    input_ids: Tensor,
    logits_processor: Callable[..., Any],
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    limits: Sequence[int] = (),
    logps: list[Tensor] | None = None,
    **model_kwargs,
) -> Tensor:
    """`GenerationMixin._sample` of transformers on the unfinished rows.

    Args:
        model: the one that `generate` was called on.
        input_ids: left-padded prompts, (B, P).
        limits: (B,), as for `unfinished_only`.
        logps: as for `unfinished_only`.
        model_kwargs: as `generate` prepares them: `past_key_values` (empty), `attention_mask`, `position_ids`, ...

    Returns:
        Prompts and completions, (B, P + longest completion), finished rows filled with the padding token.

    Raises:
        RuntimeError: a probability is NaN.
    """
    num_rows, pad = len(input_ids), padding_token(generation_config)
    logits, model_kwargs = _prefill(model, input_ids, model_kwargs)
    sequences = input_ids  # (B, P + t)
    running = torch.arange(num_rows, device=input_ids.device)  # rows of the batch that are computed
    finished = torch.zeros(num_rows, dtype=torch.bool, device=input_ids.device)  # (running,)
    last = torch.tensor(limits, device=input_ids.device) + input_ids.shape[1] if limits else None  # (B,)
    while True:
        scores = logits_processor(sequences[running], logits)
        if logps is not None:
            scores = scores.log_softmax(dim=-1)
        if not generation_config.do_sample:
            tokens = scores.argmax(-1)
        else:
            tokens = _sample(scores, running, num_rows) if logps is None else _draw(scores)
        if logps is not None:
            drawn = scores.gather(1, tokens[:, None]).squeeze(1).masked_fill(finished, torch.nan)
            logps.append(scores.new_full((num_rows,), torch.nan).index_copy(0, running, drawn))
        column = pad.repeat(num_rows)
        column[running] = tokens = torch.where(finished, pad, tokens)
        sequences = torch.cat([sequences, column[:, None]], dim=1)
        finished = finished | stopping_criteria(sequences[running], None)
        if last is not None:
            finished = finished | (sequences.shape[1] >= last[running])
        if finished.all():
            return sequences
        if finished.sum() >= DROP_FRAC * len(running):
            kept = (~finished).nonzero().squeeze(1)
            running, finished, tokens = running[kept], finished[kept], tokens[kept]
            model_kwargs["past_key_values"].batch_select_indices(kept)
            model_kwargs = _select_rows(model_kwargs, kept)
        inputs = model.prepare_inputs_for_generation(tokens[:, None], next_sequence_length=1, **model_kwargs)
        logits, model_kwargs = _forward(model, inputs, model_kwargs)


def _prefill(model: Any, input_ids: Tensor, model_kwargs: dict) -> tuple[Tensor, dict]:
    """One forward pass over the prompts, each run of equal rows once: logits (B, V) and a cache of B rows."""
    rows, mask = input_ids, model_kwargs.get("attention_mask")
    if "position_ids" in model_kwargs:  # one row where nothing is padded
        model_kwargs["position_ids"] = model_kwargs["position_ids"].expand(len(rows), -1)
    marked = rows if mask is None else torch.cat([rows, mask], dim=1)  # a prompt may begin with the padding token
    _, counts = torch.unique_consecutive(marked, dim=0, return_counts=True)
    first = counts.cumsum(0) - counts
    inputs = model.prepare_inputs_for_generation(
        rows[first], is_first_iteration=True, **_select_rows(model_kwargs, first)
    )
    logits, updated = _forward(model, inputs, model_kwargs)
    copies = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
    updated["past_key_values"].batch_select_indices(copies)
    return logits[copies], updated


def _forward(model: Any, inputs: dict, model_kwargs: dict) -> tuple[Tensor, dict]:
    """Logits of the last position in float32, (rows, V), and the arguments with one more column."""
    outputs = model(**inputs, return_dict=True)
    return outputs.logits[:, -1].float(), next_model_kwargs(model, outputs, model_kwargs)


def _select_rows(model_kwargs: dict, rows: Tensor) -> dict:
    """The per-row arguments of `rows`; the cache is selected in place by its own method."""
    per_row = {name: model_kwargs.get(name) for name in ("attention_mask", "position_ids")}
    return model_kwargs | {name: value[rows] for name, value in per_row.items() if value is not None}


def _sample(scores: Tensor, running: Tensor, num_rows: int) -> Tensor:
    """One token per running row, (running,), from softmax(scores).

    `torch.multinomial` is argmax p_i / q_i with q_i ~ Exp(1), which is exact: the least of the arrival times q_i / p_i
    belongs to i with probability p_i. Drawing q for every row of the batch gives each row the noise of transformers.
    """
    probs = scores.softmax(dim=-1)
    noise = torch.empty(num_rows, probs.shape[1], dtype=probs.dtype, device=probs.device).exponential_()
    largest, tokens = (probs / noise[running]).max(dim=-1)
    _refuse_nan(largest)
    return tokens


def _draw(logps: Tensor) -> Tensor:
    """One token per row, (rows,), from log-probs (rows, V): the first whose cumulated probability is above a number
    that is uniform in [0, sum)."""
    cumulated = logps.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    _refuse_nan(total)
    number = torch.rand(len(logps), 1, dtype=torch.float64, device=logps.device) * total
    return torch.searchsorted(cumulated, number, right=True).squeeze(1)


def _refuse_nan(of_rows: Tensor) -> None:
    if of_rows.isnan().any():
        raise RuntimeError(
            f"{int(of_rows.isnan().sum())} of {len(of_rows)} rows have a NaN among their token probabilities: the "
            "model's weights or logits are no longer finite. Look at the last finite `loss` and `grad_norm`."
        )
