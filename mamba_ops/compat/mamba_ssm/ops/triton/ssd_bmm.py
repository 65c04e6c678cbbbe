"""mamba_ssm.ops.triton.ssd_bmm in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .ssd_chunk_state import in_chunks, runs


def _bmm_chunk_fwd(
    a: Tensor,
    b: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    causal: bool = False,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """a b^T inside chunks, zero between different stretches of seq_idx, above the diagonal zero if causal.

    Args:
        a, b: (batch, seqlen, k) or (batch, seqlen, ngroups, k).
        seq_idx: (batch, seqlen) integers.

    Returns:
        (batch, nchunks, [ngroups,] chunk_size, chunk_size) in output_dtype or a's.
    """
    chunks = -(-a.shape[1] // chunk_size)
    grouped = a.dim() == 4
    a_, b_ = (in_chunks(m, chunks, chunk_size) for m in (a, b))
    out = torch.einsum("bclgk,bcsgk->bcgls" if grouped else "bclk,bcsk->bcls", a_, b_)
    if seq_idx is not None:
        run = runs(seq_idx, chunks, chunk_size)
        same = run[..., :, None] == run[..., None, :]
        out = out * (same[:, :, None] if grouped else same)
    return (out.tril() if causal else out).to(output_dtype or a.dtype)
