"""The objectives: what is maximised for each trained token, as pure functions of tensors.

An objective maps `LossInputs` (T trained completion tokens of R rows, flat, without padding) to the per-token surrogate
J of shape (T,), which training maximises. How tokens are averaged is separate: `row_weights`. The loss is
-sum_t row_weights[row_t] * J_t, so a pack's share does not depend on the other packs, and a mini-batch may be cut into
packs anywhere between rows.

Notation: r = pi_theta / pi_old of a token, z = log r, A = advantage, tau = temperature.
Equation numbers are those of SAPO, arXiv 2511.20347.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sapo_trl.errors import did_you_mean

# exp overflows fp32 near z = 88.7; from there on d loss = 0 * inf = NaN even where the loss is finite.
# At |z| = 20 every gate is flat in fp32, so the clamp changes nothing but that.
MAX_LOG_RATIO = 20.0

Temperature = float | Tensor


def clamp_log_ratio(log_ratio: Tensor) -> Tensor:
    """z in fp32 (fp64 stays), non-finite values replaced, within +-`MAX_LOG_RATIO`; no gradient outside.

    `nan_to_num` comes first because clamp passes NaN (-inf minus -inf) through.
    """
    if log_ratio.dtype in (torch.float16, torch.bfloat16):
        log_ratio = log_ratio.float()
    finite = log_ratio.nan_to_num(nan=0.0, posinf=2 * MAX_LOG_RATIO, neginf=-2 * MAX_LOG_RATIO)
    return finite.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


# ---- gates -----------------------------------------------------------------------------------------------------------


class Gate(NamedTuple):
    """One family of soft gates, as functions of x = r - 1 and tau.

    Attributes:
        value: f(r).
        weight: w(r) = f'(r); every family has w(1) = 1, so on-policy all of them are the plain policy gradient.
        one_sided: gate only where A (r - 1) > 0, where a step along A moves r further from 1; elsewhere f(r) = r.
    """

    value: Callable[[Tensor, Temperature], Tensor]
    weight: Callable[[Tensor, Temperature], Tensor]
    one_sided: bool = False


def _erf(x: Tensor, tau: Temperature) -> Tensor:
    return 1 + math.sqrt(math.pi / 2) / tau * torch.erf(tau * x / math.sqrt(2))


def _gaussian(x: Tensor, tau: Temperature) -> Tensor:
    return torch.exp(-((tau * x) ** 2) / 2)


# A new gate is a row here. Sources: sigmoid Eq. 6 and 16; erf, arctan, softsign arXiv 2602.19345; one-sided is MASPO's
# Gaussian, arXiv 2602.17550, with tau = 1/sigma.
GATES: dict[str, Gate] = {
    "sigmoid": Gate(
        lambda x, tau: torch.sigmoid(tau * x) * 4 / tau,
        lambda x, tau: 4 * torch.sigmoid(tau * x) * torch.sigmoid(-tau * x),  # not 1 - sigma(tau x): exact in the tail
    ),
    "erf": Gate(_erf, _gaussian),
    "arctan": Gate(lambda x, tau: 1 + torch.atan(tau * x) / tau, lambda x, tau: 1 / (1 + (tau * x) ** 2)),
    "softsign": Gate(
        lambda x, tau: 1 + x * torch.rsqrt(1 + (tau * x) ** 2), lambda x, tau: torch.rsqrt(1 + (tau * x) ** 2) ** 3
    ),
    "one-sided": Gate(_erf, _gaussian, one_sided=True),
}


def soft_gate(log_ratio: Tensor, tau: Temperature, family: str = "sigmoid", advantages: Tensor | None = None) -> Tensor:
    """The gated ratio f(r), to be multiplied by the advantage.

    sigmoid    4/tau * sigma(tau (r - 1))                          f(1) = 2/tau
    erf        1 + sqrt(pi/2)/tau * erf(tau (r - 1)/sqrt(2))       f(1) = 1
    arctan     1 + atan(tau (r - 1))/tau                           f(1) = 1
    softsign   1 + (r - 1)/sqrt(1 + tau^2 (r - 1)^2)               f(1) = 1
    one-sided  erf where A (r - 1) > 0, the plain ratio elsewhere

    Args:
        log_ratio: z, any shape.
        tau: temperature > 0, a number or a tensor that broadcasts to z.
        family: a key of `GATES`.
        advantages: shape of z; only `one-sided` reads them, and needs them.

    Returns:
        f(exp z), shape of z, fp32 for half-precision input. Finite with finite gradient for every z.

    >>> soft_gate(torch.zeros(1), 2.0)
    tensor([1.])
    """
    gate = _gate(family)
    x = torch.expm1(clamp_log_ratio(log_ratio))  # r - 1, without the cancellation of exp(z) - 1 near z = 0
    value = gate.value(x, tau)
    return torch.where(_expands(x, advantages), value, 1 + x) if gate.one_sided else value


def gate_weight(
    log_ratio: Tensor, tau: Temperature, family: str = "sigmoid", advantages: Tensor | None = None
) -> Tensor:
    """The gate weight w = f'(r) of `soft_gate`: the share of the plain gradient that a token keeps (Eq. 16).

    sigmoid    sech^2(tau (r - 1)/2) = 4 sigma (1 - sigma)
    erf        exp(-tau^2 (r - 1)^2 / 2)
    arctan     1/(1 + tau^2 (r - 1)^2)
    softsign   (1 + tau^2 (r - 1)^2)^(-3/2)
    one-sided  erf's where A (r - 1) > 0, else 1

    A token's A grad log pi is multiplied by the effective weight w r: d f(exp z)/dz = w r.

    >>> gate_weight(torch.zeros(1), 10.0, "erf")
    tensor([1.])
    """
    gate = _gate(family)
    x = torch.expm1(clamp_log_ratio(log_ratio))
    weight = gate.weight(x, tau)
    return torch.where(_expands(x, advantages), weight, torch.ones_like(x)) if gate.one_sided else weight


def _gate(family: str) -> Gate:
    if family not in GATES:
        raise ValueError(f"gate={family!r} is unknown; known: {', '.join(GATES)}.{did_you_mean(family, GATES)}")
    return GATES[family]


def _expands(x: Tensor, advantages: Tensor | None) -> Tensor:
    """True where a step along A moves r further from 1 (the direction that a one-sided gate damps)."""
    if advantages is None:
        raise ValueError("the one-sided gate damps only where A and r - 1 have the same sign: pass `advantages`.")
    return advantages * x > 0


# ---- what an objective reads -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossInputs:
    """What an objective may read: T trained tokens of R rows. Prompt, padding and tool tokens are not among them.

    Attributes:
        policy_logps: log pi_theta, (T,), with gradient.
        old_logps: log pi_old, (T,).
        advantages: A of the token's row, (T,).
        rows: index of the token's row, (T,) in [0, R).
        num_rows: R.
        level: `token` or `sequence`: the level of `log_ratio`.
        importance_ratio: pi_old / pi_engine after truncation or masking, (T,), or None without a separate engine.
    """

    policy_logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    rows: Tensor
    num_rows: int
    level: str = "token"
    importance_ratio: Tensor | None = None

    def __post_init__(self):
        for name in ("old_logps", "advantages", "rows", "importance_ratio"):
            value = getattr(self, name)
            if value is not None and value.shape != self.policy_logps.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, policy_logps {tuple(self.policy_logps.shape)}."
                )

    def row_sum(self, x: Tensor) -> Tensor:
        """Sum of a (T,) tensor over each row, (R,)."""
        return x.new_zeros(self.num_rows).index_add(0, self.rows, x)

    def row_mean(self, x: Tensor) -> Tensor:
        """Mean of a (T,) tensor over each row's trained tokens, (R,); 0 for a row without any."""
        return self.row_sum(x) / self.row_sum(torch.ones_like(x)).clamp(min=1)

    @cached_property
    def token_log_ratio(self) -> Tensor:
        """z per token, clamped to +-`MAX_LOG_RATIO`, (T,)."""
        return clamp_log_ratio(self.policy_logps.float() - self.old_logps.float())

    @cached_property
    def log_ratio(self) -> Tensor:
        """z at the algorithm's level, (T,). Sequence level (GSPO, Eq. 7 of arXiv 2507.18071): the row's mean of z."""
        if self.level == "sequence":
            return self.row_mean(self.token_log_ratio)[self.rows]
        return self.token_log_ratio

    @property
    def clamped(self) -> Tensor:
        """True where z was outside the clamp or not a number, (T,)."""
        log_ratio = self.policy_logps.detach().float() - self.old_logps.float()
        return ~(log_ratio.abs() <= MAX_LOG_RATIO)


# ---- objectives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective(ABC):
    """An objective: subclasses are frozen dataclasses whose fields are the objective's options.

    `SAPOConfig` fills a field from its own field of the same name, or from `objective_kwargs`. `__post_init__` refuses
    impossible values. A new objective only has to define `surrogate`.

    Attributes:
        zero_without_advantage: the gradient is exactly 0 where A = 0, so that such rows need no forward pass.
        corrects_engine: `surrogate` applies `LossInputs.importance_ratio` itself; otherwise it is multiplied onto J.
    """

    zero_without_advantage: ClassVar[bool] = False
    corrects_engine: ClassVar[bool] = False

    @abstractmethod
    def surrogate(self, tokens: LossInputs) -> Tensor:
        """J per trained token, (T,), to be maximised."""

    def weight(self, tokens: LossInputs) -> Tensor:
        """The effective weight w r that multiplies A grad log pi of each token, (T,), without gradient.

        1 on-policy for the plain policy gradient. Here by automatic differentiation of `surrogate`; NaN, which no
        metric counts, where A = 0 or where `surrogate` does not depend on the policy.
        """
        with torch.enable_grad():
            policy = tokens.policy_logps.detach().requires_grad_()
            value = self.surrogate(replace(tokens, policy_logps=policy))
            (gradient,) = (
                torch.autograd.grad(value.sum(), policy, allow_unused=True) if value.requires_grad else (None,)
            )
        if gradient is None:
            return torch.full_like(policy, math.nan).detach()
        return (gradient / tokens.advantages).masked_fill(tokens.advantages == 0, math.nan)


def per_token(values: Tensor, tokens: LossInputs, objective: Objective, method: str) -> Tensor:
    """What the objective's `method` has returned.

    Raises:
        ValueError: it is not one number per token, and would be broadcast, or it has no gradient.
    """
    if not isinstance(values, Tensor) or values.shape != tokens.policy_logps.shape:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        size, what = len(tokens.policy_logps), "J" if method == "surrogate" else "w r"
        raise ValueError(
            f"{method} of {type(objective).__name__} must return {what} per token, shape (T,) = ({size},); got {found}."
            " Leave the mean over tokens out: the loss takes it."
        )
    is_trained = method == "surrogate" and tokens.policy_logps.requires_grad and torch.is_grad_enabled()
    if is_trained and not values.requires_grad:
        if values.any():
            raise ValueError(
                f"the surrogate of {type(objective).__name__} does not depend on tokens.policy_logps, or detaches it: "
                "it has no gradient, and nothing would be trained."
            )
        return values + 0 * tokens.policy_logps  # an objective may find nothing in a pack
    return values


@dataclass(frozen=True)
class CustomObjective(Objective):
    """A function of `LossInputs` as an objective; only its values are known."""

    function: Callable[[LossInputs], Tensor]

    def surrogate(self, tokens: LossInputs) -> Tensor:
        return self.function(tokens)


def require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value} must be {rule}.")


@dataclass(frozen=True)
class SoftGate(Objective):
    """SAPO, Eq. 5-6: J = f(r) A, with a temperature for each sign of A (tau_neg where A = 0)."""

    zero_without_advantage: ClassVar[bool] = True

    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    gate: str = "sigmoid"

    def __post_init__(self):
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            value = vars(self)[name]
            require(0 < value < math.inf, name, value, "a finite number > 0 (the SAPO paper: 1.0 and 1.05)")
        _gate(self.gate)

    def temperatures(self, advantages: Tensor) -> Tensor:
        """tau_pos where A > 0, else tau_neg, (T,)."""
        return torch.where(advantages > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)

    def surrogate(self, tokens: LossInputs) -> Tensor:
        tau = self.temperatures(tokens.advantages)
        return soft_gate(tokens.log_ratio, tau, self.gate, tokens.advantages) * tokens.advantages

    def weight(self, tokens: LossInputs) -> Tensor:
        z, tau = tokens.log_ratio.detach(), self.temperatures(tokens.advantages)
        weight = gate_weight(z, tau, self.gate, tokens.advantages) * z.exp()
        return weight.masked_fill(tokens.clamped, 0.0)


@dataclass(frozen=True)
class SequenceGate(SoftGate):
    """The limit of SAPO where a row's ratios are alike, Eq. 23: a gate on s_i alone, w r = sech^2(tau/2 log s_i).

    s_i is the row's geometric mean ratio (`level="sequence"`). J = (2/tau) tanh(tau/2 log s_i) A.
    """

    def __post_init__(self):
        super().__post_init__()
        require(self.gate == "sigmoid", "gate", self.gate, "sigmoid: Eq. 23 is the limit of no other gate")

    def surrogate(self, tokens: LossInputs) -> Tensor:
        tau = self.temperatures(tokens.advantages)
        return 2 / tau * torch.tanh(tau / 2 * tokens.log_ratio) * tokens.advantages

    def weight(self, tokens: LossInputs) -> Tensor:
        tau = self.temperatures(tokens.advantages)
        weight = 1 - torch.tanh(tau / 2 * tokens.log_ratio.detach()) ** 2
        return weight.masked_fill(tokens.clamped, 0.0)


@dataclass(frozen=True)
class AdaptiveGate(Objective):
    """SAPO for stale rollouts: a bad answer is pushed down only as far as the policy still gives it.

    J = sg[omega_i min(1, r)] A log pi where A < 0. omega_i = (geometric mean over the row of 1 - d_t)^p, with
    d_t = max(0, pi_old - pi), the probability that the token has lost: omega_i closes where the answer's likely tokens
    have fallen, and stays open where only unlikely ones have, whose r falls as far without changing what is sampled.
    J = f(r) A where A > 0 and r >= 1, and A log pi where r < 1: a good token that has fallen comes back at weight 1.
    On-policy the gradient is SAPO's. `adaptive_power` is p; at 32, a mean loss of 0.02 per token halves the push.
    """

    zero_without_advantage: ClassVar[bool] = True

    sapo_temperature_pos: float = 1.0
    gate: str = "sigmoid"
    adaptive_power: float = 32.0

    def __post_init__(self):
        SoftGate(self.sapo_temperature_pos, gate=self.gate)
        require(0 <= self.adaptive_power < math.inf, "adaptive_power", self.adaptive_power, "a finite number >= 0")

    def row_weight(self, tokens: LossInputs) -> Tensor:
        """omega_i of the token's row, (T,), without gradient."""
        z = tokens.token_log_ratio.detach()
        old = tokens.old_logps.to(z.dtype).nan_to_num(nan=0.0).clamp(max=0).exp()
        kept = 1 + old * torch.expm1(z.clamp(max=0))  # 1 - d_t
        return (self.adaptive_power * tokens.row_mean(kept.clamp(min=1e-6).log())).exp()[tokens.rows]

    def bad_weight(self, tokens: LossInputs) -> Tensor:
        """omega_i min(1, r) per token, (T,), without gradient."""
        return self.row_weight(tokens) * tokens.log_ratio.detach().clamp(max=0).exp()

    def surrogate(self, tokens: LossInputs) -> Tensor:
        z, advantages = tokens.log_ratio, tokens.advantages
        gated = soft_gate(z, self.sapo_temperature_pos, self.gate, advantages)
        good = torch.where(z.detach() < 0, z, gated)
        return torch.where(advantages > 0, good, self.bad_weight(tokens) * z) * advantages

    def weight(self, tokens: LossInputs) -> Tensor:
        z, advantages = tokens.log_ratio.detach(), tokens.advantages
        gated = gate_weight(z, self.sapo_temperature_pos, self.gate, advantages) * z.exp()
        good = torch.where(z < 0, 1.0, gated)
        return torch.where(advantages > 0, good, self.bad_weight(tokens)).masked_fill(tokens.clamped, 0.0)
