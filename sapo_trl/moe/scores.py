"""The scores of chosen experts, computed as each family of transformers' routers does it.

Routing replay needs them: it chooses the recorded experts and weighs them by the router's present logits. A family's
formula is copied from the file named in its docstring; a test compares every one of them with transformers' router.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (router, logits (T, experts), chosen (T, k)) -> scores (T, k). The caller casts to the dtype of the router's own.
Scoring = Callable[[nn.Module, Tensor, Tensor], Tensor]


def softmax_scores(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """softmax over all experts in float32, read at the chosen ones (transformers modeling_jamba.py)."""
    return F.softmax(logits, dtype=torch.float, dim=-1).gather(-1, chosen)


def normalised_softmax_scores(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """The same, divided by its sum over the chosen experts (modeling_mixtral.py, modeling_qwen3_vl_moe.py)."""
    scores = softmax_scores(router, logits, chosen)
    return scores / scores.sum(dim=-1, keepdim=True)


def qwen_scores(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """One of the two above, by `norm_topk_prob` (modeling_qwen3_moe.py)."""
    return (normalised_softmax_scores if router.norm_topk_prob else softmax_scores)(router, logits, chosen)


def softmax_of_chosen_scores(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """softmax over the chosen experts only (modeling_gpt_oss.py, modeling_granitemoe.py)."""
    return F.softmax(logits.gather(-1, chosen), dim=-1, dtype=logits.dtype)


def sigmoid_scores(router: nn.Module, logits: Tensor, chosen: Tensor) -> Tensor:
    """sigmoid at the chosen experts, normalised and scaled (modeling_deepseek_v3.py); the bias only selects."""
    scores = logits.sigmoid().gather(-1, chosen)
    if router.norm_topk_prob:
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    factor: Any = router.routed_scaling_factor
    return scores * factor


_FAMILIES: dict[Scoring, str] = {
    qwen_scores: "FlexOlmo Mellum Olmoe Qwen2Moe Qwen3Moe Qwen3Next Qwen3OmniMoeThinkerText Qwen4ExpText",
    normalised_softmax_scores: "MiniMax Mixtral Qwen3OmniMoeText Qwen3VLMoeText Qwen3_5Moe",
    softmax_scores: "Jamba",
    softmax_of_chosen_scores: "GptOss GraniteMoe GraniteMoeHybrid GraniteMoeShared GraniteMoeSWA",
    sigmoid_scores: "DeepseekV3 DeepseekV32 Dots1 ExaoneMoe Glm4Moe Glm4MoeLite Glm4vMoeText GlmMoeDsa KimiLinear "
    "MiMoV2Flash SolarOpen",
}
# Class name of the router in lower case (transformers writes TopKRouter and TopkRouter) -> its scores.
SCORES: dict[str, Scoring] = {
    f"{name}topkrouter".lower(): score for score, names in _FAMILIES.items() for name in names.split()
}


def scoring_of(router: nn.Module) -> Scoring:
    """The scores of a router, whose class PEFT or FSDP may have extended but not given another `forward`."""
    for cls in type(router).__mro__:
        is_known = issubclass(cls, nn.Module) and cls.__name__.lower() in SCORES
        if is_known and cls.forward is type(router).forward:
            return SCORES[cls.__name__.lower()]
    raise NotImplementedError(
        f"{type(router).__name__} scores its experts in a way that routing replay does not reproduce. Supported "
        f"families: {', '.join(' '.join(_FAMILIES.values()).split())}. Set routing_replay: none."
    )
