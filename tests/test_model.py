"""What stages ask of a model: the same answer with and without adapters and wrappers around it."""

import pytest
from accelerate import Accelerator
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from sapo_trl.model import (
    find_routers,
    has_dropout,
    inner_model,
    layout_of,
    moe_blocks,
    text_config,
    vocabulary_size,
    without_adapters,
)

PEFT = {
    "attention": {"target_modules": ["q_proj"]},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "saved router": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


@pytest.mark.parametrize("kind", PEFT)
def test_one_search_finds_the_routers_under_adapters(tokenizer, kind):
    """Two layers, each router under the name it had; PEFT's copy of a router shares its original's layer."""
    base = tiny_model(tokenizer, moe=True)
    names = {router.name: router.layer for router in find_routers(base)}
    assert names == {"model.layers.0.mlp.gate": 0, "model.layers.1.mlp.gate": 1}
    model = get_peft_model(base, LoraConfig(r=2, **PEFT[kind]))
    found = find_routers(model)
    assert {router.name.removeprefix("base_model.model."): router.layer for router in found} == names
    assert len(found) == (4 if kind == "saved router" else 2)
    assert [type(block).__name__ for block in moe_blocks(model)] == ["Qwen3MoeSparseMoeBlock"] * 2
    assert {router.module for router in found} <= set(model.modules())


def test_a_dense_model_has_no_router(tokenizer):
    assert find_routers(tiny_model(tokenizer)) == [] and moe_blocks(tiny_model(tokenizer)) == []


def test_the_model_inside_its_wrappers(tokenizer):
    base = tiny_model(tokenizer)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert without_adapters(base) is without_adapters(adapted) is base
    assert inner_model(adapted, Accelerator(cpu=True)) is base
    with pytest.raises(TypeError, match="Linear is not a transformers model"):
        without_adapters(nn.Linear(1, 1))


def test_dropout_of_an_adapter_counts(tokenizer):
    base = tiny_model(tokenizer)
    assert not has_dropout(base)
    assert not has_dropout(get_peft_model(tiny_model(tokenizer), LoraConfig(r=2, target_modules=["q_proj"])))
    assert has_dropout(get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)))


def test_the_language_model_of_a_multimodal_one(monkeypatch):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    config = Qwen2VLConfig(text_config=text | {"vocab_size": 77, "intermediate_size": 16}, vision_config=vision)
    model = Qwen2VLForConditionalGeneration(config)
    assert text_config(model) is config.text_config and vocabulary_size(model) == 77
    assert layout_of(model)[0] == "segments"
    monkeypatch.delattr(type(model.model), "get_rope_index")  # nothing says where pictures lie
    assert layout_of(model) == ("padded", "Qwen2VLForConditionalGeneration is multimodal")
