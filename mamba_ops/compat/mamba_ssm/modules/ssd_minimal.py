"""mamba_ssm.modules.ssd_minimal: the paper's listing, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The SSD recurrence S[t] = exp(A[t]) S[t-1] + X[t] B[t]^T, Y[t] = S[t] C[t], by blocks.

    Unlike the original: any length, block_len need not divide it.

    Args:
        X: (batch, length, n_heads, d_head), already times dt.
        A: (batch, length, n_heads): dt * A, the log decays.
        B, C: (batch, length, n_heads, d_state).
        initial_states: (batch, 1, n_heads, d_head, d_state).

    Returns:
        Y like X, and the final state (batch, n_heads, d_head, d_state).
    """
    assert X.dtype == A.dtype == B.dtype == C.dtype, "X, A, B and C must have one dtype"
    if initial_states is None:
        state = X.new_zeros(X.shape[0], X.shape[2], X.shape[3], B.shape[3])
    else:
        state = initial_states.squeeze(1)
    outs = []
    blocks = zip(*(torch.split(t, block_len, dim=1) for t in (X, A, B, C)), strict=True)
    for X_b, A_b, B_b, C_b in blocks:
        total = A_b.cumsum(1)
        l = total.shape[1]
        causal = torch.ones(l, l, dtype=torch.bool, device=X.device).tril()[..., None]
        decay = torch.exp((total[:, :, None] - total[:, None]).masked_fill(~causal, -torch.inf))
        inside = torch.einsum("blhn,bshn,blsh,bshp->blhp", C_b, B_b, decay, X_b)
        outs.append(inside + torch.einsum("blhn,bhpn,blh->blhp", C_b, state, total.exp()))
        left = torch.exp(total[:, -1:] - total)
        state = total[:, -1:].exp().mT[..., None] * state + torch.einsum(
            "bshn,bsh,bshp->bhpn", B_b, left, X_b
        )
    return torch.cat(outs, dim=1), state
