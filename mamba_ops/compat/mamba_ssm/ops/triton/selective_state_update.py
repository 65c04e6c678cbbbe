"""mamba_ssm.ops.triton.selective_state_update on mamba_ops' operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..... import reference, selective_scan, ssd, ssd_state_update
from ..... import selective_state_update as _scan_update
from ....autocast import parameter, without_autocast
from ..selective_scan_interface import upcast

_NO_LIMIT = (-math.inf, math.inf)


@without_autocast
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of a selective scan, or of a Mamba-2 scan by heads, with the state updated in place.

    Where A, dt and dt_bias are one number per head, expanded with stride 0, the head is computed as such.
    Unlike the original: D and dt_bias may be None (there: an error), and gradients flow where they are
    recorded, but for state_batch_indices (there: dropped).

    Args:
        state: (batch, dim, dstate) or (batch, nheads, dim, dstate), any float dtype; more rows with
            state_batch_indices.
        x, dt, z: (batch, dim) or (batch, nheads, dim).
        A: (dim, dstate) or (nheads, dim, dstate).
        B, C: (batch, dstate) or (batch, ngroups, dstate).
        D, dt_bias: (dim,) or (nheads, dim).
        state_batch_indices: (batch,) integers, the row of the state for each row of x; negative: out is 0
            and no state is touched.

    Returns:
        out, of x's shape and dtype.

    Raises:
        RuntimeError: shapes or devices disagree, or gradients are asked of state_batch_indices.
    """
    inputs: tuple[Any, ...] = (x, dt, B, C, z)
    if any(t is not None and t.dtype != x.dtype for t in inputs):
        inputs = tuple(t if t is None else t.float() for t in inputs)
    parameters = [parameter(t, inputs[0].dtype) for t in (A, D, dt_bias)]
    recording = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (state, *inputs, *parameters)
    )
    if state.dim() == 4 and _one_number_per_head(A, dt, dt_bias):
        out = _by_heads(state, inputs, parameters, bool(dt_softplus), state_batch_indices, recording)
    else:
        out = _by_channels(state, inputs, parameters, bool(dt_softplus), state_batch_indices, recording)
    return out.reshape(x.shape).to(x.dtype)


def _one_number_per_head(A: Tensor, dt: Tensor, dt_bias: Tensor | None) -> bool:
    expanded = A.stride(-1) == 0 and A.stride(-2) == 0 and dt.stride(-1) == 0
    return expanded and (dt_bias is None or dt_bias.stride(-1) == 0)


def _by_heads(
    state: Tensor,
    inputs: tuple[Any, ...],
    parameters: list[Any],
    softplus: bool,
    indices: Tensor | None,
    recording: bool,
) -> Tensor:
    x, dt, B, C, z = inputs
    A, D, dt_bias = parameters
    B, C = (M if M.dim() == 3 else M[:, None] for M in (B, C))
    rates = (A[:, 0, 0], B, C, D)
    bias = None if dt_bias is None else dt_bias[:, 0]
    if not recording or indices is not None:
        steps = (bias, softplus, _NO_LIMIT)
        return ssd_state_update(state, x, dt[..., 0], *rates, z, *steps, state_indices=indices)
    gate = None if z is None else z[:, None]
    y, final = ssd(
        x[:, None],
        dt[:, None, ..., 0],
        A[:, 0, 0],
        B[:, None],
        C[:, None],
        D,
        gate,
        bias,
        softplus,
        _NO_LIMIT,
        initial_state=state.clone(),
        return_final_state=True,
    )
    state.copy_(final)
    return y


def _by_channels(
    state: Tensor,
    inputs: tuple[Any, ...],
    parameters: list[Any],
    softplus: bool,
    indices: Tensor | None,
    recording: bool,
) -> Tensor:
    """Heads times their dim as channels: groups of B and C fall on the same ones."""
    x, dt, B, C, z = inputs
    A, D, dt_bias = parameters
    flat = state.flatten(1, 2) if state.dim() == 4 else state
    copied = state.dim() == 4 and state.stride(1) != state.stride(2) * state.shape[2]
    x, dt, z, D, dt_bias = (
        t if t is None or state.dim() == 3 else t.flatten(-2) for t in (x, dt, z, D, dt_bias)
    )
    A = A.flatten(0, -2)
    if not recording or indices is not None:
        y = _scan_update(flat, x, dt, A, B, C, D, z, dt_bias, softplus, state_indices=indices)
    else:
        y, final = selective_scan(
            x[..., None],
            dt[..., None],
            A,
            B[..., None],
            C[..., None],
            D,
            None if z is None else z[..., None],
            dt_bias,
            softplus,
            initial_state=flat.clone(),
            return_final_state=True,
        )
        flat.copy_(final)
    if copied:
        state.copy_(flat.view(state.shape))
    return y


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` in plain torch, in float32."""
    if state.dim() == 4:
        x_, dt_, z_ = (t if t is None else t.flatten(1) for t in (x, dt, z))
        D_, bias = (t if t is None else t.flatten() for t in (D, dt_bias))
        flat = state.flatten(1, 2)
    else:
        x_, dt_, z_, D_, bias, flat = x, dt, z, D, dt_bias, state
    inner = flat.float() if flat.dtype != torch.float64 else flat.clone()
    tensors = (upcast(t) for t in (x_, dt_, A.flatten(0, -2), B, C, D_, z_, bias))
    scan: list[Any] = [*tensors, bool(dt_softplus)]
    out: Tensor = reference.selective_state_update(inner, *scan)
    state.copy_(inner.view(state.shape))
    return out.reshape(x.shape).to(x.dtype)
