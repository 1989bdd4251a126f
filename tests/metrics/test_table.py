"""The table of metrics: every name that a run logs stands in it, and everyone who lists metrics finds them there."""

import copy
import json
import re

import pytest
import torch
from accelerate import Accelerator
from conftest import length_reward, prompts, sapo_config, tiny_model

from sapo_trl import SAPOTrainer
from sapo_trl.metrics.step import StepMetrics
from sapo_trl.metrics.table import LIVE_LABELS, MAXIMA, MEANS, METRICS, SECTIONS, find, markdown_table, title
from sapo_trl.monitor.files import MetricsFile
from sapo_trl.monitor.guard import RULES
from sapo_trl.rewards import accuracy_reward

# What only other machines or options log: a rollout by vLLM, several processes, clips, tools
ELSEWHERE = (
    "sampling/kl",
    "sampling/log_ratio_abs_mean",
    "sampling/sampling_logp_difference/mean",
    "sampling/importance_sampling_ratio/mean",
    "sampling/lost_frac",
    "update/imbalance",
    "update/imbalance_before_dealing",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "tools/call_frequency",
    "tools/failure_frequency",
    "eval_aime25_pass_at_1",
    "eval_aime25_pass_at_1_low",
    "eval_aime25_loss",
    "mini_batch_13/sampling/kl",
)


def logged(tmp_path, tokenizer, moe: bool, **fields) -> set[str]:
    """The names in metrics.jsonl after two rollouts of two mini-batches, each evaluated."""
    fields |= {"num_mini_batches": 2, "max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    config = sapo_config(tmp_path, **fields)
    trainer = SAPOTrainer(
        copy.deepcopy(tiny_model(tokenizer, moe)),
        [length_reward, accuracy_reward],
        config,
        prompts(),
        eval_dataset=prompts(4),
        processing_class=tokenizer,
        callbacks=[MetricsFile()],
    )
    trainer.train()
    return {name for line in (tmp_path / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}


EVERYTHING = [
    {"moe": False, "algorithm": "sapo", "beta": 0.1, "use_adaptive_entropy": True, "entropy_coef": 0.01},
    {"moe": True, "algorithm": "grpo-r2", "router_aux_loss_coef": 0.01, "entropy_coef": 0.01},
]


@pytest.mark.parametrize("fields", EVERYTHING, ids=["dense", "moe"])
def test_every_logged_name_is_in_the_table_by_its_own_row(tmp_path, tokenizer, fields):
    names = logged(tmp_path, tokenizer, **fields)
    moe = {"aux_loss", "routing/layer_01/load_max", "clip_ratio/low_mean"}
    own = moe if fields["moe"] else {"kl", "entropy_coef"}
    own |= {"entropy_bonus", "verdict/wrong_frac", "verdict/time_s", "mini_batch_1/ratio/p99.9", "eval_pass_at_1_low"}
    assert own | {"gate/pull_neg_p99", "time/old_and_reference_logps_s", "train_runtime", "reward_high"} <= names
    rows = {name: find(name) for name in names}
    assert not [name for name, row in rows.items() if row is None or not row.title]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_other_machines_are_in_the_table(name):
    row = find(name)
    assert row is not None and row.title


def test_names_of_your_own_are_shown_in_the_section_of_their_prefix():
    sections = {"gate/mine": "Gate", "routing/mine": "Routing", "verdict/mine": "Verdicts"}
    for name, section in (sections | {"time/mine_s": "Time and tokens"}).items():
        row = find(name)
        assert row is not None and row.section == section and title(name) == name
    assert find("mine") is None and title("mine") == "mine"


def test_a_family_gives_way_to_a_row_of_its_own():
    names = ("verdict/time_s", "rewards/a/b/mean", "eval_reward", "eval_reward_std", "ratio/p99.9")
    rows = ("verdict/time_s", "rewards/<function>/mean", "eval_reward", "eval_<metric>", "ratio/p<percent>")
    assert tuple(row.name for row in map(find, names) if row is not None) == rows


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reward", "Training reward"),
        ("completions/mean_length", "Completion length (tokens)"),
        ("eval_aime25_pass_at_1", "Held-out Pass@1: aime25"),
        ("rewards/accuracy_reward/mean", "Mean of accuracy_reward"),
        ("gate/weight_neg_mean", "Mean gate weight, A < 0"),
        ("mini_batch_3/entropy", "Entropy (nats per token), 3 updates after the rollout"),
        ("eval_verdict/right_frac", "Held-out: Answers with the verdict right (fraction)"),
        ("rewards/<metric>\\1/mean", "Mean of <metric>\\1"),
    ],
)
def test_titles(name, expected):
    assert title(name) == expected


def test_what_a_step_sums_is_in_the_table():
    """A sum or a maximum without a row is an error, and not a number that silently goes missing."""
    assert len(set(MEANS)) == len(MEANS) and MAXIMA == ("ratio/max",)
    accelerator = Accelerator(cpu=True)
    metrics = StepMetrics()
    metrics.mean("kl", torch.tensor(3.0), 2.0)
    values, _, _ = metrics.reduce(accelerator)
    assert values == {"kl": 1.5}
    metrics.mean("my/own", torch.tensor(1.0), 1.0)
    with pytest.raises(KeyError, match="not in the table of metrics.*my/own"):
        metrics.reduce(accelerator)


def test_live_view_and_guard():
    assert LIVE_LABELS == {
        "reward": "reward",
        "eval_reward": "eval",
        "eval_pass_at_1": "Pass@1",
        "effective_update_ratio": "update ratio",
        "gate/leak_neg": "leak",
        "log_ratio/drift": "drift",
        "kl": "kl",
        "entropy": "entropy",
        "completions/mean_length": "length",
        "grad_norm": "grad norm",
        "learning_rate": "lr",
    }
    assert all(find(rule.signal) is not None for rule in RULES)


def test_rows_are_consistent():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        placeholders = set(re.findall(r"<(\w+)>", metric.name))
        assert set(re.findall(r"<(\w+)>", metric.title)) <= placeholders, metric.name
        assert metric.section in ("", *SECTIONS), metric.name
        assert not (metric.label or metric.by_staleness) or not placeholders, metric.name


def test_documentation_table():
    lines = markdown_table().splitlines()
    assert len(lines) == len(METRICS) + 2
    assert "| `log_ratio/abs_mean` | Mean \\|log r\\| | mean | Gate |" in lines
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 5 for line in lines)
