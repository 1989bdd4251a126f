"""The scripts' front door: YAML, command line, `check.py`, and one sentence for everything wrong."""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from transformers import TrainerState

from sapo_trl.batch_plan import batch_plan
from sapo_trl.cli import train
from sapo_trl.cli.parse import parse_run, read_yaml, resolved_fields
from sapo_trl.monitor.files import RunFiles

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs/tiny/sapo.yaml")


def write(tmp_path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_file():
    run = parse_run(["--config", TINY, "--algorithm", "gspo", "--learning_rate", "5e-5", "--seed", "3"])
    assert (run.config.algorithm, run.config.learning_rate, run.config.seed) == ("gspo", 5e-5, 3)
    assert run.config.build_objective().epsilon_high == 4e-4 and run.script.reward_funcs == ["accuracy"]
    assert parse_run([f"--config={TINY}"]).config.algorithm == "sapo"


REFUSED = [
    ("learning_rat: 1.0e-6", [], r"unknown key 'learning_rat'. Did you mean 'learning_rate'"),
    ("algorithm: sapo\nbeta: 0.0\nalgorithm: grpo", [], r"key 'algorithm' stands twice, in lines 1 and 3"),
    ("algorithm: sappo", [], r"algorithm='sappo' is unknown.*Did you mean 'sapo'"),
    ("- a list", [], r"holds list, not a mapping"),
    ("algorithm: [unclosed", [], r"is not YAML"),
    ("seed: 1", ["--lerning_rate", "1"], r"unknown argument --lerning_rate. Did you mean 'learning_rate'"),
    ("seed: 1", ["--learning", "1"], r"unknown argument --learning"),  # an abbreviation
    ("seed: 1", ["--num_generations", "eight"], r"invalid int value: 'eight'"),
    ("seed: 1", ["stray"], r"stray"),
    ("seed: 1", ["mine.yaml"], r"mine.yaml is no option, nor a value of one. Did you mean --config mine.yaml\?"),
    ("sapo_temperature_pos: 0", [], r"sapo_temperature_pos=0"),
    ("sapo_temperature_pos: .nan", [], r"sapo_temperature_pos=nan"),
]


@pytest.mark.parametrize("text, extra, message", REFUSED)
def test_refused(tmp_path, text, extra, message):
    with pytest.raises(ValueError, match=message):
        parse_run(["--config", write(tmp_path, text), "--use_cpu", "true", "--bf16", "false", *extra])


SWITCHED_OFF = [
    (["--save_steps", "20"], "save_steps=20.* has no effect with save_strategy: no. Set save_strategy: steps"),
    (["--lora_r", "4"], "lora_r=4 has no effect with use_peft: false"),
    (["--bnb_4bit_quant_type", "fp4"], "bnb_4bit_quant_type=fp4 has no effect with load_in_4bit: false"),
    (["--hub_model_id", "me/mine"], "hub_model_id=me/mine has no effect with push_to_hub: false"),
    (["--eval_strategy", "no", "--eval_steps", "5"], "eval_steps=5.* has no effect with eval_strategy: no"),
    (["--eval_strategy", "no", "--eval_on_start", "true"], "eval_on_start=True has no effect with eval_strategy: no"),
]


@pytest.mark.parametrize("words, message", SWITCHED_OFF)
def test_an_option_without_effect_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_run(["--config", TINY, *words])


def test_what_the_command_line_switches_off_in_the_file_goes_with_what_belongs_to_it():
    config = parse_run(["--config", TINY, "--eval_strategy", "no", "--log_completions=false"]).config
    assert (config.eval_steps, config.num_completions_to_print, config.num_generations_eval) == (None, None, 4)
    assert parse_run(["--config", TINY, "--eval_strategy", "steps"]).config.eval_steps == 20
    gpu = ["--config", "configs/qwen3-8b/sapo.yaml", "--use_cpu", "true", "--bf16", "false"]
    without = parse_run([*gpu, "--use_vllm", "false", "--save_strategy", "no"]).config
    assert (without.vllm_max_model_length, without.save_total_limit, without.eval_steps) == (None, None, 100)


@pytest.mark.parametrize("null", ["null", "none", "None"])
def test_null_is_no_value_of_an_optional_field(tmp_path, null):
    words = ["--eval_dataset_name", null, f"--max_prompt_tokens={null}", "--lora_target_modules", null, "--seed", "3"]
    run = parse_run(["--config", TINY, *words])
    assert (run.script.eval_dataset_name, run.script.max_prompt_tokens, run.config.seed) == (None, None, 3)
    assert run.model.lora_target_modules is None
    in_file = ["--config", write(tmp_path, f"system_prompt: {null}\nbf16: false\nuse_cpu: true\nmax_samples: {null}")]
    assert (parse_run(in_file).script.system_prompt, parse_run(in_file).script.max_samples) == (None, None)


def test_a_no_without_quotes_is_a_strategy(tmp_path):
    file = write(tmp_path, "save_strategy: no\neval_strategy: no\nbf16: false\nuse_cpu: true")
    assert parse_run(["--config", file]).config.save_strategy == "no"


def test_none_stays_where_it_is_a_value():
    words = ["--config", TINY, "--scale_rewards", "none", "--report_to"]
    assert parse_run([*words, "none", "--routing_replay", "none"]).config.routing_replay == "none"
    assert parse_run([*words, "null", "--routing_replay", "null"]).config.routing_replay is None
    assert parse_run([*words, "null"]).config.report_to == parse_run([*words, "none"]).config.report_to == []


def test_a_missing_config_names_its_neighbour():
    with pytest.raises(ValueError, match=r"sap.yaml does not exist. Did you mean '.*sapo.yaml'"):
        parse_run(["--config", TINY.replace("sapo.yaml", "sap.yaml")])


def test_duplicate_keys_inside_mappings_are_found(tmp_path):
    with pytest.raises(ValueError, match="'top_k' stands twice"):
        read_yaml(write(tmp_path, "generation_kwargs:\n  top_k: 0\n  top_k: 20\n"))


EVALUATED = ("--eval_dataset_name", TINY, "--eval_strategy", "steps", "--num_generations_eval", "4")


@pytest.mark.parametrize(
    "metric, near",
    [
        ("eval_pas_at_1", "eval_pass_at_1"),
        ("maj_at_8", "eval_maj_at_4"),
        ("eval_rewards/accuracy/mean", "eval_rewards/accuracy_reward/mean"),
        ("eval_completion/mean_length", "eval_completions/mean_length"),
        ("eval_pass_at_4_low", None),
        ("reward", None),
        ("eval_completions/mean_length", None),
        ("eval_verdict/right_frac", None),
        ("eval_kl", None),
    ],
)
def test_the_best_metric_is_one_that_an_evaluation_logs(metric, near):
    words = ["--config", TINY, *EVALUATED, "--metric_for_best_model", metric]
    with pytest.raises(ValueError, match=f"Did you mean '{near}'") if near else nullcontext():
        parse_run(words)
    is_score = "pass_at" in metric or "maj_at" in metric
    with pytest.raises(ValueError, match="logged by no evaluation") if is_score else nullcontext():
        parse_run([*words, "--reward_funcs", "collections.Counter"])  # somebody else's may log any other name


def test_the_best_metric_of_a_set():
    sets = json.dumps({"hard": {"num_samples": 4}, "hard_too": {"num_samples": 2}})
    words = ["--config", TINY, *EVALUATED, "--eval_sets", sets, "--metric_for_best_model"]
    for metric in ("eval_hard_too_maj_at_2", "hard_completions/mean_length", "eval_hard_reward"):
        parse_run([*words, metric])
    with pytest.raises(ValueError, match="Did you mean 'eval_hard_too_completions/mean_length'"):
        parse_run([*words, "eval_hard_too_completion/mean_length"])


def test_run_record(tmp_path):
    run = parse_run(["--config", TINY, "--output_dir", str(tmp_path / "run"), "--hub_token", "secret"])
    files = RunFiles(batch_plan(run.config).rows())
    files.settings = resolved_fields(run)
    files.on_train_begin(run.config, TrainerState(is_world_process_zero=True), None)
    resolved = yaml.safe_load((tmp_path / "run/resolved_config.yaml").read_text())
    assert resolved["loss_type"] == "sapo" and resolved["max_tokens_per_pack"] and resolved["model_name_or_path"]
    assert "secret" not in (tmp_path / "run/resolved_config.yaml").read_text()
    versions = json.loads((tmp_path / "run/versions.json").read_text())
    assert versions["trl"].startswith("1.16") and versions["num_processes"] == 1
    assert "prompts per rollout" in json.loads((tmp_path / "run/plan.json").read_text())


def script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # with a GPU, vLLM would have to be there
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def test_check_prints_the_plan_without_a_model():
    started = time.perf_counter()
    launch = ("--config_file", "configs/accelerate/zero3.yaml", "--gpu_memory", "20")
    done = script("check.py", "--config", "configs/qwen3-8b/sapo.yaml", *launch)
    assert done.returncode == 0, done.stderr
    plan = ("prompts per rollout", "64", "acts on 3 of 4 steps", "loss_type", "Qwen/Qwen3-8B")
    for part in (*plan, "one of 8 GPU(s) with 20 GiB, zero3", "8.19B parameters", "does NOT fit. Nearest change: "):
        assert part in done.stdout
    assert time.perf_counter() - started < 60  # 5 s alone on the machine; others may keep it busy


@pytest.fixture
def no_weights(tmp_path, tokenizer) -> list[str]:
    """A configuration whose model is a tokenizer and no weights: loading the model would fail otherwise."""
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return ["--config", TINY, "--model_name_or_path", str(model)]


def test_train_ends_in_one_line(no_weights):
    done = script("train.py", *no_weights, "--num_mini_batches", "1")
    assert done.returncode == 1 and "error: require_off_policy is set, but the gate is INERT" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--per_device_train_batch_size", "3"), "Set per_device_train_batch_size=4 for"),
        (("--model_name_or_path", "runs/no-such-model"), "error: the model runs/no-such-model does not exist"),
        (("--reward_funcs", "acuracy"), "'accuracy'"),
        (("--dataset_name", "no-such.jsonl"), "no-such.jsonl"),
    ],
)
def test_what_is_wrong_is_said_before_the_weights_are_read(no_weights, arguments, message, capsys):
    assert train.main([*no_weights, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") <= 2
