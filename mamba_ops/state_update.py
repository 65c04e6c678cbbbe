"""One token, or a few, with the state updated in place: what generation runs at every step.

The three operators have no backward: they refuse tensors that require gradients while gradients are recorded.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ._library import is_silu, register_autocast, register_fake, step_limits

_conv = torch.ops.mamba_ops.causal_conv1d_update.default
_scan = torch.ops.mamba_ops.selective_state_update.default
_ssd = torch.ops.mamba_ops.ssd_state_update.default


def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d` of one token or a few, continuing from `state`, which then holds the last k inputs.

    Args:
        x: (b, d) or (b, d, t), float32, bfloat16, float16 or float64; any strides.
        state: (b, d, k) with k >= w - 1, updated in place; any float dtype and strides. With state_indices
            (s, d, k).
        weight: (d, w) with w in 2..4, x's dtype or float32.
        bias: (d), dtype as for weight.
        activation: None, "silu" or "swish" (the same).
        state_indices: (b) integers below s: the row of the state for each batch row. Negative: a padding row,
            whose y is zero and which touches no state. Rows that share a state take their turns in order.
            On CUDA an index beyond s cannot raise: the y of its row is NaN, and no state is touched.

    Returns:
        y, shaped like x, in its dtype and layout. Not differentiable.

    Raises:
        RuntimeError: shapes, dtypes, devices or indices disagree (the message names the argument), or a
            tensor requires gradients while they are recorded.
        ValueError: an unknown activation.

    Source: Gu & Dao 2023, section 3.4; checked against `mamba_ops.reference.causal_conv1d_update`.

    >>> state = torch.tensor([[[1.0, 2.0]]])
    >>> causal_conv1d_update(torch.tensor([[3.0]]), state, torch.tensor([[10.0, 1.0]])), state
    (tensor([[23.]]), tensor([[[2., 3.]]]))
    """
    silu = is_silu("causal_conv1d_update", activation)
    prepare("causal_conv1d_update", state, x, weight, bias)
    y: Tensor = _conv(x, state, weight, bias, state_indices, silu)
    return y


def selective_state_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`selective_scan` of one token or a few, continuing from `state`, which then holds the state after them.

    Args:
        state: (b, d, n), updated in place; any float dtype (complex if A is), rounded to once a call; any
            strides, fastest contiguous in float32. With state_indices (s, d, n).
        u: (b, d) or (b, d, t), float32, bfloat16, float16 or float64; any strides, here and below.
        delta: like u: the step size before bias and softplus.
        A: (d, n), u's dtype or float32; or complex64 (complex128 for float64 u), and then ``2 Re(C h)`` takes
            the place of ``C h``.
        B, C: (b, n) or (b, g, n), with tokens (b, n, t) or (b, g, n, t); u's dtype, complex if A is.
        D, delta_bias: (d), u's dtype or float32.
        z: like u: the gate.
        delta_softplus: apply softplus to delta + delta_bias.
        state_indices: (b) integers below s: the row of the state for each batch row. Negative: a padding row,
            whose y is zero and which touches no state. Rows that share a state take their turns in order.
            On CUDA an index beyond s cannot raise: the y of its row is NaN, and no state is touched.

    Returns:
        y, shaped like u, in its dtype and layout, from the unrounded state. Not differentiable.

    Raises:
        RuntimeError: shapes, dtypes, devices or indices disagree (the message names the argument), or a
            tensor requires gradients while they are recorded.

    Source: Gu & Dao 2023, eq. 2; checked against `mamba_ops.reference.selective_state_update`.

    >>> state, one = torch.ones(1, 1, 1), torch.ones(1, 1)
    >>> selective_state_update(state, one, one, torch.zeros(1, 1), one, one), state
    (tensor([[2.]]), tensor([[[2.]]]))
    """
    prepare("selective_state_update", state, u, delta, A, B, C, D, z, delta_bias)
    y: Tensor = _scan(state, u, delta, A, B, C, D, z, delta_bias, state_indices, delta_softplus)
    return y


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    *,
    state_indices: Tensor | None = None,
    A_is_log: bool = False,
) -> Tensor:
    """`ssd` of one token or a few, continuing from `state`, which then holds the state after them.

    Args:
        state: (b, h, p, n), updated in place; any float dtype, rounded to once a call; any strides, fastest
            contiguous in float32. With state_indices (s, h, p, n).
        x: (b, h, p) or (b, t, h, p), float32, bfloat16, float16 or float64; any strides, here and below.
        dt: (b, h) or (b, t, h), x's dtype: the step size before bias, softplus and limits.
        A: (h), x's dtype or float32.
        B, C: (b, g, n) or (b, t, g, n), x's dtype; their g may differ.
        D: (h) or (h, p), x's dtype or float32.
        z: like x: the gate.
        dt_bias: (h), x's dtype or float32.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: the step size is clamped to this range.
        state_indices: (b) integers below s: the row of the state for each batch row. Negative: a padding row,
            whose y is zero and which touches no state. Rows that share a state take their turns in order.
            On CUDA an index beyond s cannot raise: the y of its row is NaN, and no state is touched.
        A_is_log: A holds log(-A), the layers' parameter: no further operators for -exp(A) at every token.

    Returns:
        y, shaped like x, in its dtype and layout, from the unrounded state. Not differentiable.

    Raises:
        RuntimeError: shapes, dtypes, devices or indices disagree (the message names the argument), or a
            tensor requires gradients while they are recorded.
        ValueError: dt_limit is no pair.

    Source: Dao & Gu 2024, section 5; checked against `mamba_ops.reference.ssd_state_update`.

    >>> state, one = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1)
    >>> ssd_state_update(state, one, one[0], torch.zeros(1), one, one), state
    (tensor([[[2.]]]), tensor([[[[2.]]]]))
    """
    prepare("ssd_state_update", state, x, dt, A, B, C, D, z, dt_bias)
    limits = step_limits("ssd_state_update", dt_limit)
    y: Tensor = _ssd(state, x, dt, A, B, C, D, z, dt_bias, state_indices, dt_softplus, *limits, A_is_log)
    return y


def prepare(op: str, state: Tensor, *inputs: Tensor | None) -> None:
    """Keeps autograd honest: no silent detaching, and the write to `state` shows in its version."""
    if torch.is_grad_enabled():
        for tensor in (state, *inputs):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(f"{op}: has no backward; use torch.no_grad() or detached tensors")
    if not torch.compiler.is_compiling() and not state.is_inference():
        torch.autograd.graph.increment_version(state)


@register_fake("causal_conv1d_update")
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@register_fake("selective_state_update")
@register_fake("ssd_state_update")
def _(state: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


register_autocast("causal_conv1d_update", positions=(0,))
register_autocast("selective_state_update", positions=(1, 2, 4, 5, 7))
register_autocast("ssd_state_update", positions=(1, 2, 4, 5, 7))
