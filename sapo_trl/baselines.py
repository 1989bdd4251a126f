"""The objectives of other papers, each with its source; `sapo_trl.objective` has SAPO's own and what they share.

Every weight here is a number of the token's own row, so that none depends on how a mini-batch is cut into packs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sapo_trl.objective import MAX_LOG_RATIO, LossInputs, Objective, require

# VESPO's lower bound of the sequence weight, log(1e-8) (arXiv 2602.10693, reference code).
VESPO_MIN_LOG_WEIGHT = math.log(1e-8)


@dataclass(frozen=True)
class Clip(Objective):
    """PPO's surrogate min(r A, clip(r, 1 - eps_low, 1 + eps_high) A); r is the row's s_i for GSPO.

    `delta` caps r from above where A < 0 (two-sided clipping, arXiv 2505.07291).
    """

    zero_without_advantage: ClassVar[bool] = True

    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None

    def __post_init__(self):
        require(0 < self.epsilon < 1, "epsilon", self.epsilon, "a number between 0 and 1: r is kept above 1 - epsilon")
        require(0 < self.epsilon_high < math.inf, "epsilon_high", self.epsilon_high, "a finite number > 0")
        if self.delta is not None:
            least = 1 + self.epsilon_high
            rule = f"finite and above 1 + epsilon_high = {least:g}"
            require(least < self.delta < math.inf, "delta", self.delta, rule)

    def surrogate(self, tokens: LossInputs) -> Tensor:
        ratio = tokens.log_ratio.exp()
        kept = ratio if self.delta is None else ratio.clamp(max=self.delta)
        hard = ratio.clamp(1 - self.epsilon, 1 + self.epsilon_high)
        return torch.min(kept * tokens.advantages, hard * tokens.advantages)

    def weight(self, tokens: LossInputs) -> Tensor:
        ratio, advantages = tokens.log_ratio.detach().exp(), tokens.advantages
        outside = (ratio < 1 - self.epsilon) & (advantages < 0)
        outside |= (ratio > 1 + self.epsilon_high) & (advantages > 0)
        if self.delta is not None:
            outside |= ratio > self.delta
        return ratio.masked_fill(outside | tokens.clamped, 0.0)


@dataclass(frozen=True)
class Weighted(Objective):
    """Objectives that are given by their weight: J = sg[weight] A log pi."""

    zero_without_advantage: ClassVar[bool] = True

    def surrogate(self, tokens: LossInputs) -> Tensor:
        return self.weight(tokens) * tokens.advantages * tokens.policy_logps


@dataclass(frozen=True)
class Cispo(Weighted):
    """CISPO (MiniMax-M1, arXiv 2506.13585): sg[min(r, eps_high)] A log pi, so that capped tokens keep a gradient."""

    epsilon_high: float = 5.0

    def __post_init__(self):
        require(0 < self.epsilon_high < math.inf, "epsilon_high", self.epsilon_high, "a finite number > 0")

    def weight(self, tokens: LossInputs) -> Tensor:
        return tokens.log_ratio.detach().exp().clamp(max=self.epsilon_high)


@dataclass(frozen=True)
class Vespo(Weighted):
    """VESPO (arXiv 2602.10693): sg[phi(w)] A log pi with phi(w) = w^k exp(lambda (1 - w)); phi(1) = 1.

    w is the product of the row's ratios, those of the trainer over the rollout engine included; k and lambda depend on
    the sign of A.
    """

    corrects_engine: ClassVar[bool] = True

    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self):
        for name, value in vars(self).items():
            require(0 <= value < math.inf, name, value, "a finite number >= 0")

    def weight(self, tokens: LossInputs) -> Tensor:
        log_weight = tokens.row_sum(tokens.token_log_ratio.detach())
        if tokens.importance_ratio is not None:
            engine = tokens.importance_ratio.log().clamp(VESPO_MIN_LOG_WEIGHT, MAX_LOG_RATIO)
            log_weight = log_weight + tokens.row_sum(engine)
        log_weight = log_weight.clamp(VESPO_MIN_LOG_WEIGHT, MAX_LOG_RATIO)[tokens.rows]
        k = torch.where(tokens.advantages >= 0, self.vespo_k_pos, self.vespo_k_neg)
        lam = torch.where(tokens.advantages >= 0, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=1e-4)
        return torch.exp(lam + k * log_weight - lam * log_weight.exp())


@dataclass(frozen=True)
class Winners(Clip):
    """WAPO (arXiv 2606.16154): the clipped surrogate on rows with A > 0; rows with A < 0 are not trained on."""

    def surrogate(self, tokens: LossInputs) -> Tensor:
        return super().surrogate(tokens) * (tokens.advantages > 0)

    def weight(self, tokens: LossInputs) -> Tensor:
        return super().weight(tokens) * (tokens.advantages > 0)


@dataclass(frozen=True)
class Topr(Weighted):
    """Tapered off-policy REINFORCE (arXiv 2503.14286): weight 1 where A > 0, else the row's min(1, prod_t r_t)."""

    def weight(self, tokens: LossInputs) -> Tensor:
        taper = tokens.row_sum(tokens.token_log_ratio.detach()).clamp(-MAX_LOG_RATIO, 0).exp()[tokens.rows]
        return torch.where(tokens.advantages > 0, 1.0, taper)


@dataclass(frozen=True)
class Dppo(Weighted):
    """DPPO (arXiv 2602.04879): weight r, but 0 where a step away from r = 1 has left the trust region.

    The region is a bound on the divergence of the two-way distributions "this token or another": total variation
    |pi - pi_old| (`tv`), or the KL divergence of pi_old from pi (`kl`). r is truncated at 20, as in the paper's code.
    """

    dppo_divergence: str = "tv"
    dppo_threshold: float = 0.2

    def __post_init__(self):
        require(self.dppo_divergence in ("tv", "kl"), "dppo_divergence", self.dppo_divergence, "tv or kl")
        require(0 < self.dppo_threshold < math.inf, "dppo_threshold", self.dppo_threshold, "a finite number > 0")

    def divergence(self, tokens: LossInputs) -> Tensor:
        """Of each token's two-way distributions, (T,), >= 0."""
        old = tokens.old_logps.exp()
        new = (tokens.old_logps + tokens.token_log_ratio.detach()).exp().clamp(max=1.0)
        if self.dppo_divergence == "tv":
            return (new - old).abs()
        others, others_new = 1 - old, (1 - new).clamp(min=torch.finfo(new.dtype).eps)
        return torch.special.xlogy(others, others / others_new) - old * tokens.token_log_ratio.detach()

    def weight(self, tokens: LossInputs) -> Tensor:
        z = tokens.token_log_ratio.detach()
        outside = (tokens.advantages * z > 0) & (self.divergence(tokens) > self.dppo_threshold)
        return z.exp().clamp(max=20.0).masked_fill(outside, 0.0)


@dataclass(frozen=True)
class M2po(Weighted):
    """M2PO (arXiv 2510.01161): weight r, but 0 for the outermost tokens of a row whose second moment is too large.

    Of the tokens whose step moves r away from 1, those of largest z^2 are dropped until the mean z^2 of the others is
    at most `m2po_threshold`. The paper takes the mean over a device's batch; here it is the row's own.
    """

    m2po_threshold: float = 0.04

    def __post_init__(self):
        require(0 < self.m2po_threshold < math.inf, "m2po_threshold", self.m2po_threshold, "a finite number > 0")

    def weight(self, tokens: LossInputs) -> Tensor:
        z = tokens.token_log_ratio.detach()
        return z.exp().masked_fill(self.outermost(tokens, z), 0.0)

    def outermost(self, tokens: LossInputs, z: Tensor) -> Tensor:
        """True for the tokens that are dropped, (T,)."""
        moves_away = tokens.advantages * z > 0
        square = torch.where(moves_away, z.square(), 0.0)
        order = torch.argsort(square, stable=True)
        order = order[torch.argsort(tokens.rows[order], stable=True)]  # by row, within it from small to large
        rows, ordered, counted = tokens.rows[order], square[order].double(), moves_away[order].double()
        first = torch.searchsorted(rows.contiguous(), torch.arange(tokens.num_rows, device=z.device))
        before = lambda x: torch.cat([x.new_zeros(1), x.cumsum(0)])  # noqa: E731
        total = before(ordered)[1:] - before(ordered)[first][rows]
        count = before(counted)[1:] - before(counted)[first][rows]
        # the running mean of an ascending sequence only rises, so that what is kept is a beginning of it
        too_large = total / count.clamp(min=1) > self.m2po_threshold
        return torch.zeros_like(moves_away).scatter(0, order, too_large & moves_away[order])


@dataclass(frozen=True)
class Aspo(Weighted):
    """ASPO (arXiv 2510.06062): PPO's clip, but weight 1/r in place of r where A > 0; both are capped at `aspo_cap`."""

    epsilon: float = 0.2
    epsilon_high: float = 0.2
    aspo_cap: float = 3.0

    def __post_init__(self):
        Clip(self.epsilon, self.epsilon_high)
        require(1 < self.aspo_cap < math.inf, "aspo_cap", self.aspo_cap, "a finite number > 1")

    def weight(self, tokens: LossInputs) -> Tensor:
        kept = Clip(self.epsilon, self.epsilon_high).weight(tokens)
        flipped = torch.where((tokens.advantages > 0) & (kept > 0), 1 / kept, kept)
        return flipped.clamp(max=self.aspo_cap)
