"""One row of the laboratory: an objective trained in a regime, on several seeds at once."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sapo_trl.algorithms import find_algorithm
from sapo_trl.lab.world import TASKS, Policies, World, make_world
from sapo_trl.metrics.tokens import leak
from sapo_trl.objective import LossInputs, Objective, per_token

SEEDS, PROMPTS_PER_ROLLOUT, COMPLETIONS = 8, 32, 8
FIRST, LAST = 5, 5  # rollouts over whose mean the drift is taken, and the reward


@dataclass(frozen=True)
class Regime:
    """How a policy is trained.

    Attributes:
        mini_batches, learning_rate: N optimizer steps per rollout of 256 completions, by Adam, the gradient's norm
            clipped at 1 for each seed.
        rollouts_ahead: 1 trains on a rollout that was sampled before the update on the one before.
        engine_noise: standard deviation of what is added to each old log-prob, as by a rollout engine that disagrees.
        length: tokens of an answer; those before the last 8 decide nothing.
        world: number of the world. Choose a method on some of them and judge it on others.
    """

    mini_batches: int
    learning_rate: float
    rollouts: int = 15
    task: str = "recall"
    rollouts_ahead: int = 0
    engine_noise: float = 0.0
    length: int = 8
    world: int = 0

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown; known: {', '.join(TASKS)}.")
        rows = PROMPTS_PER_ROLLOUT * COMPLETIONS
        if self.mini_batches < 1 or rows % self.mini_batches:
            raise ValueError(f"mini_batches={self.mini_batches} does not divide the rollout of {rows} completions.")
        if self.rollouts_ahead not in (0, 1):
            raise ValueError(f"rollouts_ahead={self.rollouts_ahead} must be 0 or 1.")

    @property
    def name(self) -> str:
        """N and the learning rate, and whatever else is not the default.

        >>> Regime(32, 5e-3).name, Regime(4, 3e-3, task="avoid", rollouts_ahead=1).name
        ('N=32 lr=5e-3', 'N=4 lr=3e-3 task=avoid rollouts_ahead=1')
        """
        mantissa, exponent = f"{self.learning_rate:e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        fields = {"task": "recall", "rollouts_ahead": 0, "engine_noise": 0.0, "length": 8, "world": 0}
        extra = [f"{name}={vars(self)[name]:g}" if name != "task" else f"task={self.task}"
                 for name, default in fields.items() if vars(self)[name] != default]  # fmt: skip
        return " ".join([f"N={self.mini_batches}", f"lr={mantissa}e{int(exponent)}", *extra])


@dataclass(frozen=True)
class Method:
    """An objective and the level of its ratio, under the name that the results call it by."""

    name: str
    objective: Objective
    level: str = "token"

    @cached_property
    def source(self) -> str:
        """A digest of the modules that define it, by which an edited one is known; "" for this package's own."""
        names = {self.name.split()[0].rpartition(".")[0], type(self.objective).__module__}
        text = ""
        for name in sorted(name for name in names if name and not name.startswith("sapo_trl.")):
            with contextlib.suppress(OSError, TypeError, KeyError):  # typed at a prompt
                text += inspect.getsource(sys.modules[name])
        return hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""


def find_method(text: str) -> Method:
    """An algorithm's name, or the dotted path of one or of an `Objective`, then options of the objective:
    `sapo sapo_temperature_neg=5`.

    Raises:
        ValueError: no such algorithm or option.
    """
    name, *options = text.split()
    row = find_algorithm(name)
    values = dict(row.options)
    for option in options:
        key, separator, value = option.partition("=")
        if key not in values or not separator:
            known = ", ".join(values) or "none"
            raise ValueError(f"{option!r} is no option of {name}; it has {known}. Write option=value.")
        try:
            values[key] = value if isinstance(values[key], str) else float(value)
        except ValueError:
            raise ValueError(f"{option!r} of {name} needs a number, as in {key}={values[key]}.") from None
    return Method(text, row.objective(**values), row.level)


@dataclass
class Result:
    """Of one method in one regime; lists have one number per seed.

    Attributes:
        rewards: mean reward of the last `LAST` rollouts.
        best: largest mean reward of a rollout.
        drift: mean z^2/2 at the last mini-batch of a rollout, mean of the first `FIRST` rollouts: later ones say how
            far a policy still moves that may have collapsed.
        leak: `gate/leak_neg` there, its mean over rollouts and seeds.
        curve: median over seeds of the reward of each rollout.
    """

    method: str
    regime: str
    first: float
    rewards: list[float]
    best: list[float]
    drift: list[float]
    leak: float
    curve: list[float]
    cpu_s: float
    settings: dict = field(default_factory=dict)

    @property
    def collapsed(self) -> int:
        """Seeds that end under half of their best reward."""
        return sum(last < 0.5 * best for last, best in zip(self.rewards, self.best, strict=True))

    def summary(self) -> dict[str, float]:
        """What the last line of `scripts/lab.py` shows for each method and regime."""
        ordered = sorted(self.rewards)
        middle = torch.tensor(ordered).quantile(0.5).item()
        drift = torch.tensor(self.drift).quantile(0.5).item()
        values = {"median": middle, "min": ordered[0], "max": ordered[-1]}
        rounded = {name: round(value, 4) for name, value in values.items()}
        return rounded | {"collapsed": self.collapsed, "drift": float(f"{drift:.3g}"), "leak": round(self.leak, 4)}


@dataclass(frozen=True)
class _Rollout:
    prompts: Tensor  # (K, R)
    answers: Tensor  # (K, R, L)
    old_logps: Tensor  # (K, R, L)
    rewards: Tensor  # (K, R)

    @property
    def advantages(self) -> Tensor:
        """Within the groups of one prompt's completions, (K, R)."""
        groups = self.rewards.view(len(self.rewards), PROMPTS_PER_ROLLOUT, COMPLETIONS)
        centred = groups - groups.mean(2, keepdim=True)
        return (centred / (groups.std(2, keepdim=True) + 1e-4)).view_as(self.rewards)


class Trainer:
    """Trains one method in one regime."""

    def __init__(self, method: Method, regime: Regime, seeds: int = SEEDS):
        self.method, self.regime, self.seeds = method, regime, seeds
        self.world: World = make_world(regime.task, regime.length, regime.world, seeds)
        self.policies: Policies = self.world.policies.copy()
        self.optimizer = torch.optim.Adam(self.policies.parameters, lr=regime.learning_rate)
        self.generator = torch.Generator().manual_seed(100 + regime.world)

    def rollout(self) -> _Rollout:
        """`COMPLETIONS` answers to each of `PROMPTS_PER_ROLLOUT` prompts."""
        drawn = [torch.randperm(self.world.right.shape[1], generator=self.generator) for _ in range(self.seeds)]
        prompts = torch.stack([x[:PROMPTS_PER_ROLLOUT] for x in drawn]).repeat_interleave(COMPLETIONS, 1)
        answers = self.policies.sample(prompts, self.generator)
        with torch.no_grad():
            logps = self.policies.logps(prompts, answers)
        noise = self.regime.engine_noise * torch.randn(logps.shape, generator=self.generator)
        return _Rollout(prompts, answers, logps + noise, self.world.rewards(prompts, answers))

    def run(self) -> Result:
        """Train, and measure."""
        started, rewards, drifts, leaks = time.process_time(), [], [], []
        ahead = self.rollout() if self.regime.rollouts_ahead else None
        for _ in range(self.regime.rollouts):
            rollout, ahead = (ahead, self.rollout()) if ahead is not None else (self.rollout(), None)
            rewards.append(rollout.rewards.mean(1))
            drift, leaked = self.update(rollout)
            drifts.append(drift)
            leaks.append(leaked)
        curve = torch.stack(rewards)
        return Result(
            self.method.name, self.regime.name, round(curve[0].median().item(), 4),
            curve[-LAST:].mean(0).tolist(), curve.max(0).values.tolist(),
            torch.stack(drifts[:FIRST]).mean(0).tolist(), sum(leaks) / len(leaks),
            [round(x, 4) for x in curve.quantile(0.5, dim=1).tolist()],
            round(time.process_time() - started, 2), asdict(self.regime),
        )  # fmt: skip

    def update(self, rollout: _Rollout) -> tuple[Tensor, float]:
        """The optimizer steps of one rollout; drift per seed (K,) and leak at the last of them.

        Raises:
            ValueError: the policy is not finite any more, or the objective's values are not one per token.
        """
        objective, rows = self.method.objective, rollout.rewards.shape[1]
        order = torch.stack([torch.randperm(rows, generator=self.generator) for _ in range(self.seeds)])
        for chosen in order.chunk(self.regime.mini_batches, dim=1):
            tokens = self.tokens(rollout, chosen)
            # answers are of equal length: the mean over a seed's tokens is the mean over its rows' means
            surrogate = per_token(objective.surrogate(tokens), tokens, objective, "surrogate")
            loss = -surrogate.sum() / (chosen.shape[1] * self.regime.length)
            self.optimizer.zero_grad()
            loss.backward()
            self.clip_gradients()
            self.optimizer.step()
        if not all(p.isfinite().all() for p in self.policies.parameters):
            raise ValueError(
                f"{self.method.name} in {self.regime.name}: the policy is not finite any more, because surrogate or "
                "its gradient was NaN or infinite. Bound what it divides by, and log r before exp."
            )
        z, weight = tokens.token_log_ratio.detach(), per_token(objective.weight(tokens), tokens, objective, "weight")
        return z.square().view(self.seeds, -1).mean(1) / 2, float(leak(tokens, weight))

    def tokens(self, rollout: _Rollout, chosen: Tensor) -> LossInputs:
        """The chosen rows (K, B) of every seed as one flat mini-batch of K B rows."""
        seed = torch.arange(self.seeds)[:, None]
        policy = self.policies.logps(rollout.prompts[seed, chosen], rollout.answers[seed, chosen])
        advantages = rollout.advantages[seed, chosen][:, :, None].expand_as(policy)
        num_rows = chosen.numel()
        rows = torch.arange(num_rows).repeat_interleave(self.regime.length)
        old, flat_advantages = rollout.old_logps[seed, chosen].flatten(), advantages.flatten()
        return LossInputs(policy.flatten(), old, flat_advantages, rows, num_rows, self.method.level)

    def clip_gradients(self) -> None:
        """To a norm of 1, for each seed."""
        gradients = [p.grad for p in self.policies.parameters if p.grad is not None]
        norms = torch.stack([g.view(self.seeds, -1).square().sum(1) for g in gradients]).sum(0).sqrt()
        scale = (1 / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, 1, 1))
