"""Rebalancing: rows move between processes, so that none of them waits for the one with the long answers.

Every process generates completions of its own prompts, and the tokens that are left after zero-advantage rows are
skipped differ by tens of per cent. Rows that share a prompt move together. The loss stays the same, because its weights
are those of the whole mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sapo_trl.rollout.rows import LOGPS_KEYS, Row

# Moving stops when the most loaded process has at most this much more than the least loaded, as a share of the mean.
TOLERANCE = 0.02


def rebalance(
    parts: Sequence[list[Row]], cost: Callable[[list[Row]], float], accelerator: Accelerator
) -> tuple[list[list[Row]], float, float]:
    """Even out each part (mini-batch) over processes; two gathers of objects, the second only of rows that move.

    Args:
        parts: this process's rows with a forward pass, by mini-batch.
        cost: cost in tokens of rows that share a prompt.

    Returns:
        (the parts after the exchange, the largest load of a process over the mean before it, and after it).
    """
    units = [_by_prompt(rows) for rows in parts]
    local = [[cost(unit) for unit in part] for part in units]
    everywhere: list[list[list[float]]] = gather_object([local])  # process, part, unit
    me = accelerator.process_index
    leaving: list[tuple[int, int, Row]] = []  # destination, part, row on the host
    staying: list[list[Row]] = []
    before = after = 1.0
    for k, part in enumerate(units):
        destinations = plan_moves([process[k] for process in everywhere])
        loads = _loads([process[k] for process in everywhere], destinations)
        home = [sum(process[k]) for process in everywhere]
        before, after = max(before, _imbalance(home)), max(after, _imbalance(loads))
        staying.append([row for unit, to in zip(part, destinations[me], strict=True) if to == me for row in unit])
        moves = [(unit, to) for unit, to in zip(part, destinations[me], strict=True) if to != me]
        leaving += [(to, k, _on(row, "cpu")) for unit, to in moves for row in unit]
    for to, k, row in gather_object(leaving):
        if to == me:
            staying[k].append(_on(row, accelerator.device))
    return staying, before, after


def plan_moves(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """The process that each unit goes to, in the shape of `costs`, where `costs[p][u]` is that of unit u on process p.

    The most loaded process gives the least loaded one the unit whose cost is nearest to half of their difference, as
    long as that helps. All processes plan the same from the same costs.

    >>> plan_moves([[4.0, 3.0, 1.0], [2.0]])
    [[0, 1, 0], [1]]
    """
    at = [[p] * len(units) for p, units in enumerate(costs)]
    loads = [float(sum(units)) for units in costs]
    for _ in range(sum(len(units) for units in costs)):
        busy, idle = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[busy] - loads[idle]
        if gap <= TOLERANCE * sum(loads) / len(loads):
            break
        movable = [(p, u) for p, units in enumerate(at) for u, now in enumerate(units) if now == busy]
        movable = [(p, u) for p, u in movable if 0 < costs[p][u] < gap]
        if not movable:
            break
        p, u = min(movable, key=lambda unit: abs(costs[unit[0]][unit[1]] - gap / 2))
        at[p][u] = idle
        loads[busy] -= costs[p][u]
        loads[idle] += costs[p][u]
    return at


def placed_rows(placed: Sequence[tuple[int, Row]], num_local: int, accelerator: Accelerator) -> list[Row]:
    """The rows of this process in the order of their places, of which each process has the next `num_local`; a gather
    of those that lie on another one.

    Args:
        placed: (place over all processes, row) of the rows that this process has.
    """
    me = accelerator.process_index
    here = [(place, row) for place, row in placed if place // num_local == me]
    if accelerator.num_processes > 1:
        leaving = [(place, _on(row, "cpu")) for place, row in placed if place // num_local != me]
        arrived = [(place, row) for place, row in gather_object(leaving) if place // num_local == me]
        here += [(place, _on(row, accelerator.device)) for place, row in arrived]
    return [row for _, row in sorted(here, key=lambda pair: pair[0])]


def _by_prompt(rows: list[Row]) -> list[list[Row]]:
    """Rows that share a prompt together, others alone."""
    units: dict = {}
    for i, row in enumerate(rows):
        units.setdefault(("row", i) if row.prompt_key is None else row.prompt_key, []).append(row)
    return list(units.values())


def _loads(costs: Sequence[Sequence[float]], destinations: Sequence[Sequence[int]]) -> list[float]:
    loads = [0.0] * len(costs)
    for units, to in zip(costs, destinations, strict=True):
        for c, p in zip(units, to, strict=True):
            loads[p] += c
    return loads


def _imbalance(loads: list[float]) -> float:
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


def _on(row: Row, device: torch.device | str) -> Row:
    """A copy of the row with its log-probs and routes on another device; ids and masks are on the host anyway."""
    known = {name: vars(row)[name] for name in (*LOGPS_KEYS, "routes")}
    return replace(row, **{name: x.to(device) for name, x in known.items() if x is not None}, prompt_key=None)
