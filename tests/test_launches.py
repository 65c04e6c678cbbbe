"""How many kernels a call of ssd launches on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import mamba_ops
from tests import cases
from tests.compare import is_float

OPERATOR = "ssd"
GATED = ("D", "z", "dt_bias", "dt_softplus")
OPTIONS = {"plain": ("D",), "gate": GATED, "states": (*GATED, "initial_state", "return_final_state")}


def launches(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What the call returns, and the kernels that it ran, of this package alone."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        result = call()
        torch.ones(1, device="cuda")
        torch.cuda.synchronize()
    kernels = [event.name for event in profiled.events() or () if event.device_type == DeviceType.CUDA]
    if not kernels:
        pytest.skip("the profiler sees no kernels here")
    return result, [name for name in kernels if "mamba_ops" in name]


SIZES = {"cut": (3, 130, 89), "split": (1, 1100, 3), "long": (1, 9000, 24)}


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_launches(device: str, size: str, dtype: torch.dtype, options: str, pack: str | None) -> None:
    """One forward, a second where sequences are split; at most four backward."""
    if device == "cpu":
        pytest.skip("launches are of a GPU")
    b, l, h = SIZES[size]
    b = 1 if pack == "cu_seqlens" else b
    inputs = cases.ssd(b, l, h, 64, 128, options=OPTIONS[options], pack=pack, dtype=dtype, device=device)
    leaves = {name: value.requires_grad_() for name, value in inputs.items() if is_float(value)}
    out, forward = launches(lambda: mamba_ops.ssd(**inputs))
    outputs = list(out) if isinstance(out, tuple) else [out]
    grads = [torch.ones_like(output) for output in outputs]
    _, backward = launches(lambda: torch.autograd.grad(outputs, list(leaves.values()), grads))
    assert 1 <= len(forward) <= 2, forward
    assert 1 <= len(backward) <= 4, backward
