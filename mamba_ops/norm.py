"""RMS norm over groups of the last dim with an optional SiLU gate."""

from typing import Any

import torch
from torch import Tensor

from ._library import register_autocast, register_autograd, register_fake, register_once_differentiable

_fwd = torch.ops.mamba_ops.rms_norm_gated_fwd.default
_bwd = torch.ops.mamba_ops.rms_norm_gated_bwd.default


def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """Divides groups of a row by their root mean square, scales by `weight`, and gates with ``silu(z)``.

    ``y = norm(x * silu(z)) * weight``, or with norm_before_gate ``y = norm(x) * weight * silu(z)``, where
    ``norm(v) = v / sqrt(mean(v**2) + eps)`` over each group. The backward keeps the inputs and nothing else.

    Args:
        x: (..., d), float32, bfloat16, float16 or float64; any leading dims, any strides.
        weight: (d), x's dtype or float32.
        z: like x: the gate before its SiLU; None: no gate.
        eps: added to the mean square, >= 0.
        group_size: values in a group, a divisor of d; None: the whole row.
        norm_before_gate: the order of the two.

    Returns:
        y (..., d) in x's dtype, contiguous.

    Raises:
        RuntimeError: shapes, dtypes, devices or group_size disagree (the message names the argument).

    Source: Dao & Gu 2024, section 7; checked against `mamba_ops.reference.rms_norm_gated`.

    >>> rms_norm_gated(torch.tensor([3.0, -3.0]), torch.ones(2), eps=0.0)
    tensor([ 1., -1.])
    """
    y: Tensor = _fwd(
        x, weight, z, eps, weight.numel() if group_size is None else group_size, norm_before_gate
    )
    return y


@register_fake("rms_norm_gated_fwd")
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("rms_norm_gated_bwd")
def _(dy: Tensor, x: Tensor, weight: Tensor, z: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), x.new_empty(0 if z is None else x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, ctx.group_size, ctx.norm_before_gate = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, z = ctx.saved_tensors
    dx, dweight, dz = _bwd(dy, x, weight, z, ctx.eps, ctx.group_size, ctx.norm_before_gate)
    return dx, dweight, None if z is None else dz, None, None, None


register_autograd("rms_norm_gated_fwd", _setup_context, _backward)
register_autocast("rms_norm_gated_fwd", positions=(0, 2))
register_once_differentiable("rms_norm_gated_bwd")
