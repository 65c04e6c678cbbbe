"""mamba_ssm.ops.triton.k_activations in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def swiglu(xy: Tensor) -> Tensor:
    """silu of the first half of the last dim, times the second half."""
    x, y = xy.chunk(2, dim=-1)
    return F.silu(x) * y


class SwiGLU:
    """The original's autograd function, for callers of its ``apply``."""

    apply = staticmethod(swiglu)
