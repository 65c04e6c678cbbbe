"""The whole layer of mamba_ssm.ops.triton.ssd_combined on mamba_ops' operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import mamba_split_conv1d_scan, reference
from .autocast import parameter
from .mamba_ssm.ops.selective_scan_interface import upcast

_NO_LIMIT = (0.0, math.inf)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: Sequence[float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float | None = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """A Mamba-2 layer behind its input projection: `mamba_ops.mamba_split_conv1d_scan`, renamed.

    Unlike the original: initial_states enter the first stretch of seq_idx whatever its id, states keep
    float32, chunk_size does not matter. Between forward and backward no tensor is kept besides the arguments.

    Args:
        zxbcdt: (batch, seqlen, 2 d_nonssm + 2 dim + 2 ngroups dstate + nheads).
        conv1d_weight, conv1d_bias: (dim + 2 ngroups dstate, width), (dim + 2 ngroups dstate,).
        dt_bias, A: (nheads,). D: (nheads,), then with headdim, or (nheads, headdim).
        initial_states: of the scan, (batch, nheads, headdim, dstate); the convolution starts from zeros.
        dt_limit: clamps the steps, whose softplus is always taken.
        rmsnorm_weight: (dim,): RMS norm over groups of dim / ngroups; None: the gate alone.
        norm_before_gate: norm(y) silu(z), else norm(y silu(z)).
        outproj_weight, outproj_bias: (out_dim, d_nonssm + dim), (out_dim,); cast under autocast.

    Returns:
        out (batch, seqlen, out_dim), without projection (batch, seqlen, d_nonssm + dim), the MLP part first;
        with return_final_states (out, final_states).

    Raises:
        RuntimeError: shapes, dtypes or devices disagree.
        AssertionError: an unknown activation, no headdim, or outproj_bias without outproj_weight.
    """
    assert activation in (None, "silu", "swish"), f"activation must be None, silu or swish, got {activation}"
    assert headdim is not None or D.dim() == 2, "headdim must be given where D is (nheads,)"
    assert outproj_weight is not None or outproj_bias is None, "outproj_bias needs outproj_weight"
    dtype = zxbcdt.dtype
    result = mamba_split_conv1d_scan(
        zxbcdt,
        parameter(conv1d_weight, dtype),
        parameter(conv1d_bias, dtype),
        parameter(dt_bias, dtype),
        parameter(A, dtype),
        parameter(D, dtype),
        headdim=D.shape[1] if D.dim() == 2 else headdim,
        ngroups=ngroups,
        activation=activation,
        dt_limit=(dt_limit[0], dt_limit[1]),
        rmsnorm_weight=parameter(rmsnorm_weight, dtype),
        rmsnorm_eps=1e-6 if rmsnorm_eps is None else rmsnorm_eps,
        norm_before_gate=norm_before_gate,
        outproj_weight=outproj_weight,
        outproj_bias=outproj_bias,
        initial_state=initial_states,
        seq_idx=seq_idx,
        mask_negative=True,
        return_final_states=return_final_states,
    )
    return result if isinstance(result, Tensor) else (result[0], result[2])


def mamba_split_conv1d_scan_ref(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    dt_limit: Sequence[float] = _NO_LIMIT,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """`mamba_split_conv1d_scan_combined` in plain torch, in float32."""
    tensors = (zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D)
    out: Tensor = reference.mamba_split_conv1d_scan(
        *(upcast(t) for t in tensors),
        headdim=headdim,
        ngroups=ngroups,
        activation=activation,
        dt_limit=(dt_limit[0], dt_limit[1]),
        rmsnorm_weight=upcast(rmsnorm_weight),
        rmsnorm_eps=rmsnorm_eps,
        norm_before_gate=norm_before_gate,
        outproj_weight=upcast(outproj_weight),
        outproj_bias=upcast(outproj_bias),
    )
    return out.to(zxbcdt.dtype)


class MambaSplitConv1dScanCombinedFn:
    """The original's autograd function, for callers of its ``apply``."""

    apply = staticmethod(mamba_split_conv1d_scan_combined)
