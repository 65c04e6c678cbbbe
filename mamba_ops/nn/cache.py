"""The states that one layer carries from token to token, and how they enter and leave the operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="Cache")


@dataclass(eq=False)
class Cache:
    """States of one layer for b sequences: tensors whose first dim is the sequence.

    The tensors keep their storage: layers write into them, so that a captured CUDA graph stays valid.
    """

    def tensors(self) -> dict[str, Tensor]:
        """The states by name; those that the layer does not have are left out."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def batch_size(self) -> int:
        return next(iter(self.tensors().values())).shape[0]

    def reset(self) -> None:
        """Forgets every token: all states become zero."""
        for tensor in self.tensors().values():
            tensor.zero_()

    def select(self: Self, rows: Tensor | Sequence[int]) -> Self:
        """A new cache that holds copies of the given rows, repeats allowed, in their order."""
        index = self._index(rows)
        return replace(self, **{name: t.index_select(0, index) for name, t in self.tensors().items()})

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes what row rows[i] was, in place; as many rows as before (beam search)."""
        self.copy_from(self.select(rows))

    def put(self: Self, rows: Tensor | Sequence[int], other: Self) -> None:
        """Row rows[i] becomes row i of another cache, in place: the inverse of select."""
        index = self._index(rows)
        for name, mine in self.tensors().items():
            mine.index_copy_(0, index, other.tensors()[name])

    def copy_from(self: Self, other: Self) -> None:
        """Takes over the states of another cache of the same shape, in place (return to a saved position)."""
        for name, mine in self.tensors().items():
            theirs = other.tensors()[name]
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"{type(self).__name__}: states must be {tuple(mine.shape)}, got {tuple(theirs.shape)}"
                )
            mine.copy_(theirs)

    def _index(self, rows: Tensor | Sequence[int]) -> Tensor:
        device = next(iter(self.tensors().values())).device
        return torch.as_tensor(rows, dtype=torch.long, device=device)


@dataclass(eq=False)
class LayerCache(Cache):
    """States of a Mamba or Mamba2 layer; their size does not depend on how many tokens were seen.

    Attributes:
        conv_state: (b, conv_dim, d_conv - 1), the activations' dtype. The last inputs of the convolution.
        ssm_state: (b, d, n) for Mamba, (b, h, p, n) for Mamba2; float32 (float64 in a float64 layer)
            unless allocate_cache was given another state_dtype.

    >>> from mamba_ops.nn import Mamba
    >>> cache = Mamba(16).allocate_cache(3)
    >>> cache.batch_size, cache.select([2, 0]).batch_size
    (3, 2)
    """

    conv_state: Tensor
    ssm_state: Tensor


@dataclass(eq=False)
class AttentionCache(Cache):
    """Keys and values of the tokens that later ones may attend to.

    Slot j holds the last token whose position is j modulo the capacity: with a window the slots are a ring.

    Attributes:
        keys, values: (b, hkv, capacity, p), the activations' dtype; keys are rotated already.
        length: (b,) int64, tokens seen.
        conv_state: (b, conv_dim, d_conv - 1) where the layer has a convolution.
        windowed: old tokens give way to new ones; else there is room for capacity tokens in all.
        seen: an upper bound of length that the host knows.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    conv_state: Tensor | None = None
    windowed: bool = False
    seen: int = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def reset(self) -> None:
        super().reset()
        self.seen = 0

    def copy_from(self, other: AttentionCache) -> None:
        super().copy_from(other)
        self.seen = other.seen

    def put(self, rows: Tensor | Sequence[int], other: AttentionCache) -> None:
        super().put(rows, other)
        self.seen = max(self.seen, other.seen)

    def require(self, tokens: int) -> None:
        """Raises ValueError unless there is room for so many further tokens of every sequence."""
        if not self.windowed and self.seen + tokens > self.capacity:
            raise ValueError(
                f"Attention: the cache has room for {self.capacity} tokens, got {self.seen} + {tokens}; "
                "allocate it with a larger max_length"
            )

    def claim(self, tokens: int) -> None:
        """Notes that every sequence goes on by at most so many tokens; raises as require."""
        self.require(tokens)
        self.seen += tokens

    def positions(self) -> Tensor:
        """(b, capacity): the position of the token in each slot, negative where there is none yet."""
        last = self.length[:, None] - 1
        slots = torch.arange(self.capacity, device=self.length.device)
        return last - (last - slots) % self.capacity

    def store(self, keys: Tensor, values: Tensor, cu_seqlens: Tensor | None) -> None:
        """Appends keys and values (b, hkv, l, p), or a pack (1, hkv, l, p) of b sequences."""
        l = keys.shape[2]
        if l == 0 or self.batch_size == 0:
            return
        before = self.length[:, None].clone()
        self.length += l if cu_seqlens is None else cu_seqlens.diff()
        positions = self.positions()
        token = positions - before if cu_seqlens is None else positions - before + cu_seqlens[:-1, None]
        token = token.clamp(0, l - 1)
        fresh = (positions >= before)[:, None, :, None]
        for mine, new in ((self.keys, keys), (self.values, values)):
            if cu_seqlens is None:
                gathered = new.gather(2, token[:, None, :, None].expand(mine.shape))
            else:
                gathered = new[0][:, token].transpose(0, 1)
            mine.copy_(torch.where(fresh, gathered.to(mine.dtype), mine))


STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state_dtype_of(activations: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of a recurrent state: the wanted one, else that of the arithmetic."""
    if wanted is not None and wanted not in STATE_DTYPES:
        raise ValueError(
            f"allocate_cache: state_dtype must be float32, bfloat16, float16 or float64, got {wanted}"
        )
    return wanted or torch.promote_types(activations, torch.float32)


def initial_state(state: Tensor, dtype: torch.dtype) -> Tensor:
    """The state to start from: a copy where autograd may keep it, since the cache is overwritten later."""
    return state.to(dtype, copy=torch.is_grad_enabled())


def carry(result: Tensor | tuple[Tensor, ...], *states: Tensor | None) -> Tensor:
    """Splits an operator's result: its final states, if there are any, go into states; returns the output."""
    if isinstance(result, Tensor):
        return result
    y, *finals = result
    with torch.no_grad():
        for state, final in zip(states, finals, strict=True):
            if state is not None:
                state.copy_(final)
    return y


def decay_rate(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 at least: half precision would lose the slow decays."""
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())


def check_sequence(name: str, x: Tensor, d_model: int) -> None:
    """Raises unless x is (b, l, d_model)."""
    if x.dim() != 3 or x.shape[-1] != d_model:
        raise ValueError(f"{name}: x must be (b, l, {d_model}), got {tuple(x.shape)}")
