"""The conformance test of losses: its cases from closed forms, right losses pass, and each mistake is recognised."""

import json
import sys
import types

import pytest
import torch
from conformance_cases import all_cases

from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.conformance import CASES, MISTAKES, check, formula, load_cases, main, padded
from sapo_trl.objective import LossInputs


def packed_loss(name):
    """Our own objective, as somebody else's packed loss."""
    row = ALGORITHMS[name]
    objective = row.objective(**row.defaults)

    def loss(logps, old_logps, advantages, rows):
        num_rows = int(rows.max()) + 1
        tokens = LossInputs(logps, old_logps, advantages, rows, num_rows, row.level)
        return -tokens.row_mean(objective.surrogate(tokens)).sum() / num_rows

    return loss


def padded_loss(algorithm, **mistake):
    """The stored formula with one mistake, as a padded loss with a gradient of its own."""

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logps, value, gradient):
            ctx.gradient = gradient
            return value

        @staticmethod
        def backward(ctx, grad):
            return ctx.gradient * grad, None, None

    cases = load_cases(algorithm)

    def loss(logps, old_logps, advantages, mask):
        (case,) = (c for c in cases if padded(c.logps).equal(logps.detach()) and padded(c.old_logps).equal(old_logps)
                   and padded(c.mask).equal(mask))  # fmt: skip
        value, gradient = formula(case, **mistake)
        return Formula.apply(logps, torch.tensor(value), gradient.float())

    return loss


def test_the_stored_cases_are_those_that_the_script_makes():
    assert json.loads(CASES.read_text()) == all_cases()


@pytest.mark.parametrize("algorithm", ["sapo", "gspo", "grpo"])
def test_our_objectives_pass_packed_and_the_formula_padded(algorithm):
    for loss, layout in ((packed_loss(algorithm), "packed"), (padded_loss(algorithm), "padded")):
        verdicts, looks_like = check(loss, algorithm, layout)
        assert len(verdicts) == 8 and all(v.passed and v.finite for v in verdicts), (layout, verdicts)
        assert looks_like == []


OF = {
    "sapo": [m for m in MISTAKES if "clip" not in m and "row's" not in m.split(",")[-1]],
    "gspo": ["the loss is maximised: its sign is reversed", "the ratio is the token's, not the row's",
             "masked tokens are counted", "the clip ranges are swapped", "the surrogate is not clipped"],
    "grpo": ["the ratio is the row's, not the token's", "the clip ranges are swapped", "the surrogate is not clipped"],
}  # fmt: skip


@pytest.mark.parametrize(("algorithm", "mistake"), [(a, m) for a, names in OF.items() for m in names])
def test_each_mistake_is_recognised(algorithm, mistake):
    verdicts, looks_like = check(padded_loss(algorithm, **MISTAKES[mistake]), algorithm)
    assert not all(v.passed for v in verdicts) and looks_like == [mistake]


def test_an_overflow_and_an_error_are_told_apart(tmp_path, monkeypatch, capsys):
    def overflows(logps, old_logps, advantages, mask):
        ratio = (logps - old_logps).exp()
        tau = torch.where(advantages > 0, 1.0, 1.05)[:, None]
        surrogate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages[:, None] * mask
        return -(surrogate.sum(1) / mask.sum(1).clamp(min=1)).mean(), {"a metric": 1}

    def breaks(logps, old_logps, advantages, mask):
        raise KeyError("x")

    module = types.ModuleType("their_losses")
    module.overflows, module.breaks = overflows, breaks
    monkeypatch.setitem(sys.modules, "their_losses", module)
    assert main(["their_losses:overflows"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("NOT FINITE" in line for line in lines) == 2 and all(line.startswith("extreme") for line in lines[6:8])
    assert lines[8:] == [
        "looks like: exp(log r) overflows near 89, and 0 x inf is NaN: clamp log r before exp, mask before exp"
    ]
    assert main(["their_losses:breaks"]) == 1 and "KeyError: 'x'" in capsys.readouterr().out
    assert main(["their_losses:nothing"]) == 1
    assert "their_losses:nothing cannot be loaded" in capsys.readouterr().err
