"""Language model: embedding, pre-norm blocks with residual, final norm, output head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..mamba2_step import Mamba2StepLayer, is_one_launch, mamba2_step
from ..nn import Attention, AttentionCache, Cache, GatedMLP, LayerCache, Mamba, Mamba2
from ..nn.init import Device
from ..nn.norm import Norm
from ..nn.token import is_plain, project
from .config import LAYERS, LMConfig
from .state import ModelCache


@dataclass
class Pass:
    """How one call goes through the blocks: over a sequence, or one token a row.

    Attributes:
        cache: states to continue from and update; None: none.
        seq_idx, cu_seqlens: of a sequence; see LanguageModel.forward.
        one_token: the activations are (b, d_model), and the layers step.
    """

    cache: ModelCache | None = None
    seq_idx: Tensor | None = None
    cu_seqlens: Tensor | None = None
    one_token: bool = False

    def check_room(self, l: int) -> None:
        """Raises where l tokens a row, or those of the pack, do not fit: before any state has changed."""
        caches = [] if self.cache is None else [c for c in self.cache if isinstance(c, AttentionCache)]
        limited = [cache for cache in caches if not cache.windowed]
        if limited and self.cu_seqlens is not None and len(self.cu_seqlens) > 1:
            l = int(self.cu_seqlens.diff().max())
        for cache in limited:
            cache.require(l)

    def mix(self, mixer: nn.Module, x: Tensor, cache: Cache | None) -> Tensor:
        out: Tensor
        if self.one_token:
            out = mixer.step(x, cache)  # type: ignore[operator]
        else:
            out = mixer(x, cache=cache, seq_idx=self.seq_idx, cu_seqlens=self.cu_seqlens)
        return out

    def transform(self, mlp: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = mlp.step(x) if self.one_token else mlp(x)  # type: ignore[operator]
        return out


class SharedBlock(nn.Module):
    """mlp(norm2(attention(norm([x, embedding])))): one set of weights for all the blocks that it runs before.

    Source: Glorioso et al. 2024 (Zamba); checked against transformers' ZambaAttentionDecoderLayer.
    """

    def __init__(self, config: LMConfig, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        d = config.d_model
        args = dict(config.shared_cfg)
        hidden = args.pop("d_intermediate", None)
        self.norm = Norm(2 * d, eps=config.norm_eps, device=device, dtype=dtype)
        self.mixer = Attention(2 * d, d_out=d, device=device, dtype=dtype, **args)
        self.norm2 = Norm(d, eps=config.norm_eps, device=device, dtype=dtype)
        self.mlp = GatedMLP(d, hidden, device=device, dtype=dtype)

    def forward(self, x: Tensor, embedded: Tensor, way: Pass, cache: Cache | None) -> Tensor:
        x = way.mix(self.mixer, self.norm(torch.cat([x, embedded], dim=-1)), cache)
        return way.transform(self.mlp, self.norm2(x))


class Block(nn.Module):
    """x + mixer(norm(x + shared_proj(s))), then x + mlp(norm2(x)), as far as the block has these parts.

    s is what the shared block has made of x: it enters the mixer, not the residual stream. The last addition
    is left to the next norm, which does both in one pass.
    """

    def __init__(self, config: LMConfig, index: int, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        d, eps = config.d_model, config.norm_eps
        self.norm = Norm(d, eps=eps, device=device, dtype=dtype)
        attention = index in config.attn_layer_idx
        kind, args = (Attention, config.attn_cfg) if attention else (LAYERS[config.layer], config.layer_args)
        self.mixer: Mamba | Mamba2 | Attention = kind(d, layer_idx=index, device=device, dtype=dtype, **args)
        if index in config.shared_layer_idx:
            self.shared_proj = nn.Linear(d, d, bias=False, device=device, dtype=dtype)
        self.has_mlp = config.has_mlp(index)
        if self.has_mlp:
            self.norm2 = Norm(d, eps=eps, device=device, dtype=dtype)
            self.mlp = GatedMLP(d, config.d_intermediate, device=device, dtype=dtype)

    def forward(
        self, out: Tensor | None, stream: Tensor, shared: Tensor | None, way: Pass, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """From the last layer's output and the stream without it to the same after this block."""
        fused, mixer = None, self.mixer
        if way.one_token and shared is None and out is not None and type(mixer) in LAYERS.values():
            fused = mixer.step_fused(out, cache, self.norm, stream)  # type: ignore[operator, arg-type]
        if fused is not None:
            out, stream = fused
        elif shared is None:
            normed, stream = self.norm.add(out, stream)
            out = way.mix(mixer, normed, cache)
        else:
            normed, _ = self.norm.add(self.shared_proj(shared), stream)
            out = way.mix(mixer, normed, cache)
        if self.has_mlp:
            normed, stream = self.norm2.add(out, stream)
            out = way.transform(self.mlp, normed)
        return out, stream


class Backbone(nn.Module):
    """Tokens to the final norm's output; parameter names as in mamba_ssm's MixerModel."""

    def __init__(self, config: LMConfig, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, device=device, dtype=dtype)
        if config.shared_layer_idx:
            self.shared = SharedBlock(config, device, dtype)
        self.layers = nn.ModuleList(Block(config, i, device, dtype) for i in range(config.n_layer))
        self.norm_f = Norm(config.d_model, eps=config.norm_eps, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, way: Pass) -> Tensor:
        way.check_room(1 if way.one_token else tokens.shape[-1])
        stream: Tensor = self.embedding(tokens)
        if self.config.residual_in_fp32:
            stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
        embedded, cache = stream, way.cache
        stepped = self._step_at_once(stream, way)
        if stepped is not None:
            return self.norm_f.add(*stepped)[0]
        out: Tensor | None = None
        for i, block in enumerate(self.layers):
            shared = None
            if i in self.config.shared_layer_idx:
                out, stream = None, stream if out is None else stream + out
                shared = self.shared(stream, embedded, way, None if cache is None else cache.shared[i])
            out, stream = block(out, stream, shared, way, None if cache is None else cache.mixers[i])
        return self.norm_f.add(out, stream)[0]

    def _step_at_once(self, stream: Tensor, way: Pass) -> tuple[Tensor, Tensor] | None:
        """`mamba2_step` of a run of Mamba-2 layers, where it is one launch for the first of them."""
        if not (way.one_token and way.cache is not None and stream.is_cuda and len(stream) == 1):
            return None
        blocks: list[Block] = list(self.layers)  # type: ignore[arg-type]
        if self.config.shared_layer_idx or any(b.has_mlp or not isinstance(b.mixer, Mamba2) for b in blocks):
            return None
        layers: list[Mamba2StepLayer] = []
        options = set()
        for block, cache in zip(blocks, way.cache.mixers, strict=True):
            assert isinstance(block.mixer, Mamba2) and isinstance(cache, LayerCache)
            layer = block.mixer.step_layer(block.norm, cache) if is_plain(block, Block) else None
            if layer is None or (not layers and not is_one_launch(stream, [layer])):
                return None
            layers.append(layer)
            options.add((block.norm.eps, block.mixer.norm.eps, block.mixer.dt_limit))
        if len(options) != 1:
            return None
        ((eps, gate_eps, dt_limit),) = options
        return mamba2_step(stream, layers, eps=eps, gate_eps=gate_eps, dt_limit=dt_limit)


class LanguageModel(nn.Module):
    """A language model of the shape of a config; parameter names as mamba_ssm's MambaLMHeadModel.

    Initialisation as there: the embedding N(0, 0.02), linear biases zero (not the step's), and each out_proj
    and fc2 scaled down by the root of the number of residual additions, so that the stream keeps its size.

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
        cache: ModelCache | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each position.

        Args:
            tokens: (b, l) integer.
            cache: from allocate_cache; continued from and updated in place.
            seq_idx: (b, l) integer; states reset where neighbours differ.
            cu_seqlens: (s + 1,) integer; s sequences packed in batch 1.

        Returns:
            (b, l, vocab_size).
        """
        logits: Tensor = self.lm_head(self.backbone(tokens, Pass(cache, seq_idx, cu_seqlens)))
        return logits

    def prefill(self, tokens: Tensor, cache: ModelCache, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Fills or continues the cache and returns the logits after each sequence's last token only.

        Args:
            tokens: (b, l), l >= 1; with cu_seqlens (1, l), and every sequence has a token.
            cache: of b rows, or s rows with cu_seqlens; updated in place.
            cu_seqlens: (s + 1,) integer.

        Returns:
            (b or s, vocab_size).
        """
        hidden = self.backbone(tokens, Pass(cache, None, cu_seqlens))
        last = hidden[:, -1] if cu_seqlens is None else hidden[0, cu_seqlens[1:].long() - 1]
        logits: Tensor = self.lm_head(last)
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """One token a row: tokens (b,), cache updated in place. Returns logits (b, vocab_size)."""
        return project(self.lm_head, self.backbone(tokens, Pass(cache, one_token=True)))

    def allocate_cache(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: Device = None,
        *,
        max_length: int | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> ModelCache:
        """Empty caches of all layers for batch_size sequences.

        Args:
            batch_size: b.
            dtype, device: of the activations; None: the weights'.
            max_length: tokens that a sequence can have in all; needed where attention has no window.
            state_dtype: of the recurrent states; None: float32. See Mamba2.allocate_cache.
        """

        def allocate(mixer: nn.Module) -> LayerCache | AttentionCache:
            if isinstance(mixer, Attention):
                return mixer.allocate_cache(batch_size, dtype, device, max_length=max_length)
            cache: LayerCache = mixer.allocate_cache(  # type: ignore[operator]
                batch_size, dtype, device, state_dtype=state_dtype
            )
            return cache

        shared = {i: allocate(self.backbone.shared.mixer) for i in self.config.shared_layer_idx}
        return ModelCache([allocate(block.mixer) for block in self.backbone.layers], shared)  # type: ignore[arg-type]

    def _initialise(self) -> None:
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        residuals = self.config.n_layer * (2 if self.config.d_intermediate else 1)
        for name, module in self.backbone.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
                nn.init.zeros_(module.bias)
            if name.endswith(("out_proj", "fc2")):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.weight /= math.sqrt(residuals)
