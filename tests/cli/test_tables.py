"""What the collapse guard says of runs that are over."""

import math

import pandas as pd

from sapo_trl.cli.tables import alarm_table, first_alarm


def lines(name: str, rewards: list[float], drifts: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"run": name, "rollout": range(len(rewards)), "reward": rewards, "drift": drifts})


STEADY = lines("steady", [0.4, 0.5, 0.6, 0.7], [0.3, 0.3, math.nan, 0.3])
WARNED = lines("warned", [0.4, 0.6, 0.39, 0.1], [0.1, 0.1, 0.3, 0.3])  # 0.39 is under 0.8 times 0.5
AT_ONCE = lines("at once", [0.4, 0.1, 0.1, 0.1], [0.1, 2.0, 0.1, 0.1])


def test_the_first_alarm_is_after_the_rollout_that_drifts_too_far():
    assert [first_alarm(run) for run in (STEADY, WARNED, AT_ONCE)] == [math.inf, 2, 1]
    assert first_alarm(WARNED.iloc[::-1]) == 2  # in whatever order the lines are


def test_runs_are_counted_by_how_they_ended():
    runs = pd.DataFrame(
        {
            "run": ["steady", "warned", "at once", "worse"],
            "world": "tiny",
            "collapsed_at": [None, 3, 1, None],
            "pass_at_1_before": 0.4,
            "pass_at_1_after": [0.7, 0.1, 0.1, 0.3],
        }
    )
    table = alarm_table(runs, pd.concat([STEADY, WARNED, AT_ONCE]))
    assert table.values.tolist() == [
        ["tiny", "above where they began", 1, 0, 0, 0],
        ["tiny", "collapsed", 2, 2, 1, 1],
        ["tiny", "below where they began", 1, 0, 0, 0],
    ]
