"""What people meet on their first day: help, names from elsewhere, a missing model, a machine without a GPU."""

import importlib
import json
import os
import re
import subprocess
import sys
from enum import EnumType
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints
from unittest.mock import Mock

import pytest
import torch
import yaml
from transformers import TrainerState

from sapo_trl import cli
from sapo_trl.batch_plan import batch_plan
from sapo_trl.bounds import CHOICES, WITHOUT_EFFECT
from sapo_trl.cli import check, cold_start, evaluate, reproduce, train
from sapo_trl.cli.names_elsewhere import USUAL_NAMES
from sapo_trl.cli.parse import known_fields, parse_run, resolved_fields
from sapo_trl.config import SAPOConfig
from sapo_trl.monitor.files import RunFiles

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs/tiny/sapo.yaml")
ENV = os.environ | {"HF_HUB_OFFLINE": "1"}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A tokenizer and a config without weights: whatever would load the model fails."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return str(folder)


def sentence(capsys) -> str:
    """The last line of stderr, which must be the only one beside the rule above it."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("error: "), lines
    return lines[1]


# ---- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [train, check])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_short_and_has_our_fields_with_their_defaults(command, flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert command.main([flag, "--config", "no-such.yaml"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 160 and text.index("--algorithm") < text.index("--datasets")
    for field, default in (("algorithm", "sapo"), ("num_mini_batches", "4"), ("prompt_format", "chat")):
        assert re.search(rf"^  --{field} {default}  ", text, re.M)
    assert "--reward_funcs accuracy" in text and "--learning_rate" in text and "--adam_beta1" not in text
    assert ("--gpu_price x" in text) == (command is check)


def test_help_all_has_every_field(capsys):
    assert train.main(["--help-all"]) == 0
    text = capsys.readouterr().out
    for field in ("adam_beta1", "scale_rewards", "lora_alpha", "drop_duplicates", "loss_type"):
        assert re.search(rf"^  --{field}\b", text, re.M), field


# ---- names from elsewhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, hint",
    [
        ("--lr", "Did you mean 'learning_rate'?"),
        ("--group-size", "Did you mean 'num_generations'?"),
        ("--num_procs", "accelerate launch --num_processes 8 -m sapo_trl train"),
        ("--mixed_precision", "accelerate launch --num_processes 8 -m sapo_trl train"),
        ("--num_minibatches", "Did you mean 'num_mini_batches'?"),
    ],
)
def test_a_foreign_name_leads_to_ours(argument, hint):
    with pytest.raises(ValueError, match=rf"^unknown argument {argument}\..*{re.escape(hint)}"):
        parse_run(["--config", TINY, argument, "2"])


def test_a_foreign_name_in_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1.0e-5\n")
    with pytest.raises(ValueError, match=r"c.yaml: unknown key 'lr'. Did you mean 'learning_rate'"):
        parse_run(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    "arguments, fix",
    [
        (["--loss_type", "dapo"], "Remove loss_type and set algorithm: dapo."),
        (["--loss_type", "dr_grpo"], "Remove loss_type and set algorithm: dr-grpo."),
        (["--importance_sampling_level", "sequence"], "set algorithm: sapo-sequence or gspo or "),
        (["--steps_per_generation", "8"], "Remove steps_per_generation and set num_mini_batches: 8."),
        (
            ["--steps_per_generation", "6", "--gradient_accumulation_steps", "3"],
            "4 num_mini_batches x 3 gradient_accumulation_steps = 12. Remove steps_per_generation and set "
            "num_mini_batches: 2.",
        ),
        (["--num_generations", "24"], "Set per_device_train_batch_size=66 for 264 completions = 11 prompts x 24."),
    ],
)
def test_a_name_of_trl_is_refused_with_the_value_that_replaces_it(arguments, fix):
    with pytest.raises(ValueError, match=re.escape(fix)):
        parse_run(["--config", TINY, *arguments])


def test_what_agrees_is_accepted():
    same = ["--loss_type", "sapo", "--importance_sampling_level", "token", "--steps_per_generation", "4"]
    assert parse_run(["--config", TINY, *same]).config.num_mini_batches == 4


# ---- values of the file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        ("num_generations: [8]", "invalid int value: '\\[8\\]'"),
        ("num_generations: 8.5", "invalid int value: '8.5'"),
        ("learning_rate: {a: 1}", "invalid float value"),
        ("num_mini_batches: null", "invalid int value: 'None'"),
        ("seed: true", "invalid int value: 'True'"),
        ("env: {HF_TOKEN: abc}", "env is not read.*export NAME=value"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_sentence(tmp_path, line, message):
    (tmp_path / "c.yaml").write_text(f"{line}\nuse_cpu: true\nbf16: false\n")
    with pytest.raises(ValueError, match=message):
        parse_run(["--config", str(tmp_path / "c.yaml")])
    assert os.environ.get("HF_TOKEN") != "abc"


@pytest.mark.parametrize(
    "name, word, near",
    [
        ("optim", "adamw8bit", "adamw_8bit"),
        ("lr_scheduler_type", "cosin", "cosine"),
        ("save_strategy", "step", "steps"),
        ("dtype", "float31", "float32"),
    ],
)
def test_a_word_that_is_no_choice_names_the_nearest_one(tmp_path, name, word, near):
    """On the command line and in a file alike."""
    (tmp_path / "c.yaml").write_text(f"{name}: {word}\nuse_cpu: true\nbf16: false\n")
    for arguments in (["--config", str(tmp_path / "c.yaml")], ["--config", TINY, f"--{name}", word]):
        with pytest.raises(ValueError, match=f"^{name}='{word}' is unknown; known: .* Did you mean '{near}'"):
            parse_run(arguments)


def test_a_word_that_yaml_takes_for_a_boolean_needs_quotes(tmp_path):
    (tmp_path / "c.yaml").write_text("report_to: off\nuse_cpu: true\nbf16: false\n")
    with pytest.raises(ValueError, match="report_to=False is of type bool; .* wandb, .* off, no, .* need quotes"):
        parse_run(["--config", str(tmp_path / "c.yaml")])


def test_the_names_of_other_projects_are_fields_here():
    assert {*USUAL_NAMES.values()} <= {*known_fields()} - WITHOUT_EFFECT.keys()
    assert not USUAL_NAMES.keys() & {*known_fields()}
    for name, near in (("lora_rank", "lora_r"), ("torch_dtype", "dtype"), ("auto_find_batch", "")):
        with pytest.raises(ValueError, match=f"unknown argument --{name}.*{near}"):
            parse_run(["--config", TINY, f"--{name}", "8"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resume_from_checkpoint", "yes"], "resume_from_checkpoint='yes' is no folder.*true for the newest"),
        (["--model_name_or_path", str(ROOT), "--model_revision", "v2"], "model_revision='v2' has no effect"),
    ],
)
def test_what_a_folder_decides_is_refused_before_anything_is_read(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_run(["--config", TINY, *arguments])


def test_every_field_that_is_an_enumeration_is_checked_by_name():
    kinds = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(SAPOConfig).items()}
    names = {name for name, parts in kinds.items() if any(isinstance(x, EnumType) for x in parts)}
    assert names and names <= CHOICES.keys()


def test_one_reward_and_auto_are_accepted(tmp_path):
    lines = ("reward_funcs: boxed_format", "max_tokens_per_pack: auto", "use_cpu: true", "bf16: false")
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    run = parse_run(["--config", str(tmp_path / "c.yaml")])
    assert run.script.reward_funcs == ["boxed_format"] and run.config.max_tokens_per_pack == "auto"
    assert parse_run(["--config", TINY, "--max_tokens_per_pack", "auto"]).config.max_tokens_per_pack == "auto"
    assert parse_run(["--config", TINY, "--max-tokens-per-pack", "512"]).config.max_tokens_per_pack == 512


def test_a_reward_may_lie_where_the_command_is_typed(tmp_path, monkeypatch):
    text = "def short(completions, **kwargs):\n    return [1.0] * len(completions)"
    (tmp_path / "rewards_of_mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    argv = ["--config", TINY, "--reward_funcs", "rewards_of_mine.short"]
    with pytest.raises(ValueError, match="No module named 'rewards_of_mine'"):
        parse_run(argv)
    importlib.reload(cli)  # as when a command starts
    assert parse_run(argv).script.reward_funcs == ["rewards_of_mine.short"]
    assert sys.path[-1] == str(tmp_path)  # where it hides nothing


# ---- what is not there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", ["", "-moe"])
def test_a_fresh_clone_is_told_how_to_make_the_tiny_model(moe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = f"sapo-trl cold-start --output_dir runs/tiny{moe}{' --moe' if moe else ''}"
    config = str(ROOT / f"configs/tiny{moe}/sapo.yaml")
    assert train.main(["--config", config]) == 1
    assert f"the model runs/tiny{moe}/model does not exist" in (told := sentence(capsys)) and told.endswith(command)
    assert check.main(["--config", config]) == 0
    assert command in capsys.readouterr().out.replace("\n", " ")


def test_nothing_given(capsys):
    assert check.main([]) == 1
    assert "no model: set model_name_or_path" in sentence(capsys)
    assert train.main(["--use_cpu", "true", "--bf16", "false"]) == 1
    assert "--config tiny/sapo" in sentence(capsys)


@needs_no_gpu
def test_a_gpu_recipe_without_a_gpu(capsys):
    assert train.main(["--config", str(ROOT / "configs/qwen3-0.6b/sapo.yaml")]) == 1
    told = sentence(capsys)
    assert "this machine has no GPU that computes in bfloat16" in told and "--config tiny/sapo" in told
    with pytest.raises(ValueError, match="no GPU"):
        parse_run(["--model_name_or_path", "x"])  # bf16 is TRL's default
    assert parse_run(["--model_name_or_path", "x", "--use_cpu", "true", "--bf16", "false"]).config.use_cpu


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--reward_funcs", "acuracy"], "'acuracy' is no reward"),
        (["--prompt_format", "chatml"], "Did you mean 'chat'"),
        (["--num_processes", "0"], "must be above 0"),
        (["--gpu_memory", "much"], "invalid float value: 'much'"),
        (["--config_file", "configs/accelerate/zero4.yaml"], "zero4.yaml does not exist"),
    ],
)
def test_check_refuses_what_training_would(arguments, message, capsys):
    assert check.main(["--config", TINY, *arguments]) == 1
    assert message in sentence(capsys)


# ---- evaluate, cold start, reproduce -------------------------------------------------------------------------------

ONE = ["--num_samples", "1"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ks", "0"], "--ks 0: pass@k needs k from 1 to --num_samples 16"),
        (["--ks", "1", "32"], "--ks 32: pass@k needs k from 1"),
        (["--temperature", "-0.5", *ONE], "--temperature -0.5 must be 0"),
        (["--temperature", "nan", *ONE], "--temperature nan must be 0"),
        (["--temperature", "0"], "all 16 samples of a problem would be the same. Add --num_samples 1"),
        (["--top_p", "0"], "--top_p 0.0 must be above 0"),
        (["--num_samples", "0"], "--num_samples 0 is less than 1"),
        (["--max_new_tokens", "0"], "--max_completion_length 0 is less than 1"),
        (["--num_problems", "-3"], "--num_problems -3 is less than 1"),
        (["--num-samples", "4"], "unrecognized arguments: --num-samples 4. Did you mean '--num_samples'?"),
        (["--ks", "one"], "argument --ks: invalid int value: 'one'. --help shows"),
        (["--dataset_name", "null"], "--dataset_name is missing"),
        (["--output", str(ROOT)], "is a folder. Name a file in it"),
        (["--prompt_format", "chatml"], "prompt_format='chatml' is not known"),
        (["--dataset_name", "no-such.jsonl"], "no-such.jsonl doesn't exist"),
        (["--dataset_name", "gsm9k"], "'gsm9k' is not a preset. Did you mean 'gsm8k'?"),
        (["--model", "runs/no-such-model/x"], "the model runs/no-such-model/x does not exist"),
        (["--model", str(ROOT)], "has no config.json"),
    ],
)
def test_evaluate_refuses_before_anything_loads(arguments, message, model, tmp_path, monkeypatch, capsys):
    (tmp_path / "test.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    loaded = []
    monkeypatch.setattr(evaluate.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(a))
    usual = ["--model", model, "--dataset_name", str(tmp_path / "test.jsonl")]
    assert evaluate.main([*usual, *arguments]) == 1
    assert message in sentence(capsys) and not loaded


def test_a_model_without_weights_is_one_sentence(model, tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    assert evaluate.main(["--model", model, "--dataset_name", str(tmp_path / "test.jsonl")]) == 1
    assert "model.safetensors" in capsys.readouterr().err.splitlines()[-1]


def test_cold_start_refuses_nothing_to_learn(tmp_path, capsys):
    assert cold_start.main(["--output_dir", str(tmp_path), "--steps", "0"]) == 1
    assert "--steps 0 is less than 1" in sentence(capsys)


def test_reproduce_ends_with_the_phase_that_failed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # no scripts/ here
    assert reproduce.main(["--output_dir", "out", "--hub_token", "abc"]) == 1
    told = capfd.readouterr()
    assert told.err.splitlines()[-1] == "error: cold start ended with status 2; what it says stands above."
    assert "--- cold start\n$ python scripts/cold_start.py --output_dir out/cold-start-seed0 --seed 0" in told.out


# ---- the launcher --------------------------------------------------------------------------------------------------


def launch(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", *words, "scripts/train.py", "--config", TINY]
    command += ["--model_name_or_path", "runs/no-such-model/x"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENV, check=False)


def test_the_sentence_is_the_last_line_under_a_quiet_launcher():
    done = launch("--quiet", "--num_processes", "1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the model runs/no-such-model/x does not exist")


def test_the_launcher_of_several_processes_quotes_the_sentence():
    done = launch("--config_file", "tests/launch/ddp.yaml")
    assert done.returncode == 1
    cause = done.stderr.split("Root Cause (first observed failure)")[1]
    assert re.search(r"traceback : SystemExit: error: the model runs/no-such-model/x does not exist", cause)
    assert "File " not in cause


# ---- secrets -------------------------------------------------------------------------------------------------------


def test_no_secret_is_in_the_record_of_a_run(tmp_path, monkeypatch, capsys):
    words = ["--config", TINY, "--output_dir", str(tmp_path), "--hub_token", "quite-1", "--push_to_hub", "false"]
    words += ["--model_init_kwargs", '{"token": "quite-2", "use_cache": false}']
    words += ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", "http://me:quite-3@host:8000"]
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", *words])
    run = parse_run()
    files = RunFiles(batch_plan(run.config).rows())
    files.settings = resolved_fields(run)
    files.on_train_begin(run.config, TrainerState(is_world_process_zero=True), None)
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 4 and "quite" not in written
    resolved = yaml.safe_load((tmp_path / "resolved_config.yaml").read_text())
    assert "hub_token" not in resolved and resolved["vllm_server_base_url"] == "http://me:***@host:8000"
    command = json.loads((tmp_path / "versions.json").read_text())["command"]
    assert "--hub_token '***' --push_to_hub false" in command and '"use_cache": false' in command
    assert run.config.hub_token == "quite-1"  # the run itself still has it
    check.main(words)
    assert "quite" not in (told := capsys.readouterr()).out + told.err


def test_no_secret_is_in_a_refusal(capsys):
    assert train.main(["--config", TINY, "--hub_tokn=quite-1"]) == 1
    assert sentence(capsys) == "error: unknown argument --hub_tokn. Did you mean 'hub_token'?"
    assert train.main(["--config", TINY, "--model_name_or_path", "https://me:quite-2@host/a/b"]) == 1
    assert "https://me:***@host/a/b" in (told := sentence(capsys)) and "quite" not in told


def test_what_a_tracker_refuses_is_one_sentence(monkeypatch, capsys):
    """wandb without a key raises an error of its own as training begins."""
    error = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})("No API key configured.")
    monkeypatch.setattr(train, "attach", lambda *args, **options: None)
    monkeypatch.setattr(train, "record_settings", lambda *args: None)
    trainer = SimpleNamespace(train=Mock(side_effect=error))
    run = parse_run(["--config", TINY, "--report_to", "wandb"])
    assert train.train(run, trainer) == 1 and "report_to wandb: No API key configured." in capsys.readouterr().err
    run.config.report_to = []
    with pytest.raises(type(error)):
        train.train(run, trainer)
