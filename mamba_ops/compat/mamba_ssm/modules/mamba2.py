"""mamba_ssm.modules.mamba2 on mamba_ops' operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .... import nn
from ...causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from .mamba_simple import states_from_cache

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:

    class PyTorchModelHubMixin:  # type: ignore[no-redef]
        """Nothing to share models with."""


class Mamba2(nn.Mamba2, PyTorchModelHubMixin):
    """`mamba_ops.Mamba2` with the original's forward, step and caches.

    Unlike the original: after a prefill, inference goes on with any number of tokens at a time; step clamps
    to dt_limit as the prefill does, and works with D_has_hdim; cu_seqlens keeps sequences apart by itself.
    process_group must be None: this layer does not split over processes.
    """

    def forward(  # type: ignore[override]
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Runs the layer.

        Args:
            u: (batch, seqlen, d_model), or (batch * seqlen, d_model) if seqlen is given.
            seq_idx: (batch, seqlen) integers; states reset where neighbours differ.
            cu_seqlens: (sequences + 1,) offsets from 0 to seqlen, batch 1.
            inference_params: keeps the states, with cu_seqlens a row per sequence.

        Returns:
            Like u.
        """
        x = u if seqlen is None else u.view(-1, seqlen, u.shape[-1])
        pack = {"cu_seqlens": cu_seqlens} if cu_seqlens is not None else {"seq_idx": seq_idx}
        if inference_params is None:
            return super().forward(x, **pack).view(*u.shape[:-1], self.out_proj.out_features)
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        conv_state, ssm_state = self._get_states_from_cache(inference_params, rows)
        if inference_params.seqlen_offset > 0 and x.shape[1] == 1:
            return self.step(x, conv_state, ssm_state)[0].view(u.shape)
        projected = self.in_proj(x)
        if inference_params.seqlen_offset == 0:
            conv_state.zero_()
            ssm_state.zero_()
        begin = 2 * self.d_mlp + self.d_ssm
        xBC = projected[..., begin : begin + self.conv_dim]
        if cu_seqlens is None:
            inputs = torch.cat([conv_state.to(xBC.dtype), xBC.mT], dim=-1)[..., -self.d_conv :]
        else:
            inputs = causal_conv1d_varlen_states(xBC.squeeze(0), cu_seqlens, self.d_conv)
        out = self._mix(projected, nn.LayerCache(conv_state[..., 1:], ssm_state), **pack)
        with torch.no_grad():
            conv_state.copy_(inputs)
        return out.view(*u.shape[:-1], out.shape[-1])

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token (batch, 1, d_model); the states are updated in place. Returns (out, both states)."""
        assert hidden_states.shape[1] == 1, "Only support decoding with 1 token at a time for now"
        return super().step(hidden_states, nn.LayerCache(conv_state, ssm_state)), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zero states: (batch, conv_dim, d_conv), channel-last, and (batch, nheads, headdim, d_state)."""
        conv, ssm = self.conv1d.weight, self.in_proj.weight
        conv_state = conv.new_zeros(batch_size, self.d_conv, self.conv_dim, dtype=dtype or conv.dtype)
        sizes = (batch_size, self.nheads, self.headdim, self.d_state)
        return conv_state.transpose(1, 2), ssm.new_zeros(sizes, dtype=dtype or ssm.dtype)

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        return states_from_cache(self, inference_params, batch_size, initialize_states)
