"""The configuration room: what a run may be told, what follows from it, and what is refused.

`algorithm` is the one flag. TRL's `loss_type`, `importance_sampling_level` and `steps_per_generation`
follow from it and from `num_mini_batches`; saying something else for them is an error, as is every
field that the chosen algorithm would silently ignore.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from trl import GRPOConfig

from sapo_trl.algorithms import ALGORITHMS, Algorithm
from sapo_trl.objective import GATES

_PLANNED_PROCESSES: ContextVar[int | None] = ContextVar("planned_processes", default=None)

REPLAYS = ("none", "r2", "r3")
ON_COLLAPSE = ("none", "warn", "stop")

# Sampling settings that cut or reshape the distribution: the log-probs of the ratio are those of the full softmax
# at `temperature`, so any of these would bias it by the mass that survives.
UNBIASED_SAMPLING = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}


@contextmanager
def planned_for(num_processes: int) -> Iterator[None]:
    """Inside, a `SAPOConfig` is validated as if launched with `num_processes` processes (for `scripts/check.py`)."""
    token = _PLANNED_PROCESSES.set(num_processes)
    try:
        yield
    finally:
        _PLANNED_PROCESSES.reset(token)


def nearest(word: str, known) -> str:
    """`; did you mean 'x'?` with the nearest known word, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


@dataclass
class SAPOConfig(GRPOConfig):
    """`GRPOConfig` with one flag for the algorithm, derived batches, and every field either honoured or refused.

    One mini-batch is one optimizer step: `per_device_train_batch_size x gradient_accumulation_steps` completions a
    process. It is cut into packs of at most `max_tokens_per_pack` tokens, which bounds memory, so the two factors
    matter only by their product. A rollout is `num_mini_batches` mini-batches.
    """

    algorithm: str = field(
        default="sapo", metadata={"help": f"What is optimised: {', '.join(ALGORITHMS)}. Loss, level and clip follow."}
    )
    num_mini_batches: int = field(
        default=4,
        metadata={"help": "Optimizer steps that one rollout is split into. 1 (with num_iterations 1) is on-policy."},
    )
    gate: str = field(default="sigmoid", metadata={"help": f"Soft gate of `algorithm: sapo`: {', '.join(GATES)}."})
    require_off_policy: bool = field(
        default=False, metadata={"help": "Make an inert gate (every update on-policy) an error instead of a warning."}
    )
    routing_replay: str | None = field(
        default=None, metadata={"help": f"Mixture-of-Experts routing replay: {', '.join(REPLAYS)}."}
    )
    freeze_router: bool = field(
        default=False, metadata={"help": "Mixture-of-Experts: keep the routers' weights as they were loaded."}
    )
    max_tokens_per_pack: int | str = field(
        default=16384,
        metadata={
            "help": "Tokens per forward pass of the update, or `auto`: as many as fit. Bounds memory; changes no "
            "gradient."
        },
    )
    share_prompts: bool = field(
        default=True,
        metadata={"help": "Forward a prompt once for the rows of a pack that have it. Changes no gradient."},
    )
    old_logprobs: str = field(
        default="trainer",
        metadata={
            "help": "Whose log-probs the ratio divides by: `trainer` computes them; `sampler` takes the engine's own, "
            "without a pass, and the ratio then holds trainer-sampler mismatch too."
        },
    )
    balance_rows: bool = field(
        default=True,
        metadata={
            "help": "Deal rows between processes so that all have equal work. Changes no gradient; off where rows hold "
            "recorded routes, which are too large to send (routing_replay r3)."
        },
    )
    overlap_rewards: bool = field(
        default=False,
        metadata={
            "help": "Run the old-log-prob pass while rewards are computed also where it then covers rows that turn out "
            "dead. Pays when rewards are slower than the pass."
        },
    )
    dump_ratios_every: int = field(
        default=0,
        metadata={
            "help": "Write the log-ratios of every n-th optimizer step to dump/*.npz, unless it is on-policy (0: no). "
            "A multiple of num_mini_batches takes the stalest mini-batches. `scripts/plot.py ratios` draws them."
        },
    )
    skip_zero_advantage: bool = field(
        default=True,
        metadata={"help": "Leave rows that can't move the weights (advantage exactly 0) out of the model passes."},
    )
    on_collapse: str = field(
        default="warn",
        metadata={"help": f"What a collapse does: {', '.join(ON_COLLAPSE)} (saves first)."},
    )

    # transformers' name and its deprecated alias; TRL defaults to True
    activation_checkpointing: str | None = field(
        default=None, metadata={"help": "true, false, or `auto` (the default): off where a pack fits without it."}
    )
    gradient_checkpointing: str | None = field(default=None, metadata={"help": "Alias of activation_checkpointing."})

    # TRL's fields whose default depends on the algorithm
    loss_type: str | None = field(default=None, metadata={"help": "Follows from `algorithm`."})
    importance_sampling_level: str | None = field(default=None, metadata={"help": "Follows from `algorithm`."})
    epsilon: float | None = field(default=None, metadata={"help": "Lower clip range; default: the algorithm's."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range; default: the algorithm's."})
    # sequence_mask, TRL's default, drops whole long answers: it thresholds the product over all tokens
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={"help": "Trainer-sampler correction: {token, sequence}_{truncate, mask}."},
    )

    def __post_init__(self):
        _require_choice("algorithm", self.algorithm, ALGORITHMS)
        _check_fields(self)
        _resolve_algorithm(self, ALGORITHMS[self.algorithm])
        _resolve_batches(self)
        _resolve_checkpointing(self)
        _resolve_buffers(self)
        super().__post_init__()

    @property
    def world_size(self) -> int:
        """Processes of this launch, or those given to `planned_for`."""
        return _PLANNED_PROCESSES.get() or super().world_size

    @property
    def launch_processes(self) -> int:
        """The same before `TrainingArguments` has set up the distributed state: accelerate and torchrun set it."""
        return _PLANNED_PROCESSES.get() or int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def aggregation(self) -> str:
        """Key of `sapo_trl.objective.row_weights`."""
        return ALGORITHMS[self.algorithm].aggregation


def _require_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; known: {', '.join(choices)}.{nearest(str(value), choices)}")


def _check_fields(config: SAPOConfig) -> None:
    """Refuse values that would fail, or destroy the weights, only after the model has loaded."""
    _require_choice("gate", config.gate, GATES)
    _require_choice("on_collapse", config.on_collapse, ON_COLLAPSE)
    for name in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be a finite number > 0 (the SAPO paper: 1.0 and 1.05).")
    for name in ("num_mini_batches", "num_iterations", "gradient_accumulation_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    _check_pack(config)
    for name in ("beta", "learning_rate", "entropy_coef"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a finite number >= 0.")
    if not 0 <= config.top_entropy_quantile <= 1:
        raise ValueError(f"top_entropy_quantile={config.top_entropy_quantile} must be within [0, 1].")
    _check_sampling(config)
    if config.pad_to_multiple_of not in (None, "auto"):
        raise ValueError("pad_to_multiple_of has no effect: the update packs rows without padding. Remove it.")
    if config.torch_empty_cache_steps is not None:
        raise ValueError("torch_empty_cache_steps has no effect: memory is bounded by max_tokens_per_pack. Remove it.")
    if "lomo" in config.optim:
        raise ValueError(f"optim={config.optim!r} steps inside backward, before all packs have run. Use adamw_torch.")


def _check_pack(config: SAPOConfig) -> None:
    tokens = config.max_tokens_per_pack
    if isinstance(tokens, str) and tokens.isdecimal():  # the command line gives text
        tokens = config.max_tokens_per_pack = int(tokens)
    if tokens != "auto" and (isinstance(tokens, str) or tokens < 1):
        raise ValueError(f"max_tokens_per_pack={tokens!r} must be a number of at least 1, or 'auto'.")
    _require_choice("old_logprobs", config.old_logprobs, ("trainer", "sampler"))
    if config.old_logprobs == "sampler" and config.use_vllm and config.vllm_importance_sampling_correction:
        raise ValueError(
            "old_logprobs='sampler' puts the trainer-sampler mismatch into the ratio, so nothing is left for "
            "vllm_importance_sampling_correction. Set vllm_importance_sampling_correction: false."
        )


def _resolve_buffers(config: SAPOConfig) -> None:
    """DDP would broadcast rotary buffers, equal anyway, before a pass: a process that starts again would wait there."""
    if config.ddp_broadcast_buffers:
        raise ValueError(
            "ddp_broadcast_buffers: true would hang a process that starts a mini-batch again after running out of "
            "memory. Remove it: the models' buffers are the same on every process."
        )
    config.ddp_broadcast_buffers = False


def _resolve_checkpointing(config: SAPOConfig) -> None:
    """`activation_checkpointing` as a bool for transformers, and whether it is ours to decide."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    given = {name: str(getattr(config, name)).lower() for name in names if getattr(config, name) is not None}
    for name, value in given.items():
        _require_choice(name, value, ("true", "false", "auto"))
    if len(set(given.values())) > 1:
        raise ValueError(f"{given} contradict each other. Remove gradient_checkpointing, the older name.")
    value = next(iter(given.values()), "auto")
    config.checkpointing_is_auto = value == "auto"
    config.activation_checkpointing = config.gradient_checkpointing = value != "false"


def _check_sampling(config: SAPOConfig) -> None:
    extra = config.generation_kwargs or {}
    if isinstance(extra, str):  # the command line passes JSON; TRL parses it later
        extra = json.loads(extra)
    for name, unbiased in UNBIASED_SAMPLING.items():
        value = extra.get(name, getattr(config, name))
        if value not in (unbiased, None) and not (name == "top_k" and value == -1):
            raise ValueError(
                f"{name}={value} biases the ratio: tokens are then drawn from a cut or reshaped distribution, while "
                f"log-probs are those of the full one. Set {name}: {unbiased} for training; evaluation is free."
            )


# TRL's constructor computes with epsilon also where the loss does not: its own default then stands in.
_TRL_EPSILON = 0.2


def _resolve_algorithm(config: SAPOConfig, algorithm: Algorithm) -> None:
    """Fill in what follows from the algorithm, and refuse fields that it would ignore."""
    for name, derived in (("loss_type", algorithm.loss_type), ("importance_sampling_level", algorithm.level)):
        value = getattr(config, name)
        if value not in (None, derived):
            raise ValueError(
                f"{name}={value!r} contradicts algorithm={config.algorithm!r}, which sets {name}={derived!r}. "
                f"Remove {name} and choose the algorithm: {', '.join(ALGORITHMS)}."
            )
        setattr(config, name, derived)
    for name in ("epsilon", "epsilon_high"):
        value, default = getattr(config, name), getattr(algorithm, name)
        if default is None and value not in (None, _TRL_EPSILON):
            _refuse_unused(config, name, value)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be a finite number > 0.")
        setattr(config, name, default if value is None else value)
    config.epsilon = _TRL_EPSILON if config.epsilon is None else config.epsilon
    _refuse_unused_fields(config, algorithm)
    if config.routing_replay is None:
        config.routing_replay = algorithm.replay
    _check_replay(config)


def _check_replay(config: SAPOConfig) -> None:
    _require_choice("routing_replay", config.routing_replay, REPLAYS)
    if config.routing_replay == "r2" and config.old_logprobs == "sampler":
        raise ValueError(
            "routing_replay='r2' records the routes in the old-log-prob pass, and old_logprobs='sampler' has none. Set "
            "old_logprobs: trainer."
        )
    if config.freeze_router and config.router_aux_loss_coef != 0.0:
        coef = "the model's own" if config.router_aux_loss_coef is None else config.router_aux_loss_coef
        raise ValueError(
            f"freeze_router is set and router_aux_loss_coef is {coef}: with nothing to move in the routers, the "
            "load-balancing loss would then bend the layers below the routers instead. Set router_aux_loss_coef: 0.0."
        )
    if config.algorithm == "grpo-r2" and config.routing_replay != "r2":
        raise ValueError(
            f"algorithm='grpo-r2' is GRPO with routing_replay='r2', not {config.routing_replay!r}. "
            "For another replay use algorithm='grpo'."
        )
    if config.routing_replay == "r3" and (config.use_vllm or config.use_transformers_continuous_batching):
        raise ValueError(
            "routing_replay='r3' records the routes while transformers generates; with continuous batching they are "
            "not recorded, and TRL 1.16 neither asks vLLM for its routed experts nor hands them on. Nearest: "
            "routing_replay='r2', which records in the trainer's own forward."
        )


# Fields that only one objective reads, with their defaults.
_OBJECTIVE_FIELDS = {
    "sapo": {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "gate": "sigmoid"},
    "vespo": {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
}


def _refuse_unused_fields(config: SAPOConfig, algorithm: Algorithm) -> None:
    for loss_type, defaults in _OBJECTIVE_FIELDS.items():
        for name, default in defaults.items():
            if algorithm.loss_type != loss_type and getattr(config, name) != default:
                _refuse_unused(config, name, getattr(config, name))
    if config.delta is not None and algorithm.epsilon is None:
        _refuse_unused(config, "delta", config.delta)
    if config.algorithm == "vespo" and config.vllm_importance_sampling_mode.startswith("sequence"):
        raise ValueError("algorithm='vespo' needs vllm_importance_sampling_mode token_truncate or token_mask.")


def _refuse_unused(config: SAPOConfig, name: str, value) -> None:
    users = [key for key, row in ALGORITHMS.items() if _reads(row, name)]
    raise ValueError(
        f"{name}={value} has no effect with algorithm={config.algorithm!r}; it belongs to {', '.join(users)}. "
        "Remove it."
    )


def _reads(algorithm: Algorithm, name: str) -> bool:
    if name in ("epsilon", "epsilon_high"):
        return getattr(algorithm, name) is not None
    if name == "delta":
        return algorithm.epsilon is not None
    return name in _OBJECTIVE_FIELDS.get(algorithm.loss_type, ())


def _resolve_batches(config: SAPOConfig) -> None:
    """steps_per_generation = num_mini_batches x gradient_accumulation_steps, and prompts must come in full groups."""
    derived = config.num_mini_batches * config.gradient_accumulation_steps
    if config.steps_per_generation not in (None, derived):
        raise ValueError(
            f"steps_per_generation={config.steps_per_generation} contradicts {config.num_mini_batches} "
            f"num_mini_batches x {config.gradient_accumulation_steps} gradient_accumulation_steps = {derived}. "
            "Remove steps_per_generation; num_mini_batches sets it."
        )
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.launch_processes
    rollout = per_step * config.num_mini_batches
    if config.generation_batch_size not in (None, rollout):
        raise ValueError(
            f"generation_batch_size={config.generation_batch_size} contradicts the {rollout} completions of a rollout. "
            "Remove it; num_mini_batches and per_device_train_batch_size set it."
        )
    if rollout % config.num_generations:
        unit = config.gradient_accumulation_steps * config.launch_processes * config.num_mini_batches
        step = config.num_generations // math.gcd(unit, config.num_generations)
        fit = math.ceil(config.per_device_train_batch_size / step) * step
        raise ValueError(
            f"num_generations={config.num_generations} does not divide the rollout of {rollout} completions "
            f"({config.per_device_train_batch_size} per device x {config.gradient_accumulation_steps} accumulation "
            f"steps x {config.launch_processes} processes x {config.num_mini_batches} mini-batches). Set "
            f"per_device_train_batch_size={fit} for {fit * unit} completions = "
            f"{fit * unit // config.num_generations} prompts x {config.num_generations}."
        )
    config.steps_per_generation, config.generation_batch_size = derived, None


@dataclass(frozen=True)
class BatchPlan:
    """What one rollout and one optimizer step are made of, over all processes.

    Attributes:
        completions_per_rollout, prompts_per_rollout: completions = prompts x num_generations.
        steps_per_rollout: optimizer steps before the next rollout, num_mini_batches x num_iterations.
        effective_batch: completions per optimizer step.
        rows_per_process: the same for one process.
        gate_status: `acts` or `inert`, with the reason.
    """

    completions_per_rollout: int
    prompts_per_rollout: int
    steps_per_rollout: int
    effective_batch: int
    rows_per_process: int
    num_processes: int
    gate_status: str

    @property
    def gate_can_act(self) -> bool:
        """Whether any update of a rollout is off-policy."""
        return self.steps_per_rollout > 1

    def __str__(self) -> str:
        return "\n".join(f"  {name:24} {value}" for name, value in self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) pairs for a table."""
        per_process = f"{self.rows_per_process} on each of {self.num_processes} process(es)"
        return [
            ("prompts per rollout", f"{self.prompts_per_rollout}"),
            ("completions per rollout", f"{self.completions_per_rollout}"),
            ("optimizer steps / rollout", f"{self.steps_per_rollout}"),
            ("effective batch", f"{self.effective_batch} completions, {per_process}"),
            ("gate", self.gate_status),
        ]


def batch_plan(config: SAPOConfig) -> BatchPlan:
    """The plan that follows from a validated config.

    Raises:
        ValueError: the gate is inert and `require_off_policy` is set.
    """
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    effective = rows * config.world_size
    rollout = effective * config.num_mini_batches
    steps = config.num_mini_batches * config.num_iterations
    if steps > 1:
        status = f"acts on {steps - 1} of {steps} steps of a rollout (the first is on-policy, r = 1)"
    else:
        status = (
            "INERT: num_mini_batches=1 and num_iterations=1 make every update on-policy, r = 1 for every token, and "
            f"{config.algorithm} is plain policy gradient. Set num_mini_batches=4 (the SAPO paper) to let it act."
        )
        if config.require_off_policy:
            raise ValueError(f"require_off_policy is set, but the gate is {status}")
    return BatchPlan(rollout, rollout // config.num_generations, steps, effective, rows, config.world_size, status)
