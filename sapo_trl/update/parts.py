"""The parts of the update, put together once from a trainer's models and configuration."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from sapo_trl.config import SAPOConfig
from sapo_trl.moe.routing_replay import Routing, prepare_routing
from sapo_trl.objective import Objective
from sapo_trl.update.budget import PackBudget
from sapo_trl.update.engine import Engine
from sapo_trl.update.entropy import EntropyController
from sapo_trl.update.loss import RouterLoss
from sapo_trl.update.memory import MemoryProbe
from sapo_trl.update.packing import PackedForward
from sapo_trl.update.passes import LogProbPasses
from sapo_trl.update.plan import UpdatePlan
from sapo_trl.update.update import Update


@dataclass(frozen=True)
class UpdateParts:
    """The parts of the update that a trainer calls."""

    forward: PackedForward
    routing: Routing
    update: Update
    plan: UpdatePlan


def assemble(
    model: nn.Module,
    ref_model: nn.Module | None,
    accelerator: Accelerator,
    config: SAPOConfig,
    objective: Objective,
    router: RouterLoss | None,
    pad_token_id: int,
    follows_generation: bool,
    auto_checkpointing: bool,
    has_images: bool,
) -> UpdateParts:
    """Put the update together; adds the token head to the models, and recording to the routers of a Mixture-of-Experts.

    Args:
        model: the policy before accelerate wraps it.
        router: the load-balancing loss, or None where it is off.
        follows_generation: each rollout is one `generate` of transformers or vLLM.
        auto_checkpointing: activation checkpointing may be switched off where packs fit without it.
        has_images: prompts contain images.

    Raises:
        ValueError: the routers' loss forwards rows that an entropy term must not count.
    """
    entropy = EntropyController.from_config(config)
    counts_entropy = entropy is not None or config.top_entropy_quantile < 1
    if router is not None and config.zero_variance_filter and counts_entropy:
        raise ValueError(
            "zero_variance_filter leaves rows out of the averages that the routers' loss forwards, and entropy_coef or "
            "top_entropy_quantile would count them. Remove one, or set router_aux_loss_coef: 0."
        )
    forward = PackedForward(
        model, ref_model, accelerator, pad_token_id, config.temperature, config.cast_lm_head_to_fp32,
        max_tokens=config.max_tokens_per_pack, share_prompts=config.share_prompts, has_images=has_images,
    )  # fmt: skip
    routing = prepare_routing(model, config.replay, follows_generation)
    engine, budget = Engine(accelerator), PackBudget(forward)
    update = Update(forward, objective, config, engine, budget, routing, router, entropy)
    # Rows with advantage 0 stay in the passes where anything but the advantage could move the weights.
    skips = config.skip_zero_advantage and objective.zero_without_advantage and config.top_entropy_quantile == 1.0
    plan = UpdatePlan(
        forward,
        LogProbPasses(forward, model, ref_model, routing, budget, engine, config),
        MemoryProbe(forward, engine, config, auto_checkpointing, has_images),
        routing,
        config,
        skips_zero_advantage=skips and config.beta == 0.0 and entropy is None and router is None,
        has_images=has_images,
        counts_all_rows=router is not None,
    )
    return UpdateParts(forward, routing, update, plan)
