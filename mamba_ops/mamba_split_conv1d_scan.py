"""All of a Mamba-2 layer between its first projection and its output, keeping only what it was given."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._library import (
    arithmetic_dtype,
    check_dtype,
    check_shape,
    define,
    is_silu,
    register_autocast,
    state_as,
    weight_grad,
)
from .causal_conv1d import _bwd as _conv_bwd
from .causal_conv1d import _fwd as _conv_fwd
from .norm import _bwd as _norm_bwd
from .norm import _fwd as _norm_fwd
from .ssd import _bwd as _ssd_bwd
from .ssd import _fwd as _ssd_fwd

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
        chunk_size: as for `ssd`.
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
        ValueError: an unknown activation.

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
    limits = (float(dt_limit[0]), float(dt_limit[1]))
    norm = (rmsnorm_eps, norm_before_gate)
    options = (headdim, ngroups, silu, *limits, *norm, chunk_size, mask_negative, return_final_states)
    out, *states = _fwd(zxbcdt, *scan, *ends, *options)
    return (out, *states) if return_final_states else out


class _Arguments(NamedTuple):
    """The operator's arguments, by name."""

    zxbcdt: Tensor
    conv1d_weight: Tensor
    conv1d_bias: Tensor | None
    dt_bias: Tensor | None
    A: Tensor
    D: Tensor | None
    rmsnorm_weight: Tensor | None
    outproj_weight: Tensor | None
    outproj_bias: Tensor | None
    conv_state: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None
    cu_seqlens: Tensor | None
    headdim: int
    ngroups: int
    silu: bool
    dt_min: float
    dt_max: float
    rmsnorm_eps: float
    norm_before_gate: bool
    chunk_size: int | None
    mask_negative: bool
    return_final_states: bool

    @property
    def d(self) -> int:
        return self.A.shape[0] * self.headdim

    @property
    def padding(self) -> Tensor | None:
        """Which tokens leave the convolution as zeros (b, 1, l)."""
        return self.seq_idx[:, None] < 0 if self.mask_negative and self.seq_idx is not None else None

    @property
    def sizes(self) -> list[int]:
        """Columns of z0, x0, z, xBC and dt."""
        h, conv = self.A.shape[0], self.conv1d_weight.shape[0]
        k = (self.zxbcdt.shape[-1] - self.d - conv - h) // 2
        return [k, k, self.d, conv, h]

    def check(self) -> None:
        check_shape(NAME, "zxbcdt", self.zxbcdt, "(b, l, 2 k + 2 d + 2 g n + h)", None, None, None)
        check_shape(NAME, "A", self.A, "(h)", None)
        check_shape(NAME, "conv1d_weight", self.conv1d_weight, "(d + 2 g n, w)", None, None)
        h, p, g, d, conv = self.A.shape[0], self.headdim, self.ngroups, self.d, self.conv1d_weight.shape[0]
        if p < 1 or g < 1 or h % g:
            raise RuntimeError(
                f"{NAME}: headdim must be positive and ngroups divide h = {h}, got {p} and {g}"
            )
        if conv <= d or (conv - d) % (2 * g):
            raise RuntimeError(
                f"{NAME}: conv1d_weight must have d + 2 g n rows with d = {d} and g = {g}, got {conv}"
            )
        width = self.zxbcdt.shape[-1]
        if width < d + conv + h or (width - d - conv - h) % 2:
            raise RuntimeError(
                f"{NAME}: zxbcdt must have 2 k + 2 d + 2 g n + h = 2 k + {d + conv + h} columns, got {width}"
            )
        out = self.sizes[0] + d
        if self.rmsnorm_weight is not None:
            check_shape(NAME, "rmsnorm_weight", self.rmsnorm_weight, "(d)", d)
        if self.outproj_weight is not None:
            check_shape(NAME, "outproj_weight", self.outproj_weight, "(m, k + d)", None, out)
            check_dtype(NAME, "outproj_weight", self.outproj_weight, self.zxbcdt.dtype)
        if self.outproj_bias is not None:
            if self.outproj_weight is None:
                raise RuntimeError(f"{NAME}: outproj_bias needs outproj_weight")
            check_shape(NAME, "outproj_bias", self.outproj_bias, "(m)", self.outproj_weight.shape[0])


class _Inside(NamedTuple):
    """What the convolution and the scan are given, and give."""

    z0: Tensor  # (b, l, k)
    x0: Tensor
    z: Tensor  # (b, l, d)
    xBC: Tensor  # (b, d + 2 g n, l)
    conv_state: Tensor
    scan: tuple[Any, ...]  # arguments of the scan, up to cu_seqlens
    options: tuple[Any, ...]  # and its softplus, limits and chunk size


def _inside(a: _Arguments) -> _Inside:
    z0, x0, z, xBC, dt = torch.split(a.zxbcdt, a.sizes, dim=-1)
    xBC = xBC.transpose(1, 2)
    states = (a.conv_state, a.seq_idx, a.cu_seqlens)
    conved, conv_state = _conv_fwd(
        xBC, a.conv1d_weight, a.conv1d_bias, *states, a.silu, a.return_final_states
    )
    if a.padding is not None:
        conved = torch.where(a.padding, 0, conved)
    h, p, g = a.A.shape[0], a.headdim, a.ngroups
    x, BC = torch.split(conved.transpose(1, 2), [a.d, conved.shape[1] - a.d], dim=-1)
    B, C = BC.view(*BC.shape[:-1], 2, g, BC.shape[-1] // (2 * g)).unbind(2)
    gate = _by_heads(z, h, p) if a.rmsnorm_weight is None else None
    tokens = (_by_heads(x, h, p), dt, a.A, B, C, a.D, gate, a.dt_bias)
    scan = (*tokens, a.initial_state, a.seq_idx, a.cu_seqlens)
    return _Inside(z0, x0, z, xBC, conv_state, scan, (True, a.dt_min, a.dt_max, a.chunk_size))


def _by_heads(t: Tensor, h: int, p: int) -> Tensor:
    return t.view(*t.shape[:-1], h, p)


def _norm_options(a: _Arguments) -> tuple[float, int, bool]:
    return a.rmsnorm_eps, a.d // a.ngroups, a.norm_before_gate


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = _Arguments(*args)
    a.check()
    i = _inside(a)
    y, state = _ssd_fwd(*i.scan, *i.options, a.return_final_states)
    y = y.flatten(-2)
    if a.rmsnorm_weight is not None:
        y = _norm_fwd(y, a.rmsnorm_weight, i.z, *_norm_options(a))
    if i.z0.shape[-1]:
        y = torch.cat([F.silu(i.z0) * i.x0, y], dim=-1)
    if a.outproj_weight is not None:
        bias = None if a.outproj_bias is None else a.outproj_bias.to(y.dtype)
        y = F.linear(y, a.outproj_weight, bias)
    return y, i.conv_state, state


_fwd = define(
    "mamba_split_conv1d_scan_fwd(Tensor zxbcdt, Tensor conv1d_weight, Tensor? conv1d_bias, Tensor? dt_bias, "
    "Tensor A, Tensor? D, Tensor? rmsnorm_weight, Tensor? outproj_weight, Tensor? outproj_bias, "
    "Tensor? conv_state, Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, SymInt headdim, "
    "SymInt ngroups, bool silu, float dt_min, float dt_max, float rmsnorm_eps, bool norm_before_gate, "
    "SymInt? chunk_size, bool mask_negative, bool return_final_states) -> (Tensor, Tensor, Tensor)",
    _forward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.options = inputs[13:]
    ctx.save_for_backward(*inputs[:13])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dconv_state: Tensor | None, dstate: Tensor | None
) -> tuple[Tensor | None, ...]:
    a = _Arguments(*ctx.saved_tensors, *ctx.options)
    needed = _Arguments(*ctx.needs_input_grad)
    if not a.return_final_states:
        dconv_state = dstate = None
    i = _inside(a)
    k = i.z0.shape[-1]
    if dout is None:
        m = k + a.d if a.outproj_weight is None else a.outproj_weight.shape[0]
        dout = a.zxbcdt.new_zeros(*a.zxbcdt.shape[:2], m)

    y: Any = None
    normed: Any = None
    if a.rmsnorm_weight is not None or needed.outproj_weight:
        normed = y = _ssd_fwd(*i.scan, *i.options, False)[0].flatten(-2)
        if a.rmsnorm_weight is not None and needed.outproj_weight:
            normed = _norm_fwd(y, a.rmsnorm_weight, i.z, *_norm_options(a))
    dinner, doutproj_weight, doutproj_bias = dout, None, None
    if a.outproj_weight is not None:
        dinner = dout @ a.outproj_weight
        if needed.outproj_weight:
            inner = torch.cat([F.silu(i.z0) * i.x0, normed], dim=-1) if k else normed
            doutproj_weight = weight_grad(dout, inner, True)
        if a.outproj_bias is not None and needed.outproj_bias:
            doutproj_bias = dout.sum((0, 1), dtype=a.outproj_bias.dtype)
    dmlp, dy = torch.split(dinner, [k, a.d], dim=-1)
    dz = drmsnorm_weight = None
    if a.rmsnorm_weight is not None:
        dy, drmsnorm_weight, dz = _norm_bwd(dy, y, a.rmsnorm_weight, i.z, *_norm_options(a))
    del y, normed

    dy = _by_heads(dy, a.A.shape[0], a.headdim)
    dx, ddt, dA, dB, dC, dD, dgate, ddt_bias, dinitial = _ssd_bwd(dy, dstate, *i.scan, *i.options)
    dz = dgate.flatten(-2) if dz is None else dz
    dxBC = torch.cat([dx.flatten(-2), dB.flatten(-2), dC.flatten(-2)], dim=-1).transpose(1, 2)
    del dx, dB, dC, dy
    if a.padding is not None:
        dxBC = torch.where(a.padding, 0, dxBC)
    dxBC, dconv_weight, dconv_bias, dconv_initial = _conv_bwd(
        dxBC,
        dconv_state,
        i.xBC,
        a.conv1d_weight,
        a.conv1d_bias,
        a.conv_state,
        a.seq_idx,
        a.cu_seqlens,
        a.silu,
    )
    parts = [dz, dxBC.transpose(1, 2), ddt]
    if k:
        parts = [torch.ops.aten.silu_backward(dmlp * i.x0, i.z0), dmlp * F.silu(i.z0), *parts]
    grads: list[Tensor | None] = [torch.cat(parts, dim=-1), dconv_weight, dconv_bias, ddt_bias, dA, dD]
    grads += [drmsnorm_weight, doutproj_weight, doutproj_bias, dconv_initial, dinitial]
    kept = [grad if given is not None else None for grad, given in zip(grads, a, strict=False)]
    return (*kept, *[None] * 12)


torch.library.register_autograd(
    "mamba_ops::mamba_split_conv1d_scan_fwd", _backward, setup_context=_setup_context
)
register_autocast("mamba_split_conv1d_scan_fwd", positions=(0, 7, 8, 9))
