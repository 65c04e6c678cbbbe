"""How the next token is drawn from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings of a draw; see stream. Raises ValueError for one outside its range."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"generate: temperature must be >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k must be >= 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p must be in (0, 1], got {self.top_p}")

    def draw(self, logits: Tensor) -> Tensor:
        """One token a row of logits (b, vocab_size): (b,) int64."""
        if self.temperature == 0 or self.top_k == 1:
            return logits.argmax(dim=-1)
        logits = logits.float() / self.temperature
        if self.top_k is None and self.top_p is None:
            return torch.multinomial(logits.softmax(dim=-1), 1, generator=self.generator).squeeze(1)
        vocab_size = logits.shape[-1]
        logits, order = logits.topk(min(self.top_k or vocab_size, vocab_size), dim=-1)
        probs = logits.softmax(dim=-1)
        if self.top_p is not None:
            above = probs.cumsum(dim=-1) - probs
            probs = probs.masked_fill(above >= self.top_p, 0.0)
        return order.gather(1, torch.multinomial(probs, 1, generator=self.generator)).squeeze(1)
