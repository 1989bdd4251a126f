"""The objectives against numbers typed by hand, finite differences in float64, and inputs that overflow."""

import math
from dataclasses import replace

import pytest
import torch

from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.baselines import Aspo, Cispo, Clip, Dppo, M2po, Topr, Vespo, Winners
from sapo_trl.bounds import LOSS_AGGREGATIONS
from sapo_trl.objective import (
    GATES,
    AdaptiveGate,
    CustomObjective,
    LossInputs,
    Objective,
    SequenceGate,
    SoftGate,
    gate_weight,
    soft_gate,
)
from sapo_trl.update.aggregation import AGGREGATIONS, MiniBatchCounts, row_weights
from sapo_trl.update.loss import engine_ratio, kl_to_reference

SAPO = SoftGate()
GRPO = Clip(epsilon=0.2, epsilon_high=0.27)
RATIOS = torch.tensor([0.2, 0.7, 1.0, 1.4, 3.0], dtype=torch.float64)


def inputs(ratios, advantages, rows=None, level="token", **extra) -> LossInputs:
    old = torch.linspace(-3, -0.5, len(ratios), dtype=torch.float64)
    policy = (old + torch.as_tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    rows = torch.zeros(len(ratios), dtype=torch.long) if rows is None else torch.tensor(rows)
    advantages = torch.as_tensor(advantages, dtype=torch.float64)
    return LossInputs(policy, old, advantages, rows, int(rows.max()) + 1, level, **extra)


# f(r) and f'(r) from a desk calculator, at tau = 2: sigma(2 (r - 1)) * 2, and so on
BY_HAND = {
    "sigmoid": [(0.7, 0.7086874, 0.9151370), (1.0, 1.0, 1.0), (1.4, 1.3799490, 0.8556388), (3.0, 1.9640276, 0.0706508)],
    "erf": [(0.7, 0.7170682, 0.8352702), (1.0, 1.0, 1.0), (1.4, 1.3611357, 0.7261490), (3.0, 1.6266174, 0.0003355)],
    "arctan": [(0.7, 0.7297902, 0.7352941), (1.0, 1.0, 1.0), (1.4, 1.3373705, 0.6097561), (3.0, 1.6629088, 0.0588235)],
    "softsign": [
        (0.7, 0.7427521, 0.6305095),
        (1.0, 1.0, 1.0),
        (1.4, 1.3123475, 0.4761395),
        (3.0, 1.4850713, 0.0142668),
    ],
}


@pytest.mark.parametrize("family", BY_HAND)
def test_gates_against_hand_computed_values(family):
    r, f, w = (torch.tensor(column, dtype=torch.float64) for column in zip(*BY_HAND[family], strict=True))
    torch.testing.assert_close(soft_gate(r.log(), 2.0, family), f, rtol=0, atol=2e-7)
    torch.testing.assert_close(gate_weight(r.log(), 2.0, family), w, rtol=0, atol=2e-7)


def test_the_papers_facts():
    """f(1) = 2/tau, w(1) = 1 for every tau, and w r peaks away from r = 1 (tau = 1: 1.575 at r = 2.06)."""
    zero = torch.zeros(1, dtype=torch.float64)
    for tau in (0.5, 1.0, 1.05, 10.0):
        assert soft_gate(zero, tau).item() == pytest.approx(2 / tau, rel=1e-14)
        assert gate_weight(zero, tau).item() == 1.0
    r = torch.linspace(0.01, 6, 5991, dtype=torch.float64)
    for tau, peak, at in ((1.0, 1.575, 2.06), (1.05, 1.536, 1.99), (10.0, 1.010, None)):
        pull = gate_weight(r.log(), tau) * r
        assert pull.max().item() == pytest.approx(peak, abs=6e-4)
        if at is not None:
            assert r[pull.argmax()].item() == pytest.approx(at, abs=0.006)


@pytest.mark.parametrize("family", GATES)
@pytest.mark.parametrize("tau", [0.5, 1.05, 12.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_weight_is_the_gates_derivative(family, tau, sign):
    """Central differences of f over r in float64."""
    r, h = torch.tensor([0.2, 0.7, 0.95, 1.2, 1.4, 3.0], dtype=torch.float64), 1e-6
    advantages = torch.full_like(r, sign)
    difference = (
        soft_gate((r + h).log(), tau, family, advantages) - soft_gate((r - h).log(), tau, family, advantages)
    ) / (2 * h)
    torch.testing.assert_close(gate_weight(r.log(), tau, family, advantages), difference, rtol=1e-6, atol=1e-8)


def test_one_sided_gate_spares_the_corrective_direction():
    z = torch.tensor([0.5, 2.0, 0.5, 2.0]).log()
    weight = gate_weight(z, 2.0, "one-sided", torch.tensor([1.0, 1.0, -1.0, -1.0]))
    damped_low, damped_high = math.exp(-(2**2) * 0.5**2 / 2), math.exp(-(2**2) * 1 / 2)
    assert weight.tolist() == pytest.approx([1.0, damped_high, damped_low, 1.0], rel=1e-6)
    with pytest.raises(ValueError, match="advantages"):
        soft_gate(z, 2.0, "one-sided")


def test_sapo_takes_the_temperature_of_the_sign():
    """A = 0 belongs to tau_neg; J = 4/tau sigma(tau (r - 1)) A."""
    tokens = inputs([1.4, 1.4, 1.4], [2.0, -1.0, 0.0])
    expected = [2 * 4 * 0.5986876601, -4 / 1.05 * 0.6034832, 0.0]  # sigma(0.4), sigma(0.42)
    assert SAPO.surrogate(tokens).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("advantage", [-1.0, 2.0])
def test_sapo_gradient_is_weight_times_ratio_times_advantage(advantage):
    tokens = inputs(RATIOS, [advantage] * 5)
    (grad,) = torch.autograd.grad(SAPO.surrogate(tokens).sum(), tokens.policy_logps)
    tau = 1.0 if advantage > 0 else 1.05
    sech2 = 1 / torch.cosh(tau * (RATIOS - 1) / 2) ** 2
    torch.testing.assert_close(grad, sech2 * RATIOS * advantage, rtol=1e-5, atol=0)


def test_clip_by_hand():
    tokens = inputs([0.2, 0.7, 1.0, 1.4, 3.0] * 2, [2.0] * 5 + [-1.0] * 5)
    expected = [0.4, 1.4, 2.0, 2.54, 2.54, -0.8, -0.8, -1.0, -1.4, -3.0]
    assert GRPO.surrogate(tokens).tolist() == pytest.approx(expected, rel=1e-6)
    assert Clip(0.2, 0.27, delta=2.0).surrogate(tokens).tolist()[-1] == pytest.approx(-2.0)


def test_gspo_is_one_ratio_per_row():
    """Rows (2, 0.5) and (4,): s = 1 and 4; the clip at 1.27 binds the second."""
    tokens = inputs([2.0, 0.5, 4.0], [1.0, 1.0, 1.0], rows=[0, 0, 1], level="sequence")
    assert GRPO.surrogate(tokens).tolist() == pytest.approx([1.0, 1.0, 1.27], rel=1e-6)


def test_cispo_and_vespo_weights_by_hand():
    tokens = inputs([1.2, 3.0], [1.0, -1.0], rows=[0, 1])
    for objective, weights in ((Cispo(1.5), [1.2, 1.5]), (Vespo(), [math.exp(-0.6) * 1.44, math.exp(-4) * 27])):
        (grad,) = torch.autograd.grad(objective.surrogate(tokens).sum(), tokens.policy_logps)
        assert grad.tolist() == pytest.approx([weights[0], -weights[1]], rel=1e-6)


def test_sapo_sequence_is_equation_23_by_hand():
    """Row (2, 0.5, 8): log s = log 8 / 3 = log 2; g = sech^2(tau/2 log 2), d J / d log pi of each token = g A."""
    tokens = inputs([2.0, 0.5, 8.0], [1.5] * 3, level="sequence")
    objective = SequenceGate(sapo_temperature_pos=2.0)
    (grad,) = torch.autograd.grad(objective.surrogate(tokens).sum(), tokens.policy_logps)
    assert grad.tolist() == pytest.approx([1.5 * 0.64] * 3, rel=1e-6)  # sech(log 2) = 2/(2 + 1/2) = 0.8
    assert objective.surrogate(tokens).tolist() == pytest.approx([1.5 * 0.6] * 3, rel=1e-6)  # tanh(log 2) = 3/5
    with pytest.raises(ValueError, match="gate=erf must be sigmoid"):
        SequenceGate(gate="erf")


def test_the_token_gate_tends_to_the_sequence_gate():
    """Eq. 22-23: for a row of equal, small ratios SAPO's w r and g differ by less than |log s|, and not at s = 1."""
    for ratio, bound in ((1.0, 1e-12), (1.01, 0.0101), (0.97, 0.0305)):
        row, sequence = (inputs([ratio] * 4, [1.0] * 4, level=level) for level in ("token", "sequence"))
        gap = SAPO.weight(row) - SequenceGate().weight(sequence)
        assert gap.abs().max() <= bound


def test_adaptive_by_hand():
    """Bad: pi 0.8 -> 0.4 and 0.1 -> 0.2, 1 - d is 0.6 and 1. Bad: 0.01 -> 0.001, although r is 0.1. Good: as above."""
    old, new = [0.8, 0.1, 0.01, 0.01, 0.5, 0.5], [0.4, 0.2, 0.001, 0.01, 0.25, 0.7]
    advantages = [-1.0] * 4 + [2.0] * 2
    tokens = replace(with_probabilities(old, new, advantages), rows=torch.tensor([0, 0, 1, 1, 2, 2]), num_rows=3)
    fallen, small = math.sqrt(0.6) ** 2, math.sqrt(0.991) ** 2  # p = 2
    expected = [fallen * 0.5, fallen, small * 0.1, small, 1.0, SAPO.weight(tokens)[5].item()]
    assert AdaptiveGate(adaptive_power=2.0).weight(tokens).tolist() == pytest.approx(expected, rel=1e-6)
    half = with_probabilities([0.5, 0.9], [0.479, 0.879], [-1.0, -1.0])  # each loses 0.021
    assert AdaptiveGate().row_weight(half).tolist() == pytest.approx([0.507, 0.507], abs=1e-3)


def test_adaptive_has_the_gradient_of_sapo_on_policy():
    on_policy = inputs([1.0] * 6, [1.0, -1.0] * 3, rows=[0, 1] * 3)
    values = [objective.surrogate(on_policy).sum() for objective in (AdaptiveGate(), SAPO)]
    grads = [torch.autograd.grad(value, on_policy.policy_logps, retain_graph=True)[0] for value in values]
    assert torch.equal(*grads)


def test_topr_by_hand():
    """A good row has weight 1 whatever r; a bad one min(1, 0.5 * 0.8) = 0.4 or min(1, 6) = 1 for all its tokens."""
    tokens = inputs([0.2, 5.0, 0.5, 0.8, 3.0, 2.0], [1.0, 1.0, -1.0, -1.0, -1.0, -1.0], rows=[0, 0, 1, 1, 2, 2])
    (grad,) = torch.autograd.grad(Topr().surrogate(tokens).sum(), tokens.policy_logps)
    assert grad.tolist() == pytest.approx([1.0, 1.0, -0.4, -0.4, -1.0, -1.0], rel=1e-6)


def with_probabilities(old, new, advantages) -> LossInputs:
    old, new = (torch.tensor(x, dtype=torch.float64).log() for x in (old, new))
    advantages = torch.tensor(advantages, dtype=torch.float64)
    return LossInputs(new.requires_grad_(), old, advantages, torch.zeros(len(old), dtype=torch.long), 1)


def test_dppo_by_hand():
    """TV of the first is 0.3, of the second 0.009, although its r is 10; the third moves back."""
    tokens = with_probabilities([0.5, 0.001, 0.5, 0.5], [0.8, 0.01, 0.8, 0.1], [1.0, 1.0, -1.0, -1.0])
    assert Dppo(dppo_threshold=0.2).weight(tokens).tolist() == pytest.approx([0.0, 10.0, 1.6, 0.0], rel=1e-6)
    assert Dppo(dppo_threshold=0.35).weight(tokens).tolist() == pytest.approx([1.6, 10.0, 1.6, 0.0], rel=1e-6)
    kl = Dppo("kl").divergence(tokens).tolist()
    small = 0.001 * math.log(0.1) + 0.999 * math.log(0.999 / 0.99)
    assert kl[:2] == pytest.approx([0.223144, small], rel=1e-5)  # 0.5 log(0.5 / 0.8) + 0.5 log(0.5 / 0.2)
    assert Dppo("kl", 0.25).weight(tokens).tolist() == pytest.approx([1.6, 10.0, 1.6, 0.0], rel=1e-6)
    assert Dppo().weight(with_probabilities([1e-3], [0.1], [1.0])).item() == pytest.approx(20.0)  # r = 100 is truncated


def test_m2po_by_hand():
    """z of the first row's outward tokens: 0.1, 0.2, 0.6. Their squares 0.01, 0.04, 0.36 have a mean of 0.137; without
    the last one it is 0.025. The token that moves back (z = -0.9) is neither counted nor dropped."""
    z = [0.1, 0.6, -0.9, 0.2, 0.1, 0.15]
    tokens = inputs([math.exp(x) for x in z], [1.0] * 6, rows=[0, 0, 0, 0, 1, 1])
    kept = M2po(m2po_threshold=0.04).weight(tokens)
    expected = [math.exp(x) for x in z]
    expected[1] = 0.0
    assert kept.tolist() == pytest.approx(expected, rel=1e-6)
    assert M2po(m2po_threshold=0.2).weight(tokens).tolist() == pytest.approx([math.exp(x) for x in z], rel=1e-6)
    shuffled = inputs([math.exp(z[i]) for i in (4, 1, 2, 5, 3, 0)], [1.0] * 6, rows=[1, 0, 0, 1, 0, 0])
    assert M2po().weight(shuffled).tolist() == pytest.approx([expected[i] for i in (4, 1, 2, 5, 3, 0)], rel=1e-6)


def test_aspo_and_wapo_by_hand():
    tokens = inputs([0.2, 0.5, 1.1, 1.4, 0.5, 1.1, 5.0], [1.0] * 4 + [-1.0] * 3)
    # good: 1/0.2 = 5 is capped at 3, 1/0.5, 1/1.1, clipped; bad: clipped, r, capped
    assert Aspo().weight(tokens).tolist() == pytest.approx([3.0, 2.0, 1 / 1.1, 0.0, 0.0, 1.1, 3.0], rel=1e-6)
    assert Winners().surrogate(tokens).tolist() == pytest.approx([0.2, 0.5, 1.1, 1.2, 0, 0, 0], rel=1e-6)


def test_kl_by_hand_and_never_negative():
    d = torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64)
    expected = [math.exp(0.5) - 1.5, math.exp(-0.5) - 0.5, 0.0]
    assert kl_to_reference(torch.zeros(3, dtype=torch.float64), d).tolist() == pytest.approx(expected, rel=1e-12)


def test_engine_ratio_modes_by_hand():
    old, sampler = torch.log(torch.tensor([2.0, 0.5, 3.0])), torch.log(torch.tensor([1.0, 1.0, 1.0]))
    rows = torch.tensor([0, 0, 1])
    ratio = lambda mode, low=None, high=None: engine_ratio(old, sampler, rows, 2, mode, low, high)[0].tolist()  # noqa: E731
    assert ratio("token_truncate", high=1.5) == pytest.approx([1.5, 0.5, 1.5])
    assert ratio("token_mask", low=0.6, high=2.5) == pytest.approx([2.0, 0.0, 0.0])
    assert ratio("sequence_truncate", high=2.0) == pytest.approx([1.0, 1.0, 2.0])
    assert ratio("sequence_mask", high=2.0) == pytest.approx([1.0, 1.0, 0.0])
    # geometric means of the rows: (2 x 1/2)^(1/2) = 1, and 3; a row that stays keeps its tokens as they are
    assert ratio("geometric_mask", 0.99, 1.01) == [1.0, 1.0, 0.0]
    assert ratio("geometric_mask", 1.01, 4.0) == [0.0, 0.0, 1.0]
    assert engine_ratio(old, sampler, rows, 2, "token_mask", 0.6, 2.5)[1].tolist() == [False, True, True]
    unscored = torch.tensor([float("nan"), 0.0, 0.0])
    assert engine_ratio(old, unscored, rows, 2, "token_truncate", None, 9.0)[0][0] == 1.0


def test_row_weights_by_hand():
    lengths = torch.tensor([4, 1, 0])
    counts = MiniBatchCounts(
        num_rows=5, num_tokens=10.0, num_rollout_tokens=80.0, num_mini_batches=4, max_completion_length=20,
        num_rollout_prompts=10.0,
    )  # fmt: skip
    groups = torch.tensor([16, 16, 5])  # tokens of the rows' prompts
    expected = {
        "sequence-mean": [1 / 20, 1 / 5, 1 / 5],
        "sequence-sum": [1 / 5] * 3,
        "token-mean": [1 / 10] * 3,
        "rollout-token-mean": [4 / 80] * 3,
        "constant": [1 / 100] * 3,
        "prompt-mean": [4 / 160, 4 / 160, 4 / 50],
    }
    assert expected.keys() == AGGREGATIONS.keys() == {*LOSS_AGGREGATIONS}
    for aggregation, weights in expected.items():
        assert row_weights(aggregation, lengths, counts, groups).tolist() == pytest.approx(weights)
        left = row_weights(aggregation, lengths, counts, torch.tensor([16, 0, 5])).tolist()
        assert left == pytest.approx([weights[0], 0.0, weights[2]])  # a prompt that does not count


def hostile_inputs(dtype, level):
    """Log-ratios of +-200, old log-probs of -inf, NaN, and both infinite, beside an ordinary token."""
    inf = float("inf")
    old = torch.tensor([-201.0, -1.0, -inf, -inf, -1.0, float("nan"), -0.7])
    policy = torch.tensor([-1.0, -201.0, -0.5, -inf, -inf, -0.5, -0.5])
    advantages = torch.tensor([2.0, -1.0, -2.0, 1.0, -1.0, 1.0, 1.5])
    rows = torch.tensor([0, 0, 1, 2, 2, 3, 4])
    return LossInputs(policy.to(dtype).requires_grad_(), old.to(dtype), advantages.to(dtype), rows, 5, level)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("sign", [1, -1])
def test_ratios_that_overflow_give_finite_gradients(dtype, level, sign):
    for objective in (GRPO, SequenceGate(), AdaptiveGate(), *(SoftGate(gate=gate) for gate in GATES)):
        tokens = hostile_inputs(dtype, level)
        object.__setattr__(tokens, "advantages", tokens.advantages * sign)
        value = objective.surrogate(tokens)
        assert value.isfinite().all(), objective
        (grad,) = torch.autograd.grad(value.sum(), tokens.policy_logps)
        assert grad.isfinite().all(), objective
        assert grad[-1].abs() > 0.5, objective  # the ordinary token still learns
    assert hostile_inputs(dtype, level).clamped.tolist() == [True, True, True, True, True, True, False]


@pytest.mark.parametrize("objective", [Cispo(), Vespo(), Topr(), Dppo(), Dppo("kl"), M2po(), Aspo()])
def test_weights_of_log_prob_objectives_stay_finite(objective):
    """Log-probs themselves must be finite here (they come from finite logits); the ratio need not be."""
    tokens = hostile_inputs(torch.float32, "token")
    policy = tokens.policy_logps.detach().clamp(min=-300).requires_grad_()
    tokens = LossInputs(policy, tokens.old_logps, tokens.advantages, tokens.rows, tokens.num_rows)
    (grad,) = torch.autograd.grad(objective.surrogate(tokens).sum(), policy)
    assert grad.isfinite().all()


def test_the_clamp_is_invisible_where_training_happens():
    """On z in [-6, 6] the gate equals float64 without a clamp, to fp32's rounding."""
    z = torch.linspace(-6, 6, 1001)
    exact = 4 * torch.sigmoid(z.double().exp() - 1)
    torch.testing.assert_close(soft_gate(z, 1.0).double(), exact, rtol=3e-7, atol=3e-7)


def test_shapes_are_checked_before_broadcasting():
    with pytest.raises(ValueError, match=r"advantages has shape \(1,\), policy_logps \(3,\)"):
        LossInputs(torch.zeros(3), torch.zeros(3), torch.zeros(1), torch.zeros(3, dtype=torch.long), 1)


def unusual_inputs(level, importance_ratio=None):
    """Four rows with ratios on both sides of every clip, one far outside the clamp, and both signs of A."""
    g = torch.Generator().manual_seed(3)
    old = -3 * torch.rand(24, generator=g, dtype=torch.float64)
    z = torch.randn(24, generator=g, dtype=torch.float64)
    z[5], z[11] = 30.0, -25.0
    rows = torch.arange(4).repeat_interleave(6)
    advantages = torch.tensor([1.3, -0.4, 0.7, -2.0], dtype=torch.float64)[rows]
    return LossInputs((old + z).requires_grad_(), old, advantages, rows, 4, level, importance_ratio)


@pytest.mark.parametrize("name", [*ALGORITHMS, *(f"sapo {gate}" for gate in GATES), "grpo delta"])
def test_what_is_logged_is_what_acts(name):
    """For every row of the table: d J / d log pi over A, by autograd, is `weight`; the base class's own weight too."""
    row, _, option = ALGORITHMS[name.split()[0]], *name.partition(" ")[1:]
    extra = {"gate": option} if option in GATES else {"delta": 2.0} if option == "delta" else {}
    objective = row.objective(**{**row.defaults, **extra})
    tokens = unusual_inputs(row.level)
    (gradient,) = torch.autograd.grad(objective.surrogate(tokens).sum(), tokens.policy_logps)
    weight = objective.weight(tokens)
    assert not weight.requires_grad
    torch.testing.assert_close(weight.double(), gradient / tokens.advantages, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(Objective.weight(objective, tokens), weight.double(), rtol=2e-5, atol=1e-7)


def test_weight_of_an_unknown_function():
    """A log pi, never clipped: weight 1 where A != 0, unknown where A = 0; a constant has no weight at all."""
    tokens = inputs([0.5, 1.0, 2.0], [1.0, 0.0, -1.0])
    weight = CustomObjective(lambda t: t.advantages * t.policy_logps).weight(tokens)
    assert weight.tolist() == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    assert CustomObjective(lambda t: t.advantages).weight(tokens).isnan().all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SoftGate(0.0), "sapo_temperature_pos=0.0 must be a finite number > 0"),
        (lambda: SoftGate(gate="sigmod"), "gate='sigmod' is unknown.*Did you mean 'sigmoid'"),
        (lambda: Clip(epsilon=1.5), "epsilon=1.5 must be a number between 0 and 1"),
        (lambda: Clip(0.2, math.nan), "epsilon_high=nan must be"),
        (lambda: Clip(0.2, 0.27, delta=1.2), "delta=1.2 must be finite and above 1 \\+ epsilon_high = 1.27"),
        (lambda: Cispo(0.0), "epsilon_high=0.0 must be"),
        (lambda: Vespo(vespo_k_pos=math.nan), "vespo_k_pos=nan must be"),
        (lambda: AdaptiveGate(0.0), "sapo_temperature_pos=0.0 must be a finite number > 0"),
        (lambda: AdaptiveGate(adaptive_power=-1), "adaptive_power=-1 must be a finite number >= 0"),
        (lambda: Dppo("js"), "dppo_divergence=js must be tv or kl"),
        (lambda: M2po(0.0), "m2po_threshold=0.0 must be"),
        (lambda: Aspo(aspo_cap=1.0), "aspo_cap=1.0 must be a finite number > 1"),
    ],
)
def test_objectives_refuse_what_makes_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()
