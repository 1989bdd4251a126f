"""What check says beyond the memory: GPUs, tokens, hours, cost and advice, by hand and over every recipe."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from test_arithmetic import SHAPES
from test_configs import CPU_MODELS, RECIPES, load, name

from sapo_trl.batch_plan import BatchPlan
from sapo_trl.cli import check, packages
from sapo_trl.cli.advice import advice, enough_prompts
from sapo_trl.cli.cost import Gpu, estimate, fewest_gpus, server_gpus
from sapo_trl.cli.memory_plan import GIB, Setup, nearest_fit
from sapo_trl.cli.shapes import Shape, model_config, shape_of

# 8 billion parameters in 10 layers; keys and values of a token take 2 x 2 B x 10 x 500 = 20 kB
SHAPE = Shape(8 * 10**9, 8 * 10**9, 8 * 10**9, 10, 1000, 1000, 500, 5, 4000, 1000, 10**8, 10**7)
PLAN = BatchPlan(32, 4, 4, 8, 2, 4, 3, "acts")
GPU = Gpu(peak=1e14, bandwidth=1e12, memory=80, utilisation=0.5, price=2.0)
SETUP = Setup(
    "zero3", 4, 80 * GIB, 2, 4096, True, 2000, 8, 1000, logprob_passes=0.75, vllm="colocate", vllm_frac=0.5,
    vllm_sleeps=True,
)  # fmt: skip


def test_seconds_by_hand():
    """Rows of 1000 tokens: a forward pass takes 32,000 x (2 x 8e9 + 2 x 10 x 1000 x 1000) = 5.1264e14 operations."""
    found = estimate(SHAPE, SETUP, PLAN, GPU, 400, fill=0.5)
    expected = {
        # 500 steps, each reads 16 GB of weights and 8 rows x 750 tokens x 20 kB, and computes 1.28e11 operations
        "generation": 500 * (16.12e9 / 0.5e12 + 1.28e11 / 0.5e14),
        "log-probs": 0.75 * 5.1264e14 / 2e14,
        "update": 4 * 5.1264e14 / 2e14,  # forward, twice that backward, and forward again
    }
    assert found.tokens == 32_000 and found.seconds == pytest.approx(expected)
    assert found.rollouts == 100 and found.num_gpus == 4
    assert found.hours == pytest.approx(100 * (17.4 + 1.9224 + 10.2528) / 3600)
    assert estimate(SHAPE, SETUP, PLAN, GPU, -1, fill=0.5).hours is None  # epochs of data that was not read


def seconds(shape=SHAPE, **changes):
    return estimate(shape, replace(SETUP, **changes), PLAN, GPU, 400, fill=0.5).seconds


def test_what_changes_the_seconds():
    assert seconds(checkpointing=False)["update"] == pytest.approx(3 * 2.5632)
    assert seconds(replace(SHAPE, is_lora=True))["update"] == pytest.approx(3 * 2.5632)  # no gradients of weights
    assert seconds(replace(SHAPE, num_experts=8))["update"] == pytest.approx(8 * 2.5632)
    assert seconds(num_gpus=8)["log-probs"] == pytest.approx(1.9224 / 2)
    # a quarter of the GPU leaves 2.25 GB of cache, 112 rows: 256 rows take 256 / 112 x 500 steps
    full = (16e9 + 112 * 750 * 20e3) / 0.5e12 + 112 * 1.6e10 / 0.5e14
    assert seconds(rows=256, vllm_frac=0.25)["generation"] == pytest.approx(256 / 112 * 500 * full)
    assert seconds(vllm="no")["generation"] > 4 * seconds()["generation"]  # transformers reads at a tenth, not a half


def test_gpus_of_a_server_and_the_fewest_for_training():
    assert server_gpus(SHAPE, SETUP) == 0
    for billions, gib, expected in ((8, 80, 1), (30, 80, 2), (235, 141, 8)):
        served = replace(SETUP, vllm="server", gpu_bytes=gib * GIB)
        assert server_gpus(replace(SHAPE, total=billions * 10**9), served) == expected
    assert estimate(SHAPE, replace(SETUP, vllm="server"), PLAN, GPU, 4, 0.5).num_gpus == 5
    # 16 B a parameter: 119 GiB on one GPU, 60 on two, which leaves 14 for the update's 6 and not for vLLM's 40
    assert fewest_gpus(SHAPE, replace(SETUP, vllm="server")) == (2, "zero3")
    assert fewest_gpus(SHAPE, SETUP) == (4, "zero3")
    assert fewest_gpus(replace(SHAPE, largest_layer=10**12), SETUP) is None


QWEN = Setup(
    "zero3", 8, 80 * GIB, 4, 16384, True, 9216, 128, 8192, vllm="colocate", vllm_frac=0.65, vllm_sleeps=True,
    vllm_tokens=9216,
)  # fmt: skip
ADVICE = [
    ({"pack_tokens": 4096}, ["max_tokens_per_pack: 4096 is less than the longest row.* Set max_tokens_per_pack: 9216"]),
    ({"pack_tokens": 9216}, []),
    (
        {"vllm_sleeps": False, "vllm_frac": 0.35},
        ["holds 7 of the longest rows, and an engine generates 128; awake, vLLM keeps 28 GiB .* Set "
         r"vllm_enable_sleep_mode: true and vllm_gpu_memory_utilization: 0.65 for 26\."],
    ),
    (
        {"vllm_sleeps": False, "vllm_may_sleep": False, "vllm_frac": 0.28},  # a rollout ahead
        [r"holds 3 of .*; awake, vLLM keeps 22 GiB .* Set vllm_gpu_memory_utilization: 0.45 for 14"],
    ),
    ({"vllm_frac": 0.4}, [r"cache holds 10 of .* Set vllm_gpu_memory_utilization: 0.65 for 26\."]),
    ({"vllm_frac": 0.4, "rows": 10}, []),
    ({"vllm_frac": 0.25, "rows": 8}, [r"holds 1 of .* 0.4 for all of them\."]),
    ({"vllm_sleeps": False, "vllm": "server"}, []),
    ({"vllm_tokens": 8192}, ["8192 cuts rows that may have 9216 tokens .* Set vllm_max_model_length: 9216"]),
    ({"vllm_tokens": 50000}, ["more than the model's 40960 positions, and vLLM will not start"]),
    ({"vllm_tokens": None}, []),
    (
        {"vllm_tokens": None, "vllm_frac": 0.25, "rows": 1},
        [r"holds \d+ tokens, and the model's 40960 positions are more. Set vllm_max_model_length: 9216"],
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def qwen():
    return shape_of(model_config("Qwen/Qwen3-8B"))


@pytest.mark.parametrize("changes, expected", [({}, []), *ADVICE], ids=str)
def test_advice(qwen, changes, expected):
    found = list(advice(qwen, replace(QWEN, **changes), 40960))
    assert len(found) == len(expected)
    for sentence, pattern in zip(found, expected):
        assert re.search(pattern, sentence), sentence


def test_advice_where_no_share_of_the_gpu_helps():
    """Weights and state of 32B leave vLLM less than half of 16 GPUs: 13.7 GiB of cache beside 15.3 of weights."""
    large = shape_of(model_config("Qwen/Qwen3-32B"))
    split = replace(QWEN, num_gpus=16, rows=64, vllm_frac=0.4, vllm_parallel=4)
    (sentence,) = advice(large, split, 40960)
    assert "larger than their keys and values" in sentence and "Set vllm_tensor_parallel_size: 8, or a s" in sentence
    assert not list(advice(large, replace(split, vllm_parallel=8), 40960))


def test_what_does_not_fit_awake_is_put_to_sleep(qwen):
    """Weights, gradients, moments and the update take 34 GiB; with 0.6 of 80 beside them 82, with 2 GiB 36."""
    awake = replace(QWEN, vllm_sleeps=False, vllm_frac=0.6)
    assert nearest_fit(qwen, awake) == "vllm_enable_sleep_mode: true"
    assert nearest_fit(qwen, replace(awake, vllm_may_sleep=False)) == "vllm_gpu_memory_utilization: 0.25"
    # only a smaller pack fits beside the share that generation needs
    assert nearest_fit(qwen, replace(QWEN, pack_tokens=100_000)) == "max_tokens_per_pack: 50000"


def test_fewer_prompts_than_a_rollout():
    assert not list(enough_prompts(4, PLAN))
    (sentence,) = enough_prompts(3, PLAN)
    assert "has 3 prompts and one rollout takes 4" in sentence


@pytest.fixture
def checked(monkeypatch, capsys):
    """What `check` prints for arguments that it accepts, on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*words):
        monkeypatch.setenv("COLUMNS", "300")
        status = check.main([*map(str, words)])
        out, errors = capsys.readouterr()
        assert status == 0, errors
        return out

    return run


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_recipe_prints_its_numbers_and_needs_no_advice(path, checked, monkeypatch, tmp_path, tokenizer):
    values, words = load(path), []
    if path.parent.name in CPU_MODELS:
        words = ["--model_name_or_path", tmp_path]
        tiny_model(tokenizer, path.parent.name == "tiny-moe").config.save_pretrained(tmp_path)
    key = (values["model_name_or_path"], values.get("use_peft", False))

    def counted(config, adapter):
        if key not in SHAPES:
            SHAPES[key] = shape_of(config, adapter)
        return SHAPES[key]

    monkeypatch.setattr(check, "shape_of", counted)
    out = checked("--config", path, *words)
    has_passes = values.get("old_logprobs") != "sampler"
    for phase in ("state", *["generation"] * ("vllm_mode: server" not in path.read_text()), "update", "step"):
        assert re.search(rf"^ {phase} .* \d+\.\d ", out, re.M), phase
    assert bool(re.search(r"^ log-probs .* \d+\.\d ", out, re.M)) == has_passes
    assert re.search(r"^ tokens of a rollout +[\d.]+M = \d+ rows x \d+", out, re.M)
    assert re.search(r"^ tokens of an optimizer step +[\d.e-]+M = \d+ rows", out, re.M)
    assert "advice:" not in out
    if path.parent.name in CPU_MODELS:
        assert re.search(r"^ GPUs +none: use_cpu", out, re.M) and "not estimated for a CPU" in out
        return
    assert re.search(r"^ GPUs +\d+ under \w+ in this plan.*; the memory needs \d+ under \w+", out, re.M)
    assert re.search(
        r"^ the whole run +[\d.,]+ h for \d+ steps = \d+ rollouts; \$[\d,]+ = \d+ GPUs x \$[\d.]+ an h", out, re.M
    )
    assert ": fits" in out


def test_the_launch_and_the_gpu_come_from_the_head_of_a_recipe(checked, monkeypatch, qwen):
    monkeypatch.setattr(check, "shape_of", lambda config, adapter: qwen)
    assert "8 GPU(s) with 80 GiB, zero3" in checked("--config", "qwen3-8b/sapo")
    assert "64 GPU(s) with 141 GiB, zero3" in checked("--config", "qwen3-235b-a22b/sapo")
    words = ("--config", "qwen3-8b/sapo", "--num_processes", 2, "--gpu", "a100", "--gpu_memory", 40, "--gpu_price", 1)
    out = checked(*words)
    assert "2 GPU(s) with 40 GiB, ddp" in out and "x $1 an hour" in out and "312 TFLOP/s x 0.4" in out
    assert check.main(["--config", "qwen3-8b/sapo", "--gpu_price", "-1"]) == 1


def test_what_a_machine_lacks_that_is_not_the_one_to_train_on(checked, monkeypatch, qwen, tmp_path):
    monkeypatch.setattr(check, "shape_of", lambda config, adapter: qwen)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    data = tmp_path / "few.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 63)
    out = checked("--config", "qwen3-8b/sapo", "--dataset_name", data)
    assert "not there yet: use_vllm is set and vLLM is not installed: pip install -e '.[vllm]'" in out
    assert "advice: The training set has 63 prompts and one rollout takes 64" in out and ": fits" in out
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 64)
    assert "advice:" not in checked("--config", "qwen3-8b/sapo", "--dataset_name", data)
    assert "has 9 prompts" in checked("--config", "qwen3-8b/sapo", "--max_samples", 9)
