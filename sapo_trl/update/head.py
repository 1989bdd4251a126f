"""The token head: log-probs and entropies at the predicting positions only, inside the model's own `forward`."""

from __future__ import annotations

import functools
import types
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from sapo_trl.model import text_config
from sapo_trl.trl_seams import ChunkedLogProbFunction, maybe_gather_lm_head_ctx
from sapo_trl.update.cpu_head import KeptHead, fits

# Vocabulary tiles of TRL's log-prob kernel. TRL's own value on a GPU; on a CPU one that stays in its cache: 900 tokens,
# hidden 256, vocabulary 4096 took 1.4 times as long in one tile, vocabulary 32768 2.4 times.
VOCABULARY_TILE = 32768
VOCABULARY_TILE_CPU = 512
HEAD_TOKENS = 4096  # TRL's TOKEN_CHUNK_SIZE: tokens of one tile of logits


@dataclass
class TokenOutputs(ModelOutput):
    """What a model with a token head returns; `PackOutputs` says what the fields hold.

    A `ModelOutput`, because ZeRO-3 hangs its backward hooks on the tensors of a forward's result and finds them in
    tuples and mappings only. All of its fields but the first must have the default None.
    """

    logps: Tensor
    entropies: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class PackOutputs:
    """What the forward pass of a pack gives.

    Attributes:
        logps, entropies: of the n trained tokens, (n,).
        router_logits: of the rows' tokens for each MoE layer, (sum of lengths, experts); empty unless asked for.
    """

    logps: Tensor
    entropies: Tensor
    router_logits: tuple[Tensor, ...]


def add_token_head(model: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool = False) -> None:
    """Make `model(..., predict=positions, targets=ids)` return `TokenOutputs`; without `predict` nothing changes.

    The head is TRL's chunked kernel, or `cpu_head` where that fits, applied to the predicting positions only. It is
    inside `forward` so that the hooks of DDP, FSDP and ZeRO see one ordinary call.

    It computes softcap(W h + b) / temperature. A model that does anything else to its logits has other log-probs here
    than from its own forward pass; `update/check.py` measures that before the first update.

    Raises:
        NotImplementedError: there is an adapter on the head. It starts as the identity, so no measurement finds it.
    """
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer") or hasattr(head, "token_adapter"):  # the second by trainable_token_indices
        raise NotImplementedError(
            f"the adapter changes the output head of {type(model).__name__}, and log-probs are computed from the "
            "head's own weight. Remove the head from lora_target_modules (and trainable_token_indices where the head "
            "is tied to the embedding), or train it whole with lora_modules_to_save."
        )
    # as a function: a deep copy of the model must compute with its own weights
    bound = model.forward
    original = getattr(bound, "__func__", lambda _, *args, **kwargs: bound(*args, **kwargs))
    softcap = getattr(text_config(model), "final_logit_softcapping", None)

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(self, *args, predict: Tensor | None = None, targets: Tensor | None = None, **kwargs):
        if predict is None:
            return original(self, *args, **kwargs)
        if "pixel_values" in kwargs and "position_ids" in kwargs:  # what packed attention is told is for text alone
            pictures = kwargs.pop("pixel_values"), kwargs.pop("image_grid_thw")
            kwargs["mm_encoder_outputs"] = {"image": self.base_model.get_image_features(*pictures, return_dict=True)}
        outputs = self.base_model(*args, use_cache=False, **kwargs)
        hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, predict)
        head = self.get_output_embeddings()
        weight, bias = head.weight, head.bias
        for p in (weight, bias):
            if hasattr(p, "ds_id"):  # ZeRO-3 notices by itself only a parameter that is sharded at this moment
                from deepspeed import zero

                zero.register_external_parameter(self, p)
        if isinstance(weight, DTensor):  # FSDP2 shards the head; the kernel needs it whole
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        tile = VOCABULARY_TILE_CPU if hidden.device.type == "cpu" else VOCABULARY_TILE
        autocast = nullcontext()
        if cast_lm_head_to_fp32:
            hidden, autocast = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        with autocast, maybe_gather_lm_head_ctx(*(p for p in (weight, bias) if p is not None)):
            if fits(hidden, weight, bias, softcap):
                logps, entropies = KeptHead.apply(hidden, weight, targets, temperature)
            else:
                logps, entropies, *_ = ChunkedLogProbFunction.apply(
                    hidden, weight, bias, targets, temperature, min(tile, len(weight)), softcap, 1.0,
                    ("log_probs", "entropy"),
                )  # fmt: skip
        return TokenOutputs(logps=logps, entropies=entropies, router_logits=outputs.get("router_logits"))

    model.forward = types.MethodType(forward, model)
