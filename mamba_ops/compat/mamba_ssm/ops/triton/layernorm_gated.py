"""mamba_ssm.ops.triton.layernorm_gated on mamba_ops' operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..... import rms_norm_gated
from ....autocast import parameter, without_autocast

Device = torch.device | str | None


@without_autocast
def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMS norm over groups of the last dim, then weight and bias, gated by silu(z) before or after.

    Args:
        x, z: (..., dim). weight, bias: (dim,).
        norm_before_gate: norm(x) silu(z), else norm(x silu(z)).

    Returns:
        (..., dim) in x's dtype.
    """
    if bias is None:
        return rms_norm_gated(
            x,
            parameter(weight, x.dtype),
            z,
            eps=eps,
            group_size=group_size,
            norm_before_gate=norm_before_gate,
        )
    gate = z if norm_before_gate else None
    inner = None if norm_before_gate or z is None else _float(z)
    x_ = _float(x)
    y = rms_norm_gated(x_, parameter(weight, x_.dtype), inner, eps=eps, group_size=group_size) + bias
    return (y if gate is None else y * F.silu(_float(gate))).to(x.dtype)


@without_autocast
def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """`rmsnorm_fn`, with the mean taken out unless is_rms_norm."""
    if is_rms_norm:
        return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)
    size = group_size or x.shape[-1]
    if x.shape[-1] % size:
        raise RuntimeError(f"layernorm_fn: group_size must divide dim = {x.shape[-1]}, got {size}")
    v = _float(x) if z is None or norm_before_gate else _float(x) * F.silu(_float(z))
    y = F.layer_norm(v.unflatten(-1, (-1, size)), (size,), eps=eps).flatten(-2) * weight  # type: ignore[no-untyped-call]
    y = y if bias is None else y + bias
    return (y * F.silu(_float(z)) if z is not None and norm_before_gate else y).to(x.dtype)


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """`rmsnorm_fn` in plain torch, in float32 if upcast."""
    v, gate = (_float(x), None if z is None else _float(z)) if upcast else (x, z)
    v = v if gate is None or norm_before_gate else v * F.silu(gate)
    groups = v.reshape(*v.shape[:-1], v.shape[-1] // (group_size or v.shape[-1]), group_size or v.shape[-1])
    scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    y = (groups * scale).reshape(v.shape) * _float(weight)
    y = y if bias is None else y + bias
    return (y if gate is None or not norm_before_gate else y * F.silu(gate)).to(x.dtype)


class LayerNorm(nn.Module):
    """`layernorm_fn` with its weight and bias."""

    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one, bias zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, z: (..., dim)."""
        options = (self.eps, self.group_size, self.norm_before_gate)
        return layernorm_fn(x, self.weight, self.bias, z, *options)


class RMSNorm(nn.Module):
    """`rmsnorm_fn` with its weight; bias is None."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x, z: (..., dim)."""
        options = (self.eps, self.group_size, self.norm_before_gate)
        return rmsnorm_fn(x, self.weight, None, z, *options)


def _float(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
