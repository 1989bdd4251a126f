"""From an objective to the loss of a pack: KL, masks, correction for the rollout engine, entropy bonus, router loss.

Every term is a sum over tokens whose weights are fixed before the first pack runs, so the packs of a mini-batch add up
to the same gradient however it is cut. Two terms need a number of the whole mini-batch (`WholeBatch`): the entropy
threshold and the experts' loads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from sapo_trl.config import SAPOConfig
from sapo_trl.objective import MAX_LOG_RATIO, LossInputs, clamp_log_ratio
from sapo_trl.rollout.rows import MiniBatch, Row, gathered
from sapo_trl.update.head import PackOutputs


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of a Mixture-of-Experts model, times `coef`."""

    num_experts: int
    top_k: int
    coef: float


@dataclass(frozen=True)
class ExpertLoads:
    """Where a whole mini-batch is routed, over all processes.

    Attributes:
        load: assignments per routed position of each expert, (E,); sums to top-k.
        routed: positions x MoE layers, mean over processes, ().
    """

    load: Tensor
    routed: Tensor


@dataclass(frozen=True)
class WholeBatch:
    """What a pack must know of its whole mini-batch, over all processes.

    Attributes:
        entropy_tokens: tokens that the entropy bonus averages over, mean over processes.
        entropy_threshold: only tokens with at least this entropy carry the policy loss; None: all do.
        experts: None without router loss.
    """

    entropy_tokens: float
    entropy_threshold: Tensor | None = None
    experts: ExpertLoads | None = None


@dataclass(frozen=True)
class PackTokens:
    """What the loss of a pack is computed from: the objective's inputs, and what the other terms need."""

    inputs: LossInputs
    entropies: Tensor
    ref_logps: Tensor | None
    sampler_logps: Tensor | None
    cut: Tensor | None  # (T,) bool: the correction for the rollout engine is truncated or masked here
    router_logits: tuple[Tensor, ...]


def pack_tokens(outputs: PackOutputs, rows: Sequence[Row], row_index: Tensor, config: SAPOConfig) -> PackTokens:
    """Join the forward pass with what the rollout recorded. Rows without old log-probs are on-policy: r = 1.

    Raises:
        ValueError: the correction needs the rollout engine's log-probs, and the rows have none.
    """
    policy, old = outputs.logps, gathered(rows, "old_logps")
    old = policy.detach() if old is None else old
    advantages = torch.tensor([row.advantage for row in rows]).to(policy.device, non_blocking=True)[row_index]
    sampler, ratio, cut = gathered(rows, "sampler_logps"), None, None
    if (config.use_vllm or config.rollouts_ahead) and config.vllm_importance_sampling_correction:
        if sampler is None:
            what = "the rollout engine gave no log-probs, which vllm_importance_sampling_correction compares"
            fix = "Set vllm_importance_sampling_correction: false."
            if config.rollouts_ahead:
                what = "the checkpoint's rollout was made without rollouts_ahead, whose log-probs are to be compared"
                fix = "Resume without rollouts_ahead, or from a checkpoint that lies between two rollouts."
            raise ValueError(f"{what} with the trainer's. {fix}")
        ratio, cut = engine_ratio(
            old, sampler, row_index, len(rows), config.vllm_importance_sampling_mode,
            config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max,
        )  # fmt: skip
    inputs = LossInputs(policy, old, advantages, row_index, len(rows), config.level, ratio)
    return PackTokens(inputs, outputs.entropies, gathered(rows, "ref_logps"), sampler, cut, outputs.router_logits)


def policy_loss(
    surrogate: Tensor, pack: PackTokens, whole: WholeBatch, config: SAPOConfig, corrects_engine: bool
) -> Tensor:
    """-J per token, (T,), with its masks and the correction for the rollout engine.

    Args:
        surrogate: J, (T,).
        corrects_engine: J contains the importance ratio already (`Objective.corrects_engine`).
    """
    tokens = pack.inputs
    if config.off_policy_mask_threshold is not None:
        sampler = tokens.old_logps if pack.sampler_logps is None else pack.sampler_logps
        surrogate = surrogate * keep_on_policy(tokens, sampler, config.off_policy_mask_threshold)
    if whole.entropy_threshold is not None:
        surrogate = surrogate * (pack.entropies >= whole.entropy_threshold)
    if tokens.importance_ratio is not None and not corrects_engine:
        surrogate = surrogate * tokens.importance_ratio
    return -surrogate


def reference_kl(pack: PackTokens, config: SAPOConfig) -> Tensor | None:
    """KL to the reference per token, (T,); None where `beta` is 0."""
    if config.beta == 0.0:
        return None
    if pack.ref_logps is None:
        raise ValueError(f"beta={config.beta} needs reference log-probs, and the rows of this pack have none.")
    kl = kl_to_reference(pack.inputs.policy_logps, pack.ref_logps)
    return kl * pack.inputs.log_ratio.exp() if config.use_bias_correction_kl else kl


def without_kl(pack: PackTokens) -> Tensor:
    """True where log pi_ref - log pi_theta is clamped or not a number, so that the KL has no gradient, (T,)."""
    assert pack.ref_logps is not None
    return ~((pack.ref_logps - pack.inputs.policy_logps.detach()).abs() <= MAX_LOG_RATIO)


def kl_to_reference(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi_theta || pi_ref) per token: exp(d) - d - 1 with d = log pi_ref - log pi_theta."""
    d = clamp_log_ratio(ref_logps - policy_logps)
    return torch.expm1(d) - d


def engine_ratio(
    old: Tensor, sampler: Tensor, rows: Tensor, num_rows: int, mode: str, low: float | None, high: float | None
) -> tuple[Tensor, Tensor]:
    """(pi_old / pi_engine per token with what lies outside [low, high] truncated or zeroed, (T,), and where that is).

    `mode` is TRL's `vllm_importance_sampling_mode`: {token, sequence}_{truncate, mask}; at sequence level the ratio
    is the product over the row. `geometric_mask` looks at the row's geometric mean and keeps a row as it is, with ratio
    1, or drops it. A token that the engine could not score (NaN) gets ratio 1.
    """
    level, action = mode.split("_")
    log_ratio = (old - sampler).nan_to_num(nan=0.0)
    if level != "token":
        lengths = torch.ones_like(log_ratio) if level == "sequence" else torch.bincount(rows, minlength=num_rows)[rows]
        log_ratio = log_ratio.new_zeros(num_rows).index_add(0, rows, log_ratio)[rows] / lengths
    ratio = log_ratio.clamp(max=4 * MAX_LOG_RATIO).exp()
    cut = ratio < (-math.inf if low is None else low)
    cut |= ratio > (math.inf if high is None else high)
    if action == "truncate":
        return ratio.clamp(min=low, max=high), cut
    return (torch.ones_like(ratio) if level == "geometric" else ratio).masked_fill(cut, 0.0), cut


def keep_on_policy(tokens: LossInputs, sampler_logps: Tensor, threshold: float) -> Tensor:
    """DeepSeek-V3.2: 0 where A < 0 and the row's mean log(pi_engine/pi_theta) exceeds the threshold, else 1."""
    drift = (sampler_logps - tokens.policy_logps.detach()).nan_to_num(nan=0.0)
    keep = (tokens.advantages >= 0) | (tokens.row_mean(drift)[tokens.rows] <= threshold)
    return keep.to(tokens.policy_logps.dtype)


def entropy_bonus(pack: PackTokens, whole: WholeBatch) -> tuple[Tensor, Tensor]:
    """(sum of entropies, number of tokens) of the tokens that the bonus acts on, those that carry the policy loss."""
    if whole.entropy_threshold is None:
        return pack.entropies.sum(), torch.as_tensor(float(len(pack.entropies)))
    selected = pack.entropies.detach() >= whole.entropy_threshold
    return (pack.entropies * selected).sum(), selected.sum()


def router_loss(router_logits: tuple[Tensor, ...], experts: ExpertLoads) -> Tensor:
    """This pack's share of the load-balancing loss E * sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, Eq. 4-6).

    f (no gradient) and the denominator of P are those of the whole mini-batch, so the packs' shares add up to the loss
    of one forward over all of it.
    """
    probs = torch.stack([logits.float().softmax(-1).sum(0) for logits in router_logits]).sum(0)  # (E,)
    return len(experts.load) * (experts.load * probs).sum() / experts.routed


def batch_share(outputs: PackOutputs, router: RouterLoss | None) -> tuple[Tensor, Tensor]:
    """A pack's share in `whole_batch`: entropies (n,), and `expert_counts`, which are empty without router loss."""
    counts = torch.empty(0) if router is None else expert_counts(outputs.router_logits, router.top_k)
    return outputs.entropies.detach().float().clamp(min=0), counts  # rounding can make an entropy of 0 negative


def whole_batch(
    shares: Sequence[tuple[Tensor, Tensor]],
    mini_batch: MiniBatch,
    config: SAPOConfig,
    router: RouterLoss | None,
    accelerator: Accelerator,
) -> WholeBatch:
    """Gather what the losses of all packs need; `shares`: those of this process's non-empty packs."""
    entropy_tokens, threshold, experts = mini_batch.num_tokens, None, None
    if config.top_entropy_quantile < 1.0:
        local = torch.cat([torch.empty(0, device=accelerator.device), *(entropies for entropies, _ in shares)])
        padded = accelerator.pad_across_processes(local, dim=0, pad_index=-1.0)  # no entropy is negative
        everywhere = accelerator.gather(padded)
        everywhere = everywhere[everywhere >= 0]
        if len(everywhere):
            threshold = _quantile(everywhere, 1 - config.top_entropy_quantile)
            entropy_tokens = float((everywhere >= threshold).sum()) / accelerator.num_processes
    if router is not None:
        counts = torch.zeros(router.num_experts + 1, device=accelerator.device)
        for _, share in shares:
            counts += share
        counts = accelerator.reduce(counts, "sum")
        experts = ExpertLoads(counts[:-1] / counts[-1], counts[-1] / accelerator.num_processes)
    return WholeBatch(entropy_tokens, threshold, experts)


def _quantile(x: Tensor, level: float) -> Tensor:
    """`torch.quantile` without its limit of 2^24 values."""
    place = level * (len(x) - 1)
    low = int(place)
    ends = x.sort().values[low : low + 2]
    return torch.lerp(ends[0], ends[-1], place - low)


def expert_counts(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Assignments to each expert over all layers and positions, then the number of routed positions: (E + 1,)."""
    counts = torch.zeros(router_logits[0].shape[-1] + 1, device=router_logits[0].device)
    for logits in router_logits:
        chosen = logits.softmax(-1).topk(top_k, dim=-1).indices.flatten()
        counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))
        counts[-1] += logits.shape[0]
    return counts
