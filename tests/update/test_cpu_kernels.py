"""The attention and the head of a CPU against plain formulas in float64."""

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction

from sapo_trl.update import cpu_attention, cpu_head
from sapo_trl.update.attention import Segments, _row_attention, segment_attention
from sapo_trl.update.cpu_head import KeptHead, fits

# Prompts of 5, 300 and 131 tokens, of which the first two are shared; rows of the second are not side by side
SIZES = (5, 3, 1, 300, 140, 131, 700, 7)
ROWS = ((0, 1), (0, 2), (3, 4), (5,), (3, 6), (3, 7))


def inputs(dtype=torch.float64, size=8, seed=0):
    """Four heads of queries, two of keys and values."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(1, sum(SIZES), heads, size) for heads in (4, 2, 2)]
    drawn = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]
    return [x.requires_grad_() for x in drawn]


def by_formula(query, key, value, scale):
    """Softmax over a mask of T x T, written out."""
    starts = torch.tensor((0, *SIZES)).cumsum(0).tolist()
    sees = torch.zeros(sum(SIZES), sum(SIZES), dtype=torch.bool)
    for row in ROWS:
        own = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in row])
        sees[own[:, None], own[None]] |= torch.ones(len(own), len(own), dtype=torch.bool).tril()
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("block", [2, 128, 1000])
def test_attention_in_parts(monkeypatch, block):
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    tensors = inputs()
    weight = torch.randn(1, sum(SIZES), 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = by_formula(*tensors, 0.3)
    found, _ = segment_attention(None, *tensors, None, scaling=0.3, segments=Segments(SIZES, ROWS))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    pairs = (torch.autograd.grad((x * weight).sum(), tensors) for x in (found, expected))
    for ours, right in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)


def test_attention_row_by_row_where_the_kernel_does_not_fit():
    """What other devices take, and here a model whose values are wider than its keys."""
    tensors = inputs()
    found = _row_attention(*tensors, Segments(SIZES, ROWS), 0.3)
    torch.testing.assert_close(found, by_formula(*tensors, 0.3), rtol=1e-10, atol=1e-12)
    query, key, value = tensors
    wide = torch.cat([value, value], dim=-1)
    out, _ = segment_attention(None, query, key, wide, None, scaling=0.3, segments=Segments(SIZES, ROWS))
    torch.testing.assert_close(out[..., 8:], found, rtol=1e-10, atol=1e-12)


def test_attention_in_half_precision_is_merged_in_full():
    """As near to float64 on the same numbers as one call of the kernel is: a rounding of the result."""
    tensors = [x.detach() for x in inputs(torch.bfloat16)]
    found, _ = segment_attention(None, *tensors, None, scaling=0.3, segments=Segments(SIZES, ROWS))
    expected = by_formula(*(x.double() for x in tensors), 0.3)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).norm() / expected.norm()) < 0.004


@pytest.mark.parametrize(("of_logps", "of_entropies"), [(1.0, 0.0), (0.0, 1.0), (1.0, 0.7)])
def test_head_that_keeps_its_probabilities(monkeypatch, of_logps, of_entropies):
    monkeypatch.setattr(cpu_head, "TILE", 150)  # three tokens at a time
    monkeypatch.setattr(cpu_head, "IDS", 16)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=g, dtype=torch.float64).requires_grad_() for n in (10, 50))
    targets, scale = torch.randint(0, 50, (10,), generator=g), torch.randn(10, generator=g, dtype=torch.float64)
    logps = (hidden @ weight.t() / 0.7).log_softmax(-1)
    expected = logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)
    found = KeptHead.apply(hidden, weight, targets, 0.7)
    torch.testing.assert_close(found, expected)
    losses = [
        (scale * ((of_logps * x if of_logps else 0) + (of_entropies * y if of_entropies else 0))).sum()
        for x, y in (found, expected)
    ]
    for ours, right in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses), strict=True):
        torch.testing.assert_close(ours, right)


def test_head_that_keeps_its_probabilities_far_from_zero():
    """A probability that is 0 in fp32, and a frozen weight."""
    hidden, weight = (
        torch.tensor([[1.0, 0.0]], requires_grad=True),
        torch.tensor([[300.0, 0.0], [0.0, 1.0], [299.0, 5.0]]),
    )
    logps, entropies = KeptHead.apply(hidden, weight, torch.tensor([1]), 1.0)
    assert logps.item() == pytest.approx(-300.3132617) and entropies.item() == pytest.approx(0.5822031)
    (grad,) = torch.autograd.grad(logps.sum() + entropies.sum(), hidden)
    assert grad.isfinite().all()


def test_other_heads_take_trls_kernel(monkeypatch):
    hidden, weight = torch.zeros(4, 3), torch.zeros(9, 3)
    assert fits(hidden, weight, None, None)
    assert not fits(hidden, weight, torch.zeros(9), None) and not fits(hidden, weight, None, 30.0)
    assert not fits(hidden.bfloat16(), weight.bfloat16(), None, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(hidden, weight, None, None)
    monkeypatch.setattr(cpu_head, "KEPT", 35)
    assert not fits(hidden, weight, None, None)


def test_both_heads_give_the_same():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g).requires_grad_() for n in (70, 600))
    targets = torch.randint(0, 600, (70,), generator=g)
    theirs = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.3, 512, None, 1.0, ("log_probs", "entropy"))
    ours = KeptHead.apply(hidden, weight, targets, 1.3)
    torch.testing.assert_close(ours, theirs[:2])
