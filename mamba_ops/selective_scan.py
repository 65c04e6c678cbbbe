"""The selective scan of Mamba-1."""

from typing import Any

import torch
from torch import Tensor

from ._library import (
    arithmetic_dtype,
    grad_like,
    kept,
    register_autocast,
    register_autograd,
    register_fake,
    register_once_differentiable,
    state_as,
    state_rows,
)

_fwd = torch.ops.mamba_ops.selective_scan_fwd.default
_bwd = torch.ops.mamba_ops.selective_scan_bwd.default


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs a linear recurrence with input-dependent steps through every channel.

    With ``step = softplus?(delta + delta_bias)``, per channel and state::

        h[t] = exp(step[t] * A) * h[t - 1] + step[t] * B[t] * u[t]
        o[t] = sum_n C[t] * h[t] + D * u[t]          (twice the real part of the sum where A is complex)
        y[t] = o[t] * silu(z[t]) if z is given else o[t]

    Besides its inputs the backward keeps one state (d, n) in 128 tokens, on CUDA in 64.

    Args:
        u: (b, d, l), float32, bfloat16, float16 or float64; any strides ((b, l, d) memory transposed is as
            good).
        delta: (b, d, l), u's dtype or float32. Step sizes before bias and softplus; after them they should
            be > 0.
        A: (d, n), u's dtype or float32, negative: decay rates; or complex64 (complex128 for float64) with a
            negative real part, the states then standing for one of each conjugate pair.
        B, C: (b, n, l), (b, g, n, l) with g dividing d, or constant (d, n), each; u's dtype or float32,
            complex if A is.
        D: (d), u's dtype or float32. The skip connection.
        z: (b, d, l), u's dtype or float32. The gate.
        delta_bias: (d), u's dtype or float32.
        delta_softplus: apply softplus (the identity above 20) to the steps.
        initial_state: (b, d, n), or (s, d, n) with cu_seqlens; any floating dtype (complex if A is).
        seq_idx: (b, l) integers: the state is reset where neighbours differ. The initial state enters the
            first stretch of a row, the final state is that of the last one.
        cu_seqlens: (s + 1) offsets from 0 to l of s sequences packed in one row (b = 1), each with states
            of its own. On a GPU they are not read by the host: with bad ones every output is NaN.
        return_final_state: also return the state after the last token.

    Returns:
        y (b, d, l) in u's dtype and layout; with return_final_state the pair (y, final_state), the state in
        float32 (float64 for float64 inputs, complex if A is). Every floating input and the states are
        differentiable.

    Raises:
        RuntimeError: shapes, dtypes, devices or offsets disagree (the message names the argument).
        TypeError: initial_state is of integers, or complex where A is not.

    Source: Gu & Dao 2023, Algorithm 2; checked against `mamba_ops.reference.selective_scan`.

    >>> u, delta, A = torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.zeros(2, 1)
    >>> B = C = torch.ones(1, 1, 3)
    >>> selective_scan(u, delta, A, B, C)[0, 0]  # no decay: a running sum
    tensor([1., 2., 3.])
    """
    if B.dim() == 3:
        B = B.unsqueeze(1)
    if C.dim() == 3:
        C = C.unsqueeze(1)
    if initial_state is not None:
        real = arithmetic_dtype(u.dtype)
        initial_state = state_as(
            "selective_scan", initial_state, real.to_complex() if A.is_complex() else real
        )
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, final_state, _ = _fwd(*tensors, seq_idx, cu_seqlens, bool(delta_softplus), return_final_state, save)
    return (y, final_state) if return_final_state else y


@register_fake("selective_scan_fwd")
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    return_final_state: bool,
    save_checkpoints: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    b, d, l = u.shape
    n = A.shape[1]
    real = arithmetic_dtype(u.dtype)
    state = real.to_complex() if A.is_complex() else real
    states = (state_rows(b, cu_seqlens), d, n) if return_final_state else (0,)
    interval = 64 if u.device.type == "cuda" else 128  # kScanCheckpointCuda, kScanCheckpoint
    checkpoints = (b, l // interval, 2 if A.is_complex() else 1, n, d) if save_checkpoints else (0,)
    return torch.empty_like(u), u.new_empty(states, dtype=state), u.new_empty(checkpoints, dtype=real)


@register_fake("selective_scan_bwd")
def _(dy: Tensor, dfinal_state: Tensor | None, u: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    # rest: delta, A, B, C, D, z, delta_bias, initial_state, then what has no gradient
    return (torch.empty_like(u), *(grad_like(t, u) for t in rest[:8]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.delta_softplus, ctx.has_state, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = _bwd(dy, dfinal_state if ctx.has_state else None, *tensors, checkpoints, ctx.delta_softplus)
    return (*kept(grads, tensors, ctx.needs_input_grad), *[None] * 5)


register_autograd("selective_scan_fwd", _setup_context, _backward)
register_autocast("selective_scan_fwd", positions=(0, 1, 3, 4, 6))
register_once_differentiable("selective_scan_bwd")
