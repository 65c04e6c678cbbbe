"""All of a Mamba-1 layer between its first projection and its output, keeping only what it was given."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._library import (
    arithmetic_dtype,
    check_dtype,
    check_shape,
    define,
    register_autocast,
    state_as,
    weight_grad,
)
from .causal_conv1d import _bwd as _conv_bwd
from .causal_conv1d import _fwd as _conv_fwd
from .norm import _bwd as _norm_bwd
from .norm import _fwd as _norm_fwd
from .selective_scan import _bwd as _scan_bwd
from .selective_scan import _fwd as _scan_fwd

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


class _Arguments(NamedTuple):
    """The operator's arguments, by name."""

    xz: Tensor
    conv1d_weight: Tensor
    conv1d_bias: Tensor | None
    x_proj_weight: Tensor
    delta_proj_weight: Tensor
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    A: Tensor
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    delta_bias: Tensor | None
    B_proj_bias: Tensor | None
    C_proj_bias: Tensor | None
    b_rms_weight: Tensor | None
    c_rms_weight: Tensor | None
    dt_rms_weight: Tensor | None
    conv_state: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None
    cu_seqlens: Tensor | None
    delta_softplus: bool
    rms_eps: float
    return_final_states: bool

    @property
    def rank(self) -> int:
        return self.delta_proj_weight.shape[1]

    @property
    def columns(self) -> tuple[slice, slice]:
        """Where B and C lie in the projection of u."""
        width = self.A.shape[1] * (2 if self.A.is_complex() else 1)
        return slice(self.rank, self.rank + width), slice(self.x_proj_weight.shape[0] - width, None)

    def check(self) -> None:
        check_shape(NAME, "xz", self.xz, "(b, 2 d, l)", None, None, None)
        d = self.A.shape[0]
        check_shape(NAME, "A", self.A, "(d, n)", None, None)
        check_shape(NAME, "xz", self.xz, "(b, 2 d, l)", None, 2 * d, None)
        check_shape(NAME, "delta_proj_weight", self.delta_proj_weight, "(d, r)", d, None)
        check_shape(NAME, "x_proj_weight", self.x_proj_weight, "(r + 2 n, d)", None, d)
        check_shape(NAME, "out_proj_weight", self.out_proj_weight, "(m, d)", None, d)
        for name in ("x_proj_weight", "delta_proj_weight", "out_proj_weight"):
            check_dtype(NAME, name, getattr(self, name), self.xz.dtype)
        if self.out_proj_bias is not None:
            m = self.out_proj_weight.shape[0]
            check_shape(NAME, "out_proj_bias", self.out_proj_bias, "(m)", m)
        n = self.A.shape[1] * (2 if self.A.is_complex() else 1)
        rows, projected = self.x_proj_weight.shape[0], (self.B is None) + (self.C is None)
        if all(rows != self.rank + k * n for k in range(projected, 3)):
            raise RuntimeError(
                f"{NAME}: x_proj_weight must have r + 2 n = {self.rank + 2 * n} rows, got {rows}"
            )
        for name, given, bias, weight in (
            ("B", self.B, self.B_proj_bias, self.b_rms_weight),
            ("C", self.C, self.C_proj_bias, self.c_rms_weight),
        ):
            if bias is not None:
                check_shape(NAME, f"{name}_proj_bias", bias, "(n)", n)
            if weight is not None:
                check_shape(NAME, f"{name.lower()}_rms_weight", weight, "(n)", n)
            if given is not None and (bias is not None or weight is not None):
                raise RuntimeError(f"{NAME}: the bias and norm of {name} need it projected, got {name} too")
            if self.A.is_complex() and weight is not None:
                raise RuntimeError(f"{NAME}: {name.lower()}_rms_weight needs a real A, got a complex one")
        if self.dt_rms_weight is not None:
            check_shape(NAME, "dt_rms_weight", self.dt_rms_weight, "(d)", d)


class _Inside(NamedTuple):
    """What lies between xz and the scan."""

    u: Tensor  # (b, d, l)
    conv_state: Tensor
    projected: Tensor  # (b, l, r + 2 n)
    raw: tuple[Tensor, Tensor, Tensor]  # delta, B, C before their norms, (b, l, .)
    delta: Tensor  # (b, d, l)
    B: Tensor  # as the scan takes them
    C: Tensor


def _inside(a: _Arguments) -> _Inside:
    x = a.xz.chunk(2, dim=1)[0]
    states = (a.conv_state, a.seq_idx, a.cu_seqlens)
    u, conv_state = _conv_fwd(x, a.conv1d_weight, a.conv1d_bias, *states, True, a.return_final_states)
    projected = F.linear(u.transpose(1, 2), a.x_proj_weight)
    raw_delta = F.linear(projected[..., : a.rank], a.delta_proj_weight)
    raw_B, raw_C = (
        projected[..., where] if bias is None else projected[..., where] + bias.to(projected.dtype)
        for where, bias in zip(a.columns, (a.B_proj_bias, a.C_proj_bias), strict=True)
    )
    delta = _rms_norm(raw_delta, a.dt_rms_weight, a.rms_eps).transpose(1, 2)
    B = _matrix(_rms_norm(raw_B, a.b_rms_weight, a.rms_eps), a.A) if a.B is None else a.B
    C = _matrix(_rms_norm(raw_C, a.c_rms_weight, a.rms_eps), a.A) if a.C is None else a.C
    return _Inside(u, conv_state, projected, (raw_delta, raw_B, raw_C), delta, B, C)


def _scan_arguments(a: _Arguments, i: _Inside) -> tuple[Tensor | None, ...]:
    z = a.xz.chunk(2, dim=1)[1]
    return i.u, i.delta, a.A, i.B, i.C, a.D, z, a.delta_bias, a.initial_state, a.seq_idx, a.cu_seqlens


def _matrix(projected: Tensor, A: Tensor) -> Tensor:
    """The scan's B or C (b, 1, n, l) from a projection (b, l, n), or (b, l, 2 n) for complex A."""
    if A.is_complex():
        parts = projected.to(A.real.dtype)
        projected = torch.complex(parts[..., 0::2], parts[..., 1::2])
    return projected.transpose(1, 2).unsqueeze(1)


def _projection_of(dmatrix: Tensor) -> Tensor:
    """The gradient of `_matrix`: (b, 1, n, l) to (b, l, n), or (b, l, 2 n) from a complex one."""
    grad = dmatrix.squeeze(1).transpose(1, 2)
    return torch.view_as_real(grad).flatten(-2) if grad.is_complex() else grad


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed: Tensor = x if weight is None else _norm_fwd(x, weight, None, eps, x.shape[-1], False)
    return normed


def _rms_norm_grads(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    if weight is None:
        return dy, None
    dx, dweight, _ = _norm_bwd(dy, x, weight, None, eps, x.shape[-1], False)
    return dx, dweight


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = _Arguments(*args)
    a.check()
    inside = _inside(a)
    y, state, _ = _scan_fwd(*_scan_arguments(a, inside), a.delta_softplus, a.return_final_states, False)
    bias = None if a.out_proj_bias is None else a.out_proj_bias.to(y.dtype)
    return F.linear(y.transpose(1, 2), a.out_proj_weight, bias), inside.conv_state, state


_fwd = define(
    "mamba_inner_fwd(Tensor xz, Tensor conv1d_weight, Tensor? conv1d_bias, Tensor x_proj_weight, "
    "Tensor delta_proj_weight, Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A, Tensor? B, "
    "Tensor? C, Tensor? D, Tensor? delta_bias, Tensor? B_proj_bias, Tensor? C_proj_bias, "
    "Tensor? b_rms_weight, Tensor? c_rms_weight, Tensor? dt_rms_weight, Tensor? conv_state, "
    "Tensor? initial_state, Tensor? seq_idx, Tensor? cu_seqlens, bool delta_softplus, float rms_eps, "
    "bool return_final_states) -> (Tensor, Tensor, Tensor)",
    _forward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, softplus, eps, has_states = inputs
    ctx.options = softplus, eps, has_states
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dconv_state: Tensor | None, dstate: Tensor | None
) -> tuple[Tensor | None, ...]:
    a = _Arguments(*ctx.saved_tensors, *ctx.options)
    needed = _Arguments(*ctx.needs_input_grad)
    if not a.return_final_states:
        dconv_state = dstate = None
    i = _inside(a)
    scan = _scan_arguments(a, i)
    y, _, checkpoints = _scan_fwd(*scan, a.delta_softplus, False, True)
    y = y.transpose(1, 2)
    if dout is None:
        dout = y.new_zeros(*y.shape[:-1], a.out_proj_weight.shape[0])
    dout_proj_weight = weight_grad(dout, y, needed.out_proj_weight)
    dout_proj_bias = None
    if a.out_proj_bias is not None and needed.out_proj_bias:
        dout_proj_bias = dout.sum((0, 1), dtype=a.out_proj_bias.dtype)

    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial = _scan_bwd(
        (dout @ a.out_proj_weight).transpose(1, 2), dstate, *scan, checkpoints, a.delta_softplus
    )
    del y, checkpoints
    raw_delta, raw_B, raw_C = i.raw
    dprojected = torch.zeros_like(i.projected)
    ddelta, ddt_rms = _rms_norm_grads(ddelta.transpose(1, 2), raw_delta, a.dt_rms_weight, a.rms_eps)
    ddelta_proj_weight = weight_grad(ddelta, i.projected[..., : a.rank], needed.delta_proj_weight)
    dprojected[..., : a.rank] = ddelta @ a.delta_proj_weight
    dB_rms = dC_rms = dB_proj_bias = dC_proj_bias = None
    where_B, where_C = a.columns
    if a.B is None:
        dB, dB_rms = _rms_norm_grads(_projection_of(dB), raw_B, a.b_rms_weight, a.rms_eps)
        dB_proj_bias = None if a.B_proj_bias is None else dB.sum((0, 1), dtype=a.B_proj_bias.dtype)
        dprojected[..., where_B] = dB
        dB = None
    if a.C is None:
        dC, dC_rms = _rms_norm_grads(_projection_of(dC), raw_C, a.c_rms_weight, a.rms_eps)
        dC_proj_bias = None if a.C_proj_bias is None else dC.sum((0, 1), dtype=a.C_proj_bias.dtype)
        dprojected[..., where_C] = dC
        dC = None
    dx_proj_weight = weight_grad(dprojected, i.u.transpose(1, 2), needed.x_proj_weight)
    du = du + (dprojected @ a.x_proj_weight).transpose(1, 2)
    dx, dconv_weight, dconv_bias, dconv_initial = _conv_bwd(
        du,
        dconv_state,
        a.xz.chunk(2, dim=1)[0],
        a.conv1d_weight,
        a.conv1d_bias,
        a.conv_state,
        a.seq_idx,
        a.cu_seqlens,
        True,
    )
    grads: list[Tensor | None] = [_cat_like(dx, dz, a.xz), dconv_weight, dconv_bias, dx_proj_weight]
    grads += [ddelta_proj_weight, dout_proj_weight, dout_proj_bias, dA, dB, dC, dD, ddelta_bias]
    grads += [dB_proj_bias, dC_proj_bias, dB_rms, dC_rms, ddt_rms, dconv_initial, dinitial]
    kept = (grad if given is not None else None for grad, given in zip(grads, a, strict=False))
    return (*kept, None, None, None, None, None)


def _cat_like(dx: Tensor, dz: Tensor, xz: Tensor) -> Tensor:
    """(b, 2 d, l) from its halves, joined as xz lies in memory."""
    if xz.stride(1) <= xz.stride(2):
        return torch.cat([dx.transpose(1, 2), dz.transpose(1, 2)], dim=-1).transpose(1, 2)
    return torch.cat([dx, dz], dim=1)


torch.library.register_autograd("mamba_ops::mamba_inner_fwd", _backward, setup_context=_setup_context)
register_autocast("mamba_inner_fwd", positions=(0, 3, 4, 5, 6, 12, 13, 17))
