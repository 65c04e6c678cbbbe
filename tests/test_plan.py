"""mamba_ops.plan: which kernels a call takes."""

from typing import Any

import pytest
import torch

import mamba_ops
from mamba_ops import _C
from tests.cases import ALL

SCAN = {"b": 2, "d": 64, "l": 64}
built_with_cuda = pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [*ALL, "add_rms_norm", "norm_linear", "norm_linear_conv"])
def test_every_operator_has_a_plan(name: str, device: str) -> None:
    kernel = mamba_ops.plan(name, device, torch.bfloat16)["kernel"]
    assert kernel.startswith((device, "none: built without CUDA"))


@pytest.mark.parametrize(
    ("arguments", "sizes", "message"),
    [
        (("scan",), {}, "op must be one of selective_scan, .*, got 'scan'"),
        (("ssd", "tpu"), {}, "device must be cpu or cuda, got 'tpu'"),
        (("ssd", "cpu", torch.int8), {}, "dtype must be one of float32, .*, got 'int8'"),
        (("ssd",), {"x": 1}, "sizes are b, l, .*, got 'x'"),
        (("ssd",), {"b": -1}, "b must be at least 0, got -1"),
        (("ssd",), {"q": 0}, r"q must be in 1..256, got 0"),
        (("ssd",), {"n": 257}, r"n must be in 1..256, got 257"),
        (("selective_scan",), {"d": 64, "g": 0}, "g must be at least 1, got 0"),
        (("selective_scan",), {"d": 64, "g": 3}, "g must divide d = 64, got 3"),
        (("ssd",), {"h": 64, "g": 3}, "g must divide h = 64, got 3"),
    ],
)
def test_what_no_call_has_is_named(arguments: tuple[Any, ...], sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"plan: {message}"):
        mamba_ops.plan(*arguments, **sizes)


def test_empty_calls_have_a_plan() -> None:
    for name, empty in (("selective_scan", "bdl"), ("ssd", "blh"), ("norm_linear", "bk")):
        for letter in empty:
            assert "kernel" in mamba_ops.plan(name, **{letter: 0})


@pytest.mark.parametrize("name", ["norm_linear", "norm_linear_conv"])
def test_norm_linear_goes_by_parts_where_it_is_no_single_launch(name: str) -> None:
    assert mamba_ops.plan(name, b=1, k=64)["kernel"].endswith(" by parts")
    if not _C.build_info()["cuda"]:
        return
    rows, width = _C.norm_linear_limits()
    for dtype, b, k in ((torch.bfloat16, 1, 64), (torch.bfloat16, rows, width)):
        assert mamba_ops.plan(name, "cuda", dtype, b=b, k=k)["kernel"] == "cuda"
    for dtype, b, k in (
        (torch.float16, 1, 64),
        (torch.bfloat16, rows + 1, 64),
        (torch.bfloat16, 1, width + 1),
        (torch.bfloat16, 1, 0),
    ):
        assert mamba_ops.plan(name, "cuda", dtype, b=b, k=k)["kernel"] == "cuda by parts"


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
