"""One-token steps in a captured CUDA graph: one launch a token instead of ten a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn import AttentionCache
from .lm import LanguageModel
from .state import ModelCache


class StepGraph:
    """model.step on one cache, captured once and replayed.

    The graph holds the addresses of the cache's tensors and of the weights, which may change their values but
    not their storage.
    """

    def __init__(self, model: LanguageModel, cache: ModelCache) -> None:
        device = model.backbone.embedding.weight.device
        self._cache = cache
        self._tokens = torch.zeros(cache.batch_size, dtype=torch.long, device=device)
        before = cache.clone()
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries set themselves up outside the capture
                model.step(self._tokens, cache)
            torch.cuda.current_stream().wait_stream(aside)
            cache.copy_from(before)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = model.step(self._tokens, cache)
        cache.copy_from(before)

    def step(self, tokens: Tensor) -> Tensor:
        """As model.step; the logits are overwritten by the next call."""
        caches = [cache for cache in self._cache if isinstance(cache, AttentionCache)]
        for cache in caches:
            cache.require(1)
        for cache in caches:
            cache.claim(1)
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits
