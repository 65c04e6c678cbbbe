"""mamba_ssm.modules.mamba2_simple on mamba_ops' operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .... import nn
from ....nn.init import Device, no_weight_decay


class Mamba2Simple(nn.Mamba2):
    """The first form of the Mamba-2 layer, whose initial states are learned if asked.

    Unlike the original, whose two paths differ there: the norm is by groups and the convolution keeps to
    seq_idx in the one path that there is. use_mem_eff_path and chunk_size have no effect.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: Sequence[float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: Sequence[float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state,
            d_conv,
            conv_init,
            expand,
            headdim,
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            use_mem_eff_path=use_mem_eff_path,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        assert activation in ("silu", "swish"), f"activation must be silu or swish, got {activation!r}"
        self.activation = activation
        self.learnable_init_states = learnable_init_states
        if learnable_init_states:
            zeros = torch.zeros(self.nheads, headdim, d_state, device=device, dtype=dtype)
            self.init_states = no_weight_decay(zeros)

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """u (batch, seqlen, d_model), seq_idx (batch, seqlen) integers. Returns u's shape."""
        starts = self.init_states.expand(u.shape[0], -1, -1, -1) if self.learnable_init_states else None
        return self._mix(self.in_proj(u), None, seq_idx, first_state=starts)
