"""The model card (README.md of the output folder): what was trained, how well it does, with which settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from trl import ModelConfig

from sapo_trl import __version__
from sapo_trl.algorithms import Algorithm
from sapo_trl.config import SAPOConfig
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.presets import PRESETS
from sapo_trl.files import masked
from sapo_trl.monitor.files import versions

AUTHORS = {
    "2511.20347": "Chang Gao and Chujie Zheng and Xiong-Hui Chen and Kai Dang and Shixuan Liu and Bowen Yu and "
    "An Yang and Shuai Bai and Jingren Zhou and Junyang Lin"
}
TRL_CITATION = """@software{vonwerra2020trl,
  title  = {{TRL: Transformers Reinforcement Learning}},
  author = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and others},
  url    = {https://github.com/huggingface/trl},
  year   = {2020}
}"""
USE = """from transformers import pipeline

generator = pipeline("text-generation", model="{place}", device_map="auto")
messages = [{{"role": "user", "content": "What is 17 * 24?"}}]
print(generator(messages, max_new_tokens=512, return_full_text=False)[0]["generated_text"])"""
# Of this machine, without a say in what was learned, or following from the algorithm and the batch plan. What is an
# option of the algorithm's objective (epsilon of a clip) is shown all the same.
NOT_SHOWN = (
    "output_dir", "logging_dir", "run_name", "hub_model_id", "hub_token", "push_to_hub_token", "report_to", "debug",
    "disable_tqdm", "accelerator_config", "generation_batch_size", "dataloader_pin_memory", "loss_type",
    "importance_sampling_level", "epsilon", "epsilon_high", "steps_per_generation", "activation_checkpointing",
    "gradient_checkpointing", "logging_nan_inf_filter", "ddp_broadcast_buffers", "disable_dropout",
)  # fmt: skip


def model_card(
    name: str,
    place: str,
    base: str | None,
    config: SAPOConfig,
    settings: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    tags: Sequence[str],
) -> str:
    """The card as Markdown, with the Hub's metadata at its head.

    Args:
        name, place: of the model; its place is a Hub id, or the folder that it lies in.
        base: Hub id of the model that training began with; None for a local one.
        config: of the trainer.
        settings: every setting of the run by name, those of a command too where one trains.
        log: the trainer's log history; an evaluated score has `<name>_low` and `<name>_high` beside it.
    """
    row, steps = config.row, max((int(record["step"]) for record in log), default=0)
    data = hub_dataset(settings.get("dataset_name"))
    tags = ["generated_from_trainer", *tags]
    facts: dict[str, Any] = {"base_model": base, "datasets": data, "model_name": name, "tags": tags}
    head = ModelCardData(library_name="transformers", pipeline_tag="text-generation", **facts)
    what = f"[{base}](https://huggingface.co/{base})" if base else "A language model"
    paper = f" ([{row.title or row.paper}](https://huggingface.co/papers/{row.paper}))" if row.paper else ""
    problems = f" on [{data}](https://huggingface.co/datasets/{data})" if data else ""
    packages = versions() | {"sapo_trl": __version__}
    return "\n\n".join(
        [
            f"---\n{head.to_yaml()}\n---",
            f"# {name}",
            f"{what}, trained with {config.algorithm.upper()}{paper}{problems} for {steps} optimizer steps by sapo_trl "
            f"{__version__} on [TRL](https://github.com/huggingface/trl).{_wandb_link()}",
            f"## Results\n\n{results(log)}",
            f"## Use\n\n```python\n{USE.format(place=place)}\n```",
            "## Settings\n\nThose that differ from the defaults; `resolved_config.yaml` has every one.\n\n"
            f"```yaml\n{yaml.safe_dump(changed_settings(config, settings), allow_unicode=True)}```",
            "## Versions\n\n" + "\n".join(f"- {package} {version}" for package, version in packages.items()),
            "## Citation\n\n" + "\n\n".join(f"```bibtex\n{entry}\n```" for entry in [*citation(row), TRL_CITATION]),
        ]
    )


def results(log: Sequence[Mapping[str, Any]]) -> str:
    """A table of every evaluated score that has an interval, first and last; without one the training reward."""
    shown: dict[str, list[str]] = {}  # score -> one text per evaluation
    for record in log:
        for name in (name for name in record if name.startswith("eval_") and f"{name}_low" in record):
            mean, low, high = (record[key] for key in (name, f"{name}_low", f"{name}_high"))
            shown.setdefault(name[5:], []).append(f"{mean:.3f} [{low:.3f}, {high:.3f}] at step {record['step']}")
    lines = [f"| {name} | {x[0] if len(x) > 1 else ''} | {x[-1]} |" for name, x in shown.items()]
    if lines:
        head = ["| score | first evaluation | last evaluation |", "|---|---|---|"]
        return "\n".join([*head, *lines, "", "With 95 % intervals over the held-out problems."])
    rewards = [record for record in log if record.get("reward") is not None]
    if not rewards:
        return "Not evaluated."
    ends = dict.fromkeys(f"{record['reward']:.3f} (step {record['step']})" for record in (rewards[0], rewards[-1]))
    return f"Not evaluated on held-out problems. Mean reward of the training rollouts: {' → '.join(ends)}."


def changed_settings(config: SAPOConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are no field's default and do not follow from others, with secrets masked."""
    usual = {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default
        for kind in (ModelConfig, ScriptArguments, SAPOConfig)
        for f in fields(kind)
    }
    hidden = {*NOT_SHOWN} - {*config.row.options}
    same = lambda name, x: x in (None, "none", usual[name])  # noqa: E731
    kept = {name: x for name, x in settings.items() if name in usual and name not in hidden and not same(name, x)}
    return masked(json.loads(json.dumps(kept, default=str)))


def citation(row: Algorithm) -> list[str]:
    """BibTeX of the algorithm's paper; empty where it has none."""
    if not row.paper:
        return []
    entry = {"title": f"{{{row.title or row.paper}}}", "author": AUTHORS.get(row.paper, "")}
    entry |= {"year": f"20{row.paper[:2]}", "eprint": row.paper, "archivePrefix": "arXiv"}
    lines = [f"  {name:13} = {{{x}}}" for name, x in entry.items() if x]
    return ["\n".join([f"@misc{{arxiv{row.paper},", ",\n".join(lines), "}"])]


def hub_dataset(name: str | None) -> str | None:
    """The Hub id behind a dataset's name; None for a local file, or where the name is not known.

    >>> hub_dataset("aime25"), hub_dataset("a/b"), hub_dataset("runs/train.jsonl"), hub_dataset(None)
    ('math-ai/aime25', 'a/b', None, None)
    """
    if name is not None and name.lower() in PRESETS:
        return PRESETS[name.lower()].path
    return name if name and name.count("/") == 1 and not Path(name).suffix and not Path(name).exists() else None


def _wandb_link() -> str:
    """A link to the run's page at Weights & Biases, where it has one."""
    run = sys.modules["wandb"].run if "wandb" in sys.modules else None
    return f" [Its curves]({run.url})." if run is not None and run.url else ""
