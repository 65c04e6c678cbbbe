"""Causal depthwise convolution over the sequence, with states."""

from typing import Any

import torch
from torch import Tensor

from ._library import (
    grad_like,
    is_silu,
    kept,
    register_autocast,
    register_autograd,
    register_fake,
    register_once_differentiable,
    state_rows,
)

_fwd = torch.ops.mamba_ops.causal_conv1d_fwd.default
_bwd = torch.ops.mamba_ops.causal_conv1d_bwd.default


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves every channel with its own short filter over the past, then applies SiLU if asked.

    ``y[t] = act(bias + sum_k weight[k] * x[t - (w - 1) + k])``, where tokens before the sequence come from
    `initial_state`, or are zero.

    Args:
        x: (b, d, l), float32, bfloat16, float16 or float64; any strides ((b, l, d) memory transposed is as
            good).
        weight: (d, w) with w in 2..4, x's dtype or float32. The last tap meets the current token.
        bias: (d), dtype as for weight.
        activation: None, "silu" or "swish" (the same).
        initial_state: (b, d, w - 1), x's dtype: the inputs before the first token; (s, d, w - 1) with
            cu_seqlens.
        seq_idx: (b, l) integers; taps reach only tokens in an unbroken stretch of the same id. The initial
            state enters the first stretch of a row, the final state is that of the last one.
        cu_seqlens: (s + 1) offsets from 0 to l of s sequences packed in one row (b = 1), each with states
            of its own. On a GPU they are not read by the host: with bad ones every output is NaN.
        return_final_state: also return the last w - 1 inputs of each row or packed sequence.

    Returns:
        y (b, d, l) in x's dtype and layout; with return_final_state the pair (y, final_state (b or s, d, w
        - 1)).

    Raises:
        RuntimeError: shapes, dtypes, devices or offsets disagree (the message names the argument).
        ValueError: an unknown activation.

    Source: the convolution of Mamba (Gu & Dao 2023); checked against `mamba_ops.reference.causal_conv1d`.

    >>> x, weight = torch.ones(1, 2, 5), torch.ones(2, 4)
    >>> causal_conv1d(x, weight)[0, 0]
    tensor([1., 2., 3., 4., 4.])
    """
    silu = is_silu("causal_conv1d", activation)
    y, final_state = _fwd(x, weight, bias, initial_state, seq_idx, cu_seqlens, silu, return_final_state)
    return (y, final_state) if return_final_state else y


@register_fake("causal_conv1d_fwd")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    b, d, _ = x.shape
    states = (state_rows(b, cu_seqlens), d, weight.shape[1] - 1)
    return torch.empty_like(x), x.new_empty(states if return_final_state else (0,))


@register_fake("causal_conv1d_bwd")
def _(dy: Tensor, dfinal_state: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    # rest: weight, bias, initial_state, then what has no gradient
    return (torch.empty_like(x), *(grad_like(t, x) for t in rest[:3]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu, ctx.has_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    grads = _bwd(dy, dfinal_state if ctx.has_state else None, *tensors, ctx.silu)
    return (*kept(grads, tensors, ctx.needs_input_grad), *[None] * 4)


register_autograd("causal_conv1d_fwd", _setup_context, _backward)
register_autocast("causal_conv1d_fwd", positions=(0, 3))
register_once_differentiable("causal_conv1d_bwd")
