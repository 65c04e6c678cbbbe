"""RMS norm with an optional SiLU gate, and that of a residual stream, as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..add_norm import add_rms_norm
from ..norm import rms_norm_gated
from .init import Device


class RMSNormGated(nn.Module):
    """RMS norm over groups of the last dimension, gated by silu(z) where z is given.

    Args:
        hidden_size: d, the size of the last dimension.
        eps: added to the mean square.
        group_size: the mean square is taken over groups of this many values; None: over all d.
        norm_before_gate: True: norm(x) * silu(z); False: norm(x * silu(z)).
        device, dtype: of the weight (d,), which starts at one.

    Source: Dao & Gu 2024, section 7; parameters as mamba_ssm's RMSNorm in layernorm_gated.

    >>> norm = RMSNormGated(8, group_size=4)
    >>> norm(torch.ones(2, 3, 8), torch.ones(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if group_size is not None and (group_size < 1 or hidden_size % group_size):
            raise ValueError(
                f"RMSNormGated: group_size must divide hidden_size = {hidden_size}, got {group_size}"
            )
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate

    def reset_parameters(self) -> None:
        """Sets the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, z: (..., d), any float dtype. Returns (..., d) in x's dtype."""
        weight = self.weight if self.weight.dtype in (x.dtype, torch.float32) else self.weight.float()
        return rms_norm_gated(
            x,
            weight,
            z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}"
        )


class Norm(RMSNormGated):
    """RMS norm of the residual stream, whose dtype may be wider than the layers'; returns the layers'."""

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        y = super().forward(x, z)
        return y if x.dtype == self.weight.dtype else y.to(self.weight.dtype)

    def add(self, out: Tensor | None, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a layer's output to the stream: the normed sum for the next layer, and the sum."""
        if out is None:  # before the first layer
            return self(stream), stream
        return add_rms_norm(out, stream, self.weight, eps=self.eps)
