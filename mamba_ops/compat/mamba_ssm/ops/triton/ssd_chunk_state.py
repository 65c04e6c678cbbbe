"""mamba_ssm.ops.triton.ssd_chunk_state in plain torch: steps and states of chunks, the SSD's inner pieces.

The whole scan is one operator (`ssd_combined.mamba_chunk_scan_combined`); these are for code that takes it
apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def chunk_state(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, states_in_fp32: bool = True) -> Tensor:
    """The state that each chunk leaves when it starts from zero; differentiable.

    Args:
        B: (batch, seqlen, ngroups, dstate). x: (batch, seqlen, nheads, headdim).
        dt, dA_cumsum: (batch, nheads, nchunks, chunk_size), as `_chunk_cumsum_fwd` gives them.

    Returns:
        (batch, nchunks, nheads, headdim, dstate), float32 or in B's dtype.
    """
    return _chunk_state_fwd(B, x, dt, dA_cumsum, states_in_fp32=states_in_fp32)


def chunk_state_ref(B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor) -> Tensor:
    """`chunk_state` token by token, in B's dtype."""
    b, h, c, q = dt.shape
    B_, x_ = by_head(in_chunks(B, c, q), h).float(), in_chunks(x, c, q).float()
    a = torch.diff(dA_cumsum.float(), dim=-1, prepend=dA_cumsum.new_zeros(b, h, c, 1))
    state = x_.new_zeros(b, c, h, x.shape[-1], B.shape[-1])
    for t in range(q):
        decay, step = (m[..., t].transpose(1, 2)[..., None, None] for m in (a.exp(), dt.float()))
        state = decay * state + step * x_[:, :, t][..., None] * B_[:, :, t][..., None, :]
    return state.to(B.dtype)


def _chunk_cumsum_fwd(
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Sequence[float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """(dA_cumsum, dt_out): the steps and the sums of their log decays, (batch, nheads, nchunks, chunk_size).

    Tokens that fill up the last chunk have steps of 0.
    """
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    step = step.clamp(dt_limit[0], dt_limit[1])
    chunks = -(-dt.shape[1] // chunk_size)
    step = in_chunks(step, chunks, chunk_size).permute(0, 3, 1, 2).contiguous()
    return (step * A.float()[:, None, None]).cumsum(-1), step


def _chunk_state_fwd(
    B: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    seq_idx: Tensor | None = None,
    states: Tensor | None = None,
    states_in_fp32: bool = True,
) -> Tensor:
    """`chunk_state` of the tokens in the last stretch of seq_idx in each chunk; states is filled if given."""
    _, h, c, q = dt.shape
    weight = dt * torch.exp(dA_cumsum[..., -1:] - dA_cumsum)
    if seq_idx is not None:
        run = runs(seq_idx, c, q)
        weight = weight * (run == run[..., -1:])[:, None]
    B_, x_ = by_head(in_chunks(B, c, q), h), in_chunks(x, c, q)
    out = torch.einsum("bhcl,bclhp,bclhn->bchpn", weight, x_.float(), B_.float())
    out = out if states_in_fp32 else out.to(B.dtype)
    return out if states is None else states.copy_(out)


@torch.no_grad()
def chunk_state_varlen(
    B: Tensor, x: Tensor, dt: Tensor, dA_cumsum: Tensor, cu_seqlens: Tensor, chunk_states: Tensor
) -> Tensor:
    """The state at the end of every packed sequence; not differentiable.

    Args:
        B: (tokens, ngroups, dstate). x: (tokens, nheads, headdim).
        dt, dA_cumsum: (nheads, nchunks, chunk_size).
        cu_seqlens: (sequences + 1,) offsets from 0.
        chunk_states: (nchunks, nheads, headdim, dstate): the state before each chunk.

    Returns:
        (sequences, nheads, headdim, dstate) in chunk_states' dtype.
    """
    h, c, q = dt.shape
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    chunk = ((end - 1) // q).clamp(min=0)
    place = chunk[:, None] * q + torch.arange(q, device=x.device)  # (sequences, chunk_size)
    inside = (place >= begin[:, None]) & (place < end[:, None])
    sums = dA_cumsum[:, chunk].float()  # (nheads, sequences, chunk_size)
    last = (end - 1 - chunk * q).clamp(min=0)
    total = sums.gather(-1, last.expand(h, -1)[..., None])
    weight = torch.where(inside, dt[:, chunk] * torch.exp((total - sums).clamp(max=0)), 0)
    B_, x_ = by_head(in_chunks(B[None], c, q), h)[0, chunk], in_chunks(x[None], c, q)[0, chunk]
    states = torch.einsum("hsl,slhp,slhn->shpn", weight, x_.float(), B_.float())
    carried = (begin < chunk * q)[:, None] * torch.exp(total[..., 0]).t()
    states = states + carried[..., None, None] * chunk_states[chunk].float()
    return states.to(chunk_states.dtype)


def in_chunks(t: Tensor, chunks: int, size: int) -> Tensor:
    """(batch, seqlen, ...) as (batch, chunks, size, ...), zeros behind the end."""
    missing = chunks * size - t.shape[1]
    padded = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)) if missing else t
    return padded.reshape(t.shape[0], chunks, size, *t.shape[2:])


def by_head(B: Tensor, heads: int) -> Tensor:
    """(..., ngroups, dstate) for every head."""
    return B.repeat_interleave(heads // B.shape[-2], dim=-2)


def runs(seq_idx: Tensor, chunks: int, size: int) -> Tensor:
    """Stretches of equal neighbours in seq_idx counted from 0, (batch, chunks, size); the last goes on."""
    changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, chunks * size - seq_idx.shape[1]))
    return changes.cumsum(1).view(-1, chunks, size)
