"""How many tokens fit into a pack: two forward passes measured at the start, the rest is a straight line.

`max_tokens_per_pack: auto` takes the largest pack that fits; `activation_checkpointing: auto` leaves checkpointing off
where the wanted pack fits without it. The measured passes leave no trace: without a backward pass there is no gradient
and no optimizer state. An estimate that was too high is corrected by the update, which halves a
pack that does not fit.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sapo_trl.rollout.rows import Row

if TYPE_CHECKING:
    from sapo_trl.update.update import Update

# Tokens of the two measured packs: far enough from 0 that a layer's fixed buffers don't decide the slope.
PROBE_TOKENS = (512, 1536)
PROBE_ROW = 256

# The wanted pack while `max_tokens_per_pack` is `auto`: below it a GPU's matrix products are not saturated, above the
# second number there is nothing left to gain.
WANTED_TOKENS = 4096
MOST_TOKENS = 32768

# Share of the free memory that may be planned for; and what the backward pass needs on top of what it reads, the
# gradients of one layer's activations.
USABLE_FRAC = 0.8
BACKWARD_FACTOR = 1.3


def settle_budget(update: Update, model: nn.Module, longest_prompt: int) -> None:
    """Resolve `max_tokens_per_pack: auto` and `activation_checkpointing: auto`; all processes take the smallest result.

    Args:
        model: the wrapped policy.
        longest_prompt: tokens; with max_completion_length it bounds the longest row.
    """
    args, forward, accelerator = update.args, update.forward, update.accelerator
    auto_tokens, auto_checkpointing = args.max_tokens_per_pack == "auto", args.checkpointing_is_auto
    if not auto_tokens and not auto_checkpointing:
        return
    if update.trainer.carries_images:
        accelerator.print(
            f"memory: what images take is not measured; packs hold at most {forward.max_tokens} tokens, activation "
            f"checkpointing is {'on' if args.activation_checkpointing else 'off'}."
        )
        return
    lengths = torch.tensor([longest_prompt], device=accelerator.device)
    longest_row = int(accelerator.gather(lengths).max()) + args.max_completion_length
    wanted = max(WANTED_TOKENS, longest_row) if auto_tokens else args.max_tokens_per_pack
    policy = accelerator.unwrap_model(model)
    if auto_checkpointing:
        policy.activation_checkpointing_disable()
        args.activation_checkpointing = False
    fits = tokens_that_fit(update, model)
    if auto_checkpointing and fits < wanted:
        policy.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
        args.activation_checkpointing = True
        fits = tokens_that_fit(update, model)
    if auto_tokens:
        forward.max_tokens = max(min(fits, MOST_TOKENS), 1)
    if accelerator.is_main_process:
        state = "on" if args.activation_checkpointing else "off"
        print(
            f"memory: {fits} tokens fit into a pack with activation checkpointing {state} (wanted: {wanted}); packs "
            f"hold at most {forward.max_tokens}",
            flush=True,
        )
        if fits < longest_row:
            print(f"memory: the longest possible row has {longest_row} tokens and may not fit.", flush=True)


def tokens_that_fit(update: Update, model: nn.Module) -> int:
    """Tokens of the largest pack that fits beside weights, gradients and optimizer states; a multiple of 256."""
    accelerator = update.accelerator
    few, many = PROBE_TOKENS
    # DDP expects a backward pass after a forward pass that is to be synchronised; engines know no such mode
    unsynchronised = nullcontext() if update.packs_are_collective else accelerator.no_sync(model)
    with unsynchronised, update.forward.packed(model):
        low, high = (_bytes_or_none(update, model, n) for n in PROBE_TOKENS)
    if low is None or high is None:  # did not fit at all; the others still wait for the gather
        return _fewest(0.0, accelerator)
    per_token = BACKWARD_FACTOR * (high - low) / (many - few)
    fixed = BACKWARD_FACTOR * low - per_token * few
    room = USABLE_FRAC * free_bytes(accelerator.device) - reserved_bytes(model) - fixed
    return _fewest(room / per_token, accelerator)


def _fewest(fits: float, accelerator: Accelerator) -> int:
    everywhere = accelerator.gather(torch.tensor([fits], dtype=torch.float64, device=accelerator.device))
    return max(0, int(everywhere.min()) // 256 * 256)


def _bytes_or_none(update: Update, model: nn.Module, num_tokens: int) -> int | None:
    """`activation_bytes`, or None where even so few tokens do not fit; an error where passes are collectives."""
    try:
        return activation_bytes(update, model, num_tokens)
    except torch.OutOfMemoryError as error:
        if not update.packs_are_collective:
            return None
        raise torch.OutOfMemoryError(
            f"a pack of {num_tokens} tokens does not fit beside the weights, and smaller ones can't be tried, because "
            "other processes are in the middle of this one. Set activation_checkpointing: true and "
            f"max_tokens_per_pack: {num_tokens // 2}, or shard over more GPUs. {error}"
        ) from None


def activation_bytes(update: Update, model: nn.Module, num_tokens: int) -> int:
    """Bytes that the forward pass of a pack of `num_tokens` tokens, all trained, holds at its highest."""
    forward, device = update.forward, update.accelerator.device
    vocabulary = update.accelerator.unwrap_model(model).config.get_text_config().vocab_size
    ids = torch.arange(num_tokens) % vocabulary
    if forward.image_token_id is not None:  # a placeholder would ask for an image
        ids[ids == forward.image_token_id] = forward.pad_token_id
    rows = [Row(part, 1, torch.ones(len(part) - 1, dtype=torch.bool), 0.0) for part in ids.split(PROBE_ROW)]
    inputs = forward.build_inputs(rows)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = forward(model, inputs)
        del outputs
        return torch.cuda.max_memory_allocated() - before
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = forward(model, inputs)
    del outputs
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def free_bytes(device: torch.device) -> int:
    """Bytes that a new tensor may take: the device's free ones and those that torch holds but does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    return psutil.virtual_memory().available


def reserved_bytes(model: nn.Module) -> int:
    """Gradients and AdamW's two states that are not there yet at the first step, of this process's share of weights.

    ZeRO allocates them when the engine starts, and its parameters are empty here.
    """
    local = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters() if p.requires_grad)
    return sum(3 * p.numel() * p.element_size() for p in local)
