"""`check.py` and `train.py` judge a config alike: what the first passes the second starts, what one refuses so does
the other, in the same sentence; never with a traceback."""

import json
import math

import pytest
import yaml
from conftest import tiny_model

from sapo_trl.cli import check, packages, train

GOOD = """
{}
{"algorithm": "gspo"}  {"algorithm": "grpo"}  {"algorithm": "dapo"}  {"algorithm": "bnpo"}  {"algorithm": "dr-grpo"}
{"algorithm": "luspo"}  {"algorithm": "cispo"}  {"algorithm": "vespo"}
{"algorithm": "grpo", "epsilon": 0.1, "delta": 2.0}  {"algorithm": "vespo", "vespo_k_pos": 1.5}
{"gate": "erf", "num_iterations": 2, "optim": "sgd", "max_tokens_per_pack": "auto", "scale_rewards": "batch"}
{"gate": "arctan", "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "max_tokens_per_pack": 64}
{"gate": "softsign", "num_mini_batches": 1, "reward_weights": [1.0, 0.5], "mask_truncated_completions": true}
{"gate": "one-sided", "old_logprobs": "trainer", "on_collapse": "stop", "top_k": 0, "scale_rewards": false}
{"sapo_temperature_neg": 2, "beta": 0.04, "activation_checkpointing": true, "max_grad_norm": 0}
{"beta": "1e-3", "learning_rate": "5e-5", "gradient_checkpointing": "auto", "entropy_coef": 0.01}
{"use_adaptive_entropy": true, "entropy_target": 0.5}  {"top_entropy_quantile": 0.5, "use_peft": true, "lora_r": 4}
{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
{"eval_size": 8, "eval_sets": {"a": {"num_samples": 1, "temperature": 0}, "b": {"num_problems": 2}},
"eval_strategy": "steps", "eval_steps": 1}
{"eval_size": 8, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "rewards/boxed_format_reward/mean"}
"""
BAD = """
{"algorithm": "SAPO"}  {"algorithm": "ppo"}  {"algorithm": 3}  {"algorithm": ["sapo"]}
{"gate": "tanh"}  {"gate": 1}  {"sapo_temperature_pos": 0}  {"sapo_temperature_pos": -1}  {"sapo_temperature_neg": NaN}
{"sapo_temperature_neg": Infinity}  {"sapo_temperature_pos": true}  {"sapo_temperature_pos": {"a": 1}}
{"algorithm": "grpo", "gate": "erf"}  {"algorithm": "grpo", "epsilon": 1.5}  {"algorithm": "grpo", "epsilon": -0.1}
{"algorithm": "grpo", "delta": 0.5}  {"algorithm": "grpo", "epsilon": NaN}  {"epsilon": 0.2}  {"delta": 2.0}
{"algorithm": "vespo", "vespo_k_pos": NaN}  {"vespo_k_pos": 5.0}  {"algorithm": "gspo", "sapo_temperature_pos": 2}
{"algorithm": "grpo-r2"}  {"routing_replay": "r4"}  {"routing_replay": "r3", "use_vllm": true, "vllm_mode": "server"}
{"beta": -1}  {"beta": NaN}  {"beta": [0.1]}  {"learning_rate": -1}  {"learning_rate": Infinity}
{"learning_rate": "fast"}
{"learning_rate": true}  {"learning_rate": 1e9}  {"weight_decay": -1}  {"weight_decay": NaN}  {"max_grad_norm": -1}
{"max_grad_norm": NaN}  {"adam_beta1": 1.5}  {"adam_beta2": -0.1}  {"adam_epsilon": -1}  {"warmup_steps": -1}
{"num_generations": 1}  {"num_generations": 0}  {"num_generations": -4}  {"num_generations": null}
{"num_generations": 3}  {"num_generations": 2.5}  {"num_mini_batches": 0}  {"num_mini_batches": -1}
{"num_iterations": 0}  {"num_iterations": 1.5}  {"gradient_accumulation_steps": 0}  {"per_device_train_batch_size": 0}
{"per_device_train_batch_size": -8}  {"per_device_train_batch_size": 7, "num_generations": 8}
{"max_steps": 0, "num_train_epochs": 0}
{"num_train_epochs": -1, "max_steps": -1}  {"max_completion_length": null}  {"max_completion_length": 0}
{"max_completion_length": 100000}  {"max_prompt_tokens": 0}  {"temperature": 0}  {"temperature": -1}
{"temperature": NaN}  {"top_p": 0.9}  {"top_k": 20}  {"min_p": 0.1}  {"repetition_penalty": 1.2}
{"generation_kwargs": {"temperature": 0.5}}  {"generation_kwargs": {"do_sample": false}}
{"generation_kwargs": {"typical_p": 0.9}}  {"generation_kwargs": {"no_repeat_ngram_size": 2}}
{"generation_kwargs": "nonsense"}  {"scale_rewards": "groups"}  {"reward_weights": [1.0]}  {"reward_weights": [NaN, 1]}
{"reward_weights": 3}  {"entropy_coef": NaN}  {"use_adaptive_entropy": true, "entropy_target": -1}
{"entropy_target": 0.5}  {"entropy_coef_max": 0.1}  {"top_entropy_quantile": 1.5}  {"top_entropy_quantile": -0.1}
{"router_aux_loss_coef": -1}  {"router_aux_loss_coef": NaN}  {"loss_type": "grpo"}  {"loss_type": "dapo"}
{"importance_sampling_level": "sequence"}  {"steps_per_generation": 3}  {"generation_batch_size": 64}
{"vllm_importance_sampling_mode": "sequence"}  {"vllm_importance_sampling_mode": "toke"}  {"old_logprobs": "sampler"}
{"old_logprobs": "mine"}  {"optim": "lomo"}  {"optim": "galore_adamw_layerwise"}  {"optim": "adamm"}
{"neftune_noise_alpha": 5}  {"label_smoothing_factor": 0.1}  {"data_seed": 3}  {"pad_to_multiple_of": 8}
{"torch_empty_cache_steps": 2}  {"train_sampling_strategy": "group_by_length"}  {"ref_model_mixup_alpha": 0.9}
{"enable_jit_checkpoint": true}  {"save_steps": 0}  {"save_steps": -1}  {"logging_steps": 0}
{"metric_for_best_model": "loss", "load_best_model_at_end": true}  {"on_collapse": "warm"}  {"on_hang": "ignore"}
{"eval_size": 8, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_pas_at_1"}
{"eval_size": 8, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_maj_at_8"}
{"eval_size": 8, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "grad_norm"}
{"max_skipped_steps": -1}  {"phase_limits": {"rolout": 3}}  {"phase_limits": {"rollout": -3}}
{"max_tokens_per_pack": 0}  {"max_tokens_per_pack": "big"}  {"activation_checkpointing": "maybe"}
{"activation_checkpointing": true, "gradient_checkpointing": false}  {"require_off_policy": true, "num_mini_batches": 1}
{"objective_kwargs": {"alpha": 1}}  {"dump_ratios_every": -1}  {"accelerator_config":
{"gradient_accumulation_kwargs": {"num_steps": 4}}}  {"reward_funcs": ["acuracy"]}  {"reward_funcs": []}
{"eval_sets": {"a": {}}}  {"eval_sets": {"a": {"dataset_name": "gsm8k", "tempature": 1}}}
{"eval_sets": {"a": {"dataset_name": "gsm8k"}}, "eval_size": 8}
{"prompt_format": "chatt"}  {"prompt_template": "no place"}  {"eval_size": -1}  {"max_samples": 0}
{"dataset_name": 5}  {"dataset_name": ["a.jsonl", "b.jsonl"]}  {"system_prompt": 5}  {"max_unusable_gold_frac": 2}
{"reward_funcs": [null]}  {"reward_funcs": [["accuracy"]]}  {"reward_funcs": {"accuracy": 1}}
{"reward_weights": ["a", "b"]}  {"model_name_or_path": ["x"]}  {"report_to": "tensorboad"}
{"report_to": ["wandb", "x"]}
{"use_peft": true, "lora_r": 0}  {"use_peft": true, "lora_alpha": -1}  {"use_peft": true, "lora_dropout": 2}
{"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": "a"}}
{"accelerator_config": {"foo": true}}
{"lr": 0.1}  {"tau_pos": 1.0}  {"env": {"A": "b"}}  {"model_name_or_path": null}  {"num_processes": 2}
"""


def listed(text: str) -> list[dict]:
    decoder, found, text = json.JSONDecoder(), [], text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:].lstrip()
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> dict:
    folder = tmp_path_factory.mktemp("world")
    tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(64)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "train.jsonl"),
        "prompt_format": "plain",
        "output_dir": str(folder / "run"),
        "reward_funcs": ["accuracy", "boxed_format"],
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "report_to": "none",
        "save_strategy": "no",
    }


def outcomes(base: dict, changes: dict, tmp_path, capfd) -> tuple[list[int], list[str]]:
    """(exit statuses, sentences on stderr) of check.py and train.py."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(base | changes))
    statuses, sentences = [], []
    for command in (check, train):
        capfd.readouterr()
        statuses.append(command.main(["--config", str(file)]))
        errors = capfd.readouterr().err
        assert "Traceback" not in errors
        sentences.append(next((line for line in errors.splitlines() if line.startswith("error: ")), ""))
    return statuses, sentences


def name_of(changes: dict) -> str:
    return json.dumps(changes)[1:-1]


@pytest.mark.parametrize("changes", listed(BAD), ids=name_of)
def test_both_refuse(base, changes, tmp_path, capfd):
    statuses, (checked, trained) = outcomes(base, changes, tmp_path, capfd)
    assert (statuses, checked) == ([1, 1], trained) and checked


@pytest.mark.parametrize("changes", listed(GOOD), ids=name_of)
def test_what_is_passed_starts(base, changes, tmp_path, capfd):
    statuses, sentences = outcomes(base, changes | {"output_dir": str(tmp_path / "run")}, tmp_path, capfd)
    assert (statuses, sentences) == ([0, 0], ["", ""])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"use_vllm": True},
            "use_vllm is set and vLLM is not installed: pip install -e '.[vllm]', or --use_vllm false.",
        ),
        ({"report_to": ["wandb"]}, "report_to names wandb, which is not installed here"),
        ({"use_liger_kernel": True}, "use_liger_kernel is set and liger-kernel is not installed: pip install liger"),
        ({"load_in_4bit": True}, "load_in_4bit is set and bitsandbytes is not installed: pip install -e '.[quant]'"),
        ({"attn_implementation": "fa2"}, "'fa2' is unknown; known: sdpa, eager, flash_attention_2"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2 needs flash-attn, which is not installed"),
        ({"attn_implementation": "kernels-community/flash-attn2"}, "needs kernels, which is not installed"),
    ],
    ids=str,
)
def test_both_refuse_what_is_not_installed(base, changes, sentence, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    monkeypatch.setattr(packages, "get_available_reporting_integrations", list)
    statuses, (checked, trained) = outcomes(base, changes, tmp_path, capfd)
    assert (statuses, checked) == ([1, 1], trained) and sentence in checked


def test_there_are_enough_of_them():
    good, bad = listed(GOOD), listed(BAD)
    assert sum(map(len, good)) >= 50 and len(bad) >= 100
    assert any(isinstance(x, float) and math.isnan(x) for changes in bad for x in changes.values())
