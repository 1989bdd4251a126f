"""What the collapse guard says of runs that are over."""

import math

import pandas as pd

from sapo_trl.cli.tables import alarm_table, all_tables, drift_table, first_alarm


def lines(name: str, rewards: list[float], drifts: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"run": name, "rollout": range(len(rewards)), "reward": rewards, "drift": drifts})


STEADY = lines("steady", [0.4, 0.5, 0.6, 0.7], [0.3, 0.3, math.nan, 0.3])
WARNED = lines("warned", [0.55, 0.6, 0.39, 0.1], [0.1, 0.1, 0.3, 0.3])  # 0.39 is under 0.8 times 0.575
AT_ONCE = lines("at once", [0.4, 0.1, 0.1, 0.1], [0.1, 2.0, 0.1, 0.1])


def test_the_first_alarm_is_after_the_rollout_that_drifts_too_far():
    assert [first_alarm(run) for run in (STEADY, WARNED, AT_ONCE)] == [math.inf, 2, 1]
    assert first_alarm(WARNED.iloc[::-1]) == 2  # in whatever order the lines are


RUNS = pd.DataFrame(
    {
        "run": ["steady", "warned", "at once", "worse"],
        "world": "tiny",
        "collapsed_at": [None, 3, 1, None],
        "pass_at_1_before": 0.4,
        "pass_at_1_after": [0.9, 0.1, 0.1, 0.3],
    }
)
ALL = pd.concat([STEADY, WARNED, AT_ONCE, lines("worse", [0.4, 0.3], [0.005, 0.005])])


def test_runs_are_counted_by_how_they_ended():
    assert alarm_table(RUNS, ALL).values.tolist() == [
        ["tiny", "above where they began", 1, 0, 0, 0],
        ["tiny", "collapsed", 2, 2, 1, 1],
        ["tiny", "not above", 1, 0, 0, 0],
    ]


def test_runs_are_counted_by_their_median_drift():
    assert drift_table(RUNS, ALL).values.tolist() == [
        ["tiny", "to 0.01", 1, "-0.100", 0, 0],
        ["tiny", "to 0.1", 1, "-0.300", 0, 1],
        ["tiny", "to 0.3", 2, "+0.100", 1, 1],
    ]


def test_a_run_without_rollouts_is_in_neither_table(tmp_path):
    setting = {"method": "sapo", "mini_batches": 4, "learning_rate": 1e-4, "rollouts_ahead": 0, "seed": 0}
    RUNS.assign(**setting, reward_last=0.5).to_csv(tmp_path / "runs.csv", index=False)
    ALL[ALL["run"] != "worse"].assign(entropy=0.1, grad_norm=1.0, leak=0.0).to_csv(
        tmp_path / "rollouts.csv", index=False
    )
    text = all_tables(tmp_path)
    assert "| tiny | to 0.1 | 1 |" in text and "to 0.01" not in text and "not above" not in text
