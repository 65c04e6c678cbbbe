"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, dim: int, base: float, interleaved: bool) -> Tensor:
    """Turns pairs of the first dim components of x by angles that grow with the position.

    The pair i of a token at position t is turned by ``t base**(-2i / dim)``: products of two rotated vectors
    depend on the distance of their tokens alone. Angles and products are float32 (float64 for float64 x).

    Args:
        x: (..., l, p).
        positions: broadcastable to (..., l), integer.
        dim: even, at most p; 0: nothing is turned.
        base: of the geometric progression of the frequencies.
        interleaved: components 2i and 2i + 1 are a pair, instead of i and i + dim / 2.

    Source: Su et al. 2021; conventions as flash_attn's RotaryEmbedding.

    >>> rotate(torch.tensor([[1.0, 0.0, 5.0]]), torch.tensor([1]), 2, 10000.0, False)
    tensor([[0.5403, 0.8415, 5.0000]])
    """
    if dim == 0:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.arange(0, dim, 2, dtype=wide, device=x.device)
    angles = positions[..., None].to(wide) * base ** (-pairs / dim)
    cos, sin = angles.cos(), angles.sin()
    turned = x[..., :dim].to(wide)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    turned = turned.to(x.dtype)
    return turned if dim == x.shape[-1] else torch.cat([turned, x[..., dim:]], dim=-1)
