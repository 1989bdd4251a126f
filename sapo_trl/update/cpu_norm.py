"""RMSNorm on a CPU, with a backward pass of two products and four passes over the activations.

autograd goes back through the norm operation by operation and sums the weight's gradient over all tokens: for 2,400
tokens, 128 wide, 1.8 ms on one EPYC core, where these formulas take 0.4. With s = (mean x^2 + eps)^(-1/2), per token:

    y = w s x        dx = s w g - x s^3 / D * sum(w g x)        dw = sum over tokens of s g x
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(torch.autograd.Function):
    """x (..., D), weight (D,), eps -> (..., D); all of fp32. Forward it is transformers' own, bit for bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (x * scale)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = outputs
        x, weight, scale = ctx.saved_tensors
        product = (grad * x).reshape(-1, len(weight))
        along = (product @ weight).view_as(scale).mul_(scale.pow(3)).div_(-len(weight))
        grad_x = (grad * weight).mul_(scale).addcmul_(x, along)
        return grad_x, product.t() @ scale.reshape(-1) if ctx.needs_input_grad[1] else None, None


def norms_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are such a norm of fp32 weights on a CPU, which is tried on two rows."""
    return [module for module in model.modules() if _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or len(list(module.parameters())) > 1:
        return False
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.ndim != 1 or not weight.numel():
        return False  # ZeRO-3 has cut an empty one up
    x = torch.linspace(-3, 2, 2 * len(weight)).view(2, -1)
    try:
        with torch.no_grad():
            return torch.equal(module(x), RMSNorm.apply(x, weight, eps))
    except Exception:  # it takes more than x, such as a gate
        return False


@contextmanager
def quick_norms(norms: Sequence[Any]) -> Generator[None]:
    """Context in which they are computed by `RMSNorm` where a gradient is wanted."""
    mine = [norm for norm in norms if "forward" not in vars(norm)]  # not this context again, nor somebody's own
    for norm in mine:
        norm.forward = partial(_forward, norm)
    try:
        yield
    finally:
        for norm in mine:
            del norm.forward  # the class's own again


def _forward(norm: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or not torch.is_grad_enabled():
        return type(norm).forward(norm, x)
    return RMSNorm.apply(x, norm.weight, norm.variance_epsilon)
