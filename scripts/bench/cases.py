"""What the update benchmark runs: cases, stored rollouts, model shapes, and the two trainers around one model.

Both trainers get the same stored rollouts through `rollout_func`, so nothing is generated while the clock runs, and
hold the same model object, so there is one set of weights and one set of gradients in the process.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.cli.shapes import QWEN3, config_of
from sapo_trl.cli.shapes import SHAPES as QWEN3_SHAPES
from sapo_trl.config import SAPOConfig
from sapo_trl.tiny import build_tokenizer
from sapo_trl.trainer import SAPOTrainer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # `rollout_func` is experimental, and the benchmark's whole idea

# Our budget of the CPU cases. Headline case, one EPYC core, 1024 / 1408 / 2048 / 2816 tokens: 5.8 / 5.5 / 5.2 / 5.1 CPU
# seconds, for activations that grow with them.
TOKENS_PER_PACK = 2048

_CPU: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "cpu-dense": _CPU,
    "cpu-moe": _CPU | {"moe_intermediate_size": 192, "num_experts": 16, "num_experts_per_tok": 4},
    "test": {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    },
    "mid": {
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
    "moe-64": QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 8, "moe_intermediate_size": 384, "num_experts": 64, "num_experts_per_tok": 8,
    },
    **QWEN3_SHAPES,
}  # fmt: skip
MAX_LENGTHS = {"equal": 256, "short": 24, "1k": 1024, "8k": 8192}


@dataclass(frozen=True)
class Setting:
    """How TRL runs: rows per device batch, activation checkpointing, attention. Ours ignores `rows`."""

    rows: int = 8
    checkpointing: bool = True
    attention: str = "sdpa"

    @property
    def name(self) -> str:
        checkpointing = "on" if self.checkpointing else "off"
        return f"{self.rows} rows, checkpointing {checkpointing}, {self.attention}"


TRL_DEFAULT = Setting()


@dataclass(frozen=True)
class Case:
    """One benchmark case.

    Attributes:
        lengths: `equal` (256), `short`, `1k` or `8k`: lognormal with that maximum.
        equal_frac: share of groups whose rewards are equal, so that every advantage is 0; rounded to whole groups.
        prompt: tokens of every prompt.
        shape: key of `SHAPES`.
        num_prompts, generations: groups of a rollout and completions of a group; fewer where TRL takes long.
        settings: what TRL is swept over for its best; the first is its default. Two are not swept: the second is best.
        repeats: of the side-by-side measurement that follows.
        default_repeats: the same of TRL's default, where it takes minutes.
        peak_runs: measurements of every side's activation peak, each in a process of its own.
        bf16: autocast over fp32 weights, TRL's and this project's default on a GPU.
    """

    lengths: str = "1k"
    equal_frac: float = 0.375
    prompt: int = 100
    shape: str = "cpu-dense"
    algorithm: str = "sapo"
    num_prompts: int = 8
    generations: int = 8
    tokens_per_pack: int = TOKENS_PER_PACK
    settings: tuple[Setting, ...] = (TRL_DEFAULT, Setting(1, False))
    repeats: int = 5
    default_repeats: int = 5
    peak_runs: int = 0
    device: str = "cpu"
    bf16: bool = False

    @property
    def num_rows(self) -> int:
        return self.num_prompts * self.generations

    @property
    def is_moe(self) -> bool:
        return "num_experts" in SHAPES[self.shape]

    @property
    def name(self) -> str:
        equal = f"{round(self.equal_frac * self.num_prompts)}/{self.num_prompts}"
        return f"{self.shape} {self.algorithm}, lengths {self.lengths}, zero-advantage {equal}, prompt {self.prompt}"


HEADLINE = Case(
    peak_runs=3,
    default_repeats=3,
    settings=(
        TRL_DEFAULT, Setting(8, False), Setting(4, False), Setting(2, False), Setting(1, False), Setting(2, True),
        Setting(2, False, "eager"),
    ),
)  # fmt: skip
# TRL's best of the headline case is taken for the side cases, but for equal lengths and experts, which are swept.
# 40 completions let 2 and 4 of 5 groups have equal rewards, which is 40 and 80 %. The long cases are smaller still,
# because TRL's time decides.
_SIDE = replace(HEADLINE, equal_frac=0.4, num_prompts=5, settings=(TRL_DEFAULT, Setting(1, False)), peak_runs=0)
_SMALL = replace(_SIDE, num_prompts=4, generations=4, equal_frac=0.5)
CASES = (
    HEADLINE,
    replace(_SIDE, equal_frac=0.0),
    replace(_SIDE, equal_frac=0.8),
    replace(_SIDE, lengths="equal", equal_frac=0.0, settings=HEADLINE.settings[:5]),
    replace(_SMALL, prompt=1000, tokens_per_pack=4096, peak_runs=1),  # a prompt is shared within a pack
    replace(_SMALL, algorithm="grpo"),
    replace(_SMALL, shape="cpu-moe", settings=HEADLINE.settings[:5]),
    replace(_SMALL, lengths="8k", num_prompts=2, repeats=3, default_repeats=2),
)


@dataclass(frozen=True)
class Rollouts:
    """Stored completions of a case, group by group: ids, and one reward each."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    rewards: list[float]
    generations: int

    @property
    def active(self) -> list[bool]:
        """Per row: its group's rewards differ."""
        groups = torch.tensor(self.rewards).view(-1, self.generations)
        return (groups != groups[:, :1]).any(1).repeat_interleave(self.generations).tolist()

    @property
    def useful_tokens(self) -> int:
        """Positions that any exact update must forward: completions of active rows, and their prompt once a group."""
        rows = range(len(self.rewards))
        completions = sum(len(self.completion_ids[i]) for i in rows if self.active[i])
        return completions + sum(len(self.prompt_ids[i]) for i in rows if self.active[i] and i % self.generations == 0)


def make_rollouts(case: Case, seed: int = 0) -> Rollouts:
    """Completions of the case's lengths (`1k`: mean about 284), the last groups with equal rewards."""
    g = torch.Generator().manual_seed(seed)
    longest = MAX_LENGTHS[case.lengths]
    if case.lengths == "equal":
        lengths = [longest] * case.num_rows
    else:
        draw = torch.exp(torch.randn(case.num_rows, generator=g) * 0.8) * longest * 0.2
        lengths = draw.clamp(4, longest).int().tolist()
    vocabulary = SHAPES[case.shape]["vocab_size"]
    ids = lambda n: torch.randint(3, vocabulary, (n,), generator=g).tolist()  # noqa: E731
    prompts = [ids(case.prompt) for _ in range(case.num_prompts)]
    equal = round(case.equal_frac * case.num_prompts)
    rewards = torch.randint(0, 2, (case.num_rows,), generator=g).float().view(case.num_prompts, case.generations)
    rewards[:, 0], rewards[:, 1] = 0.0, 1.0
    rewards[case.num_prompts - equal :] = 1.0
    repeated = [prompt for prompt in prompts for _ in range(case.generations)]
    return Rollouts(repeated, [ids(n) for n in lengths], rewards.flatten().tolist(), case.generations)


def make_model(case: Case) -> PreTrainedModel:
    """Random fp32 weights, the same for the same case, on the case's device."""
    torch.manual_seed(0)
    config = config_of(SHAPES[case.shape] | {"max_position_embeddings": 16384})
    with torch.device(case.device):
        return Qwen3MoeForCausalLM(config) if isinstance(config, Qwen3MoeConfig) else Qwen3ForCausalLM(config)


@dataclass(frozen=True)
class Side:
    """One trainer, and the state that it wants the shared model in."""

    trainer: GRPOTrainer
    setting: Setting

    @property
    def model(self) -> PreTrainedModel:
        """The model that both sides share."""
        model = self.trainer.model
        assert isinstance(model, PreTrainedModel)
        return model

    def activate(self) -> None:
        """Put the shared model into this side's state: attention and checkpointing."""
        model = self.model
        model.set_attn_implementation(self.setting.attention)
        if self.setting.checkpointing:
            model.activation_checkpointing_enable()
        elif model.is_activation_checkpointing:
            model.activation_checkpointing_disable()
        model.train()


def common_fields(case: Case, setting: Setting, folder: str) -> dict[str, Any]:
    """Fields that both configs get."""
    return {
        "output_dir": folder, "report_to": "none", "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "shuffle_dataset": False, "learning_rate": 0.0, "use_cpu": case.device == "cpu",
        "bf16": case.bf16, "num_generations": case.generations, "max_completion_length": MAX_LENGTHS["8k"],
        "activation_checkpointing": setting.checkpointing, "router_aux_loss_coef": 0.0,
    }  # fmt: skip


def ours_config(case: Case, common: dict[str, Any], num_mini_batches: int) -> SAPOConfig:
    """One mini-batch of `num_rows / num_mini_batches` completions a step."""
    return SAPOConfig(
        algorithm=case.algorithm, num_mini_batches=num_mini_batches, max_tokens_per_pack=case.tokens_per_pack,
        per_device_train_batch_size=case.num_rows // num_mini_batches, **common,
    )  # fmt: skip


def trl_config(case: Case, setting: Setting, common: dict[str, Any], num_mini_batches: int) -> GRPOConfig:
    """The same steps in device batches of `setting.rows`."""
    row = ALGORITHMS[case.algorithm]
    clip: dict[str, Any] = {name: value for name, value in row.options.items() if name in ("epsilon", "epsilon_high")}
    accumulation = case.num_rows // num_mini_batches // setting.rows
    return GRPOConfig(
        loss_type=row.loss_type, importance_sampling_level=row.level, per_device_train_batch_size=setting.rows,
        gradient_accumulation_steps=accumulation, steps_per_generation=accumulation * num_mini_batches,
        **clip, **common,
    )  # fmt: skip


def make_trainer(
    kind: str,
    model: PreTrainedModel,
    rewards: list[Any],
    data: Dataset,
    case: Case,
    setting: Setting,
    common: dict[str, Any],
    num_mini_batches: int,
    rollout: Any = None,
) -> GRPOTrainer:
    """The trainer of `ours` or `trl` around a model."""
    more: dict[str, Any] = {"processing_class": build_tokenizer(), "rollout_func": rollout}
    if kind == "ours":
        return SAPOTrainer(model, rewards, ours_config(case, common, num_mini_batches), data, **more)
    return GRPOTrainer(model, rewards, trl_config(case, setting, common, num_mini_batches), data, **more)


def build(
    kind: str, model: PreTrainedModel, rollouts: Rollouts, case: Case, setting: Setting, num_mini_batches: int = 1
) -> Side:
    """`ours` or `trl` around the stored rollouts and the shared model."""
    model.set_attn_implementation(setting.attention)  # our layout is chosen by it
    common = common_fields(case, setting, tempfile.gettempdir())
    stored = {
        "prompt_ids": rollouts.prompt_ids, "completion_ids": rollouts.completion_ids,
        "logprobs": [[0.0] * len(ids) for ids in rollouts.completion_ids],
    }  # fmt: skip
    rollout = lambda prompts, trainer: dict(stored)  # noqa: E731
    reward = lambda completions, **kwargs: rollouts.rewards  # noqa: E731
    data = Dataset.from_list([{"prompt": str(i)} for i in range(case.num_prompts)])
    return Side(make_trainer(kind, model, [reward], data, case, setting, common, num_mini_batches, rollout), setting)
