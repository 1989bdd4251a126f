"""The model card says what was trained, how well it does and how to cite it, and never `None`."""

import re

import pytest
import yaml
from conftest import sapo_config, sapo_trainer, tiny_model

from sapo_trl import __version__
from sapo_trl.monitor import record_settings
from sapo_trl.monitor.card import model_card

EVALUATED = [
    {"step": 0, "eval_pass_at_1": 0.4583, "eval_pass_at_1_low": 0.4401, "eval_pass_at_1_high": 0.4764},
    {"step": 1, "reward": 0.25, "reward_low": 0.125, "reward_high": 0.375},
    {"step": 80, "eval_pass_at_1": 0.8382, "eval_pass_at_1_low": 0.8097, "eval_pass_at_1_high": 0.8635},
    {"step": 80, "eval_aime_maj_at_16": 0.5, "eval_aime_maj_at_16_low": 0.25, "eval_aime_maj_at_16_high": 0.75},
]


def card(config, log=(), **facts) -> str:
    usual = {"name": "m", "place": "me/m", "base": None, "settings": {}, "tags": ["sapo"]}
    return model_card(config=config, log=log, **usual | facts)


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_scores_have_their_intervals_first_and_last(tmp_path):
    text = card(sapo_config(tmp_path), EVALUATED)
    assert "| pass_at_1 | 0.458 [0.440, 0.476] at step 0 | 0.838 [0.810, 0.864] at step 80 |" in text
    assert "| aime_maj_at_16 |  | 0.500 [0.250, 0.750] at step 80 |" in text
    assert "for 80 optimizer steps" in text and "| reward" not in text


def test_without_an_evaluation_the_reward_is_said_to_be_of_training(tmp_path):
    log = [{"step": 1, "reward": 0.25}, {"step": 2, "loss": 0.0}, {"step": 3, "reward": 0.5}]
    assert "training rollouts: 0.250 (step 1) → 0.500 (step 3)." in card(sapo_config(tmp_path), log)
    assert "Not evaluated." in card(sapo_config(tmp_path))


def test_settings_are_those_that_were_chosen(tmp_path):
    config = sapo_config(tmp_path, learning_rate=3e-5, hub_token="quite-1").for_trl()
    given = {"dataset_name": "aime25", "reward_funcs": ["accuracy"], "model_name_or_path": "Qwen/Qwen3-8B"}
    given["model_init_kwargs"] = {"token": "quite-2"}
    text = card(config, settings=config.to_dict() | given)
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert (settings["learning_rate"], settings["num_generations"], settings["dataset_name"]) == (3e-5, 4, "aime25")
    assert settings["model_init_kwargs"] == {"token": "***"}
    # defaults, what follows from the algorithm, the machine's
    hidden = {"reward_funcs", "epsilon", "steps_per_generation", "output_dir", "hub_token", "routing_replay"}
    assert not hidden & set(settings)
    clipped = sapo_config(tmp_path, algorithm="grpo").for_trl()
    assert "epsilon_high: 0.27" in card(clipped, settings=clipped.to_dict())


def test_names_on_the_hub_are_links_and_metadata(tmp_path):
    text = card(sapo_config(tmp_path), base="Qwen/Qwen3-8B", settings={"dataset_name": "aime25"})
    found = metadata(text)
    assert (found["base_model"], found["datasets"]) == ("Qwen/Qwen3-8B", "math-ai/aime25")
    assert found["tags"] == ["generated_from_trainer", "sapo"] and found["model_name"] == "m"
    assert "[Qwen/Qwen3-8B](https://huggingface.co/Qwen/Qwen3-8B), trained with SAPO" in text
    assert 'model="me/m"' in text


@pytest.mark.parametrize("dataset", ["here.jsonl", "runs/data.jsonl", None])
def test_what_is_only_here_is_no_link(tmp_path, dataset):
    text = card(sapo_config(tmp_path), settings={"dataset_name": dataset})
    assert not {"base_model", "datasets"} & set(metadata(text)) and "huggingface.co/datasets" not in text


def test_citation(tmp_path):
    sapo = card(sapo_config(tmp_path))
    for part in ("@misc{arxiv2511.20347,\n", "= {{Soft Adaptive Policy Optimization}},\n", "= {Chang Gao and "):
        assert part in sapo
    assert sapo.count("```bibtex") == 2 and "vonwerra2020trl" in sapo
    other = card(sapo_config(tmp_path, algorithm="gspo"))
    assert "arxiv2507.18071" in other and "2511.20347" not in other


def test_a_run_writes_it_with_every_checkpoint(tmp_path, tokenizer):
    fields = {"max_steps": 2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "run_name": "runs/mine"}
    fields["gradient_checkpointing"] = None  # decided by the trainer: no value of the config is the given one any more
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **fields)
    record_settings(trainer, trainer.args.to_dict() | {"dataset_name": "gsm8k"})
    trainer.train()
    text = (tmp_path / "README.md").read_text()
    assert "# mine\n" in text and f"for 2 optimizer steps by sapo_trl {__version__} on" in text
    assert metadata(text)["datasets"] == "openai/gsm8k" and f'model="{tmp_path}"' in text
    for missing in ("None", "null", "nan"):
        assert not re.search(rf"\b{missing}\b", text), missing
    trainer.create_model_card(model_name="yours", dataset_name="a/b", tags="extra")
    text = (tmp_path / "README.md").read_text()
    assert "# yours\n" in text and metadata(text)["datasets"] == "a/b" and "extra" in metadata(text)["tags"]
