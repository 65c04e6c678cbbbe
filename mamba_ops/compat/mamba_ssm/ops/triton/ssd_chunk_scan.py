"""mamba_ssm.ops.triton.ssd_chunk_scan in plain torch: the outputs of chunks from the states before them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .ssd_chunk_state import by_head, in_chunks


def chunk_scan(
    B: Tensor,
    C: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    prev_states: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """out (batch, seqlen, nheads, headdim) in x's dtype; differentiable.

    Args:
        B, C: (batch, seqlen, ngroups, dstate). x, z: (batch, seqlen, nheads, headdim).
        dt, dA_cumsum: (batch, nheads, nchunks, chunk_size), as `_chunk_cumsum_fwd` gives them.
        prev_states: (batch, nchunks, nheads, headdim, dstate): the state before each chunk.
        D: (nheads,) or (nheads, headdim).
    """
    _, h, c, q = dt.shape
    B_, C_ = (by_head(in_chunks(M, c, q), h).float() for M in (B, C))
    x_ = in_chunks(x, c, q).float()
    between = (dA_cumsum[..., :, None] - dA_cumsum[..., None, :]).float()
    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    weights = torch.exp(between.masked_fill(~causal, -torch.inf)) * dt[..., None, :].float()
    out = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C_, B_, weights, x_)
    decay = torch.exp(dA_cumsum.float()).permute(0, 2, 3, 1)
    out = out + torch.einsum("bclhn,bchpn,bclh->bclhp", C_, prev_states.float(), decay)
    out = out.flatten(1, 2)[:, : x.shape[1]]
    if D is not None:
        out = out + x.float() * (D[:, None] if D.dim() == 1 else D).float()
    return (out if z is None else out * F.silu(z.float())).to(x.dtype)


def chunk_scan_ref(
    B: Tensor,
    C: Tensor,
    x: Tensor,
    dt: Tensor,
    dA_cumsum: Tensor,
    prev_states: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """`chunk_scan` token by token."""
    b, h, c, q = dt.shape
    B_, C_ = (by_head(in_chunks(M, c, q), h).float() for M in (B, C))
    x_ = in_chunks(x, c, q).float()
    a = torch.diff(dA_cumsum.float(), dim=-1, prepend=dA_cumsum.new_zeros(b, h, c, 1))
    state, outs = prev_states.float(), []
    for t in range(q):
        decay, step = (m[..., t].transpose(1, 2)[..., None, None] for m in (a.exp(), dt.float()))
        state = decay * state + step * x_[:, :, t][..., None] * B_[:, :, t][..., None, :]
        outs.append((state @ C_[:, :, t][..., None])[..., 0])
    out = torch.stack(outs, dim=2).flatten(1, 2)[:, : x.shape[1]]
    if D is not None:
        out = out + x.float() * (D[:, None] if D.dim() == 1 else D).float()
    return (out if z is None else out * F.silu(z.float())).to(x.dtype)
