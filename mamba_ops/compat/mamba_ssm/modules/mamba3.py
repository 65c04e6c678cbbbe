"""mamba_ssm.modules.mamba3: the name alone, which the package imports."""

from __future__ import annotations

from typing import Any

from torch import nn


class Mamba3(nn.Module):
    """Refuses: mamba_ops has no Mamba-3."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Mamba3: mamba_ops has no Mamba-3; use mamba_ssm itself for it")
