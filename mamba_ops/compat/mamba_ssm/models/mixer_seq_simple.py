"""mamba_ssm.models.mixer_seq_simple on mamba_ops' operators."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.block import Block
from ..modules.mamba2 import Mamba2
from ..modules.mamba3 import Mamba3
from ..modules.mamba_simple import Mamba
from ..modules.mha import MHA
from ..modules.mlp import GatedMLP
from ..ops.triton.layer_norm import RMSNorm, layer_norm_fn
from ..utils.generation import GenerationMixin
from ..utils.hf import load_config_hf, load_state_dict_hf
from .config_mamba import MambaConfig

Device = torch.device | str | None
LMOutput = namedtuple("LMOutput", ["logits"])
_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}


def create_block(
    d_model: int,
    d_intermediate: int,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """The block at layer_idx: attention if in attn_layer_idx, else the mixer of ssm_cfg."""
    kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
    if layer_idx not in (attn_layer_idx or []):
        cfg = dict(ssm_cfg or {})
        layer = cfg.pop("layer", "Mamba1")
        if layer not in _MIXERS:
            raise ValueError(f"Invalid ssm_layer: {layer}, only support Mamba1 and Mamba2")
        mixer_cls = partial(_MIXERS[layer], layer_idx=layer_idx, **cfg, **kwargs)
    else:
        mixer_cls = partial(MHA, layer_idx=layer_idx, **(attn_cfg or {}), **kwargs)
    norm_cls = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **kwargs)
    mlp_cls: Any = nn.Identity
    if d_intermediate:
        mlp_cls = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **kwargs)
    block = Block(d_model, mixer_cls, mlp_cls, norm_cls, fused_add_norm, residual_in_fp32)
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Zero biases but those flagged _no_reinit, normal embeddings, smaller projections onto the residual."""
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, p in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(p, a=math.sqrt(5))
                with torch.no_grad():
                    p.div_(math.sqrt(n_residuals_per_layer * n_layer))


class MixerModel(nn.Module):
    """Embedding, blocks and a last norm."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **kwargs)
        self.layers = nn.ModuleList(
            create_block(
                d_model,
                d_intermediate,
                ssm_cfg,
                attn_layer_idx,
                attn_cfg,
                norm_epsilon,
                rms_norm,
                residual_in_fp32,
                fused_add_norm,
                layer_idx,
                **kwargs,
            )
            for layer_idx in range(n_layer)
        )
        norm_cls: Any = RMSNorm if rms_norm else nn.LayerNorm
        self.norm_f = norm_cls(d_model, eps=norm_epsilon, **kwargs)
        options = {"n_residuals_per_layer": 2 if d_intermediate else 1} | (initializer_cfg or {})
        self.apply(partial(_init_weights, n_layer=n_layer, **options))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of every layer, by its index."""
        layers: Any = enumerate(self.layers)
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in layers
        }

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """input_ids (batch, seqlen) to hidden states (batch, seqlen, d_model)."""
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        norm = self.norm_f
        if not self.fused_add_norm:
            total = hidden if residual is None else hidden + residual
            out: Tensor = norm(total.to(norm.weight.dtype))
            return out
        is_rms_norm = isinstance(norm, RMSNorm)
        normed = layer_norm_fn(
            hidden, norm.weight, norm.bias, residual, eps=norm.eps, is_rms_norm=is_rms_norm
        )
        assert isinstance(normed, Tensor)
        return normed


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """The language model of a MambaConfig.

    Unlike the original: from_pretrained also reads safetensors and sharded checkpoints, and loads in dtype.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            **kwargs,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **kwargs)
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """One tensor for embedding and head, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of every layer, by its index."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> LMOutput:
        """Logits of input_ids (batch, seqlen), or of the last num_last_tokens; position_ids are not used."""
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden = hidden[:, -num_last_tokens:]
        return LMOutput(logits=self.lm_head(hidden))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str,
        device: Device = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> MambaLMHeadModel:
        """The model of a folder or of the Hub."""
        config = MambaConfig(**load_config_hf(pretrained_model_name))
        model = cls(config, device=device, dtype=dtype, **kwargs)
        model.load_state_dict(load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype))
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Writes pytorch_model.bin and config.json."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=4))
