"""mamba_ssm.ops.triton.ssd_combined on mamba_ops' operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..... import reference, ssd
from ....autocast import parameter, without_autocast
from ....causal_conv1d import causal_conv1d_fn
from ....split_scan import MambaSplitConv1dScanCombinedFn as MambaSplitConv1dScanCombinedFn
from ....split_scan import mamba_split_conv1d_scan_combined as mamba_split_conv1d_scan_combined
from ....split_scan import mamba_split_conv1d_scan_ref as mamba_split_conv1d_scan_ref
from ..selective_scan_interface import selective_scan_fn, upcast
from .layernorm_gated import rmsnorm_fn as rmsnorm_fn
from .ssd_bmm import _bmm_chunk_fwd as _bmm_chunk_fwd
from .ssd_chunk_scan import chunk_scan as chunk_scan
from .ssd_chunk_scan import chunk_scan_ref as chunk_scan_ref
from .ssd_chunk_state import _chunk_cumsum_fwd, _chunk_state_fwd
from .ssd_chunk_state import chunk_state as chunk_state
from .ssd_chunk_state import chunk_state_ref as chunk_state_ref
from .ssd_chunk_state import chunk_state_varlen as chunk_state_varlen
from .ssd_state_passing import _state_passing_fwd
from .ssd_state_passing import state_passing as state_passing
from .ssd_state_passing import state_passing_ref as state_passing_ref

_NO_LIMIT = (0.0, math.inf)


@without_autocast
def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Sequence[float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Any:
    """The chunked SSD of Mamba-2.

    Unlike the original: initial_states enter the first stretch of seq_idx, whatever its id (there: id 0
    alone, else dropped silently); cu_seqlens keeps its sequences apart by itself (there: ignored, or without
    effect but for varlen_states), initial_states then entering the first; all is differentiable, and the
    states between chunks keep float32. The operator picks its own chunks: chunk_size does not matter.

    Args:
        x, z: (batch, seqlen, nheads, headdim).
        dt: (batch, seqlen, nheads); the steps are clamp(softplus?(dt + dt_bias), *dt_limit).
        A, dt_bias: (nheads,). D: (nheads,) or (nheads, headdim).
        B, C: (batch, seqlen, ngroups, dstate).
        initial_states: (batch, nheads, headdim, dstate).
        seq_idx: (batch, seqlen) integers: the state is reset where neighbours differ; not read beside
            cu_seqlens, which says the same.
        cu_seqlens: (sequences + 1,) offsets from 0, batch 1; tokens behind the last one are a sequence more.
        return_final_states: also return the state after the last token, float32.
        return_varlen_states: also return the states after every sequence of cu_seqlens, (sequences, nheads,
            headdim, dstate) in state_dtype or C's dtype.

    Returns:
        out, or (out[, final_states][, varlen_states]).

    Raises:
        RuntimeError: shapes, dtypes or devices disagree.
        AssertionError: return_varlen_states without cu_seqlens, or a batch above 1 with cu_seqlens.
    """
    assert cu_seqlens is not None or not return_varlen_states, (
        "cu_seqlens must be provided if return_varlen_states is True"
    )
    pack: dict[str, Any] = {"initial_state": initial_states, "seq_idx": seq_idx}
    if cu_seqlens is not None:
        pack = _pack(x, cu_seqlens, initial_states)
    x, dt, B, C, z = _common_dtype(x, dt, B, C, z)
    A, D, dt_bias = (parameter(t, x.dtype) for t in (A, D, dt_bias))
    scan = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, (dt_limit[0], dt_limit[1]))
    if not return_final_states and not return_varlen_states:
        return ssd(*scan, **pack)
    out, states = ssd(*scan, return_final_state=True, **pack)
    results = [out]
    if return_final_states:
        results.append(states if cu_seqlens is None else _last(states, cu_seqlens, x.shape[1]))
    if return_varlen_states:
        results.append(states[:-1].to(state_dtype or C.dtype))
    return tuple(results)


def _pack(x: Tensor, cu_seqlens: Tensor, initial_states: Tensor | None) -> dict[str, Any]:
    """cu_seqlens with a further sequence up to the end, perhaps empty, and a state for each sequence."""
    assert x.shape[0] == 1, "cu_seqlens is only supported if batch dimension is 1"
    end = torch.full((1,), x.shape[1], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    if initial_states is not None:
        rest = initial_states.new_zeros(cu_seqlens.shape[0] - 1, *initial_states.shape[1:])
        initial_states = torch.cat([initial_states, rest])
    return {"initial_state": initial_states, "cu_seqlens": torch.cat([cu_seqlens, end])}


def _last(states: Tensor, cu_seqlens: Tensor, l: int) -> Tensor:
    """The state after the last token (1, ...), from those of cu_seqlens and of what may follow them."""
    return torch.where((cu_seqlens[-1:] < l).view(1, 1, 1, 1), states[-1:], states[-2:-1])


def _common_dtype(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The others in x's dtype, or in float32 if they are that beside x in half precision."""
    keep = (x.dtype, torch.float32)
    return (x, *(t if t is None or t.dtype in keep else t.to(x.dtype) for t in others))


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan_combined` without its further options."""
    out: Tensor = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus
    )
    return out


def ssd_chunk_scan_combined_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan` in plain torch, in float32, by chunks of chunk_size."""
    x_, dt_, A_, B_, C_, *rest = (upcast(t) for t in (x, dt, A, B, C, D, z, dt_bias))
    options: dict[str, Any] = {"chunk_size": chunk_size, "form": "chunked", "dt_softplus": dt_softplus}
    out: Tensor = reference.ssd(x_, dt_, A_, B_, C_, *rest, **options).to(x.dtype)
    return out


def ssd_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Sequence[float] = _NO_LIMIT,
) -> Tensor:
    """The SSD by the selective scan of Mamba-1, which has a rate and a step for every channel.

    Args:
        x, z: (batch, seqlen, nheads, headdim); B, C: (batch, seqlen, ngroups, dstate).
        dt: (batch, seqlen, nheads) or (batch, seqlen, nheads, headdim).
        A: (nheads,) or (nheads * headdim, dstate).
        D, dt_bias: (nheads,) or (nheads, headdim).
    """
    p, n = x.shape[-1], B.shape[-1]

    def channels(t: Tensor | None) -> Any:
        """(..., nheads) or (..., nheads, headdim) by channel."""
        if t is None:
            return None
        per_head = t.dim() in (1, 3)
        return (t[..., None].expand(*t.shape, p) if per_head else t).flatten(-2)

    if A.dim() == 1:
        A = A[:, None].expand(-1, p).flatten()[:, None].expand(-1, n)
    steps, bias, softplus = channels(dt), channels(dt_bias), dt_softplus
    if (dt_limit[0], dt_limit[1]) != _NO_LIMIT:
        steps = steps.float() if bias is None else steps + bias.float()
        steps = torch.nn.functional.softplus(steps) if dt_softplus else steps
        steps, bias, softplus = steps.clamp(dt_limit[0], dt_limit[1]).to(x.dtype), None, False
    gate = None if z is None else z.flatten(-2).mT
    D = channels(D)
    out = selective_scan_fn(
        x.flatten(-2).mT,
        steps.mT,
        A.float(),
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        D if D is None else D.float(),
        gate,
        bias if bias is None else bias.float(),
        softplus,
    )
    assert isinstance(out, Tensor)
    return out.mT.reshape(x.shape)


def mamba_conv1d_scan_ref(
    xBC: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Sequence[float] = _NO_LIMIT,
    activation: str | None = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:
    """Convolution and `ssd_selective_scan`; z (batch, seqlen, dim) or D (nheads, headdim) gives headdim."""
    b, l, h = dt.shape[:3]
    if z is not None:
        headdim = z.shape[-1] // h
    elif D is not None and D.dim() == 2:
        headdim = D.shape[1]
    assert headdim is not None, "headdim must be given where neither z nor D has it"
    out = causal_conv1d_fn(xBC.mT, conv1d_weight, conv1d_bias, activation=activation)
    assert isinstance(out, Tensor)
    n = (xBC.shape[-1] - h * headdim) // (2 * ngroups)
    x, B, C = torch.split(out.mT, [h * headdim, ngroups * n, ngroups * n], dim=-1)
    y = ssd_selective_scan(
        x.reshape(b, l, h, headdim),
        dt.to(x.dtype),
        A,
        B.reshape(b, l, ngroups, n),
        C.reshape(b, l, ngroups, n),
        D,
        None if z is None else z.reshape(b, l, h, headdim),
        dt_bias,
        dt_softplus,
        dt_limit,
    )
    return y.flatten(-2)


class MambaChunkScanCombinedFn:
    """The original's autograd function, for callers of its ``apply``."""

    apply = staticmethod(mamba_chunk_scan_combined)


@torch.no_grad()
def _mamba_chunk_scan_combined_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Sequence[float] = _NO_LIMIT,
    state_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """(out, out_x, dt, dA_cumsum, states, final_states[, varlen_states]) without autograd.

    out_x is out before the gate (None without z); dt and dA_cumsum (batch, nheads, chunks, chunk_size) are
    the steps and the sums of their log decays in each chunk; states (batch, chunks, nheads, headdim, dstate)
    are those before each chunk, in state_dtype or C's dtype.
    """
    options: dict[str, Any] = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
    starts: dict[str, Any] = {"initial_states": initial_states, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
    ungated, final_states, *varlen = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        **options,
        **starts,
        return_final_states=True,
        return_varlen_states=cu_seqlens is not None,
        state_dtype=state_dtype,
    )
    dA_cumsum, steps = _chunk_cumsum_fwd(dt, A, chunk_size, **options)
    chunk_states = _chunk_state_fwd(B, x, steps, dA_cumsum, seq_idx=seq_idx)
    states, _ = _state_passing_fwd(
        chunk_states.flatten(-2),
        dA_cumsum[..., -1],
        initial_states=None if initial_states is None else initial_states.flatten(-2),
        seq_idx=seq_idx,
        chunk_size=chunk_size,
        out_dtype=state_dtype or C.dtype,
    )
    states = states.view(chunk_states.shape)
    if z is None:
        return (ungated, None, steps, dA_cumsum, states, final_states, *varlen)
    out = (ungated.float() * torch.nn.functional.silu(z.float())).to(x.dtype)
    return (out, ungated, steps, dA_cumsum, states, final_states, *varlen)


def _mamba_chunk_scan_combined_bwd(
    dout: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    out: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dfinal_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Sequence[float] = _NO_LIMIT,
    dx: Tensor | None = None,
    ddt: Tensor | None = None,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    dz: Tensor | None = None,
    recompute_output: bool = False,
    state_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """(dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states), and out with recompute_output.

    Those of dx, ddt, dB, dC and dz that are given are filled, and may be views. out is not used.
    """
    inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    inputs["initial_states"] = initial_states
    leaves: dict[str, Any] = {k: t.detach().requires_grad_() for k, t in inputs.items() if t is not None}
    with torch.enable_grad():
        y, final_states = mamba_chunk_scan_combined(
            **leaves,
            chunk_size=chunk_size,
            seq_idx=seq_idx,
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            return_final_states=True,
        )
    outputs = [y] if dfinal_states is None else [y, final_states]
    weights = [dout] if dfinal_states is None else [dout, dfinal_states.to(final_states.dtype)]
    grads = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), weights), strict=True))
    for name, given in (("x", dx), ("dt", ddt), ("B", dB), ("C", dC), ("z", dz)):
        if given is not None and name in grads:
            grads[name] = given.copy_(grads[name])
    result = tuple(grads.get(name) for name in inputs)
    return (*result, y.detach()) if recompute_output else result


def ensure_stride(t: Tensor) -> Tensor:
    """t with its strides but the last multiples of 8, copied if need be, as the original's kernels ask."""
    if t.stride(-1) == 1 and all(stride % 8 == 0 for stride in t.stride()[:-1]):
        return t
    width = -(-t.shape[-1] // 8) * 8
    return t.new_empty(*t.shape[:-1], width)[..., : t.shape[-1]].copy_(t)


def rearrange_and_update_stride(tensor: Tensor, pattern: str | None = None, dim: int = 2) -> Tensor:
    """By its older name: the last dims swapped if there is a pattern, copied unless stride(dim) % 8 == 0."""
    t = tensor if pattern is None else tensor.mT
    return t if t.stride(dim) % 8 == 0 else t.contiguous()
