"""The states that one layer carries from token to token, and how they enter and leave the operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class LayerCache:
    """States of one layer for b sequences; its size does not depend on how many tokens were seen.

    The tensors keep their storage: layers write into them, so that a captured CUDA graph stays valid.

    Attributes:
        conv_state: (b, conv_dim, d_conv - 1), the activations' dtype. The last inputs of the convolution.
        ssm_state: (b, d, n) for Mamba, (b, h, p, n) for Mamba2; float32 (float64 in a float64 layer).

    >>> from mamba_ops.nn import Mamba
    >>> cache = Mamba(16).allocate_cache(3)
    >>> cache.batch_size, cache.select([2, 0]).batch_size
    (3, 2)
    """

    conv_state: Tensor
    ssm_state: Tensor

    @property
    def batch_size(self) -> int:
        return self.conv_state.shape[0]

    def reset(self) -> None:
        """Forgets every token: all states become zero."""
        self.conv_state.zero_()
        self.ssm_state.zero_()

    def select(self, rows: Tensor | Sequence[int]) -> LayerCache:
        """A new cache that holds copies of the given rows, repeats allowed, in their order."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.conv_state.device)
        return LayerCache(self.conv_state.index_select(0, index), self.ssm_state.index_select(0, index))

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes what row rows[i] was, in place; as many rows as before (beam search)."""
        self.copy_from(self.select(rows))

    def copy_from(self, other: LayerCache) -> None:
        """Takes over the states of another cache of the same shape, in place (return to a saved position)."""
        for mine, theirs in ((self.conv_state, other.conv_state), (self.ssm_state, other.ssm_state)):
            if mine.shape != theirs.shape:
                raise ValueError(f"LayerCache: states must be {tuple(mine.shape)}, got {tuple(theirs.shape)}")
            mine.copy_(theirs)


def initial_state(state: Tensor, dtype: torch.dtype) -> Tensor:
    """The state to start from: a copy where autograd may keep it, since the cache is overwritten later."""
    return state.to(dtype, copy=torch.is_grad_enabled())


def carry(result: Tensor | tuple[Tensor, Tensor], state: Tensor | None) -> Tensor:
    """Splits an operator's result: the final state, if there is one, goes into state; returns the output."""
    if isinstance(result, Tensor):
        return result
    y, final_state = result
    if state is not None:
        with torch.no_grad():
            state.copy_(final_state)
    return y


def decay_rate(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 at least: half precision would lose the slow decays."""
    return -torch.exp(A_log if A_log.dtype == torch.float64 else A_log.float())


def check_sequence(name: str, x: Tensor, d_model: int) -> None:
    """Raises unless x is (b, l, d_model)."""
    if x.dim() != 3 or x.shape[-1] != d_model:
        raise ValueError(f"{name}: x must be (b, l, {d_model}), got {tuple(x.shape)}")
