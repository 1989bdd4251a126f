"""Cases of exact resume, and what is compared: parameters, optimizer state and every logged number, bit for bit."""

import contextlib
import gc
import io
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from conftest import length_reward, prompts, sapo_config, tiny_model
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from picture_world import content_reward, small_model, small_processor, with_pictures
from transformers.trainer_callback import PrinterCallback

from sapo_trl import SAPOTrainer
from sapo_trl.tiny import build_tokenizer

BASE = {
    "learning_rate": 1e-2, "lr_scheduler_type": "linear", "logging_steps": 1, "num_mini_batches": 4,
    "save_strategy": "steps", "save_steps": 1, "router_aux_loss_coef": 0.0, "disable_tqdm": True,
    "on_collapse": "none", "max_completion_length": 8,
}  # fmt: skip
ZERO = "ACCELERATE_USE_DEEPSPEED"  # set by the launcher
TIMES = re.compile(r"^time/|step_time|runtime|per_second|_s$")  # seconds are not part of a run's identity


@dataclass(frozen=True)
class Case:
    """A training set-up; `core`: the steps after which the default suite kills it."""

    fields: dict
    num_prompts: int = 64
    moe: bool = False
    lora: dict | None = None
    stream: bool = False
    pictures: bool = False  # a Qwen3-VL, and prompts of which three in four have some
    evaluated: bool = False
    core: tuple[int, ...] = ()
    every: tuple[int, ...] = ()  # in the matrix; empty: every step
    extra: dict = field(default_factory=dict)  # arguments of the trainer


def steps(n: int, **fields) -> dict:
    return {"max_steps": n, **fields}


def half_reward(completions, **kwargs):
    """None for every third completion."""
    return [None if i % 3 == 0 else float(len(x) % 5) for i, x in enumerate(completions)]


def equal_for_some(prompts, completions, **kwargs):
    """One reward for all completions of two prompts in five."""
    return [
        0.5 if int(p.split("+")[0]) % 5 in (1, 4) else float(len(x) % 5)
        for p, x in zip(prompts, completions, strict=True)
    ]


class Stricter:
    """A reward that pays less with every call; `key` counts them, and JSON turns a number into a text."""

    calls = 0

    def __init__(self, key="calls"):
        self.key = key

    def __call__(self, completions, **kwargs):
        self.calls += 1
        return [float(len(x) % 5) / self.calls + i % 2 for i, x in enumerate(completions)]

    def state_dict(self):
        return {self.key: self.calls}

    def load_state_dict(self, state):
        self.calls = state[self.key]


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
AHEAD = {"rollouts_ahead": 1, "old_logprobs": "sampler", "vllm_importance_sampling_correction": False}
ENTROPY = {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_coef_delta": 0.01, "entropy_coef_max": 1.0}

# 8 prompts a rollout: 4, 2 and 2
MIXTURE = {"a": {"share": 0.5}, "b": {"share": 0.3, "max_completion_length": 4}, "c": {"share": 0.2}}

CASES = {
    "dense": Case(steps(9), core=(3, 4)),
    "moe": Case(steps(9), moe=True),
    "moe, r2": Case(steps(8, algorithm="grpo-r2"), moe=True, core=(2,)),
    "moe, r3": Case(steps(8, routing_replay="r3"), moe=True, core=(3,)),
    "moe, router loss": Case(steps(6, router_aux_loss_coef=0.01), moe=True),
    "accumulation": Case(steps(9, per_device_train_batch_size=4, gradient_accumulation_steps=2), core=(3,)),
    "iterations": Case(steps(10, num_mini_batches=2, num_iterations=2), core=(3,)),
    "iterations, r2": Case(steps(8, num_mini_batches=2, num_iterations=2, algorithm="grpo-r2"), moe=True),
    "epochs": Case(steps(18), num_prompts=16, core=(13,)),
    "fractional epochs": Case({"num_train_epochs": 1.5}, num_prompts=16),
    "on-policy": Case(steps(5, num_mini_batches=1)),
    "lora": Case(steps(7), lora={"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    "lora, dropout": Case(steps(7), lora={"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.2}),
    "lora on experts": Case(
        steps(6, algorithm="grpo-r2", beta=0.05),
        moe=True,
        lora={"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ),
    "bf16": Case(steps(7, bf16=True), core=(2,)),
    "kl": Case(steps(7, beta=0.05), moe=True),
    "kl, reference moves": Case(
        steps(9, beta=0.05, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5)
    ),
    "adaptive entropy": Case(steps(7, **ENTROPY, entropy_target=10.0), core=(3,)),
    "entropy above its target": Case(steps(7, **ENTROPY, entropy_target=1.0)),
    "top entropy": Case(steps(7, top_entropy_quantile=0.5)),
    "logging every 3": Case(steps(10, logging_steps=3), core=(4,)),
    "gspo": Case(steps(7, algorithm="gspo")),
    "dapo": Case(steps(7, algorithm="dapo")),
    "evaluation": Case(steps(8, **EVALUATED), evaluated=True, core=(5,)),
    "evaluation, epochs": Case(
        steps(14, eval_strategy="epoch", save_strategy="epoch", save_steps=500, per_device_eval_batch_size=8),
        num_prompts=8, evaluated=True, every=(4, 8, 12),
    ),
    "ahead": Case(steps(11, **AHEAD, **EVALUATED), num_prompts=16, evaluated=True, core=(3, 8)),
    "ahead, corrected": Case(steps(11, rollouts_ahead=1, num_mini_batches=2, num_iterations=2), num_prompts=8),
    "ahead, r2": Case(steps(6, rollouts_ahead=1, algorithm="grpo-r2"), moe=True),
    "ahead, lora": Case(steps(7, **AHEAD), lora={"r": 2, "target_modules": ["q_proj", "v_proj"]}),
    "ahead, mixture, dynamic sampling, curriculum": Case(
        steps(13, datasets=MIXTURE, dynamic_sampling=True, drop_solved_above=1.0, **AHEAD, **EVALUATED),
        num_prompts=30, evaluated=True, extra={"reward_funcs": equal_for_some},
    ),
    "guard": Case(steps(12, on_collapse="warn"), every=(5, 8, 10)),
    "stream": Case(steps(9), stream=True, core=(3,)),
    "stream, two passes": Case(steps(14), num_prompts=16, stream=True, core=(9,)),
    "stream, accumulation": Case(
        steps(11, per_device_train_batch_size=4, gradient_accumulation_steps=2), num_prompts=16, stream=True
    ),
    "completions": Case(steps(9, log_completions=True, num_completions_to_print=1, logging_steps=3), core=(5,)),
    "pictures": Case(
        steps(6, num_mini_batches=2), num_prompts=16, pictures=True, core=(3,), extra={"reward_funcs": content_reward}
    ),
    "packs": Case(steps(7, max_tokens_per_pack=40, share_prompts=False)),
    "measured packs": Case(steps(6, max_tokens_per_pack="auto", gradient_checkpointing="auto")),
    "early passes": Case(steps(7, skip_zero_advantage=False)),
    "workers": Case(steps(7, dataloader_num_workers=1), every=(3, 5)),
    "a reward with a state": Case(steps(7), extra={"reward_funcs": lambda: partial(Stricter())}, core=(3,)),
    "no reward": Case(steps(7), extra={"reward_funcs": half_reward}),
    "cosine, warm-up": Case(steps(9, lr_scheduler_type="cosine", warmup_steps=3), every=(1, 4, 6)),
    "mixture": Case(steps(9, datasets=MIXTURE), num_prompts=20),
    "mixture, dynamic sampling, curriculum": Case(
        steps(13, datasets=MIXTURE, dynamic_sampling=True, dynamic_sampling_max_rounds=3, drop_solved_above=1.0),
        num_prompts=30, core=(5, 8), extra={"reward_funcs": equal_for_some},
    ),
    "best model": Case(
        steps(8, **EVALUATED, load_best_model_at_end=True, metric_for_best_model="eval_reward", save_steps=2),
        evaluated=True, every=(2, 4, 6),
    ),
}  # fmt: skip

TOKENIZER = build_tokenizer()


def dataset(case: Case) -> Dataset | IterableDataset:
    rows = prompts(case.num_prompts)
    if case.pictures:
        return with_pictures(case.num_prompts)
    if "datasets" in case.fields:
        rows = rows.add_column("task", ["abaca"[i % 5] for i in range(len(rows))])
    return rows.to_iterable_dataset() if case.stream else rows


def make(folder: Path, name: str, model: torch.nn.Module | None = None, **changed) -> SAPOTrainer:
    """A trainer of the case; `changed` fields win."""
    case = CASES[name]
    extra = dict(case.extra)
    if case.lora:
        extra["peft_config"] = LoraConfig(**case.lora)
    if case.evaluated:
        extra["eval_dataset"] = prompts(4)
    if case.pictures:
        processing = small_processor()
        model = small_model(processing)
    else:
        processing, model = TOKENIZER, tiny_model(TOKENIZER, case.moe) if model is None else model
    reward = extra.pop("reward_funcs", length_reward)
    fields = BASE | case.fields | changed
    if "RANK" in os.environ:
        fields |= {"per_device_train_batch_size": 4, "use_cpu": ZERO not in os.environ, "ddp_backend": "gloo"}
    with quiet():
        trainer = SAPOTrainer(
            model,
            reward() if name == "a reward with a state" else reward,
            sapo_config(folder, **fields),
            dataset(case),
            processing_class=processing,
            **extra,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextlib.contextmanager
def quiet():
    """Inside, what is printed goes to the yielded buffer."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        yield out


@dataclass
class Outcome:
    """Everything that must be equal."""

    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    logs: list[dict]
    tables: dict[str, list]


def outcome(trainer: SAPOTrainer) -> Outcome:
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's, torch's own
        optimizer = optimizer.optimizer
    held = {name: p.ds_tensor if hasattr(p, "ds_tensor") else p for name, p in trainer.model.named_parameters()}
    files = sorted(Path(trainer.args.output_dir, "completions").glob("*.parquet"))
    return Outcome(
        {name: p.detach().clone() for name, p in held.items()},
        {
            f"{i} {key}": x.clone()
            for i, state in enumerate(optimizer.state.values())
            for key, x in state.items()
            if torch.is_tensor(x)
        },
        [{k: v for k, v in entry.items() if not TIMES.search(k)} for entry in trainer.state.log_history],
        {path.name: pd.read_parquet(path).to_dict("list") for path in files},
    )


def same_number(a, b) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def differences(whole: Outcome, resumed: Outcome, after: int) -> list[str]:
    """What is not equal bit for bit; logs and tables from the first step after `after` on."""
    found = []
    for kind in ("parameters", "optimizer"):
        a, b = vars(whole)[kind], vars(resumed)[kind]
        names = a.keys() ^ b.keys() | {name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])}
        found += [f"{kind}: {len(names)} of {len(a)} differ"] if names else []
    ours, theirs = ([entry for entry in x.logs if entry["step"] > after] for x in (whole, resumed))
    if [entry["step"] for entry in ours] != [entry["step"] for entry in theirs]:
        return [*found, f"logged at {[x['step'] for x in ours]} and at {[x['step'] for x in theirs]}"]
    for a, b in zip(ours, theirs, strict=True):
        names = [k for k in sorted(a.keys() | b.keys()) if k not in a or k not in b or not same_number(a[k], b[k])]
        found += [f"step {a['step']}: {', '.join(names[:5])} ({len(names)})"] if names else []
    late = {name: rows for name, rows in whole.tables.items() if int(re.search(r"\d+", name)[0]) > after}
    found += [f"table {name}" for name, rows in late.items() if str(resumed.tables.get(name)) != str(rows)]
    return found


def kills(name: str, ks: tuple[int, ...], folder: Path) -> dict[int, list[str]]:
    """step -> differences, of runs that go on from each of the steps, against the run that was never stopped."""
    with quiet():
        whole = make(folder / "whole", name)
        whole.train()
    expected, found = outcome(whole), {}
    last = whole.state.global_step
    fresh = make(folder / "fresh", name)
    start = {key: p.detach().clone() for key, p in fresh.model.named_parameters()}
    assert any(not torch.equal(start[key], x) for key, x in expected.parameters.items())
    for k in ks or range(1, last):
        with quiet() as out:
            trainer = make(folder / f"from {k}", name)
            trainer.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{k}"))
        assert "NOT exact" not in out.getvalue() and f"checkpoint-{k} equal those saved" in out.getvalue()
        found[k] = differences(expected, outcome(trainer), k)
        del trainer
        gc.collect()
        shutil.rmtree(folder / f"from {k}")
    return found
