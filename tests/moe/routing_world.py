"""Tiny Mixture-of-Experts models prepared for routing replay, and the oracle of what their experts ran."""

import copy

import torch
from conftest import padded_rollout, tiny_model
from transformers import AutoModel

from sapo_trl.model import find_routers
from sapo_trl.moe.routing_replay import attach, changed_selections, recording, split_routes, tape_of
from sapo_trl.rollout.rows import rows_from_padded
from sapo_trl.update.attention import packed_attention
from sapo_trl.update.head import add_token_head
from sapo_trl.update.packing import pack_inputs

LAYERS, TOP_K, EXPERTS = 2, 2, 8


def bare_model(tokenizer, normalised: bool = True):
    """The tiny Qwen3-MoE. Qwen3-30B-A3B normalises its scores."""
    model = tiny_model(tokenizer, moe=True)
    for router in find_routers(model):
        router.module.norm_topk_prob = normalised
    return model


def moe_model(tokenizer, normalised: bool = True):
    """The same with the token head, prepared for replay."""
    model = bare_model(tokenizer, normalised)
    add_token_head(model, 1.0)
    attach(model)
    return model


def shape_of(config) -> tuple[int, int, int]:
    """(MoE layers, experts per token, experts) of a model of this configuration, without its weights."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    attach(model)
    tape = tape_of(model)
    return tape.num_layers, tape.top_k, tape.num_experts


def changed_share(recorded, now) -> float:
    """Share of token x layer pairs whose set of experts changed."""
    changed, counted = changed_selections(recorded, now)
    return (changed.sum() / counted.sum()).item()


def drifted(model, scale: float = 0.1, seed: int = 3):
    """The same model after an update of random direction."""
    generator = torch.Generator().manual_seed(seed)
    after = copy.deepcopy(model)
    with torch.no_grad():
        for p in after.parameters():
            p += scale * p.std() * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return after


def eight_rows(tokenizer):
    """Eight rows, longest first, of 4 to 19 tokens."""
    return sorted(rows_from_padded(padded_rollout(tiny_model(tokenizer, moe=True))), key=len, reverse=True)


def build_inputs(rows, layout="segments"):
    return pack_inputs(rows, layout, 0, torch.device("cpu"))


def forward(model, rows, layout="segments", **extra):
    inputs = build_inputs(rows, layout)
    with packed_attention(model, layout):
        return model(**inputs.model_inputs, predict=inputs.predict, targets=inputs.targets, **extra)


def record_rows(model, rows, layout="segments"):
    """(T_i, layers, k) per row: the routers' own selection in an old-policy forward."""
    with torch.no_grad(), recording(model) as record:
        forward(model, rows, layout)
    return split_routes(record.routes(), [len(row) for row in rows], build_inputs(rows, layout).expand)


class Executed:
    """What the experts of every layer were given: indices and scores."""

    def __init__(self, model):
        self.indices, self.scores = [], []
        experts = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeExperts"]
        self.hooks = [m.register_forward_pre_hook(self.keep) for m in experts]

    def keep(self, module, args):
        self.indices.append(args[1].detach().clone())
        self.scores.append(args[2].detach().clone())

    def routes(self):
        return torch.stack(self.indices, dim=1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
