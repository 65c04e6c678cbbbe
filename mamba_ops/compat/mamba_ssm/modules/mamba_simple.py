"""mamba_ssm.modules.mamba_simple on mamba_ops' operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .... import nn
from .block import Block as Block


class Mamba(nn.Mamba):
    """`mamba_ops.Mamba` with the original's forward, step and caches.

    Unlike the original: after a prefill, inference goes on with any number of tokens at a time.
    """

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:  # type: ignore[override]
        """hidden_states (batch, seqlen, d_model); states are kept in inference_params. Same shape out."""
        if inference_params is None:
            return super().forward(hidden_states)
        conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0 and hidden_states.shape[1] == 1:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        projected = self.in_proj(hidden_states)
        if inference_params.seqlen_offset == 0:
            conv_state.zero_()
            ssm_state.zero_()
        inputs = torch.cat([conv_state.to(projected.dtype), projected[..., : self.d_inner].mT], dim=-1)
        out = self._mix(projected, nn.LayerCache(conv_state[..., 1:], ssm_state))
        with torch.no_grad():
            conv_state.copy_(inputs[..., -self.d_conv :])
        return out

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token (batch, 1, d_model); the states are updated in place. Returns (out, both states)."""
        assert hidden_states.shape[1] == 1, "Only support decoding with 1 token at a time for now"
        return super().step(hidden_states, nn.LayerCache(conv_state, ssm_state)), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zero states: (batch, d_inner, d_conv) and (batch, d_inner, d_state), in the weights' dtypes."""
        conv, ssm = self.conv1d.weight, self.dt_proj.weight
        return (
            conv.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or conv.dtype),
            ssm.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype or ssm.dtype),
        )

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        return states_from_cache(self, inference_params, batch_size, initialize_states)


def states_from_cache(
    layer: Any, inference_params: Any, batch_size: int, initialize_states: bool
) -> tuple[Tensor, Tensor]:
    """The layer's states in inference_params, allocated at first, zero if initialize_states."""
    assert layer.layer_idx is not None, "inference needs layer_idx"
    states = inference_params.key_value_memory_dict
    if layer.layer_idx not in states:
        states[layer.layer_idx] = layer.allocate_inference_cache(batch_size, inference_params.max_seqlen)
    conv_state, ssm_state = states[layer.layer_idx]
    if initialize_states:
        conv_state.zero_()
        ssm_state.zero_()
    return conv_state, ssm_state
