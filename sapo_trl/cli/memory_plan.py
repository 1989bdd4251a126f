"""Memory of a run before it starts: parameters counted exactly, bytes per GPU by stated formulas.

Parameters are counted on the model itself, built on the meta device from its config: no weights, no formula that could
drift from the architecture. Bytes follow from how each engine stores them; activations from a count of what autograd
saves in a layer, which a test compares with what it really saves. An estimate: it leaves `RESERVED_FRAC` of the GPU
for the CUDA context, communication buffers and fragmentation, and it has not been compared with a real GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from sapo_trl.cli.parse import RunArguments
from sapo_trl.model import moe_blocks
from sapo_trl.moe.routing_replay import replay_bytes
from sapo_trl.update.head import VOCABULARY_TILE

GIB = 2**30
RESERVED_FRAC = 0.08
VLLM_RESERVED = 3 * GIB  # vLLM's own activations and CUDA graphs, of the share of the GPU it is given
VLLM_ASLEEP = 2 * GIB  # what sleep level 2 does not give back
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size and allgather_bucket_size
HEAD_TOKENS = 4096  # TRL's TOKEN_CHUNK_SIZE: tokens of one tile of logits
AUTO_PACK_TOKENS = 16384

# config.json of the recipes' models on the Hub (huggingface.co/Qwen), so that a plan needs no download
_WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_QWEN3 = {"vocab_size": 151936, "head_dim": 128}
_MOE = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False}
_DENSE = {
    "Qwen/Qwen3-0.6B": ((1024, 3072, 28, 16, 8), True),
    "Qwen/Qwen3-1.7B": ((2048, 6144, 28, 16, 8), True),
    "Qwen/Qwen3-4B": ((2560, 9728, 36, 32, 8), True),
    "Qwen/Qwen3-8B": ((4096, 12288, 36, 32, 8), False),
    "Qwen/Qwen3-14B": ((5120, 17408, 40, 40, 8), False),
    "Qwen/Qwen3-32B": ((5120, 25600, 64, 64, 8), False),
}
_EXPERTS = {
    "Qwen/Qwen3-30B-A3B": ((2048, 6144, 48, 32, 4), 768),
    "Qwen/Qwen3-235B-A22B": ((4096, 12288, 94, 64, 4), 1536),
}


def model_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a local folder, of a recipe's model, or from the Hub.

    Raises:
        OSError: none of the three has it.
    """
    if not Path(name).is_dir() and name in _DENSE:
        widths, tied = _DENSE[name]
        return Qwen3Config(**dict(zip(_WIDTHS, widths)), **_QWEN3, tie_word_embeddings=tied)
    if not Path(name).is_dir() and name in _EXPERTS:
        widths, inner = _EXPERTS[name]
        return Qwen3MoeConfig(**dict(zip(_WIDTHS, widths)), **_QWEN3, **_MOE, moe_intermediate_size=inner)
    return AutoConfig.from_pretrained(name, revision=revision)


@dataclass(frozen=True)
class Shape:
    """Counts of a model. `active`: parameters that one token passes through. `inner`: width of one MLP or expert."""

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
    num_experts: int = 0  # 0: dense
    top_k: int = 1
    moe_layers: int = 0
    adapted_experts: int = 0  # expert parameters of a layer that LoRA merges with its adapters in every forward

    @property
    def saved_per_token(self) -> int:
        """Bytes that autograd keeps of one layer for one token, in bfloat16 with fused attention.

        8H + 5Q + 5K for the norms, projections, rotary embedding and attention, 4I for the MLP; with experts
        k (2H + 4I) instead, for every token is copied to its k experts.
        """
        attention = 8 * self.hidden + 5 * self.query + 5 * self.key
        copies = 2 * self.hidden if self.num_experts else 0
        return 2 * (attention + self.top_k * (copies + 4 * self.inner))

    @property
    def cached_per_token(self) -> int:
        """Bytes of keys and values of one token in bfloat16, all layers."""
        return 2 * 2 * self.layers * self.key


def shape_of(config: PreTrainedConfig, adapter: PeftConfig | None = None) -> Shape:
    """Count a model (with its LoRA adapters) on the meta device."""
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        plain = sum(p.numel() for p in model.parameters())
        blocks = moe_blocks(model)
        experts = [list(block.experts.parameters()) for block in blocks]
        layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == text.num_hidden_layers)
        largest_layer = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        largest_tensor = max(p.numel() for p in model.parameters())
        if adapter is not None:
            model = get_peft_model(model, adapter)
    num_experts, top_k = (experts[0][0].shape[0], text.num_experts_per_tok) if blocks else (0, 1)
    idle = sum(p.numel() for tensors in experts for p in tensors) * (num_experts - top_k) // max(num_experts, 1)
    head_dim = text.head_dim if hasattr(text, "head_dim") else text.hidden_size // text.num_attention_heads
    merges = adapter is not None and any("experts." in name for name in adapter.target_parameters or [])
    return Shape(
        total=sum(p.numel() for p in model.parameters()),
        active=plain - idle,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=text.num_attention_heads * head_dim,
        key=text.num_key_value_heads * head_dim,
        key_heads=text.num_key_value_heads,
        inner=text.moe_intermediate_size if blocks else text.intermediate_size,
        vocabulary=text.vocab_size,
        largest_layer=largest_layer,
        largest_tensor=largest_tensor,
        is_lora=adapter is not None,
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=len(blocks),
        adapted_experts=sum(p.numel() for p in experts[0]) if merges else 0,
    )


@dataclass(frozen=True)
class Setup:
    """How a run is spread over GPUs. `load_bytes`: of a weight as loaded; `rows`: completions a process rolls out."""

    engine: str  # none, ddp, zero2, zero3, fsdp2
    num_gpus: int
    gpu_bytes: float
    load_bytes: int
    pack_tokens: int
    checkpointing: bool
    row_tokens: int
    rows: int
    vllm: str = "no"  # no, colocate, server
    vllm_frac: float = 0.0
    vllm_parallel: int = 1
    vllm_sleeps: bool = False
    replays: bool = False
    has_reference: bool = False
    offloads_optimizer: bool = False
    autocasts: bool = True


def engine_of(launch: dict, num_processes: int) -> str:
    """none, ddp, zero2, zero3 or fsdp2 from an accelerate config file's content.

    Raises:
        ValueError: another kind of launch.
    """
    kind = launch.get("distributed_type", "MULTI_GPU")
    if kind == "DEEPSPEED" and launch["deepspeed_config"]["zero_stage"] in (2, 3):
        return f"zero{launch['deepspeed_config']['zero_stage']}"
    if kind == "FSDP" and launch["fsdp_config"]["fsdp_version"] == 2:
        return "fsdp2"
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return "ddp" if num_processes > 1 else "none"
    raise ValueError(f"distributed_type={kind!r} is not in the memory arithmetic: DDP, ZeRO-2, ZeRO-3 and FSDP2 are.")


def setup_of(run: RunArguments, launch: dict, num_processes: int, gpu_bytes: float) -> Setup:
    """The `Setup` of a parsed run under an accelerate config file; call it inside `planned_for(num_processes)`."""
    config, model = run.config, run.model
    tokens = AUTO_PACK_TOKENS if config.max_tokens_per_pack == "auto" else config.max_tokens_per_pack
    return Setup(
        engine=engine_of(launch, num_processes),
        num_gpus=num_processes,
        gpu_bytes=gpu_bytes,
        load_bytes=2 if model.dtype in ("bfloat16", "float16") else 4,
        pack_tokens=tokens,
        checkpointing=bool(config.activation_checkpointing),  # "auto" counts as on
        row_tokens=(run.script.max_prompt_tokens or 0) + config.max_completion_length,
        rows=config.per_device_train_batch_size * config.gradient_accumulation_steps * config.num_mini_batches,
        vllm=config.vllm_mode if config.use_vllm else "no",
        vllm_frac=config.vllm_gpu_memory_utilization,
        vllm_parallel=config.vllm_tensor_parallel_size,
        vllm_sleeps=config.vllm_enable_sleep_mode,
        replays=config.routing_replay in ("r2", "r3"),
        has_reference=config.beta > 0,
        offloads_optimizer=launch.get("deepspeed_config", {}).get("offload_optimizer_device", "none") != "none",
        autocasts=launch.get("mixed_precision", "bf16" if config.bf16 else "no") == "bf16",
    )


# (phase, name, bytes, how it is counted); the phase `state` is there all the time
Line = tuple[str, str, float, str]


def state_lines(shape: Shape, setup: Setup) -> list[Line]:
    """Weights, gradients and AdamW's states on one GPU."""
    frozen, trained, n = shape.total - shape.trainable, shape.trainable, setup.num_gpus
    parts = 1 if setup.engine in ("none", "ddp") else n
    if setup.engine in ("zero2", "zero3"):
        held = 1 if setup.engine == "zero2" else n
        weights, how = 2 * shape.total / held, f"2 B / {held}"
        gradient, moments = 2, 12
    else:
        trained_bytes = 4 if shape.is_lora or setup.engine == "fsdp2" else setup.load_bytes
        weights = (setup.load_bytes * frozen + trained_bytes * trained) / parts
        how = f"{trained_bytes} B trained, {setup.load_bytes} B frozen / {parts}"
        gradient, moments = trained_bytes * (2 if setup.engine == "ddp" else 1), 2 * trained_bytes
    on_gpu = 0 if setup.offloads_optimizer else moments
    lines = [
        ("state", "weights", weights, how),
        ("state", "gradients", gradient * trained / parts, f"{gradient} B a trained parameter / {parts}"),
        ("state", "AdamW", on_gpu * trained / parts, f"{on_gpu} B a trained parameter / {parts}"),
    ]
    if setup.has_reference and not shape.is_lora:
        lines.append(("state", "reference model", weights, "beta > 0: the weights once more"))
    if setup.replays:
        size = setup.rows * replay_bytes(setup.row_tokens, shape.moe_layers, shape.top_k, shape.num_experts)
        lines.append(("state", "routing replay", size, f"{setup.rows} rows x {setup.row_tokens} tokens"))
    return lines


def update_lines(shape: Shape, setup: Setup) -> list[Line]:
    """What the forward and backward pass of one pack adds."""
    tokens = max(setup.pack_tokens, setup.row_tokens)
    layer = shape.saved_per_token * tokens
    if setup.checkpointing:
        saved, how = 2 * tokens * shape.hidden * shape.layers, f"{tokens} tokens x 2 B x H x {shape.layers} layers"
    else:
        saved, how = layer * shape.layers, f"{tokens} tokens x {shape.saved_per_token} B x {shape.layers} layers"
    head = 6 * HEAD_TOKENS * VOCABULARY_TILE + 4 * shape.vocabulary * shape.hidden + 8 * tokens * shape.hidden
    lines = [
        ("update", "activations", saved, how + (", checkpointed" if setup.checkpointing else "")),
        ("update", "one layer in backward", 2 * layer, f"2 x {shape.saved_per_token} B x {tokens} tokens"),
        ("update", "head", head, "one tile of logits, its float32 weight gradient, hidden states"),
    ]
    if setup.engine in ("zero3", "fsdp2"):
        live = min(shape.total, max(LIVE_PARAMETERS, 2 * shape.largest_layer))
        size = 2 * (live + shape.largest_layer)
        lines.append(("update", "gathered layers", size, f"2 B x {live / 1e9:.1f}B weights and a layer's gradient"))
    elif setup.engine == "zero2":
        lines.append(("update", "buckets", 4 * min(shape.trainable, BUCKET), "2 x 2 B x 5e8"))
    elif setup.autocasts and setup.load_bytes == 4:
        lines.append(("update", "autocast copies", 2 * shape.total, "2 B a weight"))
    if shape.adapted_experts:
        lines.append(
            ("update", "merged experts", 4 * shape.adapted_experts, "LoRA: W + BA of a layer, and its gradient")
        )
    return lines


def rollout_lines(shape: Shape, setup: Setup) -> list[Line]:
    """What generation adds, and handing the weights to vLLM (`sync`)."""
    if setup.vllm == "no":
        lines = [
            (
                "rollout",
                "keys and values",
                setup.rows * setup.row_tokens * shape.cached_per_token,
                f"{setup.rows} rows x {setup.row_tokens} tokens x {shape.cached_per_token} B",
            )
        ]
        if setup.engine == "zero3":
            lines.append(("rollout", "whole model gathered", 2 * shape.total, "2 B a parameter, to generate"))
        return lines
    if setup.engine not in ("zero3", "fsdp2"):
        size, why = 0, "nothing: every GPU has the weights"
    elif shape.is_lora and setup.engine == "zero3":
        size, why = 2 * shape.total, "the whole model: TRL merges adapters gathered"
    else:
        size, why = 2 * shape.largest_tensor, "the largest tensor"
    lines = [("sync", "gathered for vLLM", size, why)]
    if setup.vllm == "colocate":
        given = setup.vllm_frac * setup.gpu_bytes
        awake = 2 * shape.total / setup.vllm_parallel if setup.vllm_sleeps else given
        lines += [
            ("rollout", "vLLM", given, f"{setup.vllm_frac} of the GPU"),
            ("sync", "vLLM", awake, "its weights" if setup.vllm_sleeps else "does not sleep"),
            ("update", "vLLM", VLLM_ASLEEP if setup.vllm_sleeps else given, "asleep" if setup.vllm_sleeps else "awake"),
        ]
    return lines


@dataclass(frozen=True)
class Memory:
    """The lines and what they add up to on the fullest GPU."""

    lines: list[Line]
    usable: float
    peaks: dict[str, float]
    vllm_rows: int | None  # longest rows that vLLM's cache holds at once on one engine; None without colocate

    @property
    def fits(self) -> bool:
        return max(self.peaks.values()) <= self.usable and self.vllm_rows != 0


def memory(shape: Shape, setup: Setup) -> Memory:
    """All lines of a run, and the peak of each phase: state + the phase's own."""
    lines = state_lines(shape, setup) + update_lines(shape, setup) + rollout_lines(shape, setup)
    state = sum(size for phase, _, size, _ in lines if phase == "state")
    phases = dict.fromkeys(phase for phase, *_ in lines if phase != "state")
    peaks = {phase: state + sum(size for p, _, size, _ in lines if p == phase) for phase in phases}
    rows = None
    if setup.vllm == "colocate":
        parallel = setup.vllm_parallel
        cache = setup.vllm_frac * setup.gpu_bytes - 2 * shape.total / parallel - VLLM_RESERVED
        row = setup.row_tokens * shape.cached_per_token / min(parallel, shape.key_heads)
        rows = max(0, int(cache // row))
    return Memory(lines, (1 - RESERVED_FRAC) * setup.gpu_bytes, peaks, rows)


def nearest_fit(shape: Shape, setup: Setup) -> str | None:
    """The smallest single change that makes a run fit, as a setting; None if no single one does."""
    changes = []
    if not setup.checkpointing:
        changes.append(("activation_checkpointing: true", {"checkpointing": True}))
    tokens = setup.pack_tokens // 2
    while tokens >= setup.row_tokens:
        changes.append((f"max_tokens_per_pack: {tokens}", {"pack_tokens": tokens}))
        tokens //= 2
    if setup.vllm == "colocate" and not setup.vllm_sleeps:
        changes.append(("vllm_enable_sleep_mode: true", {"vllm_sleeps": True}))
    if setup.engine != "zero3" and setup.num_gpus > 1:
        changes.append(("--config_file configs/accelerate/zero3.yaml", {"engine": "zero3"}))
    if setup.vllm == "colocate":
        changes += [(f"vllm_gpu_memory_utilization: {x / 20}", {"vllm_frac": x / 20}) for x in range(4, 15)]
        changes.append(("vllm_mode: server, on GPUs of its own", {"vllm": "server"}))
    for factor in (2, 4, 8, 16):
        gpus = factor * setup.num_gpus
        engine = "zero3" if setup.engine in ("none", "ddp") else setup.engine
        changes.append((f"{gpus} GPUs under {engine}", {"num_gpus": gpus, "engine": engine}))
    for label, fields in changes:
        if memory(shape, replace(setup, **fields)).fits:
            return label
    return None
