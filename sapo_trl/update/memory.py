"""How many tokens fit into a pack: two forward passes are measured at the start, and a straight line goes through them.

`max_tokens_per_pack: auto` takes the largest pack that fits; `activation_checkpointing: auto` leaves checkpointing off
where the wanted pack fits without it. The measured passes change nothing: without a backward pass there is no gradient
and no optimizer state. Where the estimate was too high, the update halves a pack that does not fit.
"""

from __future__ import annotations

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sapo_trl.config import SAPOConfig
from sapo_trl.model import inner_model, vocabulary_size
from sapo_trl.rollout.rows import Row
from sapo_trl.update.engine import Engine
from sapo_trl.update.head import HEAD_TOKENS, VOCABULARY_TILE
from sapo_trl.update.packing import PackedForward

# Tokens of the two measured packs, so many that a layer's fixed buffers don't decide the slope.
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


class MemoryProbe:
    """Settles `max_tokens_per_pack: auto` and `activation_checkpointing: auto`, once, after the first rollout.

    Args:
        config: read for the wanted pack; its `activation_checkpointing` is set to what was settled.
        auto_checkpointing: whether activation checkpointing may be switched off.
        has_images: prompts contain images, whose memory is not measured.
    """

    def __init__(
        self, forward: PackedForward, engine: Engine, config: SAPOConfig, auto_checkpointing: bool, has_images: bool
    ):
        self.forward, self.engine, self.config = forward, engine, config
        self.auto_checkpointing, self.has_images = auto_checkpointing, has_images
        self.is_settled = config.max_tokens_per_pack != "auto" and not auto_checkpointing

    def restore(self, is_settled: bool, activation_checkpointing: bool, model: nn.Module) -> None:
        """Take over what a resumed run had settled."""
        self.is_settled = is_settled
        if activation_checkpointing != self.config.activation_checkpointing:
            self._set_checkpointing(model, activation_checkpointing)

    def _set_checkpointing(self, model: nn.Module, is_on: bool) -> None:
        """Switch checkpointing in the model, and in the configuration, which TRL reads."""
        policy = inner_model(model, self.forward.accelerator)
        policy.activation_checkpointing_disable()
        if is_on:
            policy.activation_checkpointing_enable(self.config.activation_checkpointing_kwargs)
        vars(self.config)["activation_checkpointing"] = is_on

    def settle(self, model: nn.Module, longest_prompt: int) -> None:
        """Measure and decide; all processes take the smallest result.

        Args:
            model: the wrapped policy.
            longest_prompt: tokens; with max_completion_length it bounds the longest row.
        """
        if self.is_settled:
            return
        self.is_settled = True
        config, forward, accelerator = self.config, self.forward, self.forward.accelerator
        if self.has_images:
            accelerator.print(
                f"memory: what images take is not measured; packs hold at most {forward.max_tokens} tokens, activation "
                f"checkpointing is {'on' if config.activation_checkpointing else 'off'}."
            )
            return
        lengths = torch.tensor([longest_prompt], device=accelerator.device)
        assert config.max_completion_length is not None  # a configuration without it is refused
        longest_row = int(accelerator.gather(lengths).max()) + config.max_completion_length
        given = config.max_tokens_per_pack
        wanted = max(WANTED_TOKENS, longest_row) if isinstance(given, str) else given
        if self.auto_checkpointing:
            self._set_checkpointing(model, False)
        fits = self.tokens_that_fit(model)
        if self.auto_checkpointing and fits < wanted:
            self._set_checkpointing(model, True)
            fits = self.tokens_that_fit(model)
        if isinstance(given, str):
            forward.max_tokens = max(min(fits, MOST_TOKENS), 1)
        state = "on" if config.activation_checkpointing else "off"
        accelerator.print(
            f"memory: {fits} tokens fit into a pack with activation checkpointing {state} (wanted: {wanted}); packs "
            f"hold at most {forward.max_tokens}",
            flush=True,
        )
        if fits < longest_row:
            accelerator.print(f"memory: the longest possible row has {longest_row} tokens and may not fit.", flush=True)

    def tokens_that_fit(self, model: nn.Module) -> int:
        """Tokens of the largest pack that fits beside weights, gradients and optimizer states; a multiple of 256."""
        accelerator, (few, many) = self.forward.accelerator, PROBE_TOKENS
        with self.engine.without_backward(model), self.forward.packed(model):
            low, high = (self._bytes_or_none(model, n) for n in PROBE_TOKENS)
        if low is None or high is None:  # did not fit at all; the other processes wait for the gather
            return _fewest(0.0, accelerator)
        low, high = low - self._head_bytes(model, few), high - self._head_bytes(model, many)
        per_token = BACKWARD_FACTOR * (high - low) / (many - few)
        fixed = BACKWARD_FACTOR * low - per_token * few + self._head_bytes(model, MOST_TOKENS)
        available = USABLE_FRAC * free_bytes(accelerator.device) - reserved_bytes(model) - fixed
        return _fewest(available / per_token, accelerator)

    def _head_bytes(self, model: nn.Module, num_tokens: int) -> int:
        """Bytes of the head's buffer, which grows up to a fixed number of tokens; counted on a GPU only."""
        accelerator = self.forward.accelerator
        if accelerator.device.type != "cuda":
            return 0
        is_half = accelerator.mixed_precision in ("bf16", "fp16") and not self.config.cast_lm_head_to_fp32
        vocabulary = vocabulary_size(inner_model(model, accelerator))
        return (2 if is_half else 4) * min(num_tokens, HEAD_TOKENS) * min(vocabulary, VOCABULARY_TILE)

    def _bytes_or_none(self, model: nn.Module, num_tokens: int) -> int | None:
        """`activation_bytes`, or None where so few tokens do not fit; an error where passes are collectives."""
        try:
            return activation_bytes(self.forward, model, num_tokens)
        except torch.OutOfMemoryError as error:
            if not self.engine.packs_are_collective:
                return None
            raise torch.OutOfMemoryError(
                f"a pack of {num_tokens} tokens does not fit beside the weights, and smaller ones can't be tried, "
                "because other processes are in the middle of this one. Set activation_checkpointing: true and "
                f"max_tokens_per_pack: {num_tokens // 2}, or shard over more GPUs. {error}"
            ) from None


def _fewest(fits: float, accelerator: Accelerator) -> int:
    everywhere = accelerator.gather(torch.tensor([fits], dtype=torch.float64, device=accelerator.device))
    return max(0, int(everywhere.min()) // 256 * 256)


def activation_bytes(forward: PackedForward, model: nn.Module, num_tokens: int) -> int:
    """Peak bytes of the forward pass over a pack of `num_tokens` tokens, all of them trained."""
    accelerator = forward.accelerator
    ids = torch.arange(num_tokens) % vocabulary_size(inner_model(model, accelerator))
    if forward.pictures is not None:  # a placeholder would ask for an image
        ids[ids == forward.pictures.token] = forward.pad_token_id
    rows = [Row(part, 1, torch.ones(len(part) - 1, dtype=torch.bool), 0.0) for part in ids.split(PROBE_ROW)]
    inputs = forward.build_inputs(rows)
    if accelerator.device.type == "cuda":
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
    """Bytes that a new tensor may take: the device's free ones, and those that torch has reserved but does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    return psutil.virtual_memory().available


def reserved_bytes(model: nn.Module) -> int:
    """Bytes of the gradients and AdamW's two states of this process's weights, which the first step allocates.

    ZeRO has allocated them when its engine started, and its parameters are empty here.
    """
    trained = (p for p in model.parameters() if p.requires_grad)
    local = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
    return sum(3 * p.numel() * p.element_size() for p in local)
