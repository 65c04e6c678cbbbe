"""A step of ``python -m mamba_ops train`` beside the matrix products of its nn.Linear layers alone."""

from __future__ import annotations

import math
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import Case, Must
from .contenders import OURS, Contender, Inputs, Results, Run

PRODUCTS = "its matrix products"


def case() -> Case:
    """The step with the command's default settings; its products run in the dtypes that they have there."""
    return Case(
        "train/step/mamba2",
        "train, default settings: one optimizer step",
        _inputs,
        (Contender(OURS, _step), Contender(PRODUCTS, _products)),
        None,
        must=Must("share", 1.6, PRODUCTS),
    )


def _inputs() -> Inputs:
    from mamba_ops.commands import train

    with tempfile.TemporaryDirectory() as folder:
        return {"trainer": train._started(folder, {"steps": 1_000_000})}


def _step(inputs: Inputs) -> Run:
    def run() -> Results:
        loss = inputs["trainer"]._train_step().item()
        if not math.isfinite(loss):
            raise ValueError(f"wrong result: the loss is {loss}")
        return {}

    return run


def _products(inputs: Inputs) -> Run:
    """Forward and both backward products of every nn.Linear that a step calls, on random numbers."""
    trainer = inputs["trainer"]
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(module: nn.Module, arguments: tuple[Tensor], out: Tensor) -> None:
        rows, o, k = out.numel() // out.shape[-1], out.shape[-1], arguments[0].shape[-1]
        x, weight, g = (torch.randn(shape).to(out.dtype) for shape in ((rows, k), (o, k), (rows, o)))
        calls.append((x, weight, g))

    hooks = [m.register_forward_hook(record) for m in trainer.model.modules() if isinstance(m, nn.Linear)]
    trainer._train_step()
    for hook in hooks:
        hook.remove()

    def run() -> Results:
        for x, weight, g in calls:
            F.linear(x, weight)
            torch.mm(g, weight)
            torch.mm(g.mT, x)
        return {}

    return run
