"""All of a Mamba-2 layer between its first projection and its output, keeping only what it was given."""

import math
from typing import Any

import torch
from torch import Tensor

from ._library import (
    allows_tf32,
    arithmetic_dtype,
    grad_like,
    is_silu,
    kept,
    register_autocast,
    register_autograd,
    register_fake,
    register_once_differentiable,
    state_as,
    state_rows,
    step_limits,
)

_fwd = torch.ops.mamba_ops.mamba_split_conv1d_scan_fwd.default
_bwd = torch.ops.mamba_ops.mamba_split_conv1d_scan_bwd.default

NAME = "mamba_split_conv1d_scan"


def mamba_split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None = None,
    *,
    headdim: int | None = None,
    ngroups: int = 1,
    activation: str | None = "silu",
    dt_limit: tuple[float, float] = (0.0, math.inf),
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    norm_before_gate: bool = False,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    chunk_size: int | None = None,
    conv_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    mask_negative: bool = False,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Convolution, chunked SSD, gate, norm and output projection, recomputed in the backward.

    ::

        z0, x0, z, xBC, dt = zxbcdt;  x, B, C = act(conv(xBC));  y = ssd(x, dt, A, B, C, D)
        out = outproj([silu(z0) x0, norm(y silu(z))])            z0, x0 only where zxbcdt is wide enough

    Between forward and backward no tensor is kept besides the arguments. Sizes: h heads of A, d = h p
    channels, conv1d_weight's d + 2 g n rows give n, the width of zxbcdt the k channels of z0 and x0.

    Args:
        zxbcdt: (b, l, 2 k + 2 d + 2 g n + h), the input projection; any strides.
        conv1d_weight, conv1d_bias: (d + 2 g n, w), (d + 2 g n); as for `causal_conv1d`.
        dt_bias: (h); the steps are softplus(dt + dt_bias), clamped to dt_limit.
        A, D: (h); D also (h, p); as for `ssd`.
        headdim: p; None: taken from D (h, p).
        ngroups: g.
        activation: after the convolution: None, "silu" or "swish".
        rmsnorm_weight: (d): RMS norm over groups of d / g, before or after the gate; None: gate alone.
        rmsnorm_eps: added to the mean squares.
        norm_before_gate: norm(y) silu(z) instead of norm(y silu(z)).
        outproj_weight, outproj_bias: (m, k + d), (m); None: no projection.
        chunk_size: as for `ssd`, which also tells when its products are of TF32.
        conv_state, initial_state: (b, d + 2 g n, w - 1), (b, h, p, n): states before the first token, a row
            per sequence with cu_seqlens.
        seq_idx, cu_seqlens: packed sequences, as for `ssd`.
        mask_negative: tokens whose seq_idx is negative are padding: they leave the convolution as zeros.
        return_final_states: also return the two states after the last token.

    Returns:
        out (b, l, m), or (b, l, k + d) without projection; with return_final_states (out, conv_state,
        final_state). Every floating input and the states are differentiable.

    Raises:
        RuntimeError: shapes, dtypes, devices or offsets disagree (the message names the argument).
        TypeError: initial_state is not of floating-point numbers.
        ValueError: an unknown activation, or a dt_limit that is no pair.

    Source: Dao & Gu 2024, section 7; the interface is mamba_ssm's; checked against
    `mamba_ops.reference.mamba_split_conv1d_scan`.

    >>> zxbcdt = torch.ones(1, 3, 2 * 4 + 2 * 8 + 2)  # d = 2 heads of 2, n = 8
    >>> mamba_split_conv1d_scan(
    ...     zxbcdt, torch.ones(20, 4), None, None, -torch.ones(2), headdim=2, outproj_weight=torch.ones(5, 4)
    ... ).shape
    torch.Size([1, 3, 5])
    """
    silu = is_silu(NAME, activation)
    if headdim is None:
        if D is None or D.dim() != 2:
            raise RuntimeError(f"{NAME}: headdim must be given, or D be (h, p), got neither")
        headdim = D.shape[1]
    if initial_state is not None:
        initial_state = state_as(NAME, initial_state, arithmetic_dtype(zxbcdt.dtype))
    scan = (conv1d_weight, conv1d_bias, dt_bias, A, D)
    ends = (rmsnorm_weight, outproj_weight, outproj_bias, conv_state, initial_state, seq_idx, cu_seqlens)
    limits = step_limits(NAME, dt_limit)
    norm = (rmsnorm_eps, norm_before_gate)
    tf32 = allows_tf32(zxbcdt)
    options = (headdim, ngroups, silu, *limits, *norm, chunk_size, tf32, mask_negative, return_final_states)
    out, *states = _fwd(zxbcdt, *scan, *ends, *options)
    return (out, *states) if return_final_states else out


@register_fake("mamba_split_conv1d_scan_fwd")
def _(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    rmsnorm_weight: Tensor | None,
    outproj_weight: Tensor | None,
    outproj_bias: Tensor | None,
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    headdim: int,
    ngroups: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    b, l, width = zxbcdt.shape
    h, (conv, w) = A.shape[0], conv1d_weight.shape
    d, rows, real = h * headdim, state_rows(b, cu_seqlens), arithmetic_dtype(zxbcdt.dtype)
    m = (width - h - conv + d) // 2 if outproj_weight is None else outproj_weight.shape[0]
    states = ((rows, conv, w - 1), (rows, h, headdim, (conv - d) // (2 * ngroups)))
    shapes = states if options[-1] else ((0,), (0,))
    out = zxbcdt.new_empty(b, l, m)
    return out, zxbcdt.new_empty(shapes[0]), zxbcdt.new_empty(shapes[1], dtype=real)


@register_fake("mamba_split_conv1d_scan_bwd")
def _(
    dout: Tensor | None,
    dconv_state: Tensor | None,
    dfinal_state: Tensor | None,
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    rmsnorm_weight: Tensor | None,
    outproj_weight: Tensor | None,
    outproj_bias: Tensor | None,
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    params = (conv1d_weight, conv1d_bias, dt_bias, A, D, rmsnorm_weight)
    weight, bias = (
        t if needed else None for t, needed in zip((outproj_weight, outproj_bias), rest[-2:], strict=True)
    )
    return (
        zxbcdt.new_empty(zxbcdt.shape),
        *(grad_like(t, zxbcdt) for t in params),
        *(zxbcdt.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias)),
        *(grad_like(t, zxbcdt) for t in (conv_state, initial_state)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *ctx.options, _, ctx.mask_negative, ctx.has_states = inputs[13:]
    ctx.save_for_backward(*inputs[:13])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dconv_state: Tensor | None, dstate: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
    states = (dconv_state, dstate) if ctx.has_states else (None, None)
    options = (*ctx.options, allows_tf32(tensors[0]), ctx.mask_negative, needed[7], needed[8])
    grads = _bwd(dout, *states, *tensors, *options)
    return (*kept(grads, tensors, needed), *[None] * 13)


register_autograd("mamba_split_conv1d_scan_fwd", _setup_context, _backward)
register_autocast("mamba_split_conv1d_scan_fwd", positions=(0, 7, 8, 9))
register_once_differentiable("mamba_split_conv1d_scan_bwd")
