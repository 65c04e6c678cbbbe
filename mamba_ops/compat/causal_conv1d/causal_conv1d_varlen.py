"""causal_conv1d.causal_conv1d_varlen in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last state_len tokens of every packed sequence, zeros before short ones.

    Args:
        x: (total_tokens, dim).
        cu_seqlens: (sequences + 1,) offsets from 0.
        state_len: tokens to keep.

    Returns:
        (sequences, dim, state_len), stored channel-last. Not differentiable.
    """
    ends = cu_seqlens[1:].long()[:, None]
    places = ends + torch.arange(-state_len, 0, device=x.device)  # (sequences, state_len)
    inside = places >= cu_seqlens[:-1].long()[:, None]
    tokens = x[places.clamp(min=0)] if x.shape[0] else x.new_zeros(*places.shape, x.shape[1])
    return tokens.masked_fill(~inside[..., None], 0).transpose(1, 2)


@torch.no_grad()
def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """`causal_conv1d_varlen_states`, one sequence after the other."""
    cuts = cu_seqlens.tolist()
    states = x.new_zeros(len(cuts) - 1, state_len, x.shape[1])
    for state, begin, end in zip(states, cuts[:-1], cuts[1:], strict=True):
        kept = min(state_len, end - begin)
        state[state_len - kept :] = x[end - kept : end]
    return states.transpose(1, 2)
