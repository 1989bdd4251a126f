"""Does a run fit into its GPUs? An estimate before anything loads, in bytes on the fullest GPU.

A training step goes through these phases, and the GPU must hold what each of them needs:

    state       in every phase: weights, gradients, AdamW's moments, a reference model, recorded routes
    sync        the new weights go to vLLM: what is gathered for that, and vLLM's own weights
    generation  keys and values of the completions, or the share of the GPU that vLLM is given
    log-probs   forward pass over one pack for old and reference log-probs, where the run has such passes
    update      forward and backward pass over one pack: activations, the model's head, gathered layers or buckets
    step        the optimizer step: what it needs beside the state

The peak of a phase is the sum of the state and the phase's own lines. Parameters are counted on the model itself, built
without weights (`shapes.shape_of`); their bytes follow from how each engine stores them. Activations are what autograd
saves in a layer, by a formula that a test compares with what it really saves. `RESERVED_FRAC` of the GPU is left to the
CUDA context, communication buffers and fragmentation. None of this has been compared with a real GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from sapo_trl.cli.parse import RunArguments
from sapo_trl.cli.shapes import Shape
from sapo_trl.config import SAPOConfig
from sapo_trl.moe.routing_replay import replay_bytes
from sapo_trl.update.head import HEAD_TOKENS, VOCABULARY_TILE

GIB = 2**30
RESERVED_FRAC = 0.08
VLLM_RESERVED = 3 * GIB  # vLLM's own activations and CUDA graphs, out of the share of the GPU that it is given
VLLM_ASLEEP = 2 * GIB  # what sleep level 2 does not give back
GATHERED_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size and allgather_bucket_size, in numbers
SUB_GROUP = 1_000_000_000  # DeepSpeed's stage3 sub_group_size: parameters that one part of the step is over
AUTO_PACK_TOKENS = 16384  # what `max_tokens_per_pack: auto` is counted as


@dataclass(frozen=True)
class Setup:
    """How a run is distributed over GPUs.

    Attributes:
        engine: none, ddp, zero2, zero3 or fsdp2.
        load_bytes: bytes of one weight as it is loaded.
        pack_tokens: tokens of one forward pass of the update.
        prompt_tokens: the longest prompt, which may be pictures throughout.
        row_tokens: the longest prompt and completion together.
        completion_tokens: the longest completion.
        rows: completions that one process rolls out.
        vllm: no, colocate or server; the five fields after it count for colocate only.
        vllm_tokens: positions that the engine is started for; None: those of the model.
        logprob_passes: forward passes over a rollout for old and reference log-probs; a fraction where the first
            mini-batch needs none.
        on_cpu: the run is for a CPU, whose memory is not judged.
        autocasts: bfloat16 is computed in by copies of float32 weights.
    """

    engine: str
    num_gpus: int
    gpu_bytes: float
    load_bytes: int
    pack_tokens: int
    checkpointing: bool
    row_tokens: int
    rows: int
    completion_tokens: int = 0
    logprob_passes: float = 0.0
    vllm: str = "no"
    vllm_frac: float = 0.0
    vllm_parallel: int = 1
    vllm_sleeps: bool = False
    vllm_may_sleep: bool = True  # not one that generates a rollout ahead during the update
    vllm_tokens: int | None = None
    replays: bool = False
    has_reference: bool = False
    offloads_optimizer: bool = False
    autocasts: bool = True
    prompt_tokens: int = 0
    on_cpu: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the largest pack: a row is never cut."""
        return max(self.pack_tokens, self.row_tokens)

    @property
    def engine_rows(self) -> int:
        """Completions of a rollout on one engine that generates on this process's GPU."""
        return self.rows * (self.vllm_parallel if self.vllm == "colocate" else 1)

    @property
    def shards_weights(self) -> bool:
        """Whether a GPU holds only its part of the weights and gathers a layer when it is needed."""
        return self.engine in ("zero3", "fsdp2")


def engine_of(launch: dict, num_processes: int) -> str:
    """none, ddp, zero2, zero3 or fsdp2 from an accelerate config file's content, as `read_launch` gives it."""
    kind = launch.get("distributed_type")
    if kind == "DEEPSPEED":
        return f"zero{launch['deepspeed_config']['zero_stage']}"
    if kind == "FSDP":
        return "fsdp2"
    return "ddp" if num_processes > 1 else "none"


def setup_of(run: RunArguments, launch: dict, num_processes: int, gpu_bytes: float) -> Setup:
    """The `Setup` of a parsed run under an accelerate config file; call it inside `planned_for(num_processes)`."""
    config, model, tokens = run.config, run.model, run.config.max_tokens_per_pack
    return Setup(
        engine=engine_of(launch, num_processes),
        num_gpus=num_processes,
        gpu_bytes=gpu_bytes,
        load_bytes=2 if model.dtype in ("bfloat16", "float16") else 4,
        pack_tokens=AUTO_PACK_TOKENS if isinstance(tokens, str) else tokens,
        checkpointing=bool(config.for_trl().activation_checkpointing),  # "auto" counts as on
        prompt_tokens=run.script.max_prompt_tokens or 0,
        row_tokens=(run.script.max_prompt_tokens or 0) + (config.max_completion_length or 0),
        rows=config.per_device_train_batch_size * config.gradient_accumulation_steps * config.num_mini_batches,
        completion_tokens=config.max_completion_length or 0,
        logprob_passes=_logprob_passes(config),
        vllm=config.vllm_mode if config.use_vllm else "no",
        vllm_frac=config.vllm_gpu_memory_utilization,
        vllm_parallel=config.vllm_tensor_parallel_size,
        vllm_sleeps=config.vllm_enable_sleep_mode,
        vllm_may_sleep=not config.rollouts_ahead,
        vllm_tokens=config.vllm_max_model_length,
        replays=config.replay in ("r2", "r3"),
        has_reference=config.beta > 0,
        offloads_optimizer=launch.get("deepspeed_config", {}).get("offload_optimizer_device", "none") != "none",
        autocasts=launch.get("mixed_precision", "bf16" if config.bf16 else "no") == "bf16",
    )


def _logprob_passes(config: SAPOConfig) -> float:
    """Old log-probs of every mini-batch but an on-policy first one, and the reference's of all."""
    old = 1.0 if config.num_iterations > 1 else 1 - 1 / config.num_mini_batches
    return old * (config.old_logprobs == "trainer") + (config.beta > 0)


class Line(NamedTuple):
    """One use of memory: its phase, its name, its bytes, and how they are counted."""

    phase: str
    name: str
    size: float
    how: str


def state_lines(shape: Shape, setup: Setup) -> Iterator[Line]:
    """The memory of every phase.

    ZeRO stores 2 bytes a weight and 2 a gradient, and 12 for AdamW (a float32 copy and two moments). Elsewhere a
    trained weight, its gradient and its moments have one precision, and DDP stores the gradients twice (in its
    buckets).
    """
    frozen, trained, n = shape.total - shape.trainable, shape.trainable, setup.num_gpus
    parts = 1 if setup.engine in ("none", "ddp") else n  # of gradients and moments
    if setup.engine in ("zero2", "zero3"):
        held = n if setup.shards_weights else 1
        weights, how = 2 * shape.total / held, f"2 B / {held}"
        gradient, moments = 2, 12
    else:
        own = 4 if shape.is_lora or setup.engine == "fsdp2" else setup.load_bytes  # bytes of a trained weight
        weights = (setup.load_bytes * frozen + own * trained) / parts
        how = f"{own} B trained, {setup.load_bytes} B frozen / {parts}"
        gradient, moments = own * (2 if setup.engine == "ddp" else 1), 2 * own
    moments = 0 if setup.offloads_optimizer else moments
    yield Line("state", "weights", weights, how)
    yield Line("state", "gradients", gradient * trained / parts, f"{gradient} B a trained parameter / {parts}")
    yield Line("state", "AdamW", moments * trained / parts, f"{moments} B a trained parameter / {parts}")
    if setup.has_reference and not shape.is_lora:
        yield Line("state", "reference model", weights, "beta > 0: the weights once more")
    if setup.replays:
        size = setup.rows * replay_bytes(setup.row_tokens, shape.moe_layers, shape.top_k, shape.num_experts)
        yield Line("state", "routing replay", size, f"{setup.rows} rows x {setup.row_tokens} tokens")


def update_lines(shape: Shape, setup: Setup) -> Iterator[Line]:
    """The memory of the passes over one pack. With checkpointing only the layers' inputs are kept."""
    tokens, saved = setup.tokens, shape.saved_per_token
    if setup.checkpointing:
        kept, how = 2 * shape.hidden, f"{tokens} tokens x 2 B x H x {shape.layers} layers, checkpointed"
    else:
        kept, how = saved, f"{tokens} tokens x {saved} B x {shape.layers} layers"
    yield Line("update", "activations", tokens * kept * shape.layers, how)
    yield Line("update", "one layer in backward", 2 * saved * tokens, f"2 x {saved} B x {tokens} tokens")
    if shape.vision is not None:
        patches = shape.vision.patches * int(tokens * setup.prompt_tokens / max(1, setup.row_tokens))
        layer, pixels = shape.vision.saved_per_patch, 4 * shape.vision.pixels
        each = 2 * shape.vision.hidden if setup.checkpointing else layer
        size = patches * (pixels + each * shape.vision.layers + 2 * layer)
        how = f"{patches} patches x ({pixels} B + {each} B x {shape.vision.layers} layers + 2 x {layer} B in backward)"
        yield Line("update", "pictures", size, how)
    head = 6 * HEAD_TOKENS * VOCABULARY_TILE + 4 * shape.vocabulary * shape.hidden + 8 * tokens * shape.hidden
    yield Line("update", "head", head, "one tile of logits, its float32 weight gradient, hidden states")
    if setup.shards_weights:
        gathered = _gathered(shape)
        how = f"2 B x {gathered / 1e9:.1f}B weights and a layer's gradient"
        yield Line("update", "gathered layers", 2 * (gathered + shape.largest_layer), how)
    elif setup.engine == "zero2":
        yield Line("update", "buckets", 4 * min(shape.trainable, BUCKET), "2 x 2 B x 5e8")
    yield from _weight_copies("update", shape, setup)
    if shape.adapted_experts:
        how = "LoRA: W + BA of a layer, and its gradient"
        yield Line("update", "merged experts", 4 * shape.adapted_experts, how)


def logprob_lines(shape: Shape, setup: Setup) -> Iterator[Line]:
    """The memory of a pass without gradients: one layer at a time, and no more."""
    if not setup.logprob_passes:
        return
    tokens, saved = setup.tokens, shape.saved_per_token
    yield Line("log-probs", "one layer", saved * tokens, f"{saved} B x {tokens} tokens")
    head = 6 * HEAD_TOKENS * VOCABULARY_TILE + 4 * tokens * shape.hidden
    yield Line("log-probs", "head", head, "one tile of logits, hidden states")
    if setup.shards_weights:
        gathered = _gathered(shape)
        yield Line("log-probs", "gathered layers", 2 * gathered, f"2 B x {gathered / 1e9:.1f}B weights")
    yield from _weight_copies("log-probs", shape, setup)
    if shape.adapted_experts:
        yield Line("log-probs", "merged experts", 2 * shape.adapted_experts, "LoRA: W + BA of a layer")


def step_lines(shape: Shape, setup: Setup) -> Iterator[Line]:
    """The memory of the optimizer step: ZeRO's float32 copy of the gradients; AdamW itself is one kernel in place."""
    if setup.engine not in ("zero2", "zero3") or setup.offloads_optimizer:
        size, how = 0.0, "nothing: in place" if not setup.offloads_optimizer else "nothing: on the CPU"
    else:
        own = shape.trainable / setup.num_gpus
        part = min(own, SUB_GROUP) if setup.engine == "zero3" else own
        size, how = 4 * part, f"4 B x {part / 1e9:.2f}B of the GPU's trained parameters"
    yield Line("step", "float32 gradients", size, how)


def _gathered(shape: Shape) -> int:
    """Parameters of the layers that a GPU without all the weights holds at once."""
    return min(shape.total, max(GATHERED_PARAMETERS, 2 * shape.largest_layer))


def _weight_copies(phase: str, shape: Shape, setup: Setup) -> Iterator[Line]:
    if not setup.shards_weights and setup.engine != "zero2" and setup.autocasts and setup.load_bytes == 4:
        yield Line(phase, "autocast copies", 2 * shape.total, "2 B a weight")


def vllm_lines(phases: Iterable[str], setup: Setup) -> Iterator[Line]:
    """What vLLM holds while this process trains."""
    if setup.vllm == "colocate":
        size, how = (VLLM_ASLEEP, "asleep") if setup.vllm_sleeps else (_given_to_vllm(setup), "awake")
        for phase in phases:
            yield Line(phase, "vLLM", size, how)


def generation_lines(shape: Shape, setup: Setup) -> Iterator[Line]:
    """The memory of generation, and of giving the weights to vLLM (`sync`)."""
    if setup.vllm == "no":
        how = f"{setup.rows} rows x {setup.row_tokens} tokens x {shape.cached_per_token} B"
        size = setup.rows * setup.row_tokens * shape.cached_per_token
        yield Line("generation", "keys and values", size, how)
        if setup.engine == "zero3":
            yield Line("generation", "whole model gathered", 2 * shape.total, "2 B a parameter, to generate")
        return
    if not setup.shards_weights:
        size, how = 0, "nothing: every GPU has the weights"
    elif shape.is_lora and setup.engine == "zero3":
        size, how = 2 * shape.total, "the whole model: TRL merges adapters gathered"
    else:
        size, how = 2 * shape.largest_tensor, "the largest tensor"
    yield Line("sync", "gathered for vLLM", size, how)
    if setup.vllm == "colocate":
        given = _given_to_vllm(setup)
        yield Line("generation", "vLLM", given, f"{setup.vllm_frac} of the GPU")
        own = 2 * shape.total / setup.vllm_parallel if setup.vllm_sleeps else given
        yield Line("sync", "vLLM", own, "its weights" if setup.vllm_sleeps else "does not sleep")


def _given_to_vllm(setup: Setup) -> float:
    return setup.vllm_frac * setup.gpu_bytes


def vllm_cache_tokens(shape: Shape, setup: Setup) -> int:
    """Tokens whose keys and values one engine of vLLM holds, beside its weights, on this process's GPU."""
    parallel = setup.vllm_parallel
    cache = _given_to_vllm(setup) - 2 * shape.total / parallel - VLLM_RESERVED
    return max(0, int(cache // (shape.cached_per_token / min(parallel, shape.key_heads))))


@dataclass(frozen=True)
class Memory:
    """All lines of a run, the peak of each phase, and the bytes that may be used."""

    lines: list[Line]
    usable: float
    peaks: dict[str, float]
    vllm_rows: int | None  # the longest ones that the cache of one engine holds at once; None without colocate

    @property
    def fits(self) -> bool:
        """Whether every phase fits, and vLLM's cache holds a row."""
        return max(self.peaks.values()) <= self.usable and self.vllm_rows != 0


def memory(shape: Shape, setup: Setup) -> Memory:
    """All lines of a run, and the peak of each phase: the state and the phase's own."""
    lines = [*state_lines(shape, setup), *generation_lines(shape, setup), *logprob_lines(shape, setup)]
    lines += [*update_lines(shape, setup), *step_lines(shape, setup)]
    phases = dict.fromkeys(line.phase for line in lines if line.phase != "state")
    lines += vllm_lines([phase for phase in phases if phase not in ("sync", "generation")], setup)
    order = ["state", *phases]
    lines.sort(key=lambda line: order.index(line.phase))
    peaks = {phase: sum(line.size for line in lines if line.phase in ("state", phase)) for phase in phases}
    rows = vllm_cache_tokens(shape, setup) // setup.row_tokens if setup.vllm == "colocate" else None
    return Memory(lines, (1 - RESERVED_FRAC) * setup.gpu_bytes, peaks, rows)


def nearest_fit(shape: Shape, setup: Setup) -> str | None:
    """The smallest single change that makes a run fit, as a setting; None if no single one does."""
    return next((label for label, changed in _changes(setup) if memory(shape, changed).fits), None)


def _changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """(setting, the setup with it), the cheapest first."""
    if not setup.checkpointing:
        yield "activation_checkpointing: true", replace(setup, checkpointing=True)
    if setup.vllm == "colocate" and setup.vllm_may_sleep and not setup.vllm_sleeps:
        yield "vllm_enable_sleep_mode: true", replace(setup, vllm_sleeps=True)
    tokens = setup.pack_tokens // 2
    while tokens >= max(1, setup.row_tokens):
        yield f"max_tokens_per_pack: {tokens}", replace(setup, pack_tokens=tokens)
        tokens //= 2
    if setup.engine != "zero3" and setup.num_gpus > 1:
        yield "--config_file configs/accelerate/zero3.yaml", replace(setup, engine="zero3")
    if setup.vllm == "colocate":
        for twentieths in range(4, 15):
            frac = twentieths / 20
            yield f"vllm_gpu_memory_utilization: {frac}", replace(setup, vllm_frac=frac)
        yield "vllm_mode: server, on GPUs of its own", replace(setup, vllm="server")
    engine = "zero3" if setup.engine in ("none", "ddp") else setup.engine
    for gpus in (setup.num_gpus * factor for factor in (2, 4, 8, 16)):
        yield f"{gpus} GPUs under {engine}", replace(setup, num_gpus=gpus, engine=engine)
