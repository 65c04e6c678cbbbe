"""Initialisation shared by both layers, as mamba_ssm does it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

Device = torch.device | str | None


def check_sizes(layer: str, **sizes: int) -> None:
    """Raises ValueError for a size below one."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{layer}: {name} must be at least 1, got {size}")


def depthwise_conv(
    channels: int, width: int, bias: bool, device: Device, dtype: torch.dtype | None
) -> nn.Conv1d:
    """Holds weight (channels, 1, width) and bias under mamba_ssm's names; the operator computes with them."""
    if not 2 <= width <= 4:
        raise ValueError(f"d_conv must be 2, 3 or 4, got {width}")
    return nn.Conv1d(
        channels,
        channels,
        width,
        groups=channels,
        padding=width - 1,
        bias=bias,
        device=device,
        dtype=dtype,
    )


def random_step_bias(
    size: int, dt_min: float, dt_max: float, floor: float, device: Device, dtype: torch.dtype | None
) -> Tensor:
    """(size,) biases whose softplus is log-uniform in [dt_min, dt_max], and at least floor."""
    if not (dt_min > 0 and dt_max > 0):
        raise ValueError(f"dt_min and dt_max must be above 0, got {dt_min} and {dt_max}")
    span = math.log(dt_max) - math.log(dt_min)
    dt = torch.exp(torch.rand(size, device=device, dtype=torch.float32) * span + math.log(dt_min))
    dt = dt.clamp(min=floor)
    inverse_softplus = dt + torch.log(-torch.expm1(-dt))
    return inverse_softplus.to(dtype or torch.get_default_dtype())


def no_weight_decay(value: Tensor) -> nn.Parameter:
    """A parameter that optimizers leave out of weight decay, by the flag that mamba_ssm's users read."""
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
