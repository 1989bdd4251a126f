"""The collapse guard: rules against values typed by hand, and runs that collapse, do not, and resume."""

import csv
import json
import math
from pathlib import Path

import pytest
from conftest import sapo_config, sapo_trainer, tiny_model

from sapo_trl.monitor import attach
from sapo_trl.monitor.guard import RULES, CollapseGuard, Rule, collapse_alarms, noise, refused, usual

RULE = {rule.signal: rule for rule in RULES}
STEADY = {
    "entropy": 0.3,
    "grad_norm": 0.5,
    "effective_update_ratio": 0.99,
    "log_ratio/abs_mean": 0.02,
    "log_ratio/drift": 0.01,
    "sampling/kl": 0.001,
    "sampling/engine_check": 0.2,
    "reward": 0.6,
    "loss": -0.1,
}


def fired(values: dict[str, list], steps_per_rollout: int = 1, first: int = 1) -> list[tuple[int, str]]:
    """(step, signal) of every alarm when `values` follow on ten steady rollouts."""
    guard, steady = CollapseGuard(), 10 * steps_per_rollout
    for step in range(1, steady + 1):
        assert guard.judge(step, STEADY, steps_per_rollout) == []
    num = max(map(len, values.values()))
    logs = [STEADY | {name: x[i] for name, x in values.items() if i < len(x)} for i in range(num)]
    alarms = [alarm for i, row in enumerate(logs) for alarm in guard.judge(steady + 1 + i, row, steps_per_rollout)]
    return [(alarm.step - steady, alarm.signal) for alarm in alarms]


@pytest.mark.parametrize(
    ("signal", "healthy", "collapsed"),
    [
        ("entropy", 0.031, 0.029),  # a tenth
        ("entropy", 1.49, 1.51),  # five times
        ("grad_norm", 4.9, 5.1),
        ("effective_update_ratio", 0.5, 0.49),
        ("log_ratio/abs_mean", 0.099, 0.101),
        ("sampling/kl", 0.05, 0.052),  # five times is less than the rise that counts
        ("reward", 0.31, 0.29),
    ],
)
def test_thresholds(signal, healthy, collapsed):
    assert fired({signal: [healthy] * 5}) == []
    assert fired({signal: [collapsed] * 5}) == [(2, signal)]  # once per episode
    assert fired({signal: [collapsed, healthy] * 3}) == []  # one outlier is no collapse
    assert fired({signal: [collapsed] * 3 + [STEADY[signal]] + [collapsed] * 3}) == [(2, signal), (6, signal)]


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_is_not_finite_fires_at_once(value):
    assert fired({"grad_norm": [value] * 3}) == [(1, "grad_norm")]
    assert fired({"loss": [value] * 3}, steps_per_rollout=4) == [(1, "loss")]
    assert fired({"grad_norm": [50.0, value, value]}) == [(2, "grad_norm")]
    assert fired({"reward": [value] * 3}) == []  # no completion could be scored: not the policy's doing


def test_a_limit_needs_neither_history_nor_a_second_rollout():
    guard = CollapseGuard()
    assert guard.judge(1, {"log_ratio/abs_mean": 0.0}, 2) == []
    (alarm,) = guard.judge(2, {"log_ratio/abs_mean": 2.5}, 2)  # mean 1.25
    assert (alarm.step, alarm.signal, alarm.value) == (2, "log_ratio/abs_mean", 1.25) and math.isnan(alarm.usual)
    assert "above 0.5 in this rollout's mean" in alarm.message
    assert guard.judge(4, {"log_ratio/abs_mean": 2.5}, 2) == []  # told


def test_drift_is_judged_at_the_last_mini_batch():
    guard = CollapseGuard()
    for step, drift in enumerate([0.0, 3.0, 3.0, 0.9, 0.0, 0.1, 0.2], 1):
        assert guard.judge(step, {"log_ratio/drift": drift}, 4) == []
    (alarm,) = guard.judge(8, {"log_ratio/drift": 1.1}, 4)
    assert (alarm.signal, alarm.value) == ("log_ratio/drift", 1.1)
    assert "is above 1 at this rollout's last mini-batch" in alarm.message and "lower learning_rate" in alarm.message


def recorded(learning_rate: str) -> list[tuple[int, dict[str, float]]]:
    """(step, logs) of a run of configs/tiny/sapo.yaml, both from one cold start, by `scripts/train.py` with
    `--num_mini_batches 16 --per_device_train_batch_size 16 --learning_rate ... --eval_strategy no`."""
    with Path(__file__).with_name("recorded_runs.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.pop("learning_rate") == learning_rate]
    return [(int(row.pop("step")), {name: float(x) for name, x in row.items() if x}) for row in rows]


def test_a_recorded_run_that_drifts_into_collapse_is_told_before_its_reward_falls():
    """Rewards by rollout: 0.50, 0.74, 0.48, 0.25, 0.12, 0."""
    guard, alarms = CollapseGuard(), []
    for step, logs in recorded("4e-4"):
        alarms += guard.judge(step, logs, 16)
    rewards = [logs["reward"] for _, logs in recorded("4e-4") if "reward" in logs]
    fallen = next(i for i, reward in enumerate(rewards) if i and reward < 0.7 * max(rewards[:i]))
    assert (alarms[0].signal, alarms[0].step) == ("log_ratio/drift", 16) and fallen == 2
    assert "effective_update_ratio" not in {alarm.signal for alarm in alarms if alarm.step <= 16 * fallen}


def test_the_same_run_at_a_quarter_of_the_learning_rate_is_left_alone():
    guard, rows = CollapseGuard(), recorded("1e-4")
    assert len(rows) == 192 and [alarm for step, logs in rows for alarm in guard.judge(step, logs, 16)] == []
    rewards = [logs["reward"] for _, logs in rows if "reward" in logs]
    assert len(rewards) == 12 and min(rewards[1:]) > rewards[0] + 0.1


def test_a_reward_that_is_lost_at_once_fires_after_five_rollouts():
    guard = CollapseGuard()
    rewards = [0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert [bool(guard.judge(step, {"reward": x})) for step, x in enumerate(rewards, 1)] == [False] * 4 + [True, False]
    assert guard.history["reward"] == [0.5]


def test_a_missing_signal_is_no_signal():
    guard = CollapseGuard()
    for step in range(1, 20):
        assert guard.judge(step, {"grad_norm": 0.5}) == []
    assert guard.history["entropy"] == []


def test_rollouts_are_judged_by_their_mean():
    """The first update of a rollout is on-policy: its log-ratio is 0 whatever happens."""
    assert fired({"log_ratio/abs_mean": [0.0, 0.05, 0.1, 0.15] * 2}, steps_per_rollout=4) == []  # mean 0.075
    assert fired({"log_ratio/abs_mean": [0.0, 0.1, 0.2, 0.3] * 3}, steps_per_rollout=4) == [(8, "log_ratio/abs_mean")]


def test_usual_values_and_noise():
    assert usual(Rule("x", ""), [3.0, 1.0, 8.0]) == 3.0 and math.isnan(usual(Rule("x", ""), []))
    assert usual(RULE["reward"], [0.0, 0.8, 0.6, 0.8, 0.6, 0.2]) == pytest.approx(0.7)  # best mean of four
    assert noise([0.0, 1.0, 3.0, 0.0]) == pytest.approx(1.4826 / math.sqrt(2) * 2)  # steps 1, 2, 3
    assert noise([1.0]) == 0.0


def test_noise_and_warm_up_hold_a_rule_back():
    noisy = [0.9, 0.3, 0.8, 0.2, 0.9, 0.3]
    assert refused(RULE["reward"], noisy, 0.0) == ""  # best 0.55, but steps of 0.6 are usual here: noise 0.63
    assert refused(RULE["grad_norm"], [0.5] * 3, 50.0) == ""  # three rollouts are no history
    assert "best running mean 0.5" in refused(RULE["reward"], [0.5] * 4, 0.0)
    assert refused(RULE["reward"], [-1.0] * 4, -1.4) == ""
    assert refused(RULE["reward"], [-1.0] * 4, -1.6)  # half of the size of a negative reward
    assert refused(RULE["log_ratio/abs_mean"], [], 0.51) == "is above 0.5"  # no history needed


def test_an_unknown_reaction_is_refused(tmp_path):
    with pytest.raises(ValueError, match="on_collapse='halt' is unknown; known: none, warn, stop"):
        sapo_config(tmp_path, on_collapse="halt")


def run(tmp_path, tokenizer, resume_from=None, **fields):
    plain = {"num_mini_batches": 2, "logging_steps": 1, "max_grad_norm": 1e9, "seed": 1}
    trainer = sapo_trainer(tmp_path, tokenizer, tiny_model(tokenizer), **(plain | fields))
    attach(trainer)
    trainer.train(resume_from_checkpoint=resume_from)
    (guard,) = [x for x in trainer.callback_handler.callbacks if isinstance(x, CollapseGuard)]
    return trainer, guard


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("healthy")
    return (*run(folder, tokenizer, learning_rate=1e-4, max_steps=16, save_strategy="steps", save_steps=16), folder)


def test_silent_on_a_healthy_run(healthy):
    trainer, guard, folder = healthy
    assert trainer.state.global_step == 16 and len(guard.history["grad_norm"]) == 8
    assert not (folder / "warnings.jsonl").exists()


def test_a_step_that_is_too_large_fires_and_stops(tmp_path, tokenizer, capsys):
    trainer, guard = run(tmp_path, tokenizer, learning_rate=1.0, max_steps=60, on_collapse="stop")
    assert trainer.state.global_step < 10 and guard.stopped_by and collapse_alarms(trainer) == guard.stopped_by
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / "trainer_state.json").exists()
    records = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert "log_ratio/abs_mean" in {record["signal"] for record in records}
    assert all(record["step"] == trainer.state.global_step for record in records)
    assert f"collapse guard, step {trainer.state.global_step}: " in capsys.readouterr().out


def test_warn_goes_on(tmp_path, tokenizer):
    trainer, guard = run(tmp_path, tokenizer, learning_rate=1.0, max_steps=10)
    records = [json.loads(line) for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    signals = [record["signal"] for record in records if "signal" in record]
    assert trainer.state.global_step == 10 and not guard.stopped_by
    assert len(signals) == len(set(signals)) > 0


def test_a_resumed_run_keeps_its_history(healthy, tmp_path, tokenizer):
    _, before, folder = healthy
    fields = {"learning_rate": 1e-4, "max_steps": 18, "save_strategy": "steps", "save_steps": 16}
    _, guard = run(tmp_path, tokenizer, str(folder / "checkpoint-16"), **fields)
    assert guard is not before and guard.rollouts == 9
    assert len(before.history["grad_norm"]) == 8
    assert guard.history["grad_norm"][:8] == before.history["grad_norm"] and len(guard.history["grad_norm"]) == 9


def test_less_drift_is_refused_while_the_reward_falls():
    """From 0.6; 0.8 times that is 0.48."""
    assert fired({"log_ratio/drift": [0.21], "reward": [0.47]}) == [(1, "log_ratio/drift")]
    assert fired({"log_ratio/drift": [0.21], "reward": [0.49]}) == []
    assert fired({"log_ratio/drift": [0.19], "reward": [0.31]}) == []
    assert fired({"log_ratio/drift": [0.21]}) == []
    assert fired({"log_ratio/drift": [0.21], "reward": [-0.1]}) == [(1, "log_ratio/drift")]


def test_a_reward_falls_by_more_than_its_noise_or_not_at_all():
    """Nor is one rollout a history."""
    guard = CollapseGuard()
    for step, reward in enumerate((0.7, 0.5, 0.74, 0.52, 0.71, 0.5, 0.73, 0.49), 1):
        assert guard.judge(step, {"reward": reward, "log_ratio/drift": 0.3}) == []
    assert len(guard.judge(9, {"reward": 0.2, "log_ratio/drift": 0.3})) == 1


def test_a_reward_that_was_never_above_0_does_not_fall():
    guard = CollapseGuard()
    for step, reward in enumerate((-0.5, -0.4, -0.9), 1):
        assert guard.judge(step, {"reward": reward, "log_ratio/drift": 0.5}) == []


def test_the_alarm_about_less_drift_says_that_the_reward_falls():
    guard = CollapseGuard()
    for step in (1, 2):
        assert guard.judge(step, {"reward": 0.6, "log_ratio/drift": 0.1}) == []
    (alarm,) = guard.judge(3, {"reward": 0.4, "log_ratio/drift": 0.3})
    assert "0.3 is above 0.2 at this rollout's last mini-batch; the reward falls, and the policy moves" in alarm.message
