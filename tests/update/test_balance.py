"""Rows rebalanced between processes: the plan by hand, the exchange in `test_distributed.py`."""

import torch
from accelerate import Accelerator

from sapo_trl.rollout.rows import Row
from sapo_trl.update import balance
from sapo_trl.update.balance import plan_moves, rebalance


def row(length: int, prompt_key=None) -> Row:
    return Row(torch.arange(length), 1, torch.ones(length - 1, dtype=torch.bool), 1.0, prompt_key)


def loads(costs, at):
    totals = [0.0] * len(costs)
    for units, to in zip(costs, at, strict=True):
        for c, p in zip(units, to, strict=True):
            totals[p] += c
    return totals


def test_moves_even_out_the_load():
    assert plan_moves([[1.0, 1.0], [2.0]]) == [[0, 0], [1]]  # even already: nothing moves
    costs = [[9.0, 5.0, 4.0, 4.0], [], [1.0], [6.0]]
    assert max(loads(costs, plan_moves(costs))) == 9  # the largest unit bounds it; mean 7.25
    g = torch.Generator().manual_seed(0)
    costs = [torch.rand(16, generator=g).mul(n).tolist() for n in (1, 2, 3, 8)]
    after = loads(costs, plan_moves(costs))
    assert max(after) * 4 / sum(after) < 1.03 < 2 < max(map(sum, costs)) * 4 / sum(map(sum, costs))
    assert plan_moves([[], []]) == [[], []]


def test_rows_arrive_whole_and_groups_stay_together(monkeypatch):
    """Two processes played in turn: what one sends is what the other gets."""
    groups = [row(10, 0), row(10, 0), row(30, 1), row(8, 2)]
    groups[0].sampler_logps = torch.tensor([0.5] * 9)
    empty: list[Row] = []
    results, mail = {}, {}

    class Process:
        device = torch.device("cpu")

        def __init__(self, index):
            self.process_index = index

    cost = lambda rows: float(sum(len(r) for r in rows))  # noqa: E731
    for turn in (0, 1, 0, 1):  # the first two turns only fill the mail
        calls = iter(("costs", "rows"))

        def gather(objects, calls=calls, turn=turn):
            name = next(calls)
            mail[name, turn] = objects
            return mail[name, 0] + mail.get((name, 1), [[[]]] if name == "costs" else [])

        monkeypatch.setattr(balance, "gather_object", gather)
        results[turn] = rebalance([groups if turn == 0 else empty], cost, Process(turn))
    (stayed,), before, after = results[0]
    (arrived,), *_ = results[1]
    assert sorted(len(r) for r in stayed + arrived) == [8, 10, 10, 30]
    assert {len(r) for r in stayed} in ({30}, {8, 10}, {10, 8}) and before == 2.0 and after < 1.1
    ten = [r for r in stayed + arrived if len(r) == 10]
    assert len([r for r in stayed if len(r) == 10]) in (0, 2)  # together
    assert any(r.sampler_logps is not None and r.sampler_logps.tolist() == [0.5] * 9 for r in ten)


def test_one_process_keeps_what_it_has():
    rows = [row(5), row(9)]
    (same,), before, after = rebalance([rows], lambda unit: 1.0, Accelerator(cpu=True))
    assert same == rows and before == after == 1.0
