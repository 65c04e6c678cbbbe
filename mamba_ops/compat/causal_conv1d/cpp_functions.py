"""causal_conv1d.cpp_functions: the bare kernels that mamba_ssm and other packages call."""

from __future__ import annotations

import torch
from torch import Tensor

from ...causal_conv1d import _bwd, _fwd
from ..autocast import parameter, without_autocast
from .causal_conv1d_interface import causal_conv1d_update


@without_autocast
@torch.no_grad()
def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """The convolution without autograd; final_states_out (batch, dim, width - 1) is written if given."""
    weight, bias = parameter(weight, x.dtype), parameter(bias, x.dtype)
    has_state = final_states_out is not None
    out, state = _fwd(x, weight, bias, initial_states, seq_idx, None, silu_activation, has_state)
    if final_states_out is not None:
        final_states_out.copy_(state)
    y: Tensor = out if seq_idx is None else out.masked_fill_(seq_idx[:, None] < 0, 0)
    return y


@without_autocast
@torch.no_grad()
def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dinitial_states); a given dx is filled, and may be a view."""
    dout = dout if seq_idx is None else dout.masked_fill(seq_idx[:, None] < 0, 0)
    taps = parameter(weight, x.dtype), parameter(bias, x.dtype)
    dx_, dweight, dbias, dinitial = _bwd(
        dout, dfinal_states, x, *taps, initial_states, seq_idx, None, silu_activation
    )
    dx = dx_ if dx is None else dx.copy_(dx_)
    wanted = return_dinitial_states and initial_states is not None
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, dweight.to(weight.dtype), dbias, dinitial if wanted else None


@torch.no_grad()
def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d_update` with its activation as a flag."""
    activation = "silu" if silu_activation else None
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
