"""The head: log-probs and entropies at the predicting positions only, inside the model's own `forward`."""

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
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

# Vocabulary tiles of TRL's log-prob kernel. TRL's own value on a GPU; on a CPU one that stays in its cache: 900 tokens,
# hidden 256, vocabulary 4096 took 1.4 times as long in one tile, vocabulary 32768 2.4 times.
VOCABULARY_TILE = 32768
VOCABULARY_TILE_CPU = 512


@dataclass
class TokenOutputs(ModelOutput):
    """log-probs and entropies of the n trained tokens, (n,), and router logits per MoE layer, (positions, experts).

    A `ModelOutput`, because ZeRO-3 hangs its backward hooks on the tensors of a forward's result and finds them in
    tuples and mappings only.
    """

    logps: Tensor | None = None
    entropies: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


def add_token_head(model: PreTrainedModel, temperature: float, cast_lm_head_to_fp32: bool = False) -> None:
    """Teach `model` to answer `model(..., predict=positions, targets=ids)` with `TokenOutputs`.

    The head is TRL's chunked kernel, applied to the predicting positions only. It sits inside `forward` so that the
    hooks of DDP, FSDP and ZeRO see one ordinary call. Without `predict` the forward is the one it was.
    """
    original, config = model.forward, model.config.get_text_config()
    scaled = [
        name
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
        if getattr(config, name, None) is not None
    ]
    if scaled:
        raise NotImplementedError(
            f"{type(model).__name__} scales its logits ({scaled[0]}); only unscaled heads are supported."
        )

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(self, *args, predict: Tensor | None = None, targets: Tensor | None = None, **kwargs):
        if predict is None:
            return original(*args, **kwargs)
        outputs = self.base_model(*args, use_cache=False, **kwargs)
        hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, predict)
        head = self.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if isinstance(weight, DTensor):  # FSDP2 shards the head; the kernel needs it whole
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        tile = VOCABULARY_TILE_CPU if hidden.device.type == "cpu" else VOCABULARY_TILE
        autocast = nullcontext()
        if cast_lm_head_to_fp32:
            hidden, autocast = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        with autocast, maybe_gather_lm_head_ctx(weight, bias):
            logps, entropies, *_ = ChunkedLogProbFunction.apply(
                hidden, weight, bias, targets, temperature, tile,
                getattr(config, "final_logit_softcapping", None), 1.0, ("log_probs", "entropy"),
            )  # fmt: skip
        return TokenOutputs(logps=logps, entropies=entropies, router_logits=outputs.get("router_logits"))

    model.forward = types.MethodType(forward, model)
