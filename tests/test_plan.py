"""mamba_ops.plan: which kernels a call takes."""

import pytest
import torch

import mamba_ops
from mamba_ops import _C
from tests.cases import ALL

SCAN = {"b": 2, "d": 64, "l": 64}
built_with_cuda = pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [*ALL, "add_rms_norm"])
def test_every_operator_has_a_plan(name: str, device: str) -> None:
    kernel = mamba_ops.plan(name, device, torch.bfloat16)["kernel"]
    assert kernel.startswith((device, "none: built without CUDA"))


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(ValueError, match=r"op must be one of selective_scan, .*, got 'scan'"):
        mamba_ops.plan("scan")


@pytest.mark.parametrize(("name", "letter"), [("selective_scan", "d"), ("ssd", "h")])
@pytest.mark.parametrize("g", [0, 3])
def test_groups_that_do_not_divide_are_named(name: str, letter: str, g: int) -> None:
    with pytest.raises(ValueError, match=rf"g must divide {letter} = 64, got {g}"):
        mamba_ops.plan(name, **{letter: 64, "g": g})


@built_with_cuda
@pytest.mark.parametrize(
    ("dtype", "sizes", "kernel"),
    [
        (torch.bfloat16, {"n": 16}, "cuda tuned"),
        (torch.float32, {"n": 16, "g": 2}, "cuda tuned"),
        (torch.float64, {"n": 16}, "cuda portable"),
        (torch.bfloat16, {"n": 17}, "cuda portable"),
        (torch.bfloat16, {"n": 16, "l": 63}, "cuda portable"),
        (torch.bfloat16, {"n": 16, "g": 16}, "cuda portable"),
    ],
)
def test_the_scan_s_kernels(dtype: torch.dtype, sizes: dict[str, int], kernel: str) -> None:
    plan = mamba_ops.plan("selective_scan", "cuda", dtype, **SCAN | sizes)
    assert (plan["kernel"], plan["backward"]) == (kernel, kernel)


@built_with_cuda
def test_the_portable_kernels_can_be_forced() -> None:
    _C.set_cuda_path("portable")
    try:
        plan = mamba_ops.plan("selective_scan", "cuda", torch.bfloat16, n=16, **SCAN)
    finally:
        _C.set_cuda_path("auto")
    assert plan["kernel"] == plan["backward"] == "cuda portable"
