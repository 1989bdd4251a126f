"""The memory arithmetic against real models, real optimizers and what autograd really saves."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from test_configs import CPU_MODELS, RECIPES, ROOT, head, name, processes
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from trl import get_peft_config

from sapo_trl.cli.memory_plan import GIB, Setup, engine_of, memory, nearest_fit, setup_of
from sapo_trl.cli.parse import parse_run, read_yaml
from sapo_trl.cli.shapes import model_config, shape_of
from sapo_trl.config import planned_for

LORA = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
SETUP = Setup("none", 1, 80 * GIB, 4, 16384, True, 9216, 64)


# Billions, from the model cards on huggingface.co/Qwen
CARDS = [("0.6B", 0.6, 0.6), ("8B", 8.2, 8.2), ("14B", 14.8, 14.8), ("32B", 32.8, 32.8)]
CARDS += [("30B-A3B", 30.5, 3.3), ("235B-A22B", 235, 22)]


@pytest.mark.parametrize("model, total, active", CARDS)
def test_parameters_of_the_model_cards(model, total, active):
    shape = shape_of(model_config(f"Qwen/Qwen3-{model}"))
    digits = 1 if total < 100 else 0
    assert round(shape.total / 1e9, digits) == total
    assert abs(shape.active / 1e9 - active) < (0.06 if digits else 0.5)  # the cards cut 3.35 to 3.3


def test_counts_equal_a_real_model(tokenizer):
    """`active` against the experts that one token's gradient reaches."""
    for moe in (False, True):
        model = tiny_model(tokenizer, moe)
        shape = shape_of(model.config)
        assert shape.total == shape.trainable == sum(p.numel() for p in model.parameters())
        model(torch.tensor([[5]])).logits.logsumexp(-1).sum().backward()
        experts = [p for n, p in model.named_parameters() if ".experts." in n]
        idle = sum(p[0].numel() * int((p.grad.flatten(1).abs().amax(1) == 0).sum()) for p in experts)
        assert shape.active == shape.total - idle and (idle > 0) == moe
    adapted = get_peft_model(model, LORA)
    shape = shape_of(model.config, LORA)
    assert shape.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape.total == sum(p.numel() for p in adapted.parameters()) and shape.is_lora
    assert shape.adapted_experts == 8 * 3 * 16 * 32  # experts x three matrices of 16 by 32


def saved_bytes(config, tokens: int) -> int:
    """What autograd keeps for backward, parameters aside."""
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).model
    return kept_bytes(model, lambda m: m(torch.arange(tokens)[None] % 100, use_cache=False))


def kept_bytes(model, forward) -> int:
    own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward(model)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("widths", [(256, 512, 128), (384, 256, 256)])
def test_activations_are_what_autograd_saves(moe, widths):
    hidden, query, key = widths
    shape = {"vocab_size": 100, "hidden_size": hidden, "intermediate_size": 640, "head_dim": 64}
    shape |= {"num_attention_heads": query // 64, "num_key_value_heads": key // 64}
    kind = Qwen3MoeConfig if moe else Qwen3Config
    if moe:
        shape |= {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 192}
    two, three = (kind(**shape, num_hidden_layers=n) for n in (2, 3))
    measured = (saved_bytes(three, 128) - saved_bytes(two, 128)) / 128
    assert shape_of(two).saved_per_token == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("hidden, inner, heads", [(256, 640, 4), (384, 512, 6)])
def test_activations_of_pictures_are_what_autograd_saves(hidden, inner, heads):
    text = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32}
    saved = []
    for depth in (2, 3):
        tower = {"depth": depth, "hidden_size": hidden, "intermediate_size": inner, "num_heads": heads}
        tower |= {"out_hidden_size": 64, "deepstack_visual_indexes": []}
        config = Qwen3VLConfig(text_config=text, vision_config=tower)
        model = Qwen3VLForConditionalGeneration(config).to(torch.bfloat16).model.visual
        pixels = torch.randn(128, 3 * 2 * 16 * 16, dtype=torch.bfloat16)
        saved.append(kept_bytes(model, lambda m: m(pixels, grid_thw=torch.tensor([[1, 8, 8], [1, 4, 16]]))))  # noqa: B023
    vision = shape_of(config).vision
    assert (vision.layers, vision.patches, vision.pixels) == (3, 4, 1536)
    assert vision.saved_per_patch == pytest.approx((saved[1] - saved[0]) / 128, rel=0.01)


def test_pictures_count_in_the_update():
    """Of 16384 tokens in packs at most a third are those of prompts, and each is four patches."""
    shape = shape_of(model_config("Qwen/Qwen3-VL-4B-Instruct"))
    assert round(shape.total / 1e9, 2) == 4.44  # as on its model card
    for checkpointing, kept in ((True, 2 * 1024), (False, 2 * (11 * 1024 + 2 * 4096))):
        setup = replace(SETUP, row_tokens=6144, prompt_tokens=2048, checkpointing=checkpointing)
        line = next(line for line in memory(shape, setup).lines if line.name == "pictures")
        assert line.size == 4 * 5461 * (4 * 1536 + 24 * kept + 2 * 2 * (11 * 1024 + 2 * 4096))
    assert round(shape_of(model_config("Qwen/Qwen3-VL-30B-A3B-Instruct")).total / 1e9, 1) == 31.1


def test_bytes_of_a_real_optimizer_step(tokenizer):
    model = tiny_model(tokenizer, moe=True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[5, 6]])).logits.sum().backward()
    optimizer.step()
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.dim()]
    lines = memory(shape_of(model.config), SETUP).lines
    assert sum(size for phase, _, size, _ in lines if phase == "state") == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    "engine, load, per_parameter", [("zero2", 4, 2 + 14 / 8), ("zero3", 2, 2), ("fsdp2", 4, 2), ("ddp", 4, 20)]
)
def test_bytes_a_parameter_on_one_of_eight_gpus(engine, load, per_parameter):
    """ZeRO: 2 weight + 2 gradient + 4 master + 8 moments; FSDP2: 4 + 4 + 8; DDP: 4 + 4 and its bucket 4 + 8."""
    shape = shape_of(model_config("Qwen/Qwen3-8B"))
    lines = memory(shape, replace(SETUP, engine=engine, num_gpus=8, load_bytes=load)).lines
    assert sum(size for phase, _, size, _ in lines if phase == "state") == pytest.approx(per_parameter * shape.total)


def test_lora_gathers_the_whole_model_for_vllm():
    shape = shape_of(model_config("Qwen/Qwen3-32B"), LoraConfig(r=32, target_modules="all-linear"))
    setup = replace(SETUP, engine="zero3", num_gpus=16, load_bytes=2, vllm="colocate", vllm_frac=0.4, vllm_parallel=4)
    setup = replace(setup, vllm_sleeps=True)
    gathered = memory(shape, setup).peaks["sync"]
    assert gathered > 2 * 32.8e9 * (1 + 1 / 4 + 1 / 16)  # whole, vLLM's quarter, the shard
    assert not memory(shape, setup).fits and nearest_fit(shape, setup).startswith("vllm_mode: server")


def test_an_engine_is_read_from_every_launch_file():
    expected = {"single": "none", "ddp": "ddp", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
    for file, engine in (expected | {"zero3-multinode": "zero3"}).items():
        launch = read_yaml(ROOT / f"configs/accelerate/{file}.yaml")
        assert engine_of(launch, launch["num_processes"]) == engine


SHAPES: dict = {}


def recipe_shape(model):
    """One count for the siblings of a recipe."""
    key = (model.model_name_or_path, model.use_peft)
    if key not in SHAPES:
        SHAPES[key] = shape_of(model_config(model.model_name_or_path), get_peft_config(model))
    return SHAPES[key]


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name not in CPU_MODELS], ids=name)
def test_a_recipe_fits_the_gpus_that_its_head_states(path):
    launch = read_yaml(ROOT / re.search(r"--config_file (\S+)", head(path))[1])
    gib = int(re.search(r"# hardware: \d+ GPUs? with (\d+) GB", head(path))[1])
    with planned_for(processes(path)):
        run = parse_run(["--config", str(path), "--use_cpu", "true"])
        setup = setup_of(run, launch, processes(path), gib * GIB)
    shape = recipe_shape(run.model)
    result = memory(shape, setup)
    assert (shape.adapted_experts > 0) == (name(path) == "qwen3-30b-a3b/sapo-lora")
    assert result.fits, (result.peaks, nearest_fit(shape, setup))
    assert not memory(shape, replace(setup, gpu_bytes=setup.gpu_bytes / 4)).fits  # and the check can fail


def test_the_nearest_change_fits():
    shape = shape_of(model_config("Qwen/Qwen3-8B"))
    setup = replace(SETUP, engine="ddp", num_gpus=8, vllm="server")
    assert not memory(shape, setup).fits and nearest_fit(shape, setup) == "--config_file configs/accelerate/zero3.yaml"
    assert nearest_fit(shape, replace(setup, engine="none", num_gpus=1)) == "4 GPUs under zero3"
    long = replace(setup, engine="zero3", checkpointing=False)
    assert nearest_fit(shape, long) == "activation_checkpointing: true"
