"""Set-up of Mixture-of-Experts models: frozen routers, leaf modules, types of the experts."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import sapo_config, sapo_trainer, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trl.generation.vllm_generation import VLLMGeneration

from sapo_trl.model import moe_blocks
from sapo_trl.moe.experts import float32_experts, freeze_routers, hub_named, mark_leaf_modules
from sapo_trl.trl_seams import convert_sent_parameters

ROUTERS = {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}


def test_frozen_routers_do_not_move_and_the_layers_below_do(tmp_path, tokenizer, capsys):
    fields = {"router_aux_loss_coef": 0.0, "learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1}
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer, True), freeze_router=True, **fields)
    assert "2 routers frozen, 512 parameters" in capsys.readouterr().out  # 2 layers x 8 experts x 32 wide
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    still = {name for name, p in trainer.model.named_parameters() if torch.equal(before[name], p)}
    assert still == ROUTERS
    assert {n for n, p in trainer.model.named_parameters() if not p.requires_grad} == ROUTERS
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(before) - len(ROUTERS)


def test_freezing_is_refused_where_it_means_nothing_or_harm(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM is dense.*Remove freeze_router"):
        sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), freeze_router=True, router_aux_loss_coef=0.0)
    for coef in (None, 0.01):
        with pytest.raises(ValueError, match=r"bend the layers below.*router_aux_loss_coef: 0\.0"):
            sapo_config(tmp_path, freeze_router=True, router_aux_loss_coef=coef)


def test_an_adapter_on_the_router_is_frozen_with_it(tokenizer):
    def with_lora(*parameters):
        return get_peft_model(tiny_model(tokenizer, True), LoraConfig(r=2, target_parameters=list(parameters)))

    model = with_lora("gate.weight", "experts.down_proj")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert freeze_routers(model) == "2 routers frozen, 160 parameters"  # 2 layers x 2 x (8 + 32)
    frozen = trained - {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(frozen) == 4 and all(".gate.lora_" in name for name in frozen)
    assert "frozen already" in freeze_routers(with_lora("experts.down_proj"))


def test_leaf_modules_are_named_for_zero_3_only(tokenizer, monkeypatch):
    model = tiny_model(tokenizer, True)
    assert [type(block).__name__ for block in moe_blocks(model)] == ["Qwen3MoeSparseMoeBlock"] * 2
    wrapped = get_peft_model(tiny_model(tokenizer, True), LoraConfig(r=2, target_parameters=["experts.down_proj"]))
    assert len(moe_blocks(wrapped)) == 2

    def plugin(stage, given=None):
        return SimpleNamespace(zero_stage=stage, transformer_moe_cls_names=given)

    assert mark_leaf_modules(model, None) is None and mark_leaf_modules(model, plugin(2)) is None
    assert mark_leaf_modules(model, plugin(3)) == "Qwen3MoeSparseMoeBlock"
    assert mark_leaf_modules(model, plugin(3, "Mine")) == "Mine"
    assert not mark_leaf_modules(tiny_model(tokenizer), plugin(3))


def test_float32_experts_under_autocast_are_announced(tokenizer):
    model = tiny_model(tokenizer, True)
    assert model.config._experts_implementation == "grouped_mm"
    one = ("cuda", "bf16", DistributedType.NO)
    assert "grouped_mm ignores bf16 autocast" in float32_experts(model, *one)
    for other in [("cpu", *one[1:]), ("cuda", "no", DistributedType.NO), ("cuda", "bf16", DistributedType.DEEPSPEED)]:
        assert float32_experts(model, *other) is None
    assert float32_experts(tiny_model(tokenizer), *one) is None
    assert float32_experts(model.to(torch.bfloat16), *one) is None


@pytest.mark.parametrize("lora", [False, True])
def test_vllm_is_handed_what_a_checkpoint_holds(tmp_path, tokenizer, lora):
    """TRL's walk over the parameters, adapters merged, against the file that save_pretrained writes."""
    model = tiny_model(tokenizer, True)
    sender = VLLMGeneration.__new__(VLLMGeneration)  # vLLM itself is not needed for what is sent
    sender.model, sender._dist = model, SimpleNamespace(is_fsdp=False, gather_params=lambda params: nullcontext())
    if lora:
        torch.manual_seed(0)
        both = ["experts.gate_up_proj", "experts.down_proj"]
        sender.model = get_peft_model(model, LoraConfig(r=2, target_parameters=both, init_lora_weights=False))
    convert_sent_parameters(sender, partial(hub_named, model))
    sent = {name: tensor.clone() for name, tensor in sender._iter_named_params()}
    (sender.model.merge_and_unload() if lora else model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert sent.keys() == saved.keys() and "model.layers.1.mlp.experts.7.up_proj.weight" in sent
    for name, tensor in saved.items():
        torch.testing.assert_close(sent[name], tensor, rtol=0, atol=0)
