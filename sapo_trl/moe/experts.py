"""Preparation of a Mixture-of-Experts model, before its optimizer and its engine exist."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from sapo_trl.model import find_routers, inner_model, moe_blocks, text_config
from sapo_trl.trl_seams import VLLMGeneration, convert_sent_parameters, experts_name, revert_weight_conversion

FLOAT32_EXPERTS = (
    "grouped_mm ignores bf16 autocast: the experts compute in float32, one after the other. For LoRA set "
    "dtype: bfloat16; for full fine-tuning launch with configs/accelerate/zero3.yaml, which computes in bfloat16 under "
    "float32 masters."
)


def freeze_routers(model: nn.Module) -> str:
    """Take the routers, and adapters on them, out of training; returns a sentence with the number of parameters.

    Gradients still flow through a frozen router to the layers below: it is a fixed function, not a detached one.

    Raises:
        ValueError: the model has no router.
    """
    routers = {router.name for router in find_routers(model)}
    if not routers:
        raise ValueError(
            f"freeze_router is set, but {type(model).__name__} is dense: 0 of its modules are routers. "
            "Remove freeze_router."
        )
    count = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(name.startswith(f"{router}.") for router in routers):
            parameter.requires_grad_(False)
            count += int(getattr(parameter, "ds_numel", parameter.numel()))  # a parameter that ZeRO-3 cut up has 0
    if count == 0:
        return f"{len(routers)} routers were frozen already (LoRA trains adapters only)"
    return f"{len(routers)} routers frozen, {count:,} parameters"


def mark_leaf_modules(model: nn.Module, plugin: DeepSpeedPlugin | None) -> str | None:
    """Let ZeRO-3 fetch a Mixture-of-Experts block as a whole, by accelerate's own setting; the names of its classes.

    Which experts run, and in which order, differs between steps and processes, but ZeRO-3 prefetches in the order of an
    earlier step. transformers 5 keeps the experts of a layer in two tensors that every pass uses whole, so only models
    with one module per expert need this. DeepSpeed 0.19 does it itself for Mixtral, Qwen2-MoE and Qwen3-MoE, and for no
    other family. A setting of the user stays.
    """
    if plugin is None or plugin.zero_stage != 3:
        return None
    kinds = sorted({type(block).__name__ for block in moe_blocks(model)})
    given = plugin.transformer_moe_cls_names or os.environ.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES")
    if given is None and kinds:
        plugin.transformer_moe_cls_names = ",".join(kinds)
    return ", ".join(kinds) if given is None else given


def float32_experts(
    model: PreTrainedModel, device_type: str, mixed_precision: str, distributed_type: DistributedType
) -> str | None:
    """A warning where the experts would compute in float32 although the run says bf16, else None.

    Autocast does not apply to `grouped_mm`, which computes in the dtype of the weights, and whose fast CUDA kernel
    takes bfloat16 only. ZeRO and FSDP cast the weights themselves and keep float32 masters.
    """
    casts = distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if device_type != "cuda" or mixed_precision != "bf16" or casts:
        return None
    if experts_name(text_config(model)) != "grouped_mm":
        return None
    experts = [block.get_submodule("experts") for block in moe_blocks(model)]
    weights = [p for each in experts for name, p in each.named_parameters() if "lora_" not in name]
    count = sum(p.numel() for p in weights if p.dtype == torch.float32)
    if count == 0:
        return None
    return f"WARNING: {count / 1e6:,.0f}M expert parameters are float32. {FLOAT32_EXPERTS}"


def hub_named(model: PreTrainedModel, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs with a layer's experts one by one under the Hub's names, as in a checkpoint on disk.

    TRL 1.16 hands vLLM the tensors of transformers 5, which contain all experts of a layer. vLLM 0.30 loads Qwen3-MoE
    from either form (tried with both); a checkpoint's own is what every version and family has a loader for. One tensor
    is converted at a time, so no more is gathered than before.
    """
    for name, tensor in parameters:
        if ".experts." in name:
            yield from revert_weight_conversion(model, {name: tensor}).items()
        else:
            yield name, tensor


def prepare_experts(
    model: nn.Module, freeze_router: bool, accelerator: Accelerator, vllm_generation: VLLMGeneration | None
) -> list[tuple[str, str]]:
    """Do all of the above that a run needs; (name, what was done) for its announcement."""
    state, inner = accelerator.state, inner_model(model, accelerator)
    lines = {
        "router": freeze_routers(model) if freeze_router else None,
        "ZeRO-3 leaf modules": mark_leaf_modules(model, state.deepspeed_plugin),
        "experts": float32_experts(inner, accelerator.device.type, state.mixed_precision, state.distributed_type),
    }
    if vllm_generation is not None and moe_blocks(model):
        convert_sent_parameters(vllm_generation, partial(hub_named, inner))
    return [(name, text) for name, text in lines.items() if text]
