"""The norm's own backward pass against autograd's, and which modules get it."""

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

from sapo_trl.update.cpu_norm import RMSNorm, norms_of, quick_norms


def made(kind=Qwen3RMSNorm, width=16) -> nn.Module:
    norm = kind(width)
    nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("shape", [(1, 50, 16), (1, 50, 4, 16), (3, 16)], ids=str)
@pytest.mark.parametrize("is_turned", [False, True], ids=["rows", "columns"])
def test_the_gradients_are_autograds(shape, is_turned):
    torch.manual_seed(0)
    norm, x = made(), torch.randn(shape)
    x[..., 0, :] = 0.0  # where eps counts
    found = []
    for norms in ([], [norm]):
        inputs = x.clone().requires_grad_()
        mine = inputs.flip(0).transpose(0, -2) if is_turned else inputs
        with quick_norms(norms):
            out = norm(mine)
            weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
            (out * weights).sum().backward()
        found.append((out.detach(), inputs.grad, norm.weight.grad))
        norm.weight.grad = None
    (plain, *expected), (out, *grads) = found
    assert torch.equal(out, plain)
    for mine, theirs in zip(grads, expected, strict=True):
        assert (mine - theirs).norm() < 1e-6 * theirs.norm()


def test_the_formulas():
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 7), (7,)))
    assert torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-6), (x, weight))


def test_which_modules_are_such_norms():
    gemma, layer = Gemma3RMSNorm(8), nn.LayerNorm(8)  # 1 + weight; a mean and a bias
    half = made().to(torch.bfloat16)
    adapted = made()
    adapted.more = nn.Linear(2, 2)
    here, other = made(), made(LlamaRMSNorm)
    gated, wide = Qwen3_5RMSNormGated(8), CohereLayerNorm((2, 8))  # more than x, a weight for every head
    others = [gemma, layer, half, nn.Linear(8, 8), adapted, gated, wide]
    assert norms_of(nn.ModuleList([here, *others, other])) == [here, other]


def test_it_is_there_inside_and_where_a_gradient_is_wanted(monkeypatch):
    norm, calls, apply = made(), [], RMSNorm.apply
    monkeypatch.setattr(RMSNorm, "apply", lambda *x: calls.append(x) or apply(*x))
    x = torch.randn(2, 16)
    with quick_norms([norm]):
        norm(x)
        with quick_norms([norm]), torch.no_grad():
            norm(x)
        norm(x.to(torch.bfloat16))
        assert len(calls) == 1
    norm(x)
    assert len(calls) == 1 and "forward" not in vars(norm)
    norm.forward = lambda x: x  # somebody's own
    with quick_norms([norm]):
        assert norm(x) is x
    assert norm.forward(x) is x


def test_a_frozen_weight_gets_no_gradient():
    norm = made().requires_grad_(False)
    x = torch.randn(2, 16, requires_grad=True)
    with quick_norms([norm]):
        norm(x).sum().backward()
    assert norm.weight.grad is None and x.grad is not None
