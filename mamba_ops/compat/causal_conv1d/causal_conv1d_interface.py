"""causal_conv1d.causal_conv1d_interface on mamba_ops' operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import causal_conv1d, reference
from ... import causal_conv1d_update as _update
from ..autocast import parameter, without_autocast


@without_autocast
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution; out lies in memory as x does.

    Takes more than the original: CPU tensors, float64, every layout and size for every option. Taps of
    seq_idx reach through an unbroken stretch of an id (the original: over equal ids); negative ids give 0.

    Args:
        x: (batch, dim, seqlen).
        weight, bias: (dim, width), (dim,).
        seq_idx: (batch, seqlen) integers; not together with states.
        initial_states: (batch, dim, width - 1).
        return_final_states: also return the last width - 1 inputs, channel-last, differentiable.
        final_states_out: where to write them, and then what is returned.
        activation: None, "silu" or "swish".

    Raises:
        NotImplementedError: another activation.
        AssertionError: seq_idx together with states.
        RuntimeError: shapes, dtypes or devices disagree.
    """
    _check_activation(activation)
    if seq_idx is not None:
        assert initial_states is None, "initial_states must be None if seq_idx is not None"
        assert not return_final_states, "If seq_idx is not None, we don't return final_states_out"
    weight, bias = parameter(weight, x.dtype), parameter(bias, x.dtype)
    result = causal_conv1d(
        x,
        weight,
        bias,
        activation,
        initial_state=initial_states,
        seq_idx=seq_idx,
        return_final_state=return_final_states,
    )
    if isinstance(result, Tensor):
        return result if seq_idx is None else torch.where(seq_idx[:, None] < 0, 0, result)
    out, state = result
    if final_states_out is not None:
        return out, final_states_out.copy_(state)
    return out, state.transpose(1, 2).contiguous().transpose(1, 2)


@without_autocast
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution of one or a few tokens; conv_state, which holds the last inputs, is updated in place.

    Differentiable where gradients are recorded (the original drops them), but for conv_state_indices.

    Args:
        x: (batch, dim) or (batch, dim, seqlen).
        conv_state: (batch, dim, state_len >= width - 1), any strides.
        weight, bias: (dim, width), (dim,).
        activation: None, "silu" or "swish".
        cache_seqlens: (batch,) integers: conv_state is a ring; x is written from slot cache_seqlens %
            state_len on, and the taps read the slots before it.
        conv_state_indices: (batch,) integers: the row of conv_state for each row of x; negative: out is 0
            and no state is touched.

    Raises:
        NotImplementedError: another activation.
        RuntimeError: shapes, dtypes or devices disagree.
    """
    _check_activation(activation)
    weight, bias = parameter(weight, x.dtype), parameter(bias, x.dtype)
    if cache_seqlens is not None:
        return _ring_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    recording = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, conv_state, weight, bias)
    )
    if conv_state_indices is not None or not recording:
        return _update(x, conv_state, weight, bias, activation, state_indices=conv_state_indices)
    tokens = x[..., None] if x.dim() == 2 else x
    history = conv_state[..., conv_state.shape[-1] - weight.shape[1] + 1 :].to(x.dtype, copy=True)
    out = causal_conv1d(tokens, weight, bias, activation, initial_state=history)
    assert isinstance(out, Tensor)
    conv_state.copy_(torch.cat([conv_state, tokens], dim=-1)[..., -conv_state.shape[-1] :])
    return out.reshape(x.shape)


def _ring_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor,
    conv_state_indices: Tensor | None,
) -> Tensor:
    tokens = x[..., None] if x.dim() == 2 else x
    t, width, state_len = tokens.shape[-1], weight.shape[1], conv_state.shape[-1]
    if state_len < width - 1 or t > state_len:
        raise RuntimeError(
            f"causal_conv1d_update: conv_state must keep at least width - 1 = {width - 1} inputs and as many "
            f"as there are tokens, {t}, got {state_len}"
        )
    rows = torch.arange(x.shape[0], device=x.device) if conv_state_indices is None else conv_state_indices
    valid, rows = rows >= 0, rows.long().clamp(min=0)
    start = cache_seqlens.long()[:, None]
    before = (start + torch.arange(1 - width, 0, device=x.device)) % state_len
    states = conv_state[rows]
    dim = states.shape[1]
    history = states.gather(2, before[:, None].expand(-1, dim, -1)).to(x.dtype)
    out = causal_conv1d(tokens, weight, bias, activation, initial_state=history)
    assert isinstance(out, Tensor)
    slots = (start + torch.arange(t, device=x.device)) % state_len
    written = states.scatter(2, slots[:, None].expand(-1, dim, -1), tokens.to(states.dtype))
    if conv_state_indices is None:
        conv_state.copy_(written)
        return out.reshape(x.shape)
    # which row of x writes to each state, without asking the device how many are valid
    count = conv_state.shape[0]
    writer = torch.full((count + 1,), -1, device=x.device)
    writer[torch.where(valid, rows, count)] = torch.arange(x.shape[0], device=x.device)
    writer = writer[:count]
    kept = (writer < 0)[:, None, None]
    conv_state.copy_(torch.where(kept, conv_state, written[writer.clamp(min=0)]))
    return torch.where(valid[:, None, None], out, 0).reshape(x.shape)


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` in plain torch, in the weight's dtype."""
    _check_activation(activation)
    initial = None if initial_states is None else initial_states.to(weight.dtype)
    out: Tensor
    state: Tensor
    out, state = reference.causal_conv1d(
        x.to(weight.dtype), weight, bias, activation, initial_state=initial, return_final_state=True
    )
    if not return_final_states:
        return out.to(x.dtype)
    state = state.to(x.dtype)
    return out.to(x.dtype), state if final_states_out is None else final_states_out.copy_(state)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` in plain torch, in the weight's dtype."""
    _check_activation(activation)
    tokens = x[..., None] if x.dim() == 2 else x
    state_len, width = conv_state.shape[-1], weight.shape[1]
    if cache_seqlens is None:
        inputs = torch.cat([conv_state, tokens], dim=-1)
        conv_state.copy_(inputs[..., -state_len:])
    else:
        # Turned so that the slot to write comes first: the history then stands at the end.
        turn = (cache_seqlens[:, None] + torch.arange(state_len, device=x.device)) % state_len
        turn = turn[:, None].expand(-1, conv_state.shape[1], -1)
        inputs = torch.cat([conv_state.gather(2, turn), tokens], dim=-1)
        conv_state.scatter_(2, turn[..., : tokens.shape[-1]], tokens)
    window = inputs[..., inputs.shape[-1] - tokens.shape[-1] - width + 1 :].to(weight.dtype)
    out = F.conv1d(window, weight[:, None], bias, groups=weight.shape[0])
    return (F.silu(out) if activation else out).to(x.dtype).reshape(x.shape)


def _check_activation(activation: str | None) -> None:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation must be None, silu, or swish, got {activation!r}")
