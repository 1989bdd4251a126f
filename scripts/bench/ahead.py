"""The whole step with one rollout ahead beside TRL's: seconds on the clock, all cores allowed to every side.

The worlds are those of `step.py` that generate. Every side runs several rollouts in one training and is measured from
the begin of the second to the begin of the last, so that starting a worker and a pipeline that fills are left out. The
threads that are fastest for a side are found first, and TRL's fastest setting with them; then all sides take turns.

CPU seconds are those of this process and of the rollout worker; the verifier's workers are not counted.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import TrainerCallback

from bench.cases import TRL_DEFAULT, Setting
from bench.step import NUM_MINI_BATCHES, Runner, World, runner
from bench.update import palindrome

AHEAD = {"rollouts_ahead": 1, "old_logprobs": "sampler", "vllm_importance_sampling_correction": False}
ROLLOUTS = 2  # measured in a training


class RolloutClock(TrainerCallback):
    """Times at the begin of every rollout, and the trainer's metrics with all of their values."""

    def __init__(self, metrics: dict[str, list[float]]):
        self.metrics, self.seen, self.marks = metrics, {}, []  # the trainer empties its metrics at the end of training

    def on_train_begin(self, args, state, control, **kwargs):
        self.marks = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % NUM_MINI_BATCHES == 0:
            self.marks.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, args, state, control, **kwargs):
        self.seen = {name: list(values) for name, values in self.metrics.items()}


@dataclass(frozen=True)
class Choice:
    """A side with its number of threads; with a rollout ahead trainer and worker get half of them each."""

    name: str
    runner: Runner
    clock: RolloutClock
    threads: int

    def seconds(self, rollouts: int, seed: int) -> dict[str, float]:
        """Seconds per rollout, and shares of the time in which the update and the worker wait."""
        trainer = self.runner.side.trainer
        self.runner.side.activate()
        torch.set_num_threads(self.threads)
        torch.manual_seed(seed)
        trainer.args.max_steps = NUM_MINI_BATCHES * (1 + rollouts) + 1  # the last rollout ahead is for a step too
        trainer.train()
        (wall, cpu), (wall_end, cpu_end) = self.clock.marks[1], self.clock.marks[1 + rollouts]
        seen, wall_s = self.clock.seen, wall_end - wall
        waited = sum(seen.get("time/ahead_wait_s", [])[1 : 1 + rollouts])
        # what was generated in that time is told by the rollouts that were taken later
        generated, generated_cpu = (
            sum(seen.get(f"time/ahead_generation_{kind}", [])[2 : 2 + rollouts]) for kind in ("s", "cpu_s")
        )
        found = {"wall": wall_s / rollouts, "cpu": (cpu_end - cpu + generated_cpu) / rollouts}
        if generated:
            found |= {"update_waits_frac": waited / wall_s, "worker_waits_frac": max(0.0, 1.0 - generated / wall_s)}
        return found


def choices(world: World, threads: Sequence[int]) -> list[Choice]:
    """All sides with all numbers of threads."""
    model, own = world.model(), Setting(world.case.num_rows, False)
    made = {f"TRL, {setting.name}": runner("trl", world, model, setting) for setting in world.case.settings}
    made |= {"ours": runner("ours", world, model, own), "ahead": runner("ours", world, model, own, AHEAD)}
    found = []
    for name, each in made.items():
        trainer = each.side.trainer
        trainer.remove_callback(each.clock)
        clock = RolloutClock(trainer._metrics["train"])
        trainer.add_callback(clock)
        shares = sorted({max(2, n) for n in threads}) if name == "ahead" else threads
        found += [Choice(name, each, clock, n) for n in shares]
    return found


def run_ahead(world: World, rollouts: int = ROLLOUTS, threads: Sequence[int] | None = None) -> dict:
    """Medians per side, and the ratios of the whole step.

    Args:
        threads: numbers of threads to choose from; default: one, and as many as cores.
    """
    usual = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    made = choices(world, sorted({1, cores}) if threads is None else threads)
    sweep = [(choice.seconds(1, 0)["wall"], i) for i, choice in enumerate(made)]
    fastest = lambda wanted: made[min(pair for pair in sweep if wanted(made[pair[1]].name))[1]]  # noqa: E731
    sides = {
        "default": fastest(lambda name: name == f"TRL, {TRL_DEFAULT.name}"),
        "best": fastest(lambda name: name.startswith("TRL")),
        "ours": fastest(lambda name: name == "ours"),
        "ahead": fastest(lambda name: name == "ahead"),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for name in palindrome(list(sides), world.repeats):
        runs[name].append(sides[name].seconds(rollouts, 1 + len(runs[name])))
    torch.set_num_threads(usual)
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    ratios = {
        f"{kind}_ratio_vs_{name}": medians[name][kind] / medians["ahead"][kind]
        for kind in ("wall", "cpu")
        for name in ("default", "best", "ours")
    }
    return ratios | {
        "world": f"{world.name}-ahead", "rows": world.case.num_rows, "mini_batches": NUM_MINI_BATCHES,
        "rollouts": rollouts, "repeats": world.repeats, "cores": cores, "seconds_per_rollout": medians,
        "sides": {name: {"side": side.name, "threads": side.threads} for name, side in sides.items()},
        "sweep_wall_s": [{"side": made[i].name, "threads": made[i].threads, "wall": wall} for wall, i in sweep],
    }  # fmt: skip
