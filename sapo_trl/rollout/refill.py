"""Dynamic sampling (DAPO, arXiv 2503.14476): prompts whose completions all got one reward give way to further ones.

Only what is missing is generated again: a round asks for as many prompts as the share of useful ones so far lets expect
to be enough. Useful prompts beyond a rollout's places go back to the source and come first in the next rollout.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sapo_trl.rollout.rollout import Rollout
from sapo_trl.rollout.rows import Row


@dataclass
class Round:
    """One generation of a rollout.

    Attributes:
        chosen: its prompts, as rows of the training set, over all processes.
        rows: the completions of this process.
        useful: whether the completions of each prompt got different rewards.
    """

    chosen: list[int]
    rollout: Rollout
    rows: list[Row]
    useful: list[bool]


@dataclass(frozen=True)
class Places:
    """The places of a rollout.

    Attributes:
        wanted: dataset -> its prompts in the rollout.
        tasks: the dataset of each row of the training set.
        left: dataset -> its prompts that are not solved yet, at least the wanted ones.
        unit: a round has a multiple of so many prompts, or its completions would not spread evenly over processes.
    """

    wanted: Mapping[str, int]
    tasks: Sequence[str]
    left: Mapping[str, int]
    unit: int = 1

    def refill(self, rounds: Sequence[Round]) -> dict[str, int]:
        """Dataset -> prompts of the next round, the first one too; empty when every place is taken, or when a round
        would need more prompts than this rollout has not had yet."""
        useful, generated = self._counts(rounds)
        more: dict[str, int] = {}
        for name, wanted in self.wanted.items():
            lacking, others = wanted - useful[name], self.left[name] - generated[name]
            if lacking > 0 and others > 0:
                share = useful[name] / max(generated[name], 1)
                more[name] = min(others, wanted, math.ceil(lacking / share) if share else wanted)
        if more:
            name = max(more, key=lambda name: self.left[name] - generated[name] - more[name])
            more[name] += -sum(more.values()) % self.unit
            return more if more[name] <= self.left[name] - generated[name] else {}
        return more

    def fill(self, rounds: Sequence[Round]) -> tuple[list[tuple[int, int]], list[int]]:
        """((round, prompt) of every place, rows of useful prompts for which there is none).

        The first useful prompts of each dataset, and where there are too few of them the first others.
        """
        found = [(r, i) for r, one in enumerate(rounds) for i in range(len(one.chosen))]
        taken: list[tuple[int, int]] = []
        for name, wanted in self.wanted.items():
            own = [(r, i) for r, i in found if self.tasks[rounds[r].chosen[i]] == name]
            taken += sorted(own, key=lambda place: not rounds[place[0]].useful[place[1]])[:wanted]
        left = [rounds[r].chosen[i] for r, i in found if rounds[r].useful[i] and (r, i) not in {*taken}]
        return sorted(taken), left

    def cost(self, rounds: Sequence[Round], num_generations: int) -> dict[str, float]:
        """Metrics: what a rollout has taken."""
        useful, generated = self._counts(rounds)
        places, num = sum(self.wanted.values()), generated.total()
        return {
            "data/rounds": len(rounds),
            "data/useful_frac": useful.total() / num,
            "data/extra_completions": (num - places) * num_generations,
            "data/missing_prompts": sum(max(0, wanted - useful[name]) for name, wanted in self.wanted.items()),
        }

    def _counts(self, rounds: Sequence[Round]) -> tuple[Counter[str], Counter[str]]:
        """Useful and all prompts so far, by dataset."""
        pairs = [(self.tasks[row], is_useful) for one in rounds for row, is_useful in zip(one.chosen, one.useful)]
        return Counter(task for task, is_useful in pairs if is_useful), Counter(task for task, _ in pairs)
