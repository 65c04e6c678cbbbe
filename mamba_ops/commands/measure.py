"""Bits per byte on held-out text: of the model, of gzip, and of an order-2 model."""

from __future__ import annotations

import gzip
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import LanguageModel
from .corpus import as_tensor


@torch.inference_mode()
def model_bits(
    model: LanguageModel, text: Tensor, dtype: torch.dtype, rows: int = 32, most: int | None = None
) -> float:
    """Mean bits the model needs for a byte of text.

    The text is cut into equal segments that run side by side, each as one long sequence through the cache.

    Args:
        text: (l,) uint8.
        dtype: of the activations: float32, or bfloat16 by autocast.
        rows: number of segments.
        most: measure only the first bytes of every segment, this many in all; None: the whole text.
    """
    length = -(-len(text) // rows)
    padded = F.pad(text.long(), (1, rows * length - len(text)), value=10)
    inputs = padded[: rows * length].view(rows, length)
    targets = padded[1:].clone()
    targets[len(text) :] = -100
    targets = targets.view(rows, length)
    if most is not None:
        length = max(1, min(length, most // rows))
    cache = model.allocate_cache(rows, dtype)
    nats = 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for start in range(0, length, 512):
            part = slice(start, min(start + 512, length))
            logits = model(inputs[:, part], cache=cache)
            nats += float(
                F.cross_entropy(logits.float().flatten(0, 1), targets[:, part].flatten(), reduction="sum")
            )
    return nats / int((targets[:, :length] >= 0).sum()) / math.log(2)


def gzip_bits(text: bytes) -> float:
    """Bits per byte of gzip -9."""
    return 8 * len(gzip.compress(text, 9)) / len(text)


def order2_bits(train: bytes, text: bytes, strength: float = 4.0) -> float:
    """Mean bits per byte of text under counts of three bytes in train.

    The distribution after two bytes is that of train, smoothed towards the one after the last byte alone, and
    so on down to the uniform one; strength is the weight of the shorter context, in counts.
    """
    seen, asked = as_tensor(train).long(), as_tensor(b"\n\n" + text).long()
    probability = torch.full((len(text),), 1 / 256, dtype=torch.float64)
    for order in range(3):
        counts = torch.bincount(_windows(seen, order + 1), minlength=256 ** (order + 1))
        contexts = counts.view(-1, 256).sum(1)
        window = _windows(asked[2 - order :], order + 1)
        probability = (counts[window] + strength * probability) / (contexts[window // 256] + strength)
    return float(-probability.log2().mean())


def _windows(text: Tensor, width: int) -> Tensor:
    """Each run of width bytes as one number in base 256."""
    count = len(text) - width + 1
    number = torch.zeros(max(count, 0), dtype=torch.long)
    for i in range(width):
        number = number * 256 + text[i : i + count]
    return number
