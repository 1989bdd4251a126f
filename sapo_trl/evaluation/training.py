"""Evaluation while training: every problem counts once and weighs the same, whatever the batches and processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from sapo_trl.eval_sets import EvalSet
from sapo_trl.rollout.rollout import unscored
from sapo_trl.stats import Interval, mean_with_interval, scores


@dataclass
class EvaluationRecord:
    """What the batches of one evaluation gave.

    Args:
        num_completions: of the whole set over all processes, None for a stream. Those beyond it are repeats, with which
            accelerate fills the last batch.
        num_generations: completions of a problem.
        ks: of pass@k and maj@k.

    Attributes:
        rewards: of each batch without repeats, (completions, functions), NaN for None.
        answers: what each completion answers, without repeats; fewer where the reward functions don't say.
        sizes: completions of each batch without repeats: what weighs its other metrics.
    """

    num_completions: int | None
    num_generations: int
    ks: Sequence[int] = ()
    rewards: list[Tensor] = field(default_factory=list)
    answers: list = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, rewards: Tensor, answers: Sequence = ()) -> None:
        """One batch over all processes, (B, functions), and what its completions answer, (B,) or none."""
        left = len(rewards) if self.num_completions is None else self.num_completions - sum(self.sizes)
        kept = rewards[: max(0, min(left, len(rewards)))].cpu()
        self.rewards.append(kept)
        self.answers += answers[: len(kept)]
        self.sizes.append(len(kept))

    def values(
        self, logged: Mapping[str, Sequence[float]], names: Sequence[str], weights: Tensor, accuracy: str
    ) -> dict[str, float]:
        """Metric -> mean over the whole set, or its extreme.

        Args:
            logged: metric -> one value per batch.
            names: of the reward functions.
            weights: of the reward functions, (functions,).
            accuracy: the function whose mean is Pass@1.
        """
        found = {name: self._joined(name, logged) for name, values in logged.items() if len(values) == len(self.sizes)}
        for name, values in logged.items():  # what some batches have logged, by number: their sizes are not known
            if len(values) != len(self.sizes) and (known := [x for x in values if not math.isnan(x)]):
                found[name] = sum(known) / len(known)
        if not sum(self.sizes):
            return found
        rewards = torch.cat(self.rewards).double().view(-1, self.num_generations, len(names))  # problems first
        scored = ~unscored(rewards, weights)
        total = (rewards * weights.double().cpu()).nansum(-1).masked_fill(~scored, math.nan)
        for i, name in enumerate(names):
            found[f"rewards/{name}/mean"] = rewards[..., i].nanmean().item()
            found[f"rewards/{name}/std"] = _std(rewards[..., i])
        per_problem = total.nanmean(dim=1)
        spread = total.nan_to_num(nan=math.inf).amin(1) >= total.nan_to_num(nan=-math.inf).amax(1)
        found |= {
            "reward": per_problem.nanmean().item(),
            "reward_std": _std(total),
            "frac_reward_zero_std": spread.float().mean().item(),
            "rewards/unscorable_frac": (~scored).float().mean().item(),
        }
        if accuracy in names:
            found |= self._scores(rewards[..., names.index(accuracy)])
        return found

    def _scores(self, rewards: Tensor) -> dict[str, float]:
        """Pass@1, and pass@k and maj@k of the problems without a missing verdict, with their intervals.

        rewards: (problems, completions), NaN for None.
        """
        found: dict[str, Interval] = {}
        complete, mean = ~rewards.isnan().any(dim=1), rewards.nanmean(dim=1)
        if complete.any():
            has_answers = len(self.answers) == rewards.numel()
            kept = complete.repeat_interleave(self.num_generations).tolist()
            answers = [answer for answer, is_kept in zip(self.answers, kept) if is_kept]
            right = (rewards[complete] == 1).numpy()
            found = scores(right, [k for k in self.ks if k > 1], answers if has_answers else None)
        if not mean.isnan().all():
            found["pass_at_1"] = mean_with_interval(mean[~mean.isnan()].tolist())
        ends = {f"{name}_{end}": vars(score)[end] for name, score in found.items() for end in ("low", "high")}
        return {name: score.mean for name, score in found.items()} | ends

    def _joined(self, name: str, logged: Mapping[str, Sequence[float]]) -> float:
        """One value of a metric for all batches; what TRL says of the completions that ended counts these alone."""
        counts: Sequence[float] = self.sizes
        if of_ended := "_terminated_" in name:  # a batch in which none ended has logged 0
            cut = logged.get("completions/clipped_ratio", [0.0] * len(counts))
            counts = [n * (1 - share) for n, share in zip(counts, cut, strict=True)]
        pairs = [(x, n) for x, n in zip(logged[name], counts, strict=True) if not math.isnan(x) and n > 0]
        if not pairs:
            return 0.0 if of_ended else math.nan
        for start, extreme in (("completions/min_", min), ("completions/max_", max)):
            if name.startswith(start):
                return extreme(x for x, _ in pairs)
        return sum(x * n for x, n in pairs) / sum(n for _, n in pairs)


def _std(values: Tensor) -> float:
    known = values[~values.isnan()]
    return known.std().item() if len(known) > 1 else math.nan


@contextmanager
def sampled_as(trainer: GRPOTrainer, one: EvalSet | None) -> Generator[None]:
    """Inside, the trainer's own engine, transformers or vLLM, samples as an evaluation set says."""
    if one is None:
        yield
        return
    engine: Any = trainer
    if trainer.use_vllm:
        engine = trainer.vllm_generation
        changed: dict[str, Any] = {name: vars(one)[name] for name in ("temperature", "top_p", "max_completion_length")}
    else:
        config = copy.deepcopy(trainer.generation_config)
        config.update(do_sample=one.temperature != 0, max_new_tokens=one.max_completion_length)
        if one.temperature != 0:
            config.update(temperature=one.temperature, top_p=one.top_p)
        else:  # transformers' own values, about which it is silent
            config.update(temperature=1.0, top_p=1.0, top_k=50)
        changed = {"generation_config": config}
    before = {name: vars(engine)[name] for name in changed}
    vars(engine).update(changed)
    try:
        yield
    finally:
        vars(engine).update(before)
