"""Language model: embedding, pre-norm blocks with residual, final norm, output head."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import LayerCache, Mamba, Mamba2, RMSNormGated
from ..nn.init import Device
from ..nn.token import project

LAYERS: dict[str, type[Mamba] | type[Mamba2]] = {"mamba": Mamba, "mamba2": Mamba2}


@dataclass(frozen=True)
class LMConfig:
    """Shape of a language model.

    Attributes:
        vocab_size: number of tokens; 256 for bytes.
        d_model: width of the residual stream.
        n_layer: number of blocks.
        layer: "mamba" or "mamba2".
        layer_args: further constructor arguments of the layer (d_state, headdim, ...).
        norm_eps: of the pre-norms and the final norm.
        tie_embeddings: the head uses the embedding's weight.

    >>> LMConfig(d_model=64).layer
    'mamba2'
    """

    vocab_size: int = 256
    d_model: int = 256
    n_layer: int = 4
    layer: str = "mamba2"
    layer_args: dict[str, Any] = field(default_factory=dict)
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.layer not in LAYERS:
            raise ValueError(f"LMConfig: layer must be one of {sorted(LAYERS)}, got {self.layer!r}")

    def to_dict(self) -> dict[str, Any]:
        """All attributes, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LMConfig:
        """The inverse of to_dict. Raises ValueError for a name that is no attribute."""
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"LMConfig: unknown entries {unknown}")
        return cls(**values)


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, config: LMConfig, index: int, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.norm = RMSNormGated(config.d_model, eps=config.norm_eps, device=device, dtype=dtype)
        self.mixer = LAYERS[config.layer](
            config.d_model, layer_idx=index, device=device, dtype=dtype, **config.layer_args
        )

    def forward(
        self, x: Tensor, cache: LayerCache | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        out: Tensor = self.mixer(self.norm(x), cache=cache, seq_idx=seq_idx, cu_seqlens=cu_seqlens)
        return x + out

    def step(self, x: Tensor, cache: LayerCache) -> Tensor:
        return x + self.mixer.step(self.norm(x), cache)


class Backbone(nn.Module):
    """Tokens to the final norm's output; parameter names as in mamba_ssm's MixerModel."""

    def __init__(self, config: LMConfig, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, device=device, dtype=dtype)
        self.layers = nn.ModuleList(Block(config, i, device, dtype) for i in range(config.n_layer))
        self.norm_f = RMSNormGated(config.d_model, eps=config.norm_eps, device=device, dtype=dtype)

    def forward(
        self,
        tokens: Tensor,
        cache: list[LayerCache] | None,
        seq_idx: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        x: Tensor = self.embedding(tokens)
        for i, block in enumerate(self.layers):
            x = block(x, None if cache is None else cache[i], seq_idx, cu_seqlens)
        out: Tensor = self.norm_f(x)
        return out

    def step(self, tokens: Tensor, cache: list[LayerCache]) -> Tensor:
        x: Tensor = self.embedding(tokens)
        for block, layer_cache in zip(self.layers, cache, strict=True):
            x = block.step(x, layer_cache)  # type: ignore[operator]
        out: Tensor = self.norm_f(x)
        return out


class LanguageModel(nn.Module):
    """A language model of Mamba or Mamba-2 blocks; parameter names as mamba_ssm's MambaLMHeadModel.

    Initialisation as there: the embedding N(0, 0.02), linear biases zero (not the step's), and each out_proj
    scaled down by sqrt(n_layer), so that the residual stream keeps its size with depth.

    Args:
        config: shape of the model.
        device, dtype: of the parameters.

    >>> model = LanguageModel(LMConfig(vocab_size=11, d_model=32, n_layer=2, layer="mamba"))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 11])
    """

    def __init__(self, config: LMConfig, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, device, dtype)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False, device=device, dtype=dtype)
        self._initialise()
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: list[LayerCache] | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each position.

        Args:
            tokens: (b, l) integer.
            cache: one entry per block, from allocate_cache; continued from and updated in place.
            seq_idx: (b, l) integer; states reset where neighbours differ.
            cu_seqlens: (s + 1,) integer; s sequences packed in batch 1.

        Returns:
            (b, l, vocab_size).
        """
        logits: Tensor = self.lm_head(self.backbone(tokens, cache, seq_idx, cu_seqlens))
        return logits

    def prefill(self, tokens: Tensor, cache: list[LayerCache], *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Fills or continues the cache and returns the logits after each sequence's last token only.

        Args:
            tokens: (b, l), l >= 1; with cu_seqlens (1, l), and every sequence has a token.
            cache: of b rows, or s rows with cu_seqlens; updated in place.
            cu_seqlens: (s + 1,) integer.

        Returns:
            (b or s, vocab_size).
        """
        hidden = self.backbone(tokens, cache, None, cu_seqlens)
        last = hidden[:, -1] if cu_seqlens is None else hidden[0, cu_seqlens[1:].long() - 1]
        logits: Tensor = self.lm_head(last)
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: list[LayerCache]) -> Tensor:
        """One token a row: tokens (b,), cache updated in place. Returns logits (b, vocab_size)."""
        return project(self.lm_head, self.backbone.step(tokens, cache))

    def allocate_cache(
        self, batch_size: int, dtype: torch.dtype | None = None, device: Device = None
    ) -> list[LayerCache]:
        """Empty caches of all blocks for batch_size sequences; dtype and device default to the weights'."""
        return [
            block.mixer.allocate_cache(batch_size, dtype, device)  # type: ignore[union-attr, operator]
            for block in self.backbone.layers
        ]

    def _initialise(self) -> None:
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        for name, module in self.backbone.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
                nn.init.zeros_(module.bias)
            if name.endswith("out_proj"):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.weight /= math.sqrt(self.config.n_layer)
