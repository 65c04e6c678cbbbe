"""Causal attention for hybrids: rotary, grouped queries, sliding window, packs, and one-token steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..causal_conv1d import causal_conv1d
from ..state_update import causal_conv1d_update
from .cache import AttentionCache, carry, check_sequence, initial_state
from .init import Device, check_sizes, depthwise_conv
from .rotary import rotate
from .token import project, token_rows


class Attention(nn.Module):
    """Causal self-attention with the arguments, parameters and results of mamba_ssm's MHA, and a window.

        q, k, v, up, gate = in_proj(x), the first three through a causal convolution where d_conv > 0
        output = out_proj([softmax(scale q k^T) v, up silu(gate)])       up, gate only where mlp_dim > 0

    It runs torch's scaled_dot_product_attention. A window of w costs O(l w), a token then O(w) anywhere.

    Args:
        d_model: width of the input, and of the output where d_out is None.
        num_heads: h, query heads.
        num_heads_kv: hkv, key and value heads, a divisor of h; None: h.
        head_dim: p; None: d_model / h.
        mlp_dim: width of the MLP part, up and gate together, rounded up to a multiple of 256.
        qkv_proj_bias, out_proj_bias: whether in_proj and out_proj have a bias.
        softmax_scale: None: p ** -0.5.
        causal: must be True.
        layer_idx: kept as an attribute, not used.
        d_conv: width of the convolution over q, k and v, 2 to 4; 0: none.
        rotary_emb_dim: components of a head that are rotated; 0: none.
        rotary_emb_base, rotary_emb_interleaved: see rotary.rotate.
        window: a token attends to so many tokens, itself included; None: to all before it.
        d_out: width of the output; None: d_model.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes that do not divide, or causal=False.

    Source: Vaswani et al. 2017; checked against transformers' attention.

    >>> layer = Attention(16, 4, num_heads_kv=2, rotary_emb_dim=4, window=3)
    >>> x = torch.randn(2, 5, 16)
    >>> cache = layer.allocate_cache(2)
    >>> with torch.no_grad():
    ...     whole, first = layer(x), layer(x[:, :4], cache=cache)
    >>> bool(torch.allclose(layer.step(x[:, 4], cache), whole[:, 4], atol=1e-5))
    True
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = True,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        window: int | None = None,
        d_out: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads < 1 or self.num_heads_kv < 1 or num_heads % self.num_heads_kv:
            raise ValueError(
                f"Attention: num_heads_kv must divide num_heads = {num_heads}, got {self.num_heads_kv}"
            )
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"Attention: num_heads must divide d_model = {d_model}, got {num_heads}")
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        check_sizes("Attention", d_model=d_model, head_dim=self.head_dim)
        if not causal:
            raise ValueError("Attention: causal must be True: a language model does not look ahead")
        if not 0 <= rotary_emb_dim <= self.head_dim or rotary_emb_dim % 2:
            raise ValueError(
                f"Attention: rotary_emb_dim must be even and in 0..head_dim = {self.head_dim}, "
                f"got {rotary_emb_dim}"
            )
        if window is not None and window < 1:
            raise ValueError(f"Attention: window must be at least 1, got {window}")
        self.mlp_dim = -(-mlp_dim // 256) * 256
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.layer_idx = layer_idx
        self.d_conv = d_conv
        self.rotary_emb_dim = rotary_emb_dim
        self.rotary_emb_base = rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved
        self.window = window
        self.qkv_dim = self.head_dim * (num_heads + 2 * self.num_heads_kv)

        self.in_proj = nn.Linear(
            d_model, self.qkv_dim + self.mlp_dim, bias=qkv_proj_bias, device=device, dtype=dtype
        )
        if d_conv:
            self.conv1d = depthwise_conv(self.qkv_dim, d_conv, True, device, dtype)
        inner = num_heads * self.head_dim + self.mlp_dim // 2
        d_out = d_model if d_out is None else d_out
        self.out_proj = nn.Linear(inner, d_out, bias=out_proj_bias, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        *,
        cache: AttentionCache | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Runs the layer over a sequence.

        Args:
            x: (b, l, d_model).
            cache: keys and values to continue from, to which those of x are added (without gradients); b
                rows, or s rows with cu_seqlens; not together with seq_idx.
            seq_idx: (b, l) integer; attention does not cross where neighbours differ.
            cu_seqlens: (s + 1,) integer; s sequences packed in batch 1. With a cache and without a window the
                host reads the longest length.

        Returns:
            (b, l, d_out).
        """
        check_sequence("Attention", x, self.d_model)
        if seq_idx is not None and (cache is not None or cu_seqlens is not None):
            raise ValueError("Attention: seq_idx goes with neither a cache nor cu_seqlens")
        b, l, _ = x.shape
        pack = None if cu_seqlens is None else _checked(cu_seqlens, b, l, x.device)
        rows = b if pack is None else len(pack) - 1
        if cache is not None:
            if cache.batch_size != rows:
                raise ValueError(f"Attention: the cache must have {rows} rows, got {cache.batch_size}")
            earlier = cache.seen > 0
            longest = l if pack is None or cache.windowed else int(pack.diff().max())
            cache.claim(longest)
        qkv, mlp = self._split(self.in_proj(x))
        if self.d_conv:
            qkv = self._convolved(qkv, cache, seq_idx, cu_seqlens)
        sequence, positions = _places(b, l, pack, seq_idx, cache, x.device)
        q, k, v = self._heads(qkv.transpose(1, 2), positions)
        if cache is None or not earlier:
            out = self._attend_new(q, k, v, sequence, positions)
        else:
            out = self._attend_all(q, k, v, sequence, positions, cache)
        if cache is not None:
            with torch.no_grad():
                cache.store(k, v, pack)
        if pack is not None:  # bad ones cannot be seen on the host, where they are on a device
            good = (pack[0] == 0) & (pack[-1] == l) & (pack.diff() >= 0).all()
            out = torch.where(good, out, torch.nan)
        return self._output(out.transpose(1, 2).flatten(2), mlp, self.out_proj)

    @torch.no_grad()
    def step(self, x: Tensor, cache: AttentionCache) -> Tensor:
        """One token: x (b, d_model) or (b, 1, d_model); cache, b rows, updated in place. As x, d_out wide."""
        rows = token_rows("Attention.step", x, self.d_model)
        if cache.batch_size != len(rows):
            raise ValueError(f"Attention.step: the cache must have {len(rows)} rows, got {cache.batch_size}")
        cache.claim(1)
        qkv, mlp = self._split(project(self.in_proj, rows))
        if cache.conv_state is not None:
            qkv = causal_conv1d_update(
                qkv, cache.conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, None
            )
        q, k, v = self._heads(qkv[:, :, None], cache.length[:, None])
        row, slot = torch.arange(len(rows), device=x.device), cache.length % cache.capacity
        cache.keys[row, :, slot] = k[:, :, 0].to(cache.keys.dtype)
        cache.values[row, :, slot] = v[:, :, 0].to(cache.values.dtype)
        cache.length += 1
        # A captured CUDA graph must serve every position; without one only the slots in use are read.
        used = cache.capacity if x.is_cuda else min(cache.seen, cache.capacity)
        filled = torch.arange(used, device=x.device) < cache.length[:, None]
        keys, values = (t[:, :, :used].to(q.dtype) for t in (cache.keys, cache.values))
        out = self._attention(q, keys, values, filled[:, None, None])
        out = self._output(out.flatten(1), mlp, lambda y: project(self.out_proj, y))
        return out if x.dim() == 2 else out[:, None]

    def allocate_cache(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: Device = None,
        *,
        max_length: int | None = None,
    ) -> AttentionCache:
        """An empty cache for batch_size sequences.

        Args:
            batch_size: b.
            dtype: the activations' dtype (that of in_proj's output); None: the weights'.
            device: None: the weights'.
            max_length: tokens that a sequence can have in all; not needed where the layer has a window.
        """
        capacity = max_length if self.window is None else self.window
        if capacity is None:
            raise ValueError("Attention: a cache without a window needs max_length")
        weight = self.in_proj.weight
        dtype, device = dtype or weight.dtype, device or weight.device
        shape = (batch_size, self.num_heads_kv, capacity, self.head_dim)
        conv_state = None
        if self.d_conv:
            conv_state = torch.zeros(batch_size, self.qkv_dim, self.d_conv - 1, dtype=dtype, device=device)
        return AttentionCache(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(batch_size, dtype=torch.long, device=device),
            conv_state,
            self.window is not None,
        )

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor | None]:
        """in_proj's output as q, k, v together and, where there is an MLP part, its hidden layer."""
        if not self.mlp_dim:
            return projected, None
        qkv, mlp = torch.split(projected, [self.qkv_dim, self.mlp_dim], dim=-1)
        up, gate = mlp.chunk(2, dim=-1)
        return qkv, up * F.silu(gate)

    def _convolved(
        self, qkv: Tensor, cache: AttentionCache | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        state = None if cache is None else cache.conv_state
        out = causal_conv1d(
            qkv.transpose(1, 2),
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            None,
            initial_state=None if state is None else initial_state(state, qkv.dtype),
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_state=state is not None,
        )
        return carry(out, state).transpose(1, 2)

    def _heads(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, qkv_dim, l) to q (b, h, l, p), k and v (b, hkv, l, p), q and k rotated."""
        b, _, l = qkv.shape
        h, hkv = self.num_heads, self.num_heads_kv
        heads = qkv.reshape(b, h + 2 * hkv, self.head_dim, l).transpose(2, 3)
        turned = rotate(
            heads[:, : h + hkv],
            positions[:, None],
            self.rotary_emb_dim,
            self.rotary_emb_base,
            self.rotary_emb_interleaved,
        )
        return turned[:, :h], turned[:, h:], heads[:, h + hkv :]

    def _attend_new(
        self, q: Tensor, k: Tensor, v: Tensor, sequence: Tensor | None, positions: Tensor
    ) -> Tensor:
        """Attention among the new tokens alone."""
        l = q.shape[2]
        if sequence is not None:
            seen = (sequence[:, :, None] == sequence[:, None]) & self._reach(positions, positions)
            return self._attention(q, k, v, seen[:, None])
        if self.window is None or l <= self.window:
            return self._attention(q, k, v, None)
        return self._attend_blocks(q, k, v, self.window)

    def _attend_blocks(self, q: Tensor, k: Tensor, v: Tensor, w: int) -> Tensor:
        """A window of w over blocks of w tokens: each block attends to itself and the one before."""
        b, h, l, p = q.shape
        blocks = -(-l // w)
        q, k, v = (F.pad(t, (0, 0, 0, blocks * w - l)).view(b, t.shape[1], blocks, w, p) for t in (q, k, v))
        k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], dim=3) for t in (k, v))
        start = torch.arange(blocks, device=q.device)[:, None] * w
        query = start + torch.arange(w, device=q.device)
        key = start - w + torch.arange(2 * w, device=q.device)
        seen = (self._reach(query, key) & (key >= 0)[:, None]).expand(b, -1, -1, -1)
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # a batch of b * blocks
        out = self._attention(q, k, v, seen.flatten(0, 1)[:, None])
        return out.view(b, blocks, h, w, p).transpose(1, 2).reshape(b, h, blocks * w, p)[:, :, :l]

    def _attend_all(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequence: Tensor | None,
        positions: Tensor,
        cache: AttentionCache,
    ) -> Tensor:
        """Attention to what the cache holds and to the new tokens."""
        keys, values, held = cache.keys.to(k.dtype), cache.values.to(v.dtype), cache.positions()
        if sequence is not None:  # the rows of the cache one after the other
            row = torch.arange(cache.batch_size, device=q.device)
            sequence = torch.cat([row.repeat_interleave(cache.capacity), sequence[0]])[None]
            keys, values = (t.transpose(0, 1).flatten(1, 2)[None] for t in (keys, values))
            held = held.reshape(1, -1)
        every = torch.cat([held, positions], dim=1)
        seen = self._reach(positions, every) & (every >= 0)[:, None]
        if sequence is not None:
            seen &= sequence[:, -q.shape[2] :, None] == sequence[:, None]
        return self._attention(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), seen[:, None])

    def _reach(self, query: Tensor, key: Tensor) -> Tensor:
        """(.., lq, lk): whether the token at a query's position may attend to the one at a key's."""
        distance = query[..., :, None] - key[..., None, :]
        return (distance >= 0) if self.window is None else (distance >= 0) & (distance < self.window)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """Softmax over the keys that are seen; None: those up to the query's own place."""
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            is_causal=seen is None,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads != self.num_heads_kv,
        )

    def _output(self, attended: Tensor, mlp: Tensor | None, out_proj: Callable[[Tensor], Tensor]) -> Tensor:
        return out_proj(attended if mlp is None else torch.cat([attended, mlp], dim=-1))


def _checked(cu_seqlens: Tensor, b: int, l: int, device: torch.device) -> Tensor:
    """cu_seqlens as int64, checked as far as the host can see it."""
    if b != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            "Attention: cu_seqlens must be (s + 1,) integers with s >= 1 and batch 1, got "
            f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype} with batch {b}"
        )
    if cu_seqlens.is_cpu:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != l or sorted(ends) != ends:
            raise ValueError(f"Attention: cu_seqlens must rise from 0 to l = {l}, got {ends}")
    return cu_seqlens.to(device=device, dtype=torch.long)


def _places(
    b: int,
    l: int,
    pack: Tensor | None,
    seq_idx: Tensor | None,
    cache: AttentionCache | None,
    device: torch.device,
) -> tuple[Tensor | None, Tensor]:
    """(b, l) sequence of each token, None for one a row; and (b, l) or (1, l) its position there."""
    token = torch.arange(l, device=device)
    if pack is not None:
        sequence = torch.searchsorted(pack[1:], token, right=True).clamp(0, len(pack) - 2)
        start = pack[:-1] if cache is None else pack[:-1] - cache.length
        return sequence[None], (token - start[sequence])[None]
    if seq_idx is not None:  # positions count on across sequences: only distances within one matter
        if seq_idx.shape != (b, l) or seq_idx.is_floating_point():
            raise ValueError(
                f"Attention: seq_idx must be (b, l) = {(b, l)} integers, "
                f"got {tuple(seq_idx.shape)} {seq_idx.dtype}"
            )
        changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))[:, :l]
        return changes.cumsum(1), token[None]
    return None, token[None] if cache is None else cache.length[:, None] + token
