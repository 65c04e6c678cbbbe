"""A projection of few rows with the norm before it: what stands between the states of a model's steps."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _C
from ._library import register_fake
from .add_norm import add_rms_norm
from .norm import rms_norm_gated
from .state_update import causal_conv1d_update, prepare

_norm_linear = torch.ops.mamba_ops.norm_linear.default
_norm_linear_conv = torch.ops.mamba_ops.norm_linear_conv.default
_MAX_ROWS, _MAX_WIDTH = _C.norm_linear_limits()


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


def norm_linear_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    begin: int = 0,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`norm_linear`, then `causal_conv1d_update` with SiLU of d of its columns, in the same launch.

    One launch for up to 8 rows in bfloat16 on CUDA with w - 1 inputs in the state; else the operators named.

    Args:
        x, weight, bias, norm_weight, residual, eps: as for `norm_linear`.
        conv_state: (b, d, k) with k >= w - 1, updated in place.
        conv_weight: (d, w) with w in 2..4, x's dtype or float32.
        conv_bias: (d), dtype as for conv_weight.
        begin: columns begin .. begin + d - 1 of y are convolved.

    Returns:
        y (b, n) in x's dtype, and residual + x in residual's dtype, or x itself without residual. Not
        differentiable.

    Raises:
        RuntimeError, ValueError: shapes, dtypes or devices disagree, or a tensor requires gradients while
            they are recorded.

    Source: mamba_ssm's layers; checked against `norm_linear` and `causal_conv1d_update`.

    >>> state, taps = torch.tensor([[[1.0]]]), torch.tensor([[0.0, 1.0]])
    >>> norm_linear_conv(torch.tensor([[8.0]]), torch.ones(2, 1), None, None, state, taps, begin=1)[0], state
    (tensor([[8.0000, 7.9973]]), tensor([[[8.]]]))
    """
    prepare("norm_linear_conv", conv_state, x, weight, bias, norm_weight, conv_weight, conv_bias, residual)
    if conv_weight.dim() != 2:
        raise ValueError(f"norm_linear_conv: conv_weight must be (d, w), got {tuple(conv_weight.shape)}")
    d, w = conv_weight.shape
    if not 0 <= begin <= weight.shape[0] - d:
        raise ValueError(
            f"norm_linear_conv: the d = {d} columns from begin must be among the n = {weight.shape[0]} of y, "
            f"got begin = {begin}"
        )
    if fuses(x) and conv_state.dtype == x.dtype and conv_state.shape[-1] == w - 1:
        y, total = _norm_linear_conv(
            x,
            residual,
            norm_weight,
            weight,
            bias,
            conv_state,
            conv_weight,
            conv_bias,
            eps,
            begin,
        )
        return y, x if residual is None else total
    y, total = norm_linear(x, weight, bias, norm_weight, residual=residual, eps=eps)
    columns = y[..., begin : begin + d]
    columns.copy_(causal_conv1d_update(columns, conv_state, conv_weight, conv_bias, "silu"))
    return y, total


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


def _outputs(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape[0], weight.shape[0]), total


@register_fake("norm_linear")
def _(
    x: Tensor, residual: Tensor | None, z: Any, norm: Any, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return _outputs(x, residual, weight)


@register_fake("norm_linear_conv")
def _(x: Tensor, residual: Tensor | None, norm: Any, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(x, residual, weight)
