"""Residual addition and RMS norm in one pass: what stands between two layers of a model."""

from typing import Any

import torch
from torch import Tensor

from ._library import register_autograd, register_fake, register_once_differentiable

_add_norm = torch.ops.mamba_ops.add_rms_norm.default
_bwd = torch.ops.mamba_ops.add_rms_norm_bwd.default


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Adds a layer's output to the residual stream and norms the sum for the next layer.

    ``sum = residual + x``, ``y = sum / sqrt(mean(sum**2) + eps) * weight`` over the last dim. The backward
    keeps the sum, which is there anyway, and the weight.

    Args:
        x: (..., d), float32, bfloat16, float16 or float64; any leading dims; copied where not contiguous.
        residual: like x, in its dtype or, beside half precision, in float32.
        weight: (d), x's dtype, residual's or float32.
        eps: added to the mean square, >= 0.

    Returns:
        y (..., d) in x's dtype and the sum (..., d) in residual's, from which y is taken as it is stored.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree (the message names the argument).

    Source: mamba_ssm's fused_add_norm; checked against `mamba_ops.reference.add_rms_norm`.

    >>> add_rms_norm(torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0]), torch.ones(2), eps=0.0)
    (tensor([ 1., -1.]), tensor([ 3., -3.]))
    """
    y, total = _add_norm(x, residual, weight, eps)
    return y, total


@register_fake("add_rms_norm")
def _(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), residual.new_empty(x.shape)


@register_fake("add_rms_norm_bwd")
def _(
    dy: Tensor, dsum: Tensor | None, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty(0 if dy.dtype == total.dtype else dy.shape)
    return total.new_empty(total.shape), dx, torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, _, weight, ctx.eps = inputs
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    if dy is None:
        return None if dsum is None else dsum.to(ctx.dtype), dsum, None, None
    dresidual, dx, dweight = _bwd(dy, dsum, total, weight, ctx.eps)
    return dresidual if dy.dtype == total.dtype else dx, dresidual, dweight, None


register_autograd("add_rms_norm", _setup_context, _backward)
register_once_differentiable("add_rms_norm_bwd")
