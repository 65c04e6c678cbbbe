"""The chunked state space dual (SSD) of Mamba-2."""

import math
from typing import Any

import torch
from torch import Tensor

from ._library import (
    allows_tf32,
    arithmetic_dtype,
    grad_like,
    kept,
    register_autocast,
    register_autograd,
    register_fake,
    register_once_differentiable,
    state_as,
    state_rows,
    step_limits,
)

_fwd = torch.ops.mamba_ops.ssd_fwd.default
_bwd = torch.ops.mamba_ops.ssd_bwd.default


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    *,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs a matrix-valued linear recurrence with one decay per head, as products over chunks of tokens.

    With ``step = clamp(softplus?(dt + dt_bias), *dt_limit)``, per head::

        S[t] = exp(step[t] * A) * S[t - 1] + step[t] * outer(x[t], B[t])
        o[t] = S[t] @ C[t] + D * x[t]
        y[t] = o[t] * silu(z[t]) if z is given else o[t]

    Nothing but the inputs is saved for the backward. Sums of float32 products on a GPU err by last bits of
    their largest factors, unless torch allows TF32 for matrices (``torch.backends.cuda.matmul.fp32_precision
    = "tf32"`` or ``torch.set_float32_matmul_precision("high")``): factors are then rounded to 11 bits, by
    forward and backward each as the setting is when it runs.

    Args:
        x: (b, l, h, p) with p in 1..256, float32, bfloat16, float16 or float64; any strides.
        dt: (b, l, h), x's dtype or float32. Step sizes before bias, softplus and limits.
        A: (h), x's dtype or float32, negative: decay rates.
        B: (b, l, gB, n) with n in 1..256 and gB dividing h; x's dtype or float32. Head k reads group k //
            (h / gB).
        C: (b, l, gC, n), likewise; gC may differ from gB.
        D: (h) or (h, p), x's dtype or float32. The skip connection.
        z: (b, l, h, p), x's dtype or float32. The gate.
        dt_bias: (h), x's dtype or float32.
        dt_softplus: apply softplus (the identity above 20) to the steps.
        dt_limit: (low, high) between which the steps are clamped, after softplus.
        chunk_size: tokens per chunk, 1..256; None picks a good one. Results differ by rounding alone; on
            a GPU the chunks may be shorter, or a kernel's own.
        initial_state: (b, h, p, n), or (s, h, p, n) with cu_seqlens; any floating dtype.
        seq_idx: (b, l) integers: the state is reset where neighbours differ. The initial state enters the
            first stretch of a row, the final state is that of the last one.
        cu_seqlens: (s + 1) offsets from 0 to l of s sequences packed in one row (b = 1), each with states
            of its own. On a GPU they are not read by the host: with bad ones every output is NaN.
        return_final_state: also return the state after the last token.

    Returns:
        y (b, l, h, p) in x's dtype; with return_final_state the pair (y, final_state), the state in float32
        (float64 for float64 inputs). Every floating input and the states are differentiable.

    Raises:
        RuntimeError: shapes, dtypes, devices, limits or offsets disagree (the message names the argument).
        TypeError: initial_state is not of floating-point numbers.
        ValueError: dt_limit is no pair.

    Source: Dao & Gu 2024, sections 5 and 6; checked against `mamba_ops.reference.ssd`.

    >>> x, dt, A = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1), torch.zeros(1)
    >>> B = C = torch.ones(1, 3, 1, 4)
    >>> ssd(x, dt, A, B, C)[0, :, 0, 0]  # no decay: a running sum over 4 states
    tensor([ 4.,  8., 12.])
    """
    if initial_state is not None:
        initial_state = state_as("ssd", initial_state, arithmetic_dtype(x.dtype))
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, cu_seqlens)
    y, final_state = _fwd(
        *tensors,
        bool(dt_softplus),
        *step_limits("ssd", dt_limit),
        chunk_size,
        allows_tf32(x),
        return_final_state,
    )
    return (y, final_state) if return_final_state else y


@register_fake("ssd_fwd")
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int | None,
    tf32: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    b, _, h, p = x.shape
    states = (state_rows(b, cu_seqlens), h, p, B.shape[3]) if return_final_state else (0,)
    return torch.empty_like(x), x.new_empty(states, dtype=arithmetic_dtype(x.dtype))


@register_fake("ssd_bwd")
def _(dy: Tensor, dfinal_state: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    # rest: dt, A, B, C, D, z, dt_bias, initial_state, then what has no gradient
    return (torch.empty_like(x), *(grad_like(t, x) for t in rest[:8]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, softplus, low, high, chunk_size, _, ctx.has_state = inputs
    ctx.options = softplus, low, high, chunk_size
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = _bwd(dy, dfinal_state if ctx.has_state else None, *tensors, *ctx.options, allows_tf32(dy))
    return (*kept(grads, tensors, ctx.needs_input_grad), *[None] * 8)


register_autograd("ssd_fwd", _setup_context, _backward)
register_autocast("ssd_fwd", positions=(0, 1, 3, 4, 6))
register_once_differentiable("ssd_bwd")
