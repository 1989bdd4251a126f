"""Recipes: every file parses as `scripts/train.py` parses it, its head tells the truth, and siblings are comparable."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import ModelConfig, TrlParser

from sapo_trl.batch_plan import batch_plan
from sapo_trl.config import SAPOConfig, planned_for
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.gym import check_gym, is_gym
from sapo_trl.data.loading import PRESETS

ROOT = Path(__file__).parents[2]
ACCELERATE = ROOT / "configs" / "accelerate"
RECIPES = sorted(p for p in ROOT.glob("configs/*/*.yaml") if p.parent != ACCELERATE)
PAPER = "paper"  # a folder whose files are named <model>-<algorithm>
MODELS = sorted({p.parent.name for p in RECIPES} - {PAPER})
CPU_MODELS = {"tiny", "tiny-moe", "tiny-vl", "smollm2"}
ONE_RECIPE = {"smollm2"}  # its head names --algorithm for the others
KNOWN = {f.name for cls in (ScriptArguments, SAPOConfig, ModelConfig) for f in dataclasses.fields(cls)}

# Where two recipes of one model may differ: the algorithm and the names; for LoRA its own keys as well.
ALGORITHM_KEYS = {"algorithm", "output_dir", "run_name", "sapo_temperature_pos", "sapo_temperature_neg"}
LORA_KEYS = {"use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "dtype", "learning_rate"}
LORA_KEYS |= {"lora_target_parameters", "per_device_train_batch_size"}  # fewer processes, the same optimizer step
# ZeRO-3 gathers the whole model to merge adapters for vLLM: the largest ones serve from other GPUs
SERVER_KEYS = {"vllm_mode", "vllm_server_host", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"}
SERVER_KEYS |= {"vllm_enable_sleep_mode", "vllm_max_model_length"}

# A recipe of several pieces: its algorithm, and the keys of its own
SCALERL = "cispo"
SCALERL_KEYS = {"epsilon_high", "old_logprobs", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"}
SCALERL_KEYS |= {"loss_aggregation", "scale_rewards", "zero_variance_filter", "drop_solved_above", "thinking_budget"}
SCALERL_KEYS |= {"cast_lm_head_to_fp32", "max_prompt_tokens", "max_completion_length", "vllm_max_model_length"}

# Recipes whose data or tools are what they show: everything but these keys is the algorithm's recipe
SHOWN = {"reasoning-gym": "sapo", "calculator": "sapo"}
SHOWN_KEYS = {"model_name_or_path", "dataset_name", "eval_dataset_name", "datasets", "reward_funcs", "tools"}
SHOWN_KEYS |= {"max_tool_calling_iterations", "max_completion_length"}

# accelerate file: (distributed_type, processes, machines, ZeRO stage)
LAUNCHES = {
    "single": ("NO", 1, 1, None),
    "ddp": ("MULTI_GPU", 8, 1, None),
    "fsdp2": ("FSDP", 8, 1, None),
    "zero2": ("DEEPSPEED", 8, 1, 2),
    "zero3": ("DEEPSPEED", 8, 1, 3),
    "zero3-multinode": ("DEEPSPEED", 16, 2, 3),
}


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error: the plain loader silently takes the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"{node.start_mark}: {', '.join(sorted(twice))} given twice")
        return super().construct_mapping(node, deep)


def load(path):
    return yaml.load(path.read_text(encoding="utf-8"), StrictLoader)


def head(path):
    """The comment lines before the first key."""
    return re.match(r"(#.*\n|\n)+", path.read_text(encoding="utf-8"))[0]


def processes(path):
    return int(re.search(r"^# processes: (\d+)$", head(path), re.M)[1])


def parse(path, *overrides):
    """Parse a recipe for its stated number of processes; on a machine without a GPU bf16 is checked for the CPU."""
    cpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    parser = TrlParser((ScriptArguments, SAPOConfig, ModelConfig))
    with planned_for(processes(path)):
        return parser.parse_args_and_config(["--config", str(path), *cpu, *overrides], fail_with_unknown_args=True)


def name(path):
    return f"{path.parent.name}/{path.stem}"


def sapo_beside(path):
    """The recipe of SAPO that a recipe is compared with."""
    return path.with_name("qwen3-30b-a3b-sapo.yaml" if path.parent.name == PAPER else "sapo.yaml")


each_recipe = pytest.mark.parametrize("path", RECIPES, ids=name)


def test_the_strict_loader_refuses_a_key_given_twice():
    with pytest.raises(yaml.YAMLError, match="beta given twice"):
        yaml.load("beta: 0\nseed: 1\nbeta: 1\n", StrictLoader)


def test_every_model_has_the_three_algorithms():
    assert len(MODELS) == 14
    for model in set(MODELS) - ONE_RECIPE:
        assert {"sapo", "gspo", "grpo"} <= {p.stem for p in RECIPES if p.parent.name == model}, model


@each_recipe
def test_keys_are_known_fields(path):
    assert set(load(path)) <= KNOWN


@each_recipe
def test_a_recipe_parses_and_its_head_states_the_batch_plan(path):
    _, config, _ = parse(path)
    with planned_for(processes(path)):
        plan = batch_plan(config)
    step = re.search(
        r"step: (\d+) per device × (\d+) accumulation × (\d+) process(?:es)? = (\d+) completions", head(path)
    )
    assert [int(n) for n in step.groups()] == [
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        processes(path),
        plan.effective_batch,
    ]
    rollout = re.search(
        r"rollout: +(\d+) × (\d+) mini-batches = (\d+) completions = (\d+) prompts × (\d+) generations", head(path)
    )
    assert [int(n) for n in rollout.groups()] == [
        plan.effective_batch,
        config.num_mini_batches,
        plan.completions_per_rollout,
        plan.prompts_per_rollout,
        config.num_generations,
    ]
    assert plan.gate_can_act
    assert plan.prompts_per_rollout * config.num_generations == plan.completions_per_rollout


@each_recipe
def test_the_head_says_how_to_launch(path):
    recipe = f"configs/{name(path)}.yaml"
    assert f"scripts/train.py --config {recipe}" in head(path)
    if path.parent.name in CPU_MODELS:
        assert processes(path) == 1
        return
    assert "not run on this hardware yet" in head(path)
    launch = ROOT / re.search(r"--config_file (\S+)", head(path))[1]
    override = re.search(r"--num_processes (\d+)", head(path))
    assert processes(path) == (int(override[1]) if override else load(launch)["num_processes"])


@each_recipe
def test_names_follow_from_the_path(path):
    values = load(path)
    assert values["output_dir"] == f"runs/{name(path)}"
    assert values["run_name"] == name(path).replace("/", "-")
    stem = path.stem.removeprefix("qwen3-30b-a3b-" if path.parent.name == PAPER else "")
    assert values["algorithm"] == (SCALERL if stem == "scalerl" else SHOWN.get(stem, stem.removesuffix("-lora")))


@each_recipe
def test_data_are_presets_or_the_files_of_the_cold_start(path):
    values = load(path)
    mixed = [one["dataset_name"] for one in values.get("datasets", {}).values()]
    held_out = [one["dataset_name"] for one in values.get("eval_sets", {}).values()]
    for dataset in (*(mixed or [values["dataset_name"]]), *(held_out or [values["eval_dataset_name"]])):
        if is_gym(dataset):
            check_gym(dataset)
            continue
        assert dataset in PRESETS or dataset.startswith(f"runs/{path.parent.name}/")
    assert "{prompt}" in values.get("prompt_template", "{prompt}")


@each_recipe
def test_vllm_fits_the_lengths_and_the_processes(path):
    values = load(path)
    if values.get("vllm_mode") != "colocate":
        return
    assert values["vllm_max_model_length"] == values["max_prompt_tokens"] + values["max_completion_length"]
    assert processes(path) % values["vllm_tensor_parallel_size"] == 0


@pytest.mark.parametrize("algorithm", ["gspo", "grpo", "vespo", "sapo-adaptive"])
@pytest.mark.parametrize("mini_batches", [4, 16])
def test_the_pretrained_recipe_takes_the_other_algorithms_and_mini_batches(algorithm, mini_batches):
    words = ["--num_mini_batches", str(mini_batches), "--per_device_train_batch_size", str(128 // mini_batches)]
    _, config, _ = parse(ROOT / "configs/smollm2/sapo.yaml", "--algorithm", algorithm, *words)
    plan = batch_plan(config)
    assert (config.algorithm, plan.completions_per_rollout, plan.prompts_per_rollout) == (algorithm, 128, 16)


@each_recipe
def test_siblings_differ_only_in_the_algorithm(path):
    values, sapo = load(path), load(sapo_beside(path))
    differ = {key for key in values.keys() | sapo.keys() if values.get(key) != sapo.get(key)}
    allowed = ALGORITHM_KEYS | (LORA_KEYS | SERVER_KEYS if path.stem.endswith("-lora") else set())
    allowed |= {"epsilon", "epsilon_high"} if path.parent.name == PAPER else set()
    allowed |= SCALERL_KEYS if path.stem == "scalerl" else SHOWN_KEYS if path.stem in SHOWN else set()
    assert differ <= allowed
    batch = "per_device_train_batch_size"
    assert values[batch] * processes(path) == sapo[batch] * processes(sapo_beside(path))
    assert ("sapo_temperature_pos" in values) == (values["algorithm"] == "sapo")


def test_the_paper_temperatures():
    for model in MODELS:
        values = load(ROOT / "configs" / model / "sapo.yaml")
        assert (values["sapo_temperature_pos"], values["sapo_temperature_neg"]) == (1.0, 1.05)


# What the paper publishes of its main experiment; of every other value its recipes say that it is ours
PUBLISHED = {
    "algorithm": {"sapo", "gspo", "grpo-r2"}, "sapo_temperature_pos": {1.0}, "sapo_temperature_neg": {1.05},
    "epsilon": {3e-4, 0.2}, "epsilon_high": {4e-4, 0.27}, "model_name_or_path": {"Qwen/Qwen3-30B-A3B-Base"},
    "num_mini_batches": {4}, "num_generations_eval": {16},
}  # fmt: skip


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name == PAPER], ids=name)
def test_recipes_of_the_paper_say_who_chose_each_value(path):
    ours = set(re.findall(r"^(\w+):.*  # ours\b", path.read_text(encoding="utf-8"), re.M))
    values = load(path)
    assert values.pop("eval_sets") == {
        name: {"dataset_name": name, "num_samples": 16} for name in ("aime25", "hmmt25", "beyondaime")
    }
    assert ours == set(values) - set(PUBLISHED)
    assert all(values[key] in allowed for key, allowed in PUBLISHED.items() if key in values)


def test_the_ablation_of_the_paper_is_one_override_each():
    path = ROOT / "configs/paper/qwen3-30b-a3b-sapo.yaml"
    lines = re.findall(r"^#   (--sapo_temperature_neg .*)$", head(path), re.M)
    configs = [parse(path, *shlex.split(words))[1] for words in ("", *lines)]
    assert [config.sapo_temperature_neg for config in configs] == [1.05, 1.0, 0.95]
    assert {config.sapo_temperature_pos for config in configs} == {1.0}
    assert len({config.output_dir for config in configs}) == len({config.run_name for config in configs}) == 3


def test_an_override_that_breaks_the_batches_is_refused():
    with pytest.raises(ValueError, match="num_generations=24 does not divide the rollout of 256 completions"):
        parse(ROOT / "configs/tiny/sapo.yaml", "--num_generations", "24")


def test_an_unknown_flag_is_refused():
    with pytest.raises(ValueError, match="--sapo_temprature_pos"):
        parse(ROOT / "configs/tiny/sapo.yaml", "--sapo_temprature_pos", "2")


def test_every_accelerate_file_is_listed():
    assert {p.stem for p in ACCELERATE.glob("*.yaml")} == set(LAUNCHES)


@pytest.mark.parametrize("launch", sorted(LAUNCHES))
def test_accelerate_file(launch):
    path = ACCELERATE / f"{launch}.yaml"
    kind, num_processes, num_machines, stage = LAUNCHES[launch]
    values, config = load(path), load_config_from_file(str(path))
    assert config.distributed_type == kind
    assert (config.num_processes, config.num_machines) == (num_processes, num_machines)
    # With use_cpu accelerate would run plain DDP instead of what the file says.
    assert config.use_cpu is False
    assert config.deepspeed_config.get("zero_stage") == stage
    assert config.fsdp_config.get("fsdp_version") == (2 if kind == "FSDP" else None)
    assert values["mixed_precision"] == "bf16"
    assert head(path).startswith("# ")
