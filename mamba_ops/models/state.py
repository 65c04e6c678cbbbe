"""The states of a whole model: what generation carries from token to token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..nn import Cache


@dataclass(eq=False)
class ModelCache:
    """The caches of all layers for b sequences, from LanguageModel.allocate_cache.

    Attributes:
        mixers: of the blocks' mixers, in their order.
        shared: of the shared attention block, by the index of the block that it runs before.

    >>> import torch
    >>> from mamba_ops.models import LanguageModel, LMConfig
    >>> model = LanguageModel(LMConfig(d_model=32, n_layer=2))
    >>> cache = model.allocate_cache(2)
    >>> before = cache.clone()
    >>> logits = model.step(torch.tensor([1, 2]), cache)
    >>> cache.copy_from(before)  # as if the step had not been
    """

    mixers: list[Cache]
    shared: dict[int, Cache]

    def __iter__(self) -> Iterator[Cache]:
        yield from self.mixers
        yield from self.shared.values()

    @property
    def batch_size(self) -> int:
        return next(iter(self)).batch_size

    def tensors(self) -> dict[str, Tensor]:
        """Every state by name."""
        named = {f"mixers.{i}": cache for i, cache in enumerate(self.mixers)}
        named |= {f"shared.{i}": cache for i, cache in self.shared.items()}
        return {f"{name}.{key}": t for name, cache in named.items() for key, t in cache.tensors().items()}

    def reset(self) -> None:
        """Forgets every token."""
        for cache in self:
            cache.reset()

    def clone(self) -> ModelCache:
        """A copy with storage of its own: a position to come back to."""
        return self.select(range(self.batch_size))

    def select(self, rows: Tensor | Sequence[int]) -> ModelCache:
        """A new cache that holds copies of the given rows, repeats allowed, in their order."""
        shared = {i: cache.select(rows) for i, cache in self.shared.items()}
        return ModelCache([cache.select(rows) for cache in self.mixers], shared)

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes what row rows[i] was, in place; as many rows as before (beam search)."""
        for cache in self:
            cache.reorder(rows)

    def put(self, rows: Tensor | Sequence[int], other: ModelCache) -> None:
        """Row rows[i] becomes row i of another cache, in place."""
        for mine, theirs in zip(self, other, strict=True):
            mine.put(rows, theirs)

    def copy_from(self, other: ModelCache) -> None:
        """Takes over the states of another cache of the same shape, in place."""
        for mine, theirs in zip(self, other, strict=True):
            mine.copy_from(theirs)
