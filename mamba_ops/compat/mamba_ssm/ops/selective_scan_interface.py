"""mamba_ssm.ops.selective_scan_interface on mamba_ops' operators."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .... import mamba_inner, reference, rms_norm_gated, selective_scan
from ...autocast import without_autocast
from ...causal_conv1d import causal_conv1d_fn as causal_conv1d_fn


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool | None = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan; out lies in memory as delta does, or as z where there is a gate.

    Unlike the original: last_state is a tensor of its own, and differentiable (there: a view of what the
    backward needs, and its gradient is dropped). Takes more: CPU tensors, float64, D and delta_bias in u's
    dtype, any strides, any dstate.

    Args:
        u, delta, z: (batch, dim, seqlen), one dtype.
        A: (dim, dstate), float32 or complex64.
        B, C: constant (dim, dstate), or (batch, dstate, seqlen) or (batch, groups, dstate, seqlen); with a
            complex A these are real, 2 seqlen long, real and imaginary parts in turns.
        D, delta_bias: (dim,).
        delta_softplus: None counts as False.
        return_last_state: also return the state after the last token, (batch, dim, dstate) in A's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree.
    """
    scan = (u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return packed_selective_scan(None, *scan, return_last_state)


@without_autocast
def packed_selective_scan(
    seq_idx: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool | None = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` whose state is reset where neighbours in seq_idx (batch, seqlen) differ."""
    result = selective_scan(
        u,
        delta,
        A,
        as_complex(B, A),
        as_complex(C, A),
        D,
        z,
        delta_bias,
        bool(delta_softplus),
        seq_idx=seq_idx,
        return_final_state=return_last_state,
    )
    like = delta if z is None else z
    if isinstance(result, Tensor):
        return laid_out_like(result, like)
    return laid_out_like(result[0], like), result[1]


def mamba_inner_fn(
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
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba layer behind its input projection, `mamba_ops.mamba_inner` by the original's names.

    Unlike the original: the RMS weights get gradients and the backward differentiates through their norms;
    out_proj_bias gets its gradient (there: an error). Both values of checkpoint_lvl recompute everything.

    Args:
        xz: (batch, 2 dim, seqlen).
        conv1d_weight: (dim, 1, width), three dims unlike everywhere else.
        x_proj_weight, delta_proj_weight: (rank + 2 dstate, dim), (dim, rank); cast under autocast.
        out_proj_weight, out_proj_bias: (d_model, dim), (d_model,); cast under autocast.
        A, B, C, D, delta_bias: as for `selective_scan_fn`; B, C None: projected.
        b_rms_weight, c_rms_weight, dt_rms_weight: (dstate,), (dstate,), (dim,): norms of B, C, and of delta
            behind its projection.

    Returns:
        (batch, seqlen, d_model).

    Raises:
        RuntimeError: shapes, dtypes or devices disagree.
        AssertionError: checkpoint_lvl other than 0 and 1.
    """
    assert checkpoint_lvl in (0, 1), f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}"
    out = mamba_inner(
        xz,
        conv1d_weight.squeeze(1),
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B if B is None else as_complex(B, A),
        C if C is None else as_complex(C, A),
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
        b_rms_weight=b_rms_weight,
        c_rms_weight=c_rms_weight,
        dt_rms_weight=dt_rms_weight,
        rms_eps=b_c_dt_rms_eps,
    )
    assert isinstance(out, Tensor)
    return out


class SelectiveScanFn:
    """The original's autograd function, for callers of its ``apply``."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn:
    """The original's autograd function, for callers of its ``apply``."""

    apply = staticmethod(mamba_inner_fn)


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` in plain torch, in float32."""
    matrices = (as_complex(B, A), as_complex(C, A))
    scan: list[Any] = [*(upcast(t) for t in (u, delta, A, *matrices, D, z, delta_bias)), bool(delta_softplus)]
    y, state = reference.selective_scan(*scan, return_final_state=True)
    y = y.to(u.dtype)
    return (y, state) if return_last_state else y


def mamba_inner_ref(
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
) -> Tensor:
    """`mamba_inner_fn` in plain torch, in float32."""
    projections = (x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias)
    matrices = (M if M is None else as_complex(M, A) for M in (B, C))
    tensors = (xz, conv1d_weight.squeeze(1), conv1d_bias, *projections, A, *matrices, D, delta_bias)
    casts: list[Any] = [*(upcast(t) for t in (*tensors, B_proj_bias, C_proj_bias)), delta_softplus]
    out: Tensor = reference.mamba_inner(*casts).to(xz.dtype)
    return out


@without_autocast
def rms_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6, is_rms_norm: bool = True
) -> Tensor:
    """RMS norm of the last dim; bias must be None, and is_rms_norm True, as in every call of the original."""
    assert bias is None and is_rms_norm, "rms_norm_forward: only without bias, and only as an RMS norm"
    return rms_norm_gated(x, weight, eps=eps)


def as_complex(M: Tensor, A: Tensor) -> Tensor:
    """B or C as mamba_ops takes it: a variable one beside a complex A is (..., 2 seqlen) real here."""
    if not A.is_complex() or M.dim() == 2 or M.is_complex():
        return M
    parts = M.to(A.real.dtype)
    return torch.complex(parts[..., 0::2], parts[..., 1::2])


def laid_out_like(y: Tensor, like: Tensor) -> Tensor:
    """y, copied where its strides are not those of ``torch.empty_like(like)``."""
    if y.stride() == torch.empty_like(like, device="meta").stride():
        return y
    return torch.empty_like(like, dtype=y.dtype).copy_(y)


def upcast(t: Tensor | None) -> Any:
    """Half precision in float32."""
    return t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t


def __getattr__(name: str) -> ModuleType:
    if name == "selective_scan_cuda":  # which itself needs this module
        from ... import selective_scan_cuda

        return selective_scan_cuda
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
