"""The peers: what people run today where this package is not installed.

Every function takes the arguments of the operator that it stands beside, in the layouts of mamba_ops and in
any float dtype: one set of inputs serves all contenders. Libraries are imported when they are asked for; a
missing one raises ImportError.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _wide(t: Tensor) -> Tensor:
    """In float32, or float64 where the input is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _skip_and_gate(o: Tensor, skip: Tensor | None, z: Tensor | None) -> Tensor:
    o = o if skip is None else o + skip
    return o if z is None else o * F.silu(z)


def _step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    step = _wide(dt) if bias is None else _wide(dt) + bias
    return F.softplus(step) if softplus else step


# Selective scan: u, delta, z (b,d,l); A (d,n); B, C (b,n,l); D, delta_bias (d).


def _scan_step(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    return _step(delta, None if delta_bias is None else delta_bias[:, None], delta_softplus)


def scan_recurrence(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """The recurrence step by step; decays and inputs of all steps are made at once.

    So do mamba_ssm's reference and transformers. They index each step out of the whole, which costs the same
    forward (706 against 721 ms at b1 d1536 l2048 n16 on two cores) but l^2 backward; the steps are unbound
    here, so that gradients can be had.
    """
    dt = _scan_step(delta, delta_bias, delta_softplus)
    decays = torch.exp(dt[..., None] * A[:, None])
    inputs = (dt * _wide(u))[..., None] * _wide(B).transpose(1, 2)[:, None]
    h, out = torch.zeros_like(decays[:, :, 0]), []
    for a, x, c in zip(decays.unbind(2), inputs.unbind(2), _wide(C).unbind(2), strict=True):
        h = a * h + x
        out.append(torch.matmul(h, c[..., None])[..., 0])
    return _skip_and_gate(torch.stack(out, 2), None if D is None else D[:, None] * u, z).to(u.dtype)


def scan_mambapy(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """mambapy's parallel scan over all states in memory, in its own layout (b,l,d,n)."""
    from mambapy.pscan import pscan

    dt = _scan_step(delta, delta_bias, delta_softplus).transpose(1, 2)
    decays = torch.exp(dt[..., None] * A)
    inputs = (dt * _wide(u).transpose(1, 2))[..., None] * _wide(B).transpose(1, 2)[:, :, None]
    states = pscan(decays, inputs)
    o = (states @ _wide(C).transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
    return _skip_and_gate(o, None if D is None else D[:, None] * u, z).to(u.dtype)


def scan_mamba_ssm(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Tensor:
    """mamba_ssm's CUDA kernel."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y: Tensor = selective_scan_fn(u, delta, A, B, C, **options)
    return y


# SSD: x, z (b,l,h,p); dt (b,l,h); A, D, dt_bias (h); B, C (b,l,g,n).


def _sums_between(a: Tensor) -> Tensor:
    """Segment sums: ``out[..., i, j]`` is the sum of ``a[..., j+1 .. i]``; minus infinity where i < j."""
    q = a.shape[-1]
    ones = torch.ones(q, q, dtype=torch.bool, device=a.device)
    sums = a[..., None].expand(*a.shape, q).masked_fill(~ones.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~ones.tril(), -torch.inf)


def ssd_listing(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    chunk_size: int = 64,
    share_groups: bool = False,
) -> Tensor:
    """The chunked SSD of the Mamba-2 paper's minimal listing; l must be a multiple of the chunk.

    Products run in x's dtype, steps and decays in float32. The listing takes B and C for every head;
    `share_groups` keeps one pair for all heads (g = 1) and multiplies C by B once, the fastest form in plain
    torch that we know of.
    """
    b, l, h, p = x.shape
    q, low = chunk_size, x.dtype
    c = l // q
    steps = _step(dt, dt_bias, dt_softplus)
    X = (x * steps[..., None]).to(low).view(b, c, q, h, p)
    a = (steps * A).view(b, c, q, h).permute(0, 3, 1, 2)
    a_cum = a.cumsum(-1)
    within = torch.exp(_sums_between(a)).to(low)
    to_end = torch.exp(a_cum[..., -1:] - a_cum).to(low)
    across = torch.exp(_sums_between(F.pad(a_cum[..., -1], (1, 0)))).to(low)
    from_start = torch.exp(a_cum).to(low)

    if share_groups:
        Bs, Cs = (v.view(b, c, q, -1) for v in (B, C))
        scores = torch.einsum("bcin,bcjn->bcij", Cs, Bs)[:, None] * within
        ends = torch.einsum("bcjn,bcjhp->bchpn", Bs, X * to_end.permute(0, 2, 3, 1)[..., None])
    else:
        Bs, Cs = (v.repeat_interleave(h // v.shape[2], 2).view(b, c, q, h, -1) for v in (B, C))
        scores = torch.einsum("bcihn,bcjhn->bhcij", Cs, Bs) * within
        ends = torch.einsum("bcjhn,bhcj,bcjhp->bchpn", Bs, to_end, X)
    o = torch.einsum("bhcij,bcjhp->bcihp", scores, X)
    ends = torch.cat([torch.zeros_like(ends[:, :1]), ends], 1)
    carried = torch.einsum("bhkc,bchpn->bkhpn", across, ends)[:, :-1]
    if share_groups:
        o = o + torch.einsum("bcin,bchpn->bcihp", Cs, carried) * from_start.permute(0, 2, 3, 1)[..., None]
    else:
        o = o + torch.einsum("bcihn,bchpn,bhci->bcihp", Cs, carried, from_start)
    return _skip_and_gate(o.reshape(b, l, h, p), None if D is None else (D[:, None] * x).to(low), z)


def ssd_mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Tensor:
    """mamba_ssm's Triton kernels, with its usual chunk of 256."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y: Tensor = mamba_chunk_scan_combined(x, dt, A, B, C, 256, **options)
    return y


def ssd_fla(
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
    """flash-linear-attention's simple gated linear attention, B and C as keys and queries of every head."""
    from fla.ops.simple_gla import chunk_simple_gla

    steps = _step(dt, dt_bias, dt_softplus)
    h = x.shape[2]
    k, q = (v.repeat_interleave(h // v.shape[2], 2) for v in (B, C))
    o, _ = chunk_simple_gla(q, k, (x * steps[..., None]).to(x.dtype), g=steps * A, scale=1.0)
    return _skip_and_gate(o, None if D is None else (D[:, None] * x).to(x.dtype), z)


# One token of the selective scan: state (b,d,n); u, delta, z (b,d); A (d,n); B, C (b,n); D, delta_bias (d).


def scan_update_torch(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
) -> Tensor:
    """The recurrence as expressions; leaves the state as it was."""
    step = _step(delta, delta_bias, delta_softplus)
    added = (step * _wide(u))[..., None] * _wide(B)[:, None]
    after = torch.exp(step[..., None] * A) * state + added
    o = (after * _wide(C)[:, None]).sum(-1)
    return _skip_and_gate(o, D * _wide(u), _wide(z)).to(u.dtype)


def scan_update_mamba_ssm(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
) -> Tensor:
    """mamba_ssm's Triton kernel."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    y: Tensor = selective_state_update(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return y


# Convolution and norm: x (b,d,l), weight (d,w); x, z (..., d), weight (d).


def conv_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """torch's depthwise convolution, padded on the left."""
    w = weight.shape[1]
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv1d(F.pad(x, (w - 1, 0)), weight[:, None].to(x.dtype), bias, groups=x.shape[1])
    return y if activation is None else F.silu(y)


def conv_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """causal-conv1d's CUDA kernel."""
    from causal_conv1d import causal_conv1d_fn

    y: Tensor = causal_conv1d_fn(x, weight, bias, activation=activation)
    return y


# One token of the convolution: x (b,d), state (b,d,w-1), weight (d,w), bias (d).


def conv_update_torch(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """The convolution's last step as expressions; leaves the state as it was."""
    window = torch.cat([state, x[..., None]], -1)
    return F.silu((_wide(window) * weight).sum(-1) + bias).to(x.dtype)


def conv_update_causal_conv1d(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Tensor:
    """causal-conv1d's CUDA kernel."""
    from causal_conv1d import causal_conv1d_update

    y: Tensor = causal_conv1d_update(x, state, weight, bias, activation)
    return y


def norm_torch(x: Tensor, weight: Tensor, z: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """The gated RMS norm as an expression, the gate applied first."""
    v = _wide(x) if z is None else _wide(x) * F.silu(_wide(z))
    return F.rms_norm(v, v.shape[-1:], _wide(weight), eps).to(x.dtype)


# One token of the SSD: state (b,h,p,n); x, z (b,h,p); dt (b,h); A, D, dt_bias (h); B, C (b,1,n).


def ssd_update_torch(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """The recurrence as expressions; leaves the state as it was."""
    step = _step(dt, dt_bias, dt_softplus)
    added = (step[..., None] * _wide(x))[..., None] * _wide(B)[:, :, None]
    after = torch.exp(step * A)[..., None, None] * state + added
    o = (after * _wide(C)[:, :, None]).sum(-1)
    return _skip_and_gate(o, D[:, None] * _wide(x), _wide(z)).to(x.dtype)


def ssd_update_mamba_ssm(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """mamba_ssm's Triton kernel, which wants the heads' numbers spread over their channels."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    h, p, n = state.shape[1:]
    step, rate = dt[..., None].expand(-1, h, p), A[:, None, None].expand(h, p, n)
    skip, bias = D[:, None].expand(h, p), dt_bias[:, None].expand(h, p)
    y: Tensor = selective_state_update(state, x, step, rate, B, C, skip, z, bias, dt_softplus)
    return y


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention (b,h,l,p), torch's own choice of kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def transformers_model(
    layer: str, d_model: int, n_layer: int, vocab_size: int, use_mambapy: bool
) -> nn.Module:
    """transformers' "mamba" or "mamba2" language model on its torch path, shaped as the published ones."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    shape: dict[str, Any] = {"hidden_size": d_model, "num_hidden_layers": n_layer, "vocab_size": vocab_size}
    if layer == "mamba":
        model: nn.Module = MambaForCausalLM(MambaConfig(**shape, use_mambapy=use_mambapy))
    else:
        model = Mamba2ForCausalLM(Mamba2Config(**shape, num_heads=d_model // 32, head_dim=64, n_groups=1))
    return model.eval()
