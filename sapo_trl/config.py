"""The configuration: what a run may be told, and what follows from it.

`algorithm` is the one flag. Fields stay as they were given, so `dataclasses.replace(config, algorithm="gspo")` works;
what follows from them are properties, and `for_trl` is the copy whose fields TRL reads. What is refused, and why, is
in `validation.py`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from sapo_trl import validation
from sapo_trl.algorithms import ALGORITHMS, Algorithm, find_algorithm
from sapo_trl.bounds import CORRECTION_PRESETS, ON_COLLAPSE, PHASE_LIMITS, REPLAYS, TRL_CLIP_MAX
from sapo_trl.eval_sets import EvalSet, read_sets
from sapo_trl.objective import GATES, CustomObjective, Objective
from sapo_trl.prompt_fields import PromptFields

_PLANNED_PROCESSES: ContextVar[int | None] = ContextVar("planned_processes", default=None)

# TRL's constructor computes with epsilon also where the objective has none.
_TRL_EPSILON = 0.2


@contextmanager
def planned_for(num_processes: int) -> Generator[None]:
    """Inside, a `SAPOConfig` is validated as if launched with `num_processes` processes (for `scripts/check.py`)."""
    token = _PLANNED_PROCESSES.set(num_processes)
    try:
        yield
    finally:
        _PLANNED_PROCESSES.reset(token)


@dataclass
class SAPOConfig(PromptFields, GRPOConfig):
    """`GRPOConfig` with one flag for the algorithm, derived batches, and every field either honoured or refused.

    One mini-batch is one optimizer step: `per_device_train_batch_size x gradient_accumulation_steps` completions a
    process. It is cut into packs of at most `max_tokens_per_pack` tokens, which bounds memory, so the two factors
    matter only by their product. A rollout is `num_mini_batches` mini-batches.

    Raises:
        ValueError: a value, or a combination of values, that would fail later, destroy the weights or have no effect.
    """

    algorithm: str = field(
        default="sapo", metadata={"help": f"What is optimised: {', '.join(ALGORITHMS)}. Loss, level and clip follow."}
    )
    objective_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of an objective of your own that are no fields of this config, as a mapping."},
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
            "without a pass, and the ratio then holds the mismatch between trainer and rollout engine too."
        },
    )
    rollouts_ahead: int = field(
        default=0,
        metadata={
            "help": "1: generate the next rollout while this one is trained on, with vLLM or (CPU) in a worker process."
        },
    )
    engine_check_every: int = field(
        default=10,
        metadata={
            "help": "Compare the log-probs of a rollout engine (vLLM, rollout_func) with the policy's after the first "
            "sync and in every n-th rollout (0: only the first). on_collapse says what a wrong engine does."
        },
    )
    vllm_dtype: str = field(
        default="auto",
        metadata={"help": "Number format of vLLM in this process: float32, bfloat16, float16; `auto`: the trainer's."},
    )
    balance_rows: bool = field(
        default=True,
        metadata={
            "help": "Move rows between processes so that all have equal work. Changes no gradient; off where rows hold "
            "recorded routes, which are too large to send (routing_replay r3)."
        },
    )
    overlap_rewards: bool = field(
        default=False,
        metadata={
            "help": "Run the old-log-prob pass while rewards are computed also where it then covers rows that turn out "
            "to have advantage 0. Pays when rewards are slower than the pass."
        },
    )
    dump_ratios_every: int = field(
        default=0,
        metadata={
            "help": "Write the log-ratios of every n-th optimizer step to dump/*.npz, unless it is on-policy (0: no). "
            "A multiple of num_mini_batches takes the stalest mini-batches. `sapo-trl plot ratios` draws them."
        },
    )
    skip_zero_advantage: bool = field(
        default=True,
        metadata={"help": "Leave rows that can't move the weights (advantage exactly 0) out of the model passes."},
    )
    max_skipped_steps: int = field(
        default=3,
        metadata={"help": "Optimizer steps in a row that numbers that are not finite may skip before the run ends."},
    )
    phase_limits: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": f"Seconds a phase may take before it counts as hanging, 0: no limit; {PHASE_LIMITS}."},
    )
    on_hang: str = field(
        default="stop", metadata={"help": "After the stacks are printed: stop (exit status 5) or warn (go on)."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch dropout off, LoRA's too: it would make the ratio r noise."}
    )
    write_report: bool = field(default=False, metadata={"help": "Write report.html when training ends."})
    eval_sets: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Named evaluation sets: name -> any of dataset_name, dataset_split, num_problems, num_samples, ks, "
            "temperature, top_p, max_completion_length; logged as eval_<name>_pass_at_1 and so on."
        },
    )
    on_collapse: str = field(
        default="warn",
        metadata={"help": f"What a collapse does: {', '.join(ON_COLLAPSE)} (saves first)."},
    )

    # transformers' name and its deprecated alias; TRL defaults to True. Types differ from theirs: not given is None.
    activation_checkpointing: str | None = field(  # ty: ignore[incompatible-attribute-override]
        default=None, metadata={"help": "true, false, or `auto` (the default): off where a pack fits without it."}
    )
    gradient_checkpointing: str | None = field(  # ty: ignore[incompatible-attribute-override]
        default=None, metadata={"help": "Alias of activation_checkpointing."}
    )

    do_train: bool = field(default=True, metadata={"help": "Always true: scripts/train.py and train() train."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Always off: the loss that is logged is the loss that was."}
    )

    # TRL's fields whose default depends on the algorithm
    loss_type: str | None = field(  # ty: ignore[incompatible-attribute-override]
        default=None, metadata={"help": "Follows from `algorithm`."}
    )
    importance_sampling_level: str | None = field(  # ty: ignore[incompatible-attribute-override]
        default=None, metadata={"help": "Follows from `algorithm`."}
    )
    epsilon: float | None = field(  # ty: ignore[incompatible-attribute-override]
        default=None, metadata={"help": "Lower clip range; default: the algorithm's."}
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper clip range; default: epsilon if that is set, else the algorithm's."}
    )
    # sequence_mask, TRL's default, drops whole long answers: it thresholds the product over all tokens
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "Correction of trainer against rollout engine: {token, sequence}_{truncate, mask}, `icepop` "
            "(token_mask within 0.5 to 2), or `geometric_mask` (rows whose geometric mean is within 0.99 to 1.01)."
        },
    )

    def __post_init__(self):
        validation.convert(self)
        if not str(self.output_dir).strip():
            raise ValueError("output_dir is empty. Name a folder; `.` is this one.")
        validation.check(self, self.row)
        self.build_objective()
        derived = self._derived()
        given = {name: vars(self)[name] for name in (*derived, "generation_batch_size")}
        validation.check_batches(self, derived["steps_per_generation"], self.launch_processes)
        vars(self).update(derived | {"generation_batch_size": None})
        try:
            super().__post_init__()  # reads and fills the derived fields
        except TypeError as error:  # a key of a mapping that accelerate does not know
            raise ValueError(f"{error}. Remove it.") from error
        vars(self).update(given)

    # ---- what follows ------------------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        """Processes of this launch, or those given to `planned_for`."""
        return _PLANNED_PROCESSES.get() or super().world_size

    @property
    def launch_processes(self) -> int:
        """The same before `TrainingArguments` has set up the distributed state: accelerate and torchrun set it."""
        return _PLANNED_PROCESSES.get() or int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def row(self) -> Algorithm:
        """The algorithm's row of the table."""
        return find_algorithm(self.algorithm)

    @property
    def level(self) -> str:
        """`token` or `sequence`: the level of the ratio."""
        return self.row.level

    @property
    def aggregation(self) -> str:
        """Key of `sapo_trl.update.aggregation.AGGREGATIONS`."""
        return self.loss_aggregation or self.row.aggregation

    @property
    def replay(self) -> str:
        """`none`, `r2` or `r3`: `routing_replay`, or what belongs to the algorithm."""
        return self.row.replay if self.routing_replay is None else self.routing_replay

    @property
    def folder(self) -> Path:
        """`output_dir`."""
        return Path(str(self.output_dir))

    @property
    def seconds_of_phases(self) -> dict[str, float]:
        """`phase_limits` over the defaults."""
        given = self.phase_limits if isinstance(self.phase_limits, dict) else {}
        return PHASE_LIMITS | given

    @property
    def evaluation_sets(self) -> dict[str, EvalSet]:
        """`eval_sets`, what they leave out filled with the sampling of this config."""
        usual = EvalSet(
            num_samples=self.num_generations_eval or self.num_generations,
            temperature=self.temperature,
            top_p=self.top_p,
            max_completion_length=self.max_completion_length,
        )
        return read_sets(self.eval_sets or {}, usual)

    @property
    def checkpointing_is_auto(self) -> bool:
        """Whether activation checkpointing is switched off where a pack fits without it."""
        return all(x in (None, "auto") for x in (self.activation_checkpointing, self.gradient_checkpointing))

    @property
    def wants_best(self) -> bool:
        """Whether something follows the best evaluation: which model is kept or saved, or the learning rate."""
        follows = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        return self.load_best_model_at_end or self.save_strategy == "best" or follows

    def build_objective(self, given: Objective | type[Objective] | Callable | None = None) -> Objective:
        """The algorithm's objective with the values of this config.

        Args:
            given: another one in its place: an `Objective`, a class of them, which is filled from this config, or a
                function of (`LossInputs`, this config).

        Raises:
            ValueError: a value that the objective refuses, or an option in `objective_kwargs` that it does not have.
        """
        if isinstance(given, Objective):
            return given
        if given is not None and not isinstance(given, type):
            return CustomObjective(lambda tokens: given(tokens, self))
        row = self.row
        if isinstance(given, type):
            if not issubclass(given, Objective):
                raise TypeError(f"objective={given.__name__} is not a subclass of sapo_trl.objective.Objective.")
            row = Algorithm(given, self.aggregation)
        own = {f.name for f in fields(self)}
        options = {name: value for name in row.options if name in own if (value := vars(self)[name]) is not None}
        if self.epsilon is not None and self.epsilon_high is None and "epsilon" in options:
            options["epsilon_high"] = self.epsilon  # as in TRL
        extra = self.objective_kwargs if isinstance(self.objective_kwargs, dict) else {}
        validation.check_objective_kwargs(extra, row, own)
        return row.objective(**{**row.defaults, **options, **extra})

    def _derived(self) -> dict[str, Any]:
        """Values of the fields that TRL and transformers read and that follow from ours."""
        options = vars(self.build_objective())
        checkpointing = validation.given_checkpointing(self) != "false"
        metric = self.metric_for_best_model or ("reward" if self.wants_best else None)
        return {
            "loss_type": self.row.loss_type,
            "importance_sampling_level": self.level,
            "epsilon": options.get("epsilon", _TRL_EPSILON),
            "epsilon_high": options.get("epsilon_high"),
            "steps_per_generation": self.num_mini_batches * self.gradient_accumulation_steps,
            "activation_checkpointing": checkpointing,
            "gradient_checkpointing": checkpointing,
            "routing_replay": self.replay,
            **self._engine_correction(),
            "metric_for_best_model": metric,
            "greater_is_better": metric is not None if self.greater_is_better is None else self.greater_is_better,
            "do_eval": self.eval_strategy != "no",
            "eval_steps": self.eval_steps or (self.logging_steps if self.eval_strategy == "steps" else None),
            # Buffers are equal anyway, and a process that starts a mini-batch again would wait in the broadcast.
            "ddp_broadcast_buffers": False,
        }

    def _engine_correction(self) -> dict[str, Any]:
        """What a preset of the correction for the rollout engine stands for; its range holds where none is given."""
        if self.vllm_importance_sampling_mode not in CORRECTION_PRESETS:
            return {}
        mode, low, high = CORRECTION_PRESETS[self.vllm_importance_sampling_mode]
        given_high = self.vllm_importance_sampling_cap or self.vllm_importance_sampling_clip_max
        low = low if self.vllm_importance_sampling_clip_min is None else self.vllm_importance_sampling_clip_min
        high = high if given_high == TRL_CLIP_MAX else given_high
        validation.check_correction(self.vllm_importance_sampling_mode, low, high)
        names = (f"vllm_importance_sampling_{name}" for name in ("mode", "clip_min", "clip_max"))
        return dict(zip(names, (mode, low, high), strict=True))

    def for_trl(self) -> SAPOConfig:
        """A copy whose derived fields hold their values, for TRL's and transformers' code."""
        derived = self._derived()
        batch = self.per_device_train_batch_size * self.world_size * derived["steps_per_generation"]
        resolved = copy.copy(self)
        # dropout is switched off, and told, by `setup_checks.without_dropout`
        vars(resolved).update(
            derived | {"generation_batch_size": batch, "disable_dropout": False, "_given": self.given}
        )
        return resolved

    @property
    def given(self) -> SAPOConfig:
        """The configuration of which this one is `for_trl`, or itself."""
        return vars(self).get("_given", self)
