"""mamba_ssm.ops.triton.ssd_state_passing in plain torch: from the states of chunks to those before them."""

from __future__ import annotations

import torch
from torch import Tensor

from .ssd_chunk_state import runs


def state_passing(
    states: Tensor, dA_chunk_cumsum: Tensor, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, and the one after the last; differentiable.

    Args:
        states: (batch, nchunks, nheads, dim): what each chunk leaves when it starts from zero.
        dA_chunk_cumsum: (batch, nheads, nchunks): the log decay over each chunk.
        initial_states: (batch, nheads, dim).

    Returns:
        out (batch, nchunks, nheads, dim) in states' dtype, final_states (batch, nheads, dim) in float32.
    """
    return _state_passing_fwd(states, dA_chunk_cumsum, initial_states)


def state_passing_ref(
    states: Tensor, dA_chunk_cumsum: Tensor, initial_states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`state_passing` as one product with the decays between all chunks, in states' dtype."""
    first = torch.zeros_like(states[:, 0]) if initial_states is None else initial_states.to(states.dtype)
    all_states = torch.cat([first[:, None], states], dim=1)
    total = torch.nn.functional.pad(dA_chunk_cumsum, (1, 0)).cumsum(-1)
    decay = torch.exp((total[..., :, None] - total[..., None, :]).clamp(max=0)).tril()
    passed = torch.einsum("bhzc,bchd->bzhd", decay.to(states.dtype), all_states)
    return passed[:, :-1], passed[:, -1]


def _state_passing_fwd(
    states: Tensor,
    dA_chunk_cumsum: Tensor,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`state_passing` in float32; no state passes a chunk in which seq_idx (batch, seqlen) changes.

    initial_states enter the first stretch of seq_idx, whatever its id (the original: id 0 alone).
    """
    decay = torch.exp(dA_chunk_cumsum.float()).transpose(1, 2)[..., None]
    if seq_idx is not None:
        assert chunk_size is not None, "seq_idx needs chunk_size"
        last = runs(seq_idx, states.shape[1], chunk_size)[..., -1]
        before = torch.nn.functional.pad(last[:, :-1], (1, 0))
        decay = decay * (last == before)[..., None, None]
    state = torch.zeros_like(states[:, 0]) if initial_states is None else initial_states
    state, passed = state.float(), []
    for chunk in range(states.shape[1]):
        passed.append(state)
        state = decay[:, chunk] * state + states[:, chunk].float()
    out = torch.stack(passed, dim=1) if passed else states
    return out.to(out_dtype or states.dtype), state
