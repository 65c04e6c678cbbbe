"""mamba_ssm.distributed.distributed_utils: collectives that autograd goes through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return _scattered(dout, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        gathered = dout.new_empty(dout.shape[0] * dist.get_world_size(ctx.group), *dout.shape[1:])
        dist.all_gather_into_tensor(gathered, dout.contiguous(), group=ctx.group)
        return gathered, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        out = x.contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return dout, None


class _Identity(torch.autograd.Function):
    """Forward nothing, backward the sum over processes: the input of a column-parallel product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        dx = dout.contiguous().clone()
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


def _scattered(x: Tensor, group: Any) -> Tensor:
    world = dist.get_world_size(group)
    if x.shape[0] % world:
        raise RuntimeError(f"reduce_scatter: {world} processes must divide the first dim, {x.shape[0]}")
    out = x.new_empty(x.shape[0] // world, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def all_gather(x: Tensor, process_group: Any) -> Tensor:
    """The first dims of all processes behind each other."""
    out: Tensor = _AllGather.apply(x, process_group)
    return out


def reduce_scatter(x: Tensor, process_group: Any) -> Tensor:
    """The sum over processes, each keeping its part of the first dim."""
    out: Tensor = _ReduceScatter.apply(x, process_group)
    return out


def all_reduce(x: Tensor, process_group: Any) -> Tensor:
    """The sum over processes."""
    out: Tensor = _AllReduce.apply(x, process_group)
    return out


def identity(x: Tensor, process_group: Any) -> Tensor:
    """x, whose gradient is summed over processes."""
    out: Tensor = _Identity.apply(x, process_group)
    return out
