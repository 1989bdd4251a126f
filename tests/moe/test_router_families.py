"""Every family of routers that replay supports, against transformers' own: selection, scores and gradient."""

import functools
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from routing_world import shape_of
from torch import nn
from transformers import (
    AutoModel,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    PhimoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from sapo_trl.moe.routing_replay import attach, recording, replaying
from sapo_trl.moe.scores import SCORES

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.3,
}  # fmt: skip
HEAD = {"head_dim": 16}
SPARSE = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
QWEN = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3}
DEEPSEEK = {
    "num_key_value_heads": 2, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
MODELS = {
    "qwen3": Qwen3MoeConfig(**TINY, **HEAD, **QWEN, norm_topk_prob=True),
    "qwen3-sparse": Qwen3MoeConfig(**TINY | HEAD | QWEN | SPARSE),
    "qwen3-vl": Qwen3VLMoeConfig(text_config={**TINY, **HEAD, **QWEN}).text_config,
    "mixtral": MixtralConfig(**TINY, **HEAD, num_local_experts=8, num_experts_per_tok=3),
    "gpt-oss": GptOssConfig(**TINY, **HEAD, num_local_experts=8, num_experts_per_tok=3),
    "granite": GraniteMoeConfig(**TINY, num_local_experts=8, num_experts_per_tok=3),
    "deepseek-v3": DeepseekV3Config(**TINY | DEEPSEEK),
}
MOE_LAYERS = {"qwen3-sparse": 2, "deepseek-v3": 2}


@pytest.mark.parametrize("name", MODELS)
def test_families_replay_an_unchanged_selection_bit_equal(name):
    torch.manual_seed(0)
    model = AutoModel.from_config(MODELS[name]).eval()
    ids = torch.randint(0, 64, (2, 9))
    before = model(ids).last_hidden_state
    attach(model)
    with torch.no_grad(), recording(model) as record:
        model(ids)
    routes = record.routes()
    assert routes.shape == (18, MOE_LAYERS.get(name, 3), 3)
    assert shape_of(MODELS[name]) == (MOE_LAYERS.get(name, 3), 3, 8)
    with replaying(model, routes):
        assert torch.equal(model(ids).last_hidden_state, before)
    with replaying(model, (routes.int() + 1).remainder(8)):
        assert not torch.allclose(model(ids).last_hidden_state, before, atol=1e-3)


@functools.cache
def router_classes() -> dict[str, tuple[str, str]]:
    """Class name in lower case -> (module, class) of every TopKRouter in transformers."""
    found = {}
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for name in re.findall(r"^class (\w*topkrouter)\(", file.read_text(), re.MULTILINE | re.IGNORECASE):
            found[name.lower()] = (f"transformers.models.{file.parent.name}.{file.stem}", name)
    return found


def router_of(class_name: str) -> nn.Module:
    """A router built on its own."""
    module, name = router_classes()[class_name]
    config = SimpleNamespace(
        num_experts=16, num_local_experts=16, num_experts_per_tok=4, hidden_size=8, norm_topk_prob=True,
        routed_scaling_factor=2.5, n_group=4, topk_group=2,
    )  # fmt: skip
    return getattr(importlib.import_module(module), name)(config)


@pytest.mark.parametrize("name", SCORES)
def test_scores_and_their_gradient_are_the_routers_own(name):
    """Every supported router, alone: float32, bfloat16, and float32 under bfloat16 autocast."""
    router = router_of(name)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 8, generator=generator)
    with torch.no_grad():
        for tensor in [*router.parameters(), *router.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    model = nn.Sequential(router)
    attach(model)

    def run(dtype, autocast):
        router.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, scores, indices = router(hidden.to(dtype))
        (scores.float() * torch.linspace(-1, 1, 160).view(40, 4)).sum().backward()
        return logits, scores, indices, router.weight.grad

    for dtype, autocast in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        router.to(dtype)
        with recording(model) as record:
            own = run(dtype, autocast)
        with replaying(model, record.routes()):
            replayed = run(dtype, autocast)
        for a, b in zip(own, replayed, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        assert own[3].abs().sum() > 0


def test_families_that_cannot_be_replayed_are_refused():
    with pytest.raises(ValueError, match="Qwen3Model is dense"):
        shape_of(Qwen3Config(**TINY))
    phi = PhimoeConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(NotImplementedError, match="PhimoeTopKRouter scores its experts in a way"):
        shape_of(phi)
    with pytest.raises(ValueError, match="at least 2 experts per token"):
        shape_of(Qwen3MoeConfig(**TINY, **QWEN | {"num_experts_per_tok": 1}))


def test_a_supported_name_with_another_forward_is_refused():
    class Mine(Qwen3MoeTopKRouter):
        def forward(self, hidden_states):
            return super().forward(2 * hidden_states)

    config = SimpleNamespace(num_experts_per_tok=2, num_experts=4, norm_topk_prob=True, hidden_size=8)
    with pytest.raises(NotImplementedError, match="Mine scores its experts"):
        attach(nn.Sequential(Mine(config)))


def test_the_shape_of_published_models_is_read_off_their_routers():
    qwen = Qwen3MoeConfig(num_hidden_layers=48, num_experts=128, num_experts_per_tok=8)
    assert shape_of(qwen) == (48, 8, 128)
    assert shape_of(Qwen3VLMoeConfig(text_config={"num_hidden_layers": 4, "num_experts": 128}).text_config)[0] == 4
