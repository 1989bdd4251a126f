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


def row_means(j, mask):
    return ((j * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def gate(ratio, advantages, pos=1.0, neg=1.05):
    tau = torch.where(advantages > 0, pos, neg)
    return torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def clip(ratio, a, low=0.2, high=0.27):
    return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def row_ratio(r, mask):
    return ((r.log() * mask).sum(1) / mask.sum(1).clamp(min=1)).exp()[:, None].expand_as(r)


WRITTEN = {  # functions of r, A (B, T), mask and log pi, as people write them
    ("sapo", "the loss is maximised: its sign is reversed"): lambda r, a, m, p: -row_means(gate(r, a), m),
    ("sapo", "the mean goes over all tokens, not over a row's tokens and then over rows"):
        lambda r, a, m, p: (gate(r, a) * m).sum() / m.sum(),
    ("sapo", "a row is divided by the padded length, not by its own"): lambda r, a, m, p: (gate(r, a) * m).mean(),
    ("sapo", "rows without trained tokens are left out of the mean over rows"):
        lambda r, a, m, p: row_means(gate(r, a)[m.sum(1) > 0], m[m.sum(1) > 0]),
    ("sapo", "masked tokens are counted"): lambda r, a, m, p: gate(r, a).mean(),
    ("grpo", "masked tokens are counted"): lambda r, a, m, p: clip(r, a).mean(1).mean(),
    ("sapo", "the temperatures are swapped"): lambda r, a, m, p: row_means(gate(r, a, 1.05, 1.0), m),
    ("sapo", "tau_pos is used for both signs"): lambda r, a, m, p: row_means(gate(r, a, neg=1.0), m),
    ("sapo", "tau_neg is used for both signs"): lambda r, a, m, p: row_means(gate(r, a, pos=1.05), m),
    ("sapo", "the factor 4/tau is missing"):
        lambda r, a, m, p: row_means(torch.sigmoid(torch.where(a > 0, 1.0, 1.05) * (r - 1)) * a, m),
    ("sapo", "the gate is detached and multiplies log pi"): lambda r, a, m, p: row_means(gate(r, a).detach() * p, m),
    ("sapo", "the gate takes log r in place of r - 1"): lambda r, a, m, p: row_means(gate(r.log() + 1, a), m),
    ("grpo", "the ratio is the row's, not the token's"): lambda r, a, m, p: row_means(clip(row_ratio(r, m), a), m),
    ("gspo", "the ratio is the token's, not the row's"): lambda r, a, m, p: row_means(clip(r, a, 3e-4, 4e-4), m),
    ("gspo", "the clip ranges are swapped"): lambda r, a, m, p: row_means(clip(row_ratio(r, m), a, 4e-4, 3e-4), m),
    ("grpo", "the surrogate is not clipped"): lambda r, a, m, p: row_means(r * a, m),
}  # fmt: skip


@pytest.mark.parametrize(("algorithm", "mistake"), WRITTEN)
def test_a_mistake_in_a_loss_as_people_write_it_is_named(algorithm, mistake):
    def loss(logps, old_logps, advantages, mask):
        z = logps - old_logps if "masked" in mistake else (logps - old_logps) * mask
        ratio = z.clamp(-20, 20).exp()
        value = WRITTEN[algorithm, mistake](ratio, advantages[:, None].expand_as(logps), mask, logps)
        return -value

    verdicts, looks_like = check(loss, algorithm)
    assert not all(v.passed for v in verdicts) and looks_like == [mistake]


def test_an_empty_row_that_is_divided_by_0_is_no_overflow():
    def loss(logps, old_logps, advantages, mask):
        ratio = ((logps - old_logps) * mask).clamp(-20, 20).exp()
        return -((gate(ratio, advantages[:, None]) * mask).sum(1) / mask.sum(1)).mean()

    assert check(loss)[1] == ["a row without trained tokens is divided by 0: clamp its number of tokens at 1"]


def test_another_value_with_the_same_gradients_is_no_mistake_of_training():
    def loss(logps, old_logps, advantages, mask):
        ratio, a = ((logps - old_logps) * mask).clamp(-20, 20).exp(), advantages[:, None]
        sigma = torch.sigmoid(torch.where(a > 0, 1.0, 1.05) * (ratio - 1))
        return -row_means((4 * sigma * (1 - sigma)).detach() * ratio * a, mask)

    assert check(loss)[1] == ["every gradient is right and only the value differs: training is the same"]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, o, a, m: None, "the function returned NoneType; return the loss, a scalar tensor"),
        (lambda p, o, a, m: p - o, "the function returned a tensor of shape (2, 3); return"),
        (lambda p, o, a, m: a.sum(), "the loss has no gradient: it does not depend on logps"),
        (lambda p, o, a, m: a.clone().requires_grad_().sum(), "the loss has no gradient"),
    ],
)
def test_what_is_no_loss_is_said(loss, message):
    verdicts, looks_like = check(loss)
    assert verdicts[0].error.startswith(message) and looks_like == []


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
    assert main(["their_losses:breaks"]) == 1 and capsys.readouterr().out == "every case: KeyError: 'x'\n"
    assert main(["their_losses:nothing"]) == 1
    assert "their_losses:nothing cannot be loaded" in capsys.readouterr().err
