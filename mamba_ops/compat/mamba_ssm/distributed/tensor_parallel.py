"""mamba_ssm.distributed.tensor_parallel: linear layers split over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .distributed_utils import all_gather, all_reduce, identity, reduce_scatter

Device = torch.device | str | None


def _share(features: int, multiple_of: int, process_group: Any, name: str) -> int:
    """This process' part of the features, in whole multiples; the first processes take what is left over."""
    if features % multiple_of:
        raise ValueError(f"{name} ({features}) must be a multiple of {multiple_of}")
    each, left = divmod(features // multiple_of, dist.get_world_size(process_group))
    return (each + (dist.get_rank(process_group) < left)) * multiple_of


class ColumnParallelLinear(nn.Linear):
    """Its rows of the weight; the input is gathered over processes first if sequence_parallel."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: Any,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        share = _share(out_features, multiple_of, process_group, "out_features")
        super().__init__(in_features, share, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens..., in_features)."""
        enter = all_gather if self.sequence_parallel else identity
        return F.linear(enter(x, self.process_group), self.weight, self.bias)


class RowParallelLinear(nn.Linear):
    """Its columns of the weight; the results are summed, and each keeps its tokens if sequence_parallel.

    The first process alone has the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: Any,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        share = _share(in_features, multiple_of, process_group, "in_features")
        has_bias = bias and dist.get_rank(process_group) == 0
        super().__init__(share, out_features, bias=has_bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens..., this process' share of in_features)."""
        leave = reduce_scatter if self.sequence_parallel else all_reduce
        return leave(super().forward(x), self.process_group)
