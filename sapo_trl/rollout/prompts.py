"""Which prompts a rollout takes, where that is not simply TRL's order.

A pool is the prompts of one dataset. It is gone through in passes, each in an order of its own, and every pass takes
every prompt once. All processes hold the same source and ask it the same, so nothing is sent between them. `state` is
all of it that a resumed run needs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from sapo_trl.mixture import apportion


@dataclass
class Pool:
    """The prompts of one dataset.

    Attributes:
        rows: of the training set.
        seed: of the order, which is then TRL's for this seed; None: the order of the rows.
        passes: whole passes behind it.
        place: prompts of the order of this pass that are behind it.
        returned: taken and given back unused; they come before all others.
        gone: solved, and never taken again.
    """

    rows: list[int]
    seed: int | None
    passes: int = 0
    place: int = 0
    returned: list[int] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)

    @property
    def num_left(self) -> int:
        """Prompts that are not gone."""
        return len(self.rows) - len(self.gone)

    def take(self, num: int, without: Collection[int] = ()) -> list[int]:
        """The next `num` prompts that are not gone, all different, beyond the end of a pass from the next one.

        What would come twice, or is one of `without`, waits and comes first in the next call.
        """
        assert num <= self.num_left - len({*without}.intersection(self.rows) - self.gone)
        taken, waiting, had = [], [], {*without}
        while len(taken) < num:
            row = self.returned.pop(0) if self.returned else self._next()
            (waiting if row in had else taken).append(row)
            had.add(row)
        self.returned = waiting + self.returned
        return taken

    def _next(self) -> int:
        while True:
            if self.place == len(self.rows):
                self.passes, self.place = self.passes + 1, 0
                vars(self).pop("order", None)
            row, self.place = self.order[self.place], self.place + 1
            if row not in self.gone:
                return row

    @cached_property
    def order(self) -> list[int]:
        """Of this pass: TRL draws one permutation after another from one generator."""
        if self.seed is None:
            return self.rows
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.passes):
            torch.randperm(len(self.rows), generator=generator)
        return [self.rows[i] for i in torch.randperm(len(self.rows), generator=generator).tolist()]

    def state(self) -> dict[str, Any]:
        """Plain data for JSON."""
        numbers = {"passes": self.passes, "place": self.place, "returned": self.returned}
        return numbers | {"gone": sorted(self.gone)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        vars(self).update(state, gone={*state["gone"]})
        vars(self).pop("order", None)


class PromptSource:
    """Gives the prompts of one rollout after another, from several datasets in the ratio of their shares.

    Args:
        tasks: the dataset of each row of the training set.
        shares: dataset -> its share of a rollout.
        seed: of the order; None: not shuffled.

    Attributes:
        ahead: prompts of the next rollout that were taken before its turn, because it is generated already.
    """

    def __init__(self, tasks: Sequence[str], shares: Mapping[str, float], seed: int | None):
        self.tasks, self.shares = tasks, dict(shares)
        rows: dict[str, list[int]] = {name: [] for name in shares}
        for row, task in enumerate(tasks):
            rows[task].append(row)
        seeds = [None if seed is None else seed + k for k in range(len(rows))]
        self.pools = {name: Pool(own, seed) for (name, own), seed in zip(rows.items(), seeds, strict=True)}
        self.ahead: list[int] = []

    def counts(self, num: int) -> dict[str, int]:
        """Dataset -> prompts in a rollout of `num`; empty if fewer are left.

        A dataset with fewer prompts than its share gives all that it has, and the others the rest.
        """
        counts: dict[str, int] = {}
        shares = dict(self.shares)
        while shares:
            asked = apportion(num - sum(counts.values()), shares)
            lacking = [name for name, count in asked.items() if self.pools[name].num_left < count]
            if not lacking:
                return counts | asked
            for name in lacking:
                counts[name] = self.pools[name].num_left
                del shares[name]
        return {}

    def take(self, counts: Mapping[str, int], without: Collection[int] = ()) -> list[int]:
        """So many prompts of each dataset, none of `without`, spread evenly, so that every process gets some of all."""
        placed = [
            ((i + 0.5) / count, row)
            for name, count in counts.items()
            for i, row in enumerate(self.pools[name].take(count, without))
        ]
        return [row for _, row in sorted(placed, key=lambda pair: pair[0])]

    def take_first(self, counts: Mapping[str, int]) -> list[int]:
        """The prompts that a rollout begins with: those taken ahead for it, or else so many of each dataset."""
        taken, self.ahead = self.ahead or self.take(counts), []
        return taken

    @property
    def num_left(self) -> dict[str, int]:
        """Dataset -> prompts that are not gone."""
        return {name: pool.num_left for name, pool in self.pools.items()}

    def drop(self, rows: Sequence[int]) -> None:
        """Solved prompts, which leave for good."""
        for row in rows:
            pool = self.pools[self.tasks[row]]
            pool.gone.add(row)
            pool.returned = [other for other in pool.returned if other != row]

    def metrics(self) -> dict[str, float]:
        """How far each dataset is, in passes."""
        parts = {name: pool.passes + pool.place / len(pool.rows) for name, pool in self.pools.items()}
        return {f"data/{name}/passes" if name else "data/passes": value for name, value in parts.items()}

    def give_back(self, rows: Sequence[int]) -> None:
        """Rows that were taken and not used; they come next, in this order."""
        for name, pool in self.pools.items():
            pool.returned = [row for row in rows if self.tasks[row] == name] + pool.returned

    def state(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"ahead": self.ahead, "pools": {name: pool.state() for name, pool in self.pools.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.ahead = state["ahead"]
        for name, pool in self.pools.items():
            pool.restore(state["pools"][name])
