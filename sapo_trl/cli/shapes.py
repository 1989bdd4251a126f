"""Shapes and parameter counts of models from their configs alone, without reading or downloading weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from sapo_trl.model import head_shape, moe_blocks
from sapo_trl.vision import sees

# Qwen3 as in its config.json files on the Hub (huggingface.co/Qwen), under the names of the folders in configs/
QWEN3: dict[str, Any] = {
    "vocab_size": 151936, "head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
}  # fmt: skip


def _dense(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    widths = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return QWEN3 | widths | {"num_attention_heads": heads, "num_key_value_heads": 8, "tie_word_embeddings": tied}


def _moe(hidden: int, mlp: int, layers: int, heads: int, expert: int) -> dict[str, Any]:
    experts = {"moe_intermediate_size": expert, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    return _dense(hidden, mlp, layers, heads, tied=False) | {"num_key_value_heads": 4} | experts


def _vision(text: dict[str, Any], depth: int, hidden: int, mlp: int, deepstack: list[int]) -> dict[str, Any]:
    """A Qwen3-VL: the shape of its text model, and its vision tower's."""
    tower = {"depth": depth, "hidden_size": hidden, "intermediate_size": mlp, "deepstack_visual_indexes": deepstack}
    given = {name: value for name, value in text.items() if name != "rope_theta"}
    return given | {"max_position_embeddings": 262144, "vision": tower | {"out_hidden_size": text["hidden_size"]}}


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _dense(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _dense(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _dense(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _dense(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": _dense(5120, 17408, 40, 40, tied=False),
    "qwen3-32b": _dense(5120, 25600, 64, 64, tied=False),
    "qwen3-30b-a3b": _moe(2048, 6144, 48, 32, expert=768),
    "qwen3-30b-a3b-base": _moe(2048, 6144, 48, 32, expert=768) | {"max_position_embeddings": 32768},
    "qwen3-235b-a22b": _moe(4096, 12288, 94, 64, expert=1536),
    "qwen3-vl-4b-instruct": _vision(_dense(2560, 9728, 36, 32, tied=True), 24, 1024, 4096, [5, 11, 17]),
    "qwen3-vl-30b-a3b-instruct": _vision(_moe(2048, 6144, 48, 32, expert=768), 27, 1152, 4304, [8, 16, 24]),
}


def config_of(shape: dict[str, Any]) -> PreTrainedConfig:
    """The config of a shape, of a Mixture-of-Experts if it names experts."""
    if "vision" in shape:
        kind, text = Qwen3VLMoeConfig if "num_experts" in shape else Qwen3VLConfig, {**shape}
        tower, tied = text.pop("vision"), text["tie_word_embeddings"]
        return kind(text_config=text, vision_config=tower, tie_word_embeddings=tied)
    return Qwen3MoeConfig(**shape) if "num_experts" in shape else Qwen3Config(**shape)


def model_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a local folder, of a model of the recipes, or from the Hub.

    Raises:
        OSError: none of the three has it.
    """
    owner, _, model = name.partition("/")
    if owner == "Qwen" and model.lower() in SHAPES and not Path(name).is_dir():
        return config_of(SHAPES[model.lower()])
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class Vision:
    """The vision tower of a model, which works on patches.

    Attributes:
        layers, hidden, inner: as in `Shape`.
        patches: of one token.
        pixels: numbers of one patch, float32.
    """

    layers: int
    hidden: int
    inner: int
    patches: int
    pixels: int

    @property
    def saved_per_patch(self) -> int:
        """Bytes that autograd keeps of one layer for one patch: 11H + 2I numbers in bfloat16."""
        return 2 * (11 * self.hidden + 2 * self.inner)


@dataclass(frozen=True)
class Shape:
    """Counts of one model.

    Attributes:
        total, trainable: parameters, LoRA adapters included.
        active: parameters that one token passes through, adapters not included.
        hidden: width of the residual stream, H.
        query, key: width of all query heads, Q, and of all key heads, K (the values have the same).
        inner: width of the MLP, or of one expert, I.
        largest_layer, largest_tensor: parameters.
        num_experts, top_k: of one layer, and chosen per token; 0 and 1 for a dense model.
        adapted_experts: expert parameters of one layer that LoRA merges with its adapters in every forward pass.
        vision: the vision tower, if there is one.
    """

    total: int
    active: int
    trainable: int
    layers: int
    hidden: int
    query: int
    key: int
    key_heads: int
    inner: int
    vocabulary: int
    largest_layer: int
    largest_tensor: int
    is_lora: bool = False
    num_experts: int = 0
    top_k: int = 1
    moe_layers: int = 0
    adapted_experts: int = 0
    vision: Vision | None = None

    @property
    def saved_per_token(self) -> int:
        """Bytes that autograd keeps of one layer for one token, in bfloat16 with fused attention.

        8H + 5Q + 5K numbers for the norms, projections, rotary embedding and attention, and 4I for the MLP; with
        experts k (2H + 4I) instead, because every token is copied to its k experts.
        """
        attention = 8 * self.hidden + 5 * self.query + 5 * self.key
        copies = 2 * self.hidden if self.num_experts else 0
        return 2 * (attention + self.top_k * (copies + 4 * self.inner))

    @property
    def cached_per_token(self) -> int:
        """Bytes of the keys and values of one token in bfloat16, all layers together."""
        return 2 * 2 * self.layers * self.key


def _count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def shape_of(config: PreTrainedConfig, adapter: PeftConfig | None = None) -> Shape:
    """Count a model, with its LoRA adapters, by building it on the meta device."""
    text = config.get_text_config()
    with torch.device("meta"):
        model = (AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM).from_config(config)
        plain = _count(model.parameters())
        experts = [list(block.get_submodule("experts").parameters()) for block in moe_blocks(model)]
        layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == text.num_hidden_layers)
        largest_layer = max(_count(layer.parameters()) for layer in layers)
        largest_tensor = max(parameter.numel() for parameter in model.parameters())
        if adapter is not None:
            model = get_peft_model(model, adapter)
    num_experts, top_k = (experts[0][0].shape[0], text.num_experts_per_tok) if experts else (0, 1)
    idle = sum(map(_count, experts)) * (num_experts - top_k) // max(num_experts, 1)
    heads, key_heads, head_dim = head_shape(text)
    adapted = isinstance(adapter, LoraConfig) and any("experts." in name for name in adapter.target_parameters or [])
    return Shape(
        total=_count(model.parameters()),
        active=plain - idle,
        trainable=_count(p for p in model.parameters() if p.requires_grad),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=heads * head_dim,
        key=key_heads * head_dim,
        key_heads=key_heads,
        inner=text.moe_intermediate_size if experts else text.intermediate_size,
        vocabulary=text.vocab_size,
        largest_layer=largest_layer,
        largest_tensor=largest_tensor,
        is_lora=adapter is not None,
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=len(experts),
        adapted_experts=_count(experts[0]) if adapted else 0,
        vision=_vision_of(config.to_dict().get("vision_config")),
    )


def _vision_of(given: dict[str, Any] | None) -> Vision | None:
    if given is None or "depth" not in given:  # other families name their parts otherwise: not counted
        return None
    pixels = given["in_channels"] * given["temporal_patch_size"] * given["patch_size"] ** 2
    widths = given["hidden_size"], given["intermediate_size"]
    return Vision(given["depth"], *widths, given["spatial_merge_size"] ** 2, pixels)
