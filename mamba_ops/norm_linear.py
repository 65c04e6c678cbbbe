"""A projection of few rows with the norm before it: what stands between the states of a model's steps."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ._library import register_fake
from .add_norm import add_rms_norm
from .norm import rms_norm_gated

_norm_linear = torch.ops.mamba_ops.norm_linear.default
_MAX_ROWS, _MAX_WIDTH = 8, 16384  # beyond, torch's product is as fast


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
) -> tuple[Tensor, Tensor]:
    """`torch.nn.functional.linear` of a norm: one launch that streams the weight, for few rows on a GPU.

    ``linear(norm(residual + x))`` as `add_rms_norm`, ``linear(norm(x * silu(z)))`` as `rms_norm_gated`, or
    ``linear(norm(x))``; without norm_weight ``linear(x)``. In one launch for up to 8 rows in bfloat16 on
    CUDA where no gradient is asked for; else by the operators named, which are differentiable.

    Args:
        x: (b, k), or any leading dims; float32, bfloat16, float16 or float64.
        weight: (n, k), x's dtype.
        bias: (n), x's dtype.
        norm_weight: (k), x's dtype or float32.
        residual: like x, in its dtype or, beside half precision, in float32; needs norm_weight.
        z: like x: the gate before its SiLU; needs norm_weight, and excludes residual.
        eps: added to the mean square, >= 0.
        norm_before_gate: ``norm(x) * silu(z)`` instead.

    Returns:
        y (b, n) in x's dtype, and residual + x in residual's dtype, or x itself without residual.

    Raises:
        RuntimeError, ValueError: shapes, dtypes or devices disagree, or arguments that exclude each other.

    Source: mamba_ssm's layers; checked against `add_rms_norm`, `rms_norm_gated` and `linear` in float64.

    >>> norm_linear(torch.tensor([[3.0, -3.0]]), torch.eye(2), None, torch.ones(2), eps=0.0)[0]
    tensor([[ 1., -1.]])
    """
    if norm_weight is None and not (residual is None and z is None):
        raise ValueError("norm_linear: residual and z are of the norm, but norm_weight is None")
    if residual is not None and z is not None:
        raise ValueError("norm_linear: residual and z exclude one another")
    if fuses(x, weight, bias, norm_weight, residual, z):
        y, total = _norm_linear(x, residual, z, norm_weight, weight, bias, eps, norm_before_gate)
        return y, x if residual is None else total
    total = x
    if norm_weight is not None and residual is not None:
        x, total = add_rms_norm(x, residual, norm_weight, eps=eps)
    elif norm_weight is not None:
        x = rms_norm_gated(x, norm_weight, z, eps=eps, norm_before_gate=norm_before_gate)
    return F.linear(x, weight, bias), total


def fuses(x: Tensor, *others: Tensor | None) -> bool:
    """Whether norm_linear of x (b, k) and its other tensors is one launch."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and x.dim() == 2
        and x.shape[0] <= _MAX_ROWS
        and 0 < x.shape[1] <= _MAX_WIDTH
        and not torch.is_autocast_enabled("cuda")
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)))
    )


@register_fake("norm_linear")
def _(
    x: Tensor, residual: Tensor | None, z: Any, norm: Any, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape[0], weight.shape[0]), total
