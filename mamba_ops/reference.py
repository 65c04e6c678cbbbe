"""The meaning of every operator, in plain torch: what the kernels are measured against.

Each function has the signature of the operator of the same name in ``mamba_ops``, which documents the
arguments. It computes in the dtype of its inputs with torch's ordinary promotion (float64 in, float64
throughout), is differentiable by autograd, and prefers the shortest statement of the formula to speed.
Letters: b batch, l length, d channels, h heads, p head dim, n state, g groups, q chunk, w conv width.
"""

import math
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# (state before, tensors with a length) -> (output, state after)
Sweep = Callable[..., tuple[Tensor, Tensor]]


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
) -> Any:
    """The Mamba-1 recurrence, one token after the other.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t and y_t = (C_t·h_t + D u_t) silu(z_t), with
    Δ = softplus(delta + delta_bias). For complex A the n states stand for n conjugate pairs: C_t·h_t becomes
    2 Re(C_t·h_t).

    Returns:
        y (b, d, l) in u's dtype, or (y, final_state).

    Source: Gu & Dao 2023, eq. 2.

    >>> u, A, B = torch.ones(1, 1, 3), torch.zeros(1, 1), torch.ones(1, 1, 3)
    >>> selective_scan(u, u, A, B, B)
    tensor([[[1., 2., 3.]]])
    """
    b, d, l = u.shape
    delta = _step(delta, delta_bias if delta_bias is None else delta_bias[:, None], delta_softplus)
    B, C = _per_channel(B, b, d, l), _per_channel(C, b, d, l)

    def sweep(state: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        outputs = [u[..., :0]]
        for t, (u_t, delta_t, B_t, C_t) in enumerate(_tokens(-1, u, delta, B, C)):
            state = _reset(state, seq_idx, t)
            state = torch.exp(delta_t[..., None] * A) * state + (delta_t * u_t)[..., None] * B_t
            o_t = (C_t * state).sum(-1, keepdim=True)
            outputs.append(2 * o_t.real if o_t.is_complex() else o_t)
        return torch.cat(outputs, -1), state

    if initial_state is None:
        initial_state = A.new_zeros(_state_rows(b, cu_seqlens), d, A.shape[1])
    o, state = _sweep_pack(sweep, cu_seqlens, -1, initial_state, u, delta, B, C)
    y = _skip_and_gate(o, u, D if D is None else D[:, None], z).to(u.dtype)
    return (y, state) if return_final_state else y


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    *,
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    form: str = "recurrent",
) -> Any:
    """The Mamba-2 recurrence in one of its three equal forms.

    S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t B_tᵀ and y_t = (S_t C_t + D x_t) silu(z_t), with
    Δ = clamp(softplus(dt + dt_bias), dt_limit).

    Args:
        chunk_size: tokens in a chunk of the chunked form; None means 64.
        form: "recurrent" walks the tokens; "quadratic" multiplies by the (l, l) matrix C Bᵀ ∘ L with
            L_ij = exp(Σ_{i≥t>j} Δ_t A); "chunked" does that inside chunks and passes the state between them.
            A chunk of one token is the recurrence, one of l tokens the quadratic form.

    Returns:
        y (b, l, h, p) in x's dtype, or (y, final_state).

    Source: Dao & Gu 2024, sections 5 and 6, Listing 1.

    >>> x, dt, A, B = torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1), torch.zeros(1), torch.ones(1, 3, 1, 1)
    >>> [ssd(x, dt, A, B, B, form=form).flatten().tolist() for form in ("recurrent", "quadratic", "chunked")]
    [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    """
    b, l, h, p = x.shape
    step = _step(dt, dt_bias, dt_softplus, dt_limit)
    if initial_state is None:
        initial_state = A.new_zeros(_state_rows(b, cu_seqlens), h, p, B.shape[3])
    tensors = (x, step, B.repeat_interleave(h // B.shape[2], 2), C.repeat_interleave(h // C.shape[2], 2))
    rate, state, *tokens = _promote(A, initial_state, *tensors)
    sweeps: dict[str, Sweep] = {
        "recurrent": lambda *args: _ssd_recurrent(rate, seq_idx, *args),
        "quadratic": lambda *args: _ssd_chunked(rate, seq_idx, max(l, 1), *args),
        "chunked": lambda *args: _ssd_chunked(rate, seq_idx, chunk_size or 64, *args),
    }
    o, state = _sweep_pack(sweeps[form], cu_seqlens, 1, state, *tokens)
    y = _skip_and_gate(o, x, D[:, None] if D is not None and D.dim() == 1 else D, z).to(x.dtype)
    return (y, state) if return_final_state else y


def _ssd_recurrent(
    A: Tensor, seq_idx: Tensor | None, state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = [x[:, :0]]
    for t, (x_t, dt_t, B_t, C_t) in enumerate(_tokens(1, x, dt, B, C)):
        decay, X_t = torch.exp(dt_t * A), dt_t[..., None] * x_t
        state = _reset(state, seq_idx, t)
        state = decay[..., None, None] * state + X_t[..., None] * B_t[..., None, :]
        outputs.append((state @ C_t[..., None]).squeeze(-1)[:, None])
    return torch.cat(outputs, 1), state


def _ssd_chunked(
    A: Tensor, seq_idx: Tensor | None, q: int, state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    l = x.shape[1]
    runs = _runs(seq_idx, x, l)
    before = runs[:, :1]  # the run that the state carried into the chunk belongs to
    outputs = [x[:, :0]]
    for x_c, dt_c, B_c, C_c, run in zip(*(torch.split(m, q, 1) for m in (x, dt, B, C, runs)), strict=True):
        if run.shape[1] == 0:  # split gives one empty chunk for an empty sequence
            break
        X, cum, last = dt_c[..., None] * x_c, (dt_c * A).cumsum(1), run[:, -1:]
        total = cum[:, -1:]
        causal = (run[:, :, None] == run[:, None]).tril()
        M = torch.einsum("bihn,bjhn->bijh", C_c, B_c) * _decay(cum[:, :, None] - cum[:, None], causal)
        carried = torch.einsum("bhpn,bihn->bihp", state, C_c) * _decay(cum, run == before)[..., None]
        outputs.append(torch.einsum("bijh,bjhp->bihp", M, X) + carried)
        added = torch.einsum("bjhp,bjhn->bhpn", _decay(total - cum, run == last)[..., None] * X, B_c)
        state = _decay(total, last == before)[:, 0, :, None, None] * state + added
        before = last
    return torch.cat(outputs, 1), state


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """A short causal convolution of each channel: y_t = act(bias + Σ_k weight_k x_{t-w+1+k}).

    Taps left of the sequence read the initial state. What lies in another run of seq_idx reads as 0, also in
    the final state.

    Returns:
        y (b, d, l) in x's dtype, or (y, final_state): the last w - 1 inputs.

    Source: Gu & Dao 2023, section 3.4; the interface is causal-conv1d's.

    >>> causal_conv1d(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[10.0, 1.0]]))
    tensor([[[ 1., 12., 23.]]])
    """
    b, d, l = x.shape
    w = weight.shape[1]

    def sweep(state: Tensor, x: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
        l = x.shape[-1]
        inputs = torch.cat([state, x], -1)
        runs = F.pad(runs, (w - 1, 0))  # the initial state belongs to run 0
        y = x.new_zeros(())
        for k in range(w):
            other_run = runs[..., k : k + l] != runs[..., w - 1 :]
            y = y + weight[:, k, None] * inputs[..., k : k + l].masked_fill(other_run, 0)
        return y, inputs[..., l:].masked_fill(runs[..., l:] != runs[..., -1:], 0)

    if initial_state is None:
        initial_state = x.new_zeros(_state_rows(b, cu_seqlens), d, w - 1)
    y, state = _sweep_pack(sweep, cu_seqlens, -1, initial_state, x, _runs(seq_idx, x, l)[:, None])
    y = y if bias is None else y + bias[:, None]
    y = (F.silu(y) if activation else y).to(x.dtype)
    return (y, state) if return_final_state else y


def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """RMS norm over groups of the last dim: norm(x silu(z)) weight, or norm(x) weight silu(z) if before.

    Returns:
        y (..., d) in x's dtype.

    Source: Dao & Gu 2024, section 7; the interface is mamba_ssm's.

    >>> rms_norm_gated(torch.tensor([3.0, -3.0]), torch.ones(2), eps=0.0)
    tensor([ 1., -1.])
    """
    gate = 1.0 if z is None else F.silu(z)
    v = x if norm_before_gate else x * gate
    d = x.shape[-1]
    groups = v.reshape(*v.shape[:-1], d // (group_size or d), group_size or d)
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    y = (groups * scale).reshape(v.shape) * weight
    return (y * gate if norm_before_gate else y).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Residual addition, then RMS norm of the sum as it is stored.

    Returns:
        y (..., d) in x's dtype, and the sum (..., d) in residual's.

    >>> add_rms_norm(torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0]), torch.ones(2), eps=0.0)
    (tensor([ 1., -1.]), tensor([ 3., -3.]))
    """
    total = (residual + x).to(residual.dtype)
    return rms_norm_gated(total, weight, eps=eps).to(x.dtype), total


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
) -> Any:
    """A Mamba layer behind its input projection: convolution, projections, scan, output projection.

    Returns:
        out (b, l, m), or (out, conv_state, final_state).

    Source: Gu & Dao 2023, figure 3; the interface is mamba_ssm's.
    """
    x, z = xz.chunk(2, 1)
    pack: Any = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens, "return_final_state": True}
    u, conv_state = causal_conv1d(x, conv1d_weight, conv1d_bias, "silu", initial_state=conv_state, **pack)
    projected = F.linear(u.mT, x_proj_weight)
    r, n = delta_proj_weight.shape[1], A.shape[1] * (2 if A.is_complex() else 1)

    def norm(v: Tensor, weight: Tensor | None) -> Tensor:
        return v if weight is None else rms_norm_gated(v, weight, eps=rms_eps)

    def matrix(columns: Tensor, bias: Tensor | None, weight: Tensor | None) -> Tensor:
        M = norm(columns if bias is None else columns + bias, weight)
        return torch.complex(M[..., 0::2], M[..., 1::2]).mT if A.is_complex() else M.mT

    B = matrix(projected[..., r : r + n], B_proj_bias, b_rms_weight) if B is None else B
    C = matrix(projected[..., -n:], C_proj_bias, c_rms_weight) if C is None else C
    delta = norm(F.linear(projected[..., :r], delta_proj_weight), dt_rms_weight).mT
    options = (D, z, delta_bias, delta_softplus)
    y, state = selective_scan(u, delta, A, B, C, *options, initial_state=initial_state, **pack)
    out = F.linear(y.mT, out_proj_weight, out_proj_bias)
    return (out, conv_state, state) if return_final_states else out


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
) -> Any:
    """A Mamba-2 layer behind its input projection: convolution, SSD, norm and gate, output projection.

    Returns:
        out (b, l, m), or (out, conv_state, final_state).

    Source: Dao & Gu 2024, section 7; the interface is mamba_ssm's.
    """
    h, p = A.shape[0], headdim or (1 if D is None else D.shape[1])
    d, conv = h * p, conv1d_weight.shape[0]
    k = (zxbcdt.shape[-1] - d - conv - h) // 2
    z0, x0, z, xBC, dt = torch.split(zxbcdt, [k, k, d, conv, h], -1)
    pack: Any = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens, "return_final_state": True}
    xBC, conv_state = causal_conv1d(
        xBC.mT, conv1d_weight, conv1d_bias, activation, initial_state=conv_state, **pack
    )
    if mask_negative and seq_idx is not None:
        xBC = xBC.masked_fill(seq_idx[:, None] < 0, 0)
    x, B, C = torch.split(xBC.mT, [d, (conv - d) // 2, (conv - d) // 2], -1)
    b, l, _ = zxbcdt.shape
    x, B, C = x.reshape(b, l, h, p), *(M.reshape(b, l, ngroups, M.shape[2] // ngroups) for M in (B, C))
    gate = z.reshape(b, l, h, p) if rmsnorm_weight is None else None
    options = (D, gate, dt_bias, True, dt_limit)
    y, state = ssd(x, dt, A, B, C, *options, initial_state=initial_state, **pack)
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        norm: Any = {"eps": rmsnorm_eps, "group_size": d // ngroups, "norm_before_gate": norm_before_gate}
        y = rms_norm_gated(y, rmsnorm_weight, z, **norm)
    y = torch.cat([F.silu(z0) * x0, y], -1)
    out = y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)
    return (out, conv_state, state) if return_final_states else out


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    state_indices: Tensor | None = None,
) -> Tensor:
    """``causal_conv1d`` of one or a few tokens; state (s, d, k >= w - 1) keeps the last k inputs, in place.

    Returns:
        y, shaped like x: (b, d) or (b, d, t).

    >>> state = torch.tensor([[[1.0, 2.0]]])
    >>> causal_conv1d_update(torch.tensor([[3.0]]), state, torch.tensor([[10.0, 1.0]])), state
    (tensor([[23.]]), tensor([[[2., 3.]]]))
    """
    tokens = x[..., None] if x.dim() == 2 else x
    k, w = state.shape[2], weight.shape[1]
    rows = _rows(state_indices, x)
    inputs = torch.cat([state[rows], tokens], -1)
    y = causal_conv1d(inputs[..., k - w + 1 :], weight, bias, activation)
    return _store(state, rows, state_indices, inputs[..., -k:], y[..., w - 1 :].reshape(x.shape))


def selective_state_update(
    state: Tensor,
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
    state_indices: Tensor | None = None,
) -> Tensor:
    """``selective_scan`` of one or a few tokens from the state (s, d, n), which is updated in place.

    Returns:
        y, shaped like u: (b, d) or (b, d, t).

    >>> state, one = torch.ones(1, 1, 1), torch.ones(1, 1)
    >>> selective_state_update(state, one, one, torch.zeros(1, 1), one, one), state
    (tensor([[2.]]), tensor([[[2.]]]))
    """
    shape, rows = u.shape, _rows(state_indices, u)
    if u.dim() == 2:
        u, delta, B, C = (m[..., None] for m in (u, delta, B, C))
        z = z if z is None else z[..., None]
    options = (D, z, delta_bias, delta_softplus)
    y, final = selective_scan(u, delta, A, B, C, *options, initial_state=state[rows], return_final_state=True)
    return _store(state, rows, state_indices, final, y.reshape(shape))


def ssd_state_update(
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
    dt_limit: tuple[float, float] = (0.0, math.inf),
    *,
    state_indices: Tensor | None = None,
    A_is_log: bool = False,
) -> Tensor:
    """``ssd`` of one or a few tokens from the state (s, h, p, n), which is updated in place.

    Returns:
        y, shaped like x: (b, h, p) or (b, t, h, p).

    >>> state, one = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1)
    >>> ssd_state_update(state, one, one[0], torch.zeros(1), one, one), state
    (tensor([[[2.]]]), tensor([[[[2.]]]]))
    """
    shape, rows = x.shape, _rows(state_indices, x)
    A = -A.exp() if A_is_log else A
    if x.dim() == 3:
        x, dt, B, C = (m[:, None] for m in (x, dt, B, C))
        z = z if z is None else z[:, None]
    options = (D, z, dt_bias, dt_softplus, dt_limit)
    y, final = ssd(x, dt, A, B, C, *options, initial_state=state[rows], return_final_state=True)
    return _store(state, rows, state_indices, final, y.reshape(shape))


def _step(
    raw: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float] = (-math.inf, math.inf)
) -> Tensor:
    """Δ = clamp(softplus(raw + bias), limit). Softplus is the identity above 20; limits pass gradients."""
    raw = raw if bias is None else raw + bias
    step = F.softplus(raw, threshold=20.0) if softplus else raw
    inside = (step >= limit[0]) & (step <= limit[1])
    return torch.where(inside, step, step.detach().clamp(*limit))


def _skip_and_gate(o: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    o = o if D is None else o + D * x
    return o if z is None else o * F.silu(z)


def _per_channel(M: Tensor, b: int, d: int, l: int) -> Tensor:
    """B or C of the selective scan, constant (d, n), (b, n, l) or (b, g, n, l), as (b, d, n, l)."""
    if M.dim() == 2:
        return M[None, ..., None].expand(b, *M.shape, l)
    M = M if M.dim() == 4 else M[:, None]
    return M.repeat_interleave(d // M.shape[1], 1)


def _decay(exponent: Tensor, keep: Tensor) -> Tensor:
    """exp(exponent (..., h)) where keep (...), else 0: masked before exp, which could overflow elsewhere."""
    return torch.exp(exponent.masked_fill(~keep[..., None], -math.inf))


def _runs(seq_idx: Tensor | None, x: Tensor, l: int) -> Tensor:
    """The runs of equal neighbours in seq_idx (b, l) numbered from 0: an id that returns is a new run."""
    if seq_idx is None:
        return torch.zeros(x.shape[0], l, dtype=torch.long, device=x.device)
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (min(l, 1), 0)).cumsum(1)


def _reset(state: Tensor, seq_idx: Tensor | None, t: int) -> Tensor:
    """The state before token t: zero in the rows where another run of seq_idx begins."""
    if seq_idx is None or t == 0:
        return state
    starts = seq_idx[:, t] != seq_idx[:, t - 1]
    return state.masked_fill(_as_rows(starts, state), 0)


def _as_rows(flags: Tensor, like: Tensor) -> Tensor:
    return flags[(..., *[None] * (like.dim() - 1))]


def _state_rows(b: int, cu_seqlens: Tensor | None) -> int:
    return b if cu_seqlens is None else cu_seqlens.numel() - 1


def _sweep_pack(
    sweep: Sweep, cu_seqlens: Tensor | None, dim: int, state: Tensor, *tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """Sweeps the whole length dim, or each sequence of a pack (batch 1) from its own row of the state."""
    if cu_seqlens is None:
        return sweep(state, *tensors)
    cuts = cu_seqlens[1:-1].tolist()
    parts = zip(
        state.tensor_split(state.shape[0]), *(m.tensor_split(cuts, dim) for m in tensors), strict=True
    )
    outputs, states = zip(*(sweep(*part) for part in parts), strict=True)
    return torch.cat(outputs, dim), torch.cat(states)


def _tokens(dim: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(m.unbind(dim) for m in tensors), strict=True)


def _promote(*tensors: Tensor) -> list[Tensor]:
    dtype = reduce(torch.promote_types, (m.dtype for m in tensors))
    return [m.to(dtype) for m in tensors]


def _rows(state_indices: Tensor | None, x: Tensor) -> Tensor:
    """Row of the state for each batch row; padding rows (negative) read row 0 and store nothing."""
    if state_indices is None:
        return torch.arange(x.shape[0], device=x.device)
    return state_indices.long().clamp(min=0)


def _store(state: Tensor, rows: Tensor, state_indices: Tensor | None, values: Tensor, y: Tensor) -> Tensor:
    """Stores the new states, in state's dtype; gives y back with the padding rows zero."""
    valid = torch.ones_like(rows, dtype=torch.bool) if state_indices is None else state_indices >= 0
    state[rows[valid]] = values[valid].to(state.dtype)
    return y.masked_fill(~_as_rows(valid, y), 0)
