"""What the stages need to know of a model: the module inside its wrappers, its shape, its routers, and its layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sapo_trl.errors import nearest
from sapo_trl.trl_seams import attention_name, calls_registered_attention

# A name on the Hub, owner/name or name; any other text can only be a path
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")

# What PEFT inserts between a module's name and the module itself
_PEFT_WRAPPERS = re.compile(r"\.(?:base_layer|original_module|modules_to_save)\b.*")

# What configs call the probability that attention weights are dropped
_ATTENTION_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "attn_dropout")


def check_model_path(name: str) -> None:
    """Refuse a name that can only be a local folder, and is none that holds a model.

    A name that could be a Hub id, and whose first part is no local folder, is left to the Hub.

    Raises:
        ValueError: with the nearest existing sibling.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
            raise ValueError(
                f"{name} holds an adapter of {base}, not a model. Load it with peft's AutoPeftModelForCausalLM and "
                "pass the model, or merge it (merge_and_unload) and save the result."
            )
        if not (path / "config.json").exists():
            raise ValueError(
                f"the model folder {name} has no config.json; is it the folder that save_pretrained wrote?"
            )
        return
    parent = path.parent
    is_local = name.startswith((".", "/", "~")) or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())
    if _HUB_ID.match(name) and not is_local:
        return
    while not parent.is_dir():
        parent = parent.parent
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    missing = path.relative_to(parent).parts[0]
    close = nearest(missing, names)
    hint = f" Nearest: {parent / close}." if close else ""
    raise ValueError(f"the model {name} does not exist: {parent} holds no {missing!r}.{hint}")


# ---------------------------------------------------------------------------------------------------------- wrappers


def without_adapters(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, or the model itself where there is none."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"{type(base).__name__} is not a transformers model.")
    return base


def inner_model(model: nn.Module, accelerator: Accelerator) -> PreTrainedModel:
    """The transformers model inside the wrappers of DDP, DeepSpeed, FSDP and PEFT."""
    bare = isinstance(model, PreTrainedModel | PeftModel)  # unwrap_model looks for DeepSpeed on the disk, 3 ms a time
    return without_adapters(model if bare else accelerator.unwrap_model(model))


# ------------------------------------------------------------------------------------------------------------- shape


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration of the language model, also if it is part of a multimodal model."""
    return model.config.get_text_config()


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of logits per position."""
    return text_config(model).vocab_size


def max_positions(config: PretrainedConfig) -> int | None:
    """Positions that a text model knows: `max_position_embeddings`, or more where its RoPE is scaled; None: no limit.

    >>> from transformers import Qwen3Config
    >>> yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    >>> max_positions(Qwen3Config(max_position_embeddings=32768, rope_parameters=yarn))
    131072
    """
    given = config.to_dict()
    most, rope = given.get("max_position_embeddings"), given.get("rope_parameters") or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return max(most, int(original * factor)) if most and original and factor else most


def head_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """(query heads, key and value heads, width of a head); configs may omit, or set to null, what follows."""
    heads = config.num_attention_heads
    given = {name: getattr(config, name) for name in ("num_key_value_heads", "head_dim") if hasattr(config, name)}
    return heads, given.get("num_key_value_heads") or heads, given.get("head_dim") or config.hidden_size // heads


def has_dropout(model: nn.Module) -> bool:
    """Whether a layer of the model drops activations while it trains, an adapter's included."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


# ------------------------------------------------------------------------------------------------------------ layout


def layout_of(model: PreTrainedModel | PeftModel) -> tuple[str, str]:
    """(layout, reason) of a model's packs: `segments`, `flash` or `padded`, see `sapo_trl/update/attention.py`.

    It follows from the configuration. That the layout gives the model's own log-probs is measured before the first
    update (`sapo_trl/update/check.py`).

    Raises:
        NotImplementedError: an adapter that puts virtual tokens before every row.
    """
    base = without_adapters(model)
    config = text_config(base)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        if model.active_peft_config.peft_type != PeftType.PREFIX_TUNING:
            raise NotImplementedError(
                f"{model.active_peft_config.peft_type.value} puts virtual tokens before every row, which shifts the "
                "positions that the loss reads. Use LoRA, or prefix tuning."
            )
        return "padded", "prefix tuning gives every row a prefix of keys and values"
    if config is not base.config and not finds_places(base):
        return "padded", f"{type(base).__name__} is multimodal"
    given = getattr(config, "layer_types", None)
    if not given and getattr(config, "sliding_window", None):
        return "padded", f"sliding_window={config.sliding_window}"
    kinds = set(given or ["full_attention"])
    if kinds != {"full_attention"}:
        return "padded", f"layers of kind {', '.join(sorted(kinds - {'full_attention'}))} carry state across rows"
    if not calls_registered_attention(base):
        return "padded", f"{type(base).__name__} does not use transformers' attention interface"
    for name in _ATTENTION_DROPOUT:
        if getattr(config, name, 0.0):
            return "padded", f"{name}={getattr(config, name)}"
    if "flash" in attention_name(config):
        return "flash", f"attn_implementation={attention_name(config)}"
    return "segments", f"{'text model' if config is base.config else 'pictures and text'} with full attention"


def finds_places(model: PreTrainedModel) -> bool:
    """Whether a vision-language model has a function for the positions of a row with pictures, as Qwen's have."""
    return callable(getattr(model.base_model, "get_rope_index", None))


# ----------------------------------------------------------------------------------------------- Mixture-of-Experts


@dataclass(frozen=True)
class Router:
    """A router module: its name before PEFT wrapped anything, and its layer, counted 0, 1, ... over the routers.

    PEFT's `modules_to_save` has copies of a module besides the original; all of them have one name and one layer.
    """

    name: str
    layer: int
    module: nn.Module


def find_routers(model: nn.Module) -> list[Router]:
    """The routers of a Mixture-of-Experts model, in the order of its modules; none of a dense model.

    transformers names their classes ...TopKRouter or ...TopkRouter; PEFT and FSDP may have derived from them.
    """
    layers: dict[str, int] = {}
    routers = []
    for path, module in model.named_modules():
        if any(cls.__name__.lower().endswith("topkrouter") for cls in type(module).__mro__):
            name = _PEFT_WRAPPERS.sub("", path)
            routers.append(Router(name, layers.setdefault(name, len(layers)), module))
    return routers


def moe_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that contain a router and its `experts`, one per layer."""
    modules = dict(model.named_modules())
    names = dict.fromkeys(router.name.rpartition(".")[0] for router in find_routers(model))
    return [modules[name] for name in names if "experts" in dict(modules[name].named_children())]


def held_here(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, without ZeRO-3's padding of the last shard (uninitialised)."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    if not hasattr(tensor, "ds_tensor"):
        return tensor
    partitioned: Any = tensor  # by DeepSpeed
    shard = partitioned.ds_tensor
    start = shard.numel() * torch.distributed.get_rank(partitioned.ds_process_group)
    return shard.flatten()[: max(0, partitioned.ds_numel - start)]


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only a part of some parameter (ZeRO-3, FSDP2)."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in model.parameters())


def has_text_only(prompt: str | list) -> bool:
    """Whether a prompt holds no pictures."""
    return isinstance(prompt, str) or all(isinstance(message.get("content"), str) for message in prompt)


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list, template_options: Mapping[str, Any] | None = None
) -> str:
    """The text the model continues: chat messages under the chat template, plain text as it is.

    Args:
        template_options: what the template reads besides the messages (`chat_template_kwargs`).
    """
    if isinstance(prompt, str):
        return prompt
    options = template_options or {}
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options))
