"""The whole step against TRL's: generate, reward, old log-probs, update, optimizer; a rollout of four mini-batches.

Three worlds: `stored` (the update benchmark's rollouts, nothing is generated), `demo` (the tiny model and the rollout
of configs/tiny/sapo.yaml) and `mid` (8 layers, 512 wide, answers of up to 128 tokens). The weights are random, so the
graded answers are wrong: the real verifier runs at weight 0, and a reward that depends on the row's place decides,
with equal rewards in three of eight groups. The learning rate is 0, so that both sides go on with the same weights.

Ratios are over CPU seconds of this process (the verifier's workers not counted); phases are seconds on the host's
clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from bench.cases import (
    HEADLINE,
    TRL_DEFAULT,
    Case,
    Setting,
    Side,
    build,
    common_fields,
    make_model,
    make_rollouts,
    make_trainer,
)
from bench.update import palindrome
from sapo_trl.rewards import accuracy_reward
from sapo_trl.tiny import MAX_ANSWER_TOKENS, build_model, build_tokenizer, chat, make_problems
from sapo_trl.trainer import SAPOTrainer

NUM_MINI_BATCHES = 4
PHASES = ("generate", "reward", "logps", "update")
END_PROBABILITY = 1 / 48  # of a random model's answer, per token; real answers end
_SETTINGS = (TRL_DEFAULT, Setting(2, False))


@dataclass(frozen=True)
class World:
    """One comparison: a model that answers `case.num_prompts` prompts, or stored rollouts (`max_tokens` 0)."""

    name: str
    case: Case
    model: Callable[[], PreTrainedModel]
    max_tokens: int
    repeats: int


def demo_model(folder: str | None) -> PreTrainedModel:
    """The tiny model: random, or the one that `scripts/cold_start.py` wrote."""
    return build_model(build_tokenizer()) if folder is None else AutoModelForCausalLM.from_pretrained(folder)


def mid_model() -> PreTrainedModel:
    """Random weights, but every token ends an answer with probability about `END_PROBABILITY`.

    Coordinate 0 of every embedding dwarfs what the layers add, so the final norm makes it sqrt(hidden) whatever the
    text; the head of the end token reads it alone, the other heads don't.
    """
    model = make_model(replace(HEADLINE, shape="mid"))
    end, hidden = build_tokenizer().eos_token_id, model.config.hidden_size
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1000.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[end] = 0.0
        odds = END_PROBABILITY / (1 - END_PROBABILITY) * model.config.vocab_size
        model.lm_head.weight[end, 0] = torch.tensor(odds).log() / hidden**0.5
    return model


def worlds(model: str | None) -> tuple[World, ...]:
    """The three comparisons; `model`: folder of a cold-started tiny model for `demo`."""
    stored = replace(HEADLINE, generations=4, settings=_SETTINGS)
    demo_settings = (TRL_DEFAULT, Setting(8, False), Setting(64, False))
    demo = replace(HEADLINE, num_prompts=32, tokens_per_pack=4096, settings=demo_settings)  # the config's budget
    mid = replace(HEADLINE, shape="mid", generations=4, tokens_per_pack=2048, settings=_SETTINGS)
    return (
        World("stored", stored, lambda: make_model(stored), 0, 2),
        World("demo", demo, lambda: demo_model(model), MAX_ANSWER_TOKENS, 3),
        World("mid", mid, mid_model, 128, 3),
    )


def place_reward(generations: int) -> Callable[..., list[float]]:
    """Rewards 0 and 1 in turn, in a pattern that shifts with the group; groups 0, 3 and 6 of eight all get 1."""

    def by_place(completions, **kwargs) -> list[float]:
        groups = [(i // generations, i % generations) for i in range(len(completions))]
        return [1.0 if g % 8 % 3 == 0 else float((k + k // 3 + g) % 2) for g, k in groups]

    return by_place


class StepClock(TrainerCallback):
    """Seconds from the first step's begin to the last one's end, on the host's clock and of the CPU."""

    def __init__(self, metrics: dict[str, list[float]]):
        self.metrics, self.seen = metrics, {}  # the trainer empties its metrics at the end of training
        self.started = (0.0, 0.0)
        self.wall_s = self.cpu_s = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.wall_s, self.cpu_s = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        self.seen = {name: sum(values) for name, values in self.metrics.items()}


@dataclass
class Runner:
    """A side with its clock; for TRL also the seconds of its phases, taken by wrapping its methods."""

    side: Side
    clock: StepClock
    spent: dict[str, float]

    def one_rollout(self, seed: int) -> dict[str, float]:
        """Train on one rollout; the same seed draws the same answers on both sides."""
        trainer, clock, spent = self.side.trainer, self.clock, self.spent
        self.side.activate()
        spent.clear()
        torch.manual_seed(seed)
        trainer.train()
        if isinstance(trainer, SAPOTrainer):
            spent["reward"], spent["logps"] = clock.seen["time/reward_s"], clock.seen["time/old_and_reference_logps_s"]
            spent["score"] = clock.seen["time/rollout_s"] + spent["logps"]  # TRL's rollout holds its log-prob pass
        return {
            "generate": spent["score"] - spent["reward"] - spent["logps"],
            "reward": spent["reward"], "logps": spent["logps"], "update": clock.wall_s - spent["score"],
            "wall": clock.wall_s, "cpu": clock.cpu_s, "mean_length": clock.seen["completions/mean_length"],
        }  # fmt: skip


def timed_methods(trainer: GRPOTrainer, spent: dict[str, float]) -> None:
    """Add the seconds of TRL's rollout, rewards and log-prob passes without gradient to `spent`."""

    def wrap(method: str, name: str, without_gradient: bool = False) -> None:
        original = getattr(trainer, method)

        def call(*args, **kwargs):
            if without_gradient and torch.is_grad_enabled():
                return original(*args, **kwargs)
            started = time.perf_counter()
            result = original(*args, **kwargs)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            return result

        setattr(trainer, method, call)

    wrap("_generate_and_score_completions", "score")
    wrap("_calculate_rewards", "reward")
    wrap("_get_per_token_logps_and_entropies", "logps", without_gradient=True)


def runner(kind: str, world: World, model: PreTrainedModel, setting: Setting, more: dict | None = None) -> Runner:
    """The trainer of `ours` or `trl` in a world; `more`: fields of its config where answers are generated."""
    case, spent = world.case, {}
    if world.max_tokens == 0:
        side = build(kind, model, make_rollouts(case), case, setting, NUM_MINI_BATCHES)
    else:
        common = common_fields(case, setting, "runs/bench") | {
            "max_completion_length": world.max_tokens, "reward_weights": [0.0, 1.0], **(more or {}),
        }  # fmt: skip
        rows = [{"prompt": chat(p.prompt), "answer": p.answer} for p in make_problems(case.num_prompts, seed=0)]
        rewards, data = [accuracy_reward, place_reward(case.generations)], Dataset.from_list(rows)
        side = Side(make_trainer(kind, model, rewards, data, case, setting, common, NUM_MINI_BATCHES), setting)
    side.trainer.args.max_steps = NUM_MINI_BATCHES
    side.trainer.remove_callback(PrinterCallback)
    clock = StepClock(side.trainer._metrics["train"])
    side.trainer.add_callback(clock)
    if kind == "trl":
        timed_methods(side.trainer, spent)
    return Runner(side, clock, spent)


def run_world(world: World) -> dict:
    """Medians per side and phase, and the ratios of the whole step."""
    torch.set_num_threads(1)
    model = world.model()
    ours = runner("ours", world, model, Setting(world.case.num_rows, False))
    theirs = {s: runner("trl", world, model, s) for s in world.case.settings}
    ours.one_rollout(0)  # warms up, starts the verifier's workers
    sweep = {s: each.one_rollout(0)["cpu"] for s, each in theirs.items()}
    best = min(sweep, key=sweep.__getitem__)
    runners = {"default": theirs[TRL_DEFAULT], "best": theirs[best], "ours": ours}
    found: dict[str, list[dict]] = {name: [] for name in runners}
    for name in palindrome(list(runners), world.repeats):
        found[name].append(runners[name].one_rollout(1 + len(found[name])))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    return {
        "world": world.name, "rows": world.case.num_rows, "mini_batches": NUM_MINI_BATCHES, "repeats": world.repeats,
        "seconds": medians, "trl_best_setting": best.name,
        "trl_sweep_s": {s.name: seconds for s, seconds in sweep.items()},
        "ratio_vs_default": medians["default"]["cpu"] / medians["ours"]["cpu"],
        "ratio_vs_best": medians["best"]["cpu"] / medians["ours"]["cpu"],
    }  # fmt: skip
