"""mamba_ssm.modules.mha on torch's attention, without flash_attn."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...causal_conv1d import causal_conv1d_fn, causal_conv1d_update


class MHA(nn.Module):
    """Self-attention: grouped keys and values, rotary positions, a short convolution, a gated MLP beside.

    Unlike the original: rotary positions need no flash_attn, the convolution's state holds its inputs (there:
    its outputs, so that generation departs from the parallel form), and a cached continuation may be longer
    than a token.

    Args:
        embed_dim, num_heads, num_heads_kv, head_dim: num_heads_kv None: num_heads; head_dim None: embed_dim /
            num_heads.
        mlp_dim: of the MLP beside the attention, rounded up to a multiple of 256; 0: none.
        d_conv: width of a causal convolution over queries, keys and values; 0: none.
        rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved: rotated dims of a head; 0: none.
        softmax_scale, causal: as in attention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.layer_idx = layer_idx
        self.d_conv = d_conv
        self.rotary_emb_dim = rotary_emb_dim
        self.rotary_emb_base = rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv or num_heads
        assert num_heads % self.num_heads_kv == 0, "num_heads must be divisible by num_heads_kv"
        if head_dim is None:
            assert embed_dim % num_heads == 0, "embed_dim must be divisible by num_heads"
        self.head_dim = head_dim or embed_dim // num_heads
        self.mlp_dim = math.ceil(mlp_dim / 256) * 256
        qkv_dim = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        out_dim = self.head_dim * num_heads + self.mlp_dim // 2
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(embed_dim, qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **kwargs)
        if d_conv > 0:
            self.conv1d = nn.Conv1d(qkv_dim, qkv_dim, d_conv, padding=d_conv - 1, groups=qkv_dim, **kwargs)
        self.out_proj = nn.Linear(out_dim, embed_dim, bias=out_proj_bias, **kwargs)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, max_seqlen, 2, num_heads_kv, head_dim) of keys and values, and the convolution's state."""
        weight, conv_state = self.out_proj.weight, None
        if self.d_conv > 0:
            channels = self.conv1d.weight.shape[0]
            conv_state = weight.new_zeros(batch_size, channels, self.d_conv, dtype=dtype or weight.dtype)
        sizes = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return weight.new_empty(sizes, dtype=dtype or weight.dtype), conv_state

    def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
        """x (batch, seqlen, embed_dim); keys, values and states are kept in inference_params."""
        b, l, _ = x.shape
        cache = None if inference_params is None else self._cache(inference_params, x)
        start = 0 if inference_params is None else inference_params.seqlen_offset
        qkv, mlp = torch.split(
            self.in_proj(x), [self.in_proj.out_features - self.mlp_dim, self.mlp_dim], dim=-1
        )
        if self.d_conv > 0:
            qkv = self._convolved(qkv, None if cache is None else cache[1], start)
        q, kv = torch.split(
            qkv, [self.num_heads * self.head_dim, 2 * self.num_heads_kv * self.head_dim], dim=-1
        )
        q = q.view(b, l, self.num_heads, self.head_dim)
        k, v = kv.view(b, l, 2, self.num_heads_kv, self.head_dim).unbind(2)
        positions = self._positions(inference_params, b, l, x.device)
        if self.rotary_emb_dim > 0:
            q, k = self._rotated(q, positions), self._rotated(k, positions)
        if cache is None:
            mask, causal = None, self.causal
        else:
            keys, mask = self._store(cache[0], k, v, positions, inference_params)
            (k, v), causal = keys.to(q.dtype).unbind(2), False
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads != self.num_heads_kv,
        )
        out = out.transpose(1, 2).flatten(2)
        if self.mlp_dim > 0:
            up, gate = mlp.chunk(2, dim=-1)
            out = torch.cat([out, up * F.silu(gate)], dim=-1)
        result: Tensor = self.out_proj(out)
        return result

    def _cache(self, inference_params: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.layer_idx is not None, "Generation requires layer_idx in the constructor"
        states = inference_params.key_value_memory_dict
        if self.layer_idx not in states:
            states[self.layer_idx] = self.allocate_inference_cache(
                x.shape[0], inference_params.max_seqlen, dtype=x.dtype
            )
        cache: tuple[Tensor, Tensor | None] = states[self.layer_idx]
        return cache

    def _positions(self, params: Any, b: int, l: int, device: torch.device) -> Tensor:
        """(batch, seqlen) of the tokens; those that a captured graph reads lie in lengths_per_sample."""
        tokens = torch.arange(l, device=device)
        if params is None or params.seqlen_offset == 0:
            return tokens.expand(b, l)
        begin: Tensor | int = params.seqlen_offset
        if params.lengths_per_sample is not None:
            begin = params.lengths_per_sample[:b, None].long()
        return (begin + tokens).expand(b, l)

    def _store(
        self, kv_cache: Tensor, k: Tensor, v: Tensor, positions: Tensor, params: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes keys and values; returns all of them, and which of them each query may see."""
        begin = params.batch_size_offset
        rows = torch.arange(begin, begin + k.shape[0], device=k.device)[:, None]
        with torch.no_grad():
            kv_cache[rows, positions] = torch.stack([k, v], dim=2).to(kv_cache.dtype)
        captured = params.lengths_per_sample is not None and params.seqlen_offset > 0
        seen = kv_cache.shape[1] if captured else params.seqlen_offset + k.shape[1]
        places = torch.arange(seen, device=k.device)
        mask = places <= positions[..., None]
        if not self.causal:
            mask = places <= positions[:, -1:, None]
        # what was never written is not a number perhaps, and masked weights of 0 would not hide that
        valid = places <= positions[:, -1:]
        keys = kv_cache[begin : begin + k.shape[0], :seen]
        return keys.masked_fill(~valid[..., None, None, None], 0), mask[:, None]

    def _convolved(self, qkv: Tensor, conv_state: Tensor | None, start: int) -> Tensor:
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if conv_state is None:
            out = causal_conv1d_fn(qkv.mT, weight, bias)
        elif start > 0 and qkv.shape[1] == 1:
            return causal_conv1d_update(qkv.squeeze(1), conv_state, weight, bias).unsqueeze(1)
        else:
            with torch.no_grad():
                conv_state.mul_(0 if start == 0 else 1)
            before = conv_state[..., 1:].to(qkv.dtype, copy=True)
            out = causal_conv1d_fn(qkv.mT, weight, bias, initial_states=before)
            with torch.no_grad():
                conv_state.copy_(torch.cat([conv_state, qkv.mT], dim=-1)[..., -self.d_conv :])
        assert isinstance(out, Tensor)
        return out.mT

    def _rotated(self, t: Tensor, positions: Tensor) -> Tensor:
        """Rotates pairs among the first rotary_emb_dim values of each head, t (batch, seqlen, heads, dim)."""
        dim = self.rotary_emb_dim
        rates = self.rotary_emb_base ** (-torch.arange(0, dim, 2, device=t.device, dtype=torch.float32) / dim)
        angles = (positions[..., None] * rates)[:, :, None]
        cos, sin = angles.cos(), angles.sin()
        turned, rest = t[..., :dim].float(), t[..., dim:]
        if self.rotary_emb_interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            out = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = turned.chunk(2, dim=-1)
            out = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([out.to(t.dtype), rest], dim=-1)
