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


def on_hopper() -> bool:
    with_kernels = "90a" in _C.build_info().get("cuda_architectures", "")
    return with_kernels and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize(
    ("dtype", "sizes", "kernel", "backward"),
    [
        (torch.bfloat16, {"n": 128}, "hopper", "hopper"),
        (torch.float16, {"n": 64, "g": 4}, "hopper", "hopper"),
        (torch.bfloat16, {"n": 96}, "hopper", "portable"),
        (torch.bfloat16, {"n": 64, "p": 128}, "hopper", "portable"),
        (torch.bfloat16, {"n": 64, "p": 24}, "portable", "portable"),
        (torch.float32, {"n": 128}, "portable", "portable"),
    ],
)
def test_the_ssd_s_kernels_on_hopper(
    dtype: torch.dtype, sizes: dict[str, int], kernel: str, backward: str
) -> None:
    if not on_hopper():
        pytest.skip("no Hopper GPU, or none of its kernels built")
    plan = mamba_ops.plan("ssd", "cuda", dtype, **{"b": 2, "l": 64, "h": 8, "p": 64} | sizes)
    assert (plan["kernel"], plan["backward"]) == (f"cuda {kernel}", f"cuda {backward}")


@built_with_cuda
def test_the_portable_kernels_can_be_forced() -> None:
    _C.set_cuda_path("portable")
    try:
        plan = mamba_ops.plan("selective_scan", "cuda", torch.bfloat16, n=16, **SCAN)
    finally:
        _C.set_cuda_path("auto")
    assert plan["kernel"] == plan["backward"] == "cuda portable"
