"""What layers need beside the operators: a check of a token, fast products of few rows, plain modules."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ..norm_linear import fuses, norm_linear, norm_linear_conv
from .norm import Norm, RMSNormGated

M = TypeVar("M", bound=nn.Module)


def token_rows(name: str, x: Tensor, d_model: int) -> Tensor:
    """x, which must be (b, d_model) or (b, 1, d_model), as (b, d_model)."""
    if x.dim() not in (2, 3) or x.shape[-1] != d_model or (x.dim() == 3 and x.shape[1] != 1):
        raise ValueError(f"{name}: x must be (b, {d_model}) or (b, 1, {d_model}), got {tuple(x.shape)}")
    return x.flatten(0, -2)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether module does what its class does and no more: no subclass, adapter, parametrization or hook."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return type(module) is kind and not any(hooks) and not module._backward_pre_hooks


def _norm_fits(norm: RMSNormGated, x: Tensor) -> bool:
    """Whether norm does what norm_linear does before its product."""
    return (
        any(is_plain(norm, kind) for kind in (RMSNormGated, Norm))
        and norm.weight.dtype in (x.dtype, torch.float32)
        and norm.group_size in (None, norm.weight.numel())
    )


def norm_and_project(norm: RMSNormGated, linear: nn.Module, x: Tensor, z: Tensor | None) -> Tensor | None:
    """norm_linear by two modules for x and its gate z (b, k) on a GPU, without autograd; None where they do
    more."""
    if not (x.is_cuda and is_plain(linear, nn.Linear) and _norm_fits(norm, x)):
        return None
    before = norm.norm_before_gate
    y, _ = norm_linear(x, linear.weight, linear.bias, norm.weight, z=z, eps=norm.eps, norm_before_gate=before)
    return y


def project_and_convolve(
    linear: nn.Module,
    conv: nn.Conv1d,
    x: Tensor,
    conv_state: Tensor,
    *,
    begin: int = 0,
    norm: RMSNormGated | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """norm_linear_conv by modules for x (b, k), without autograd; None where it would not be one launch."""
    if not (is_plain(linear, nn.Linear) and linear.weight.dtype == x.dtype and fuses(x)):
        return None
    if not (norm is None or _norm_fits(norm, x)):
        return None
    if conv_state.dtype != x.dtype or conv.weight.dtype not in (x.dtype, torch.float32):
        return None
    return norm_linear_conv(
        x,
        linear.weight,
        linear.bias,
        None if norm is None else norm.weight,
        conv_state,
        conv.weight.squeeze(1),
        conv.bias,
        begin=begin,
        residual=residual,
        eps=1e-5 if norm is None else norm.eps,
    )


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x) for x (b, k), without autograd.

    torch multiplies one to three float32 rows on the CPU by a matrix-vector routine of one thread, at a
    quarter of the memory's speed (torch 2.15 with MKL, two cores of an AMD EPYC: 2.1 ms for 30 MB of
    weights). As a batch of row blocks of the weight the same product runs on every thread (0.45 ms). On a GPU
    norm_linear knows what to do with few rows.
    """
    if is_plain(linear, nn.Linear) and x.is_cuda:
        return norm_linear(x, linear.weight, linear.bias)[0]
    if (
        not is_plain(linear, nn.Linear)
        or not 1 <= x.shape[0] <= 3
        or x.dtype != torch.float32
        or not x.is_cpu
        or linear.weight.numel() < 1 << 18
        or linear.out_features % 8
        or torch.is_autocast_enabled("cpu")
    ):
        out: Tensor = linear(x)
        return out
    b = x.shape[0]
    blocks = linear.weight.view(8, -1, linear.in_features)
    out = torch.bmm(blocks, x.t().expand(8, -1, -1))
    out = out.view(1, -1) if b == 1 else out.view(-1, b).t().contiguous()
    return out if linear.bias is None else out + linear.bias
