"""One token through a run of Mamba-2 layers: a language model's step between embedding and head."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C
from ._library import register_fake, step_limits
from .norm import rms_norm_gated
from .norm_linear import norm_linear, norm_linear_conv
from .state_update import prepare, ssd_state_update

_step = torch.ops.mamba_ops.mamba2_step.default


class Mamba2StepLayer(NamedTuple):
    """The tensors of one layer, with d_inner = h p. States are updated in place."""

    norm_weight: Tensor  # (d), of the norm before the layer
    in_proj: Tensor  # (2 d_inner + 2 n + h, d): rows of z, x, B, C, dt
    conv_state: Tensor  # (b, d_inner + 2 n, w - 1)
    conv_weight: Tensor  # (d_inner + 2 n, w)
    conv_bias: Tensor | None  # (d_inner + 2 n)
    state: Tensor  # (b, h, p, n)
    dt_bias: Tensor  # (h)
    A_log: Tensor  # (h): log of the decay rates
    D: Tensor  # (h) or (h, p)
    gate_norm_weight: Tensor  # (d_inner), of the norm behind the gate
    out_proj: Tensor  # (d, d_inner)


def mamba2_step(
    stream: Tensor,
    layers: Sequence[Mamba2StepLayer],
    *,
    eps: float = 1e-5,
    gate_eps: float = 1e-5,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """One token through pre-norm Mamba-2 layers with a residual stream; the layers' states move on.

    For each layer, where ``out`` is the output of the one before: ``stream += out``; ``z, xBC, dt =
    in_proj(norm(stream))``; ``x, B, C = silu(conv(xBC))``; ``y = ssd_state_update(...)`` gated with
    ``silu(z)``; ``out = out_proj(norm(y))``. On a Hopper GPU all layers are one launch for one row in
    bfloat16, if d is a multiple of 256 up to 2560, d_inner = 2 d, w = 4 and a row of the state 128, 256 or
    512 bytes: weights are read without a pause between the layers. Elsewhere three launches a layer.

    Args:
        stream: (b, d), the weights' dtype or float32, in which it is summed.
        layers: a `Mamba2StepLayer` each, one group of B and C. Norms, projections and convolutions have one
            dtype; state, dt_bias, A_log and D may be float32.
        eps, gate_eps: of the norms before the layer and behind the gate, >= 0.
        dt_limit: bounds of the step after its softplus.

    Returns:
        (out, stream): the last layer's output (b, d) in the weights' dtype, and the stream (b, d) to which it
        is yet to be added. Not differentiable.

    Raises:
        RuntimeError: shapes, dtypes or devices disagree (the message names the argument), or a tensor
            requires gradients while they are recorded.
        ValueError: no layers, a stream or a state of other dims, or bounds of the step that are not ordered.

    Source: Dao & Gu 2024, section 7; checked against its parts.

    >>> def ones(*sizes: int) -> torch.Tensor:
    ...     return torch.ones(*sizes)
    >>> layer = Mamba2StepLayer(
    ...     norm_weight=ones(1),
    ...     in_proj=ones(5, 1),
    ...     conv_state=ones(1, 3, 1),
    ...     conv_weight=ones(3, 2),
    ...     conv_bias=None,
    ...     state=ones(1, 1, 1, 1),
    ...     dt_bias=ones(1),
    ...     A_log=ones(1),
    ...     D=ones(1),
    ...     gate_norm_weight=ones(1),
    ...     out_proj=ones(1, 1),
    ... )
    >>> out, stream = mamba2_step(ones(1, 1), [layer])
    >>> stream + out
    tensor([[2.]])
    """
    if not layers:
        raise ValueError("mamba2_step: layers must be one or more, got none")
    if stream.dim() != 2:
        raise ValueError(f"mamba2_step: stream must be (b, d), got {tuple(stream.shape)}")
    for layer in layers:
        if layer.state.dim() != 4:
            raise ValueError(f"mamba2_step: state must be (b, h, p, n), got {tuple(layer.state.shape)}")
    low, high = step_limits("mamba2_step", dt_limit)
    if not low <= high:
        raise ValueError(f"mamba2_step: dt_limit must be (low, high) with low <= high, got {dt_limit}")
    for layer in layers:
        for state in (layer.state, layer.conv_state):
            prepare("mamba2_step", state, stream, *layer)
    if not is_one_launch(stream, layers):
        return _by_parts(stream, layers, eps, gate_eps, (low, high))
    lists: list[list[Any]] = [list(tensors) for tensors in zip(*layers, strict=True)]
    lists[4] = [bias for bias in lists[4] if bias is not None]
    out, stream = _step(stream, *lists, eps, gate_eps, low, high)
    return out, stream


def is_one_launch(stream: Tensor, layers: Sequence[Mamba2StepLayer]) -> bool:
    """Whether mamba2_step of these is one launch."""
    half = torch.bfloat16
    if not stream.is_cuda or len(stream) != 1:
        return False
    if torch.compiler.is_compiling():  # addresses are not known yet
        return False
    if stream.dtype not in (half, torch.float32) or torch.is_autocast_enabled("cuda"):
        return False
    first = layers[0]
    d, (_, h, p, n) = stream.shape[1], first.state.shape
    if h * p != 2 * d or first.in_proj.shape != (4 * d + 2 * n + h, d) or first.conv_weight.shape[1] != 4:
        return False
    wide = {"state", "dt_bias", "A_log", "D"}
    for layer in layers:
        for name, t, like in zip(layer._fields, layer, first, strict=True):
            if t is None or like is None:
                if t is not like:
                    return False
                continue
            fits = t.dtype == half or (t.dtype == torch.float32 and name in wide)
            same = t.dtype == like.dtype and t.shape == like.shape
            if not (fits and same and t.is_contiguous() and t.data_ptr() % 16 == 0):
                return False
    with torch.cuda.device(stream.device):
        return _C.mamba2_step_fits(len(layers), d, h, n, first.state.element_size())


def _by_parts(
    stream: Tensor,
    layers: Sequence[Mamba2StepLayer],
    eps: float,
    gate_eps: float,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    out: Tensor | None = None
    for layer in layers:
        b, h, p, n = layer.state.shape
        inner, dtype = h * p, layer.in_proj.dtype
        conv = (layer.conv_state, layer.conv_weight, layer.conv_bias)
        if out is None:
            normed = rms_norm_gated(stream, layer.norm_weight.to(stream.dtype), eps=eps).to(dtype)
            u, _ = norm_linear_conv(normed, layer.in_proj, None, None, *conv, begin=inner)
        else:
            u, stream = norm_linear_conv(
                out, layer.in_proj, None, layer.norm_weight, *conv, begin=inner, residual=stream, eps=eps
            )
        z, x, B, C, dt = torch.split(u, [inner, inner, n, n, h], dim=-1)
        y = ssd_state_update(
            layer.state,
            x.view(b, h, p),
            dt,
            layer.A_log,
            B.view(b, 1, n),
            C.view(b, 1, n),
            layer.D,
            z.view(b, h, p),
            layer.dt_bias,
            True,
            dt_limit,
            A_is_log=True,
        )
        out, _ = norm_linear(y.flatten(-2), layer.out_proj, None, layer.gate_norm_weight, eps=gate_eps)
    assert out is not None
    return out, stream


@register_fake("mamba2_step")
def _(stream: Tensor, norm_weight: Any, in_proj: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return in_proj[0].new_empty(stream.shape), torch.empty_like(stream)
