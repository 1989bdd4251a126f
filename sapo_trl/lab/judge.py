"""Is a method better than others? Judged on worlds that it was not chosen on, paired over seeds.

Two seeds of one world start from the same policy and have the same task, whatever the method, so that how hard they are
cancels in the difference of their rewards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sapo_trl.lab.run import Method, Regime
from sapo_trl.lab.sweep import Table, find_methods, sweep
from sapo_trl.stats import Interval, paired_difference

WORLDS = (1, 2, 3)  # methods are chosen on world 0
MILD = (Regime(4, 3e-3), Regime(4, 3e-3, task="avoid"))
# where sapo ends at about half of what it reaches with the same N at a lower learning rate, or below (world 0)
HARSH = (Regime(32, 5e-3), Regime(16, 1e-2), Regime(32, 2e-2, task="avoid"))
STABLE = ("grpo", "vespo", "topr")


@dataclass(frozen=True)
class Question:
    """What is asked: the method against the rivals in these regimes, in each of the worlds (empty: `WORLDS`)."""

    name: str
    rivals: tuple[str, ...]
    regimes: tuple[Regime, ...]
    worlds: tuple[int, ...] = ()


QUESTIONS = (
    Question("little drift", ("sapo",), MILD),
    Question("much drift", STABLE, HARSH[:2]),
    Question("much drift", STABLE, HARSH[2:], worlds=tuple(range(1, 9))),  # three could not tell
    Question("sapo loses all", ("topr",), (Regime(32, 1e-2),)),
    Question("one rollout ahead", STABLE, tuple(replace(regime, rollouts_ahead=1) for regime in HARSH)),
    Question("engine noise of 0.1", STABLE, tuple(replace(regime, engine_noise=0.1) for regime in HARSH)),
)


def judge(method: Method, table: Table, questions: tuple[Question, ...] = QUESTIONS) -> Iterator[dict]:
    """Run what the table lacks; one entry per question, task and rival, each question's when its rows are there."""
    for question in questions:
        asked = [replace(regime, world=world) for world in question.worlds or WORLDS for regime in question.regimes]
        sweep(asked, [method, *find_methods(question.rivals)], table)
        for task in dict.fromkeys(regime.task for regime in asked):
            names = [regime.name for regime in asked if regime.task == task]
            for rival in question.rivals:
                yield {"question": question.name, "task": task, **compare(table, names, method.name, rival)}


def compare(table: Table, names: list[str], method: str, rival: str) -> dict:
    """The paired difference of the rewards over all seeds of these regimes, and the collapsed seeds of both.

    The regimes of one seed and world are no independent draws: they enter as their mean.
    """
    mine, theirs = ([table.rows[name, which] for name in names] for which in (method, rival))
    difference = paired_difference(per_seed(theirs), per_seed(mine))
    collapsed = [sum(int(row["collapsed"]) for row in rows) for rows in (mine, theirs)]
    return {"rival": rival, "difference": difference, "collapsed": collapsed}


def per_seed(rows: list[dict[str, str]]) -> list[float]:
    """Mean reward of each seed of each world over the regimes that it was trained in."""
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        world = next((part for part in row["regime"].split() if part.startswith("world=")), "world=0")
        for seed, reward in enumerate(json.loads(row["rewards"])):
            found.setdefault((world, seed), []).append(reward)
    return [sum(rewards) / len(rewards) for _, rewards in sorted(found.items())]


def line(entry: dict) -> str:
    """One entry as a line of text."""
    interval: Interval = entry["difference"]
    verdict = "above" if interval.low > 0 else "below" if interval.high < 0 else "not told apart"
    mine, theirs = entry["collapsed"]
    text = f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
    return (
        f"{entry['question']:19s} {entry['task']:7s} against {entry['rival']:6s} {text}  {verdict:14s}  "
        f"collapsed {mine} against {theirs}"
    )
