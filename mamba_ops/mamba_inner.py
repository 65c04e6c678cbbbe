"""All of a Mamba-1 layer between its first projection and its output, keeping only what it was given."""

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

_fwd = torch.ops.mamba_ops.mamba_inner_fwd.default
_bwd = torch.ops.mamba_ops.mamba_inner_bwd.default

NAME = "mamba_inner"


def mamba_inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    rms_eps: float = 1e-6,
    conv_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Convolution, projections, selective scan, gate and output projection, recomputed in the backward.

    ::

        x, z = xz;  u = silu(conv(x));  dt, B, C = x_proj(u);  delta = delta_proj(dt)
        out = out_proj(selective_scan(u, norm(delta), A, norm(B), norm(C), D, z, delta_bias))

    Between forward and backward no tensor is kept besides the arguments.

    Args:
        xz: (b, 2 d, l), the input projection: x, then the gate z; any strides, (b, l, 2 d) memory transposed
            the best.
        conv1d_weight, conv1d_bias: (d, w), (d); as for `causal_conv1d`.
        x_proj_weight: (r + 2 n, d): rows of dt, B, C (B and C with 2 n rows each, real and imaginary parts in
            turns, where A is complex; rows of a B or C that is given may be there or not).
        delta_proj_weight: (d, r).
        out_proj_weight, out_proj_bias: (m, d), (m).
        A: (d, n); see `selective_scan`, also for B, C (None: projected), D and delta_bias.
        B_proj_bias, C_proj_bias: added to the projected B and C.
        delta_softplus: apply softplus to the steps.
        b_rms_weight, c_rms_weight, dt_rms_weight: (n), (n), (d): RMS norms of the projected B and C, and of
            delta behind delta_proj (as mamba_ssm has it for FalconMamba).
        rms_eps: added to the mean squares of these norms.
        conv_state, initial_state: (b, d, w - 1), (b, d, n): states before the first token, a row per sequence
            with cu_seqlens.
        seq_idx, cu_seqlens: packed sequences, as for `selective_scan`.
        return_final_states: also return the two states after the last token.

    Returns:
        out (b, l, m); with return_final_states (out, conv_state, final_state). Every floating input and the
        states are differentiable.

    Raises:
        RuntimeError: shapes, dtypes, devices or offsets disagree (the message names the argument).
        TypeError: initial_state is of integers, or complex where A is not.

    Source: Gu & Dao 2023, figure 3; the interface is mamba_ssm's; checked against
    `mamba_ops.reference.mamba_inner`.

    >>> xz, w, one = torch.ones(1, 4, 3), torch.ones(2, 4), torch.ones(1)
    >>> x_proj, proj, A = torch.ones(3, 2), torch.ones(2, 1), -torch.ones(2, 1)
    >>> mamba_inner(xz, w, None, x_proj, proj, torch.ones(5, 2), None, A).shape
    torch.Size([1, 3, 5])
    """
    B, C = (m.unsqueeze(1) if m is not None and m.dim() == 3 else m for m in (B, C))
    if initial_state is not None:
        real = arithmetic_dtype(xz.dtype)
        initial_state = state_as(NAME, initial_state, real.to_complex() if A.is_complex() else real)
    weights = (conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias)
    scan = (A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight)
    starts = (conv_state, initial_state, seq_idx, cu_seqlens)
    out, *states = _fwd(xz, *weights, *scan, *starts, bool(delta_softplus), rms_eps, return_final_states)
    return (out, *states) if return_final_states else out


@register_fake("mamba_inner_fwd")
def _(xz: Tensor, conv1d_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    out_proj_weight, A, cu_seqlens, has_states = rest[3], rest[5], rest[18], rest[-1]
    b, _, l = xz.shape
    (d, w), n, rows = conv1d_weight.shape, A.shape[1], state_rows(b, cu_seqlens)
    real = arithmetic_dtype(xz.dtype)
    shapes = ((rows, d, w - 1), (rows, d, n)) if has_states else ((0,), (0,))
    return (
        xz.new_empty(b, l, out_proj_weight.shape[0]),
        xz.new_empty(shapes[0]),
        xz.new_empty(shapes[1], dtype=real.to_complex() if A.is_complex() else real),
    )


@register_fake("mamba_inner_bwd")
def _(dout: Tensor | None, dconv_state: Tensor | None, dstate: Tensor | None, xz: Tensor, *rest: Any) -> Any:
    b, width, l = xz.shape
    dxz = xz.new_empty(b, width, l) if xz.stride(1) > xz.stride(2) else xz.new_empty(b, l, width).mT
    chosen = dict(zip((2, 3, 4, 5), rest[-4:], strict=True))  # projections: whether a gradient is wanted
    grads = [dxz]
    for i, t in enumerate(rest[:18]):
        if i in chosen:
            grads.append(t.new_empty(t.shape) if t is not None and chosen[i] else xz.new_empty(0))
        else:
            grads.append(grad_like(t, xz))
    return tuple(grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *ctx.options, ctx.has_states = inputs[21:]
    ctx.save_for_backward(*inputs[:21])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dconv_state: Tensor | None, dstate: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
    states = (dconv_state, dstate) if ctx.has_states else (None, None)
    grads = _bwd(dout, *states, *tensors, *ctx.options, *needed[3:7])
    return (*kept(grads, tensors, needed), *[None] * 5)


register_autograd("mamba_inner_fwd", _setup_context, _backward)
register_autocast("mamba_inner_fwd", positions=(0, 3, 4, 5, 6, 12, 13, 17))
register_once_differentiable("mamba_inner_bwd")
