"""The gated MLP that hybrids put behind a mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .init import Device
from .token import project


class GatedMLP(nn.Module):
    """``fc2(y silu(gate))`` with y, gate the halves of ``fc1(x)``; parameters as mamba_ssm's GatedMLP.

    Args:
        in_features: width of input and output.
        hidden_features: width inside, rounded up to a multiple of multiple_of; None: 8/3 of in_features.
        out_features: width of the output; None: in_features.
        bias: whether fc1 and fc2 have a bias.
        multiple_of: see hidden_features.
        device, dtype: of the parameters.

    >>> GatedMLP(16, 100)(torch.zeros(2, 3, 16)).shape
    torch.Size([2, 3, 16])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias: bool = False,
        multiple_of: int = 128,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        if hidden < 1:
            raise ValueError(f"GatedMLP: hidden_features must be at least 1, got {hidden}")
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        out = in_features if out_features is None else out_features
        self.fc2 = nn.Linear(hidden, out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features). Returns (..., out_features)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        out: Tensor = self.fc2(y * F.silu(gate))
        return out

    @torch.no_grad()
    def step(self, x: Tensor) -> Tensor:
        """The same for a token a row, x (b, in_features), without autograd."""
        y, gate = project(self.fc1, x).chunk(2, dim=-1)
        return project(self.fc2, y * F.silu(gate))
