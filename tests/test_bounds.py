"""No kernel touches memory beyond its arguments, where each of them ends, or begins, beside unmapped memory.

In a process of its own, which an access to such memory ends.
"""

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_ops
from mamba_ops import _C
from tests import cases
from tests.cases import CONV_OPTIONS, SCAN_OPTIONS, SSD_OPTIONS, Inputs
from tests.compare import is_float
from tests.conftest import missing_device

# Sizes of whole packs, with a tile of threads that is not full, and odd ones.
CASES: dict[str, tuple[Callable[..., Inputs], list[dict[str, Any]]]] = {
    "selective_scan": (
        cases.selective_scan,
        [
            {"b": 2, "d": 40, "l": 76, "n": 16, "groups": (1, 1), "options": SCAN_OPTIONS},
            {"b": 1, "d": 64, "l": 136, "n": 16, "groups": (2, 4), "options": SCAN_OPTIONS},
            {"d": 7, "l": 37, "n": 5, "options": SCAN_OPTIONS},
        ],
    ),
    "ssd": (
        cases.ssd,
        [
            {"l": 150, "h": 3, "p": 64, "n": 128, "options": SSD_OPTIONS},
            {"l": 70, "h": 2, "p": 40, "n": 24, "groups": (2, 1), "options": SSD_OPTIONS},
            {"l": 37, "h": 3, "p": 3, "n": 5, "options": SSD_OPTIONS},
        ],
    ),
    "causal_conv1d": (
        cases.causal_conv1d,
        [
            {"d": 264, "l": 72, "options": CONV_OPTIONS},
            {"d": 40, "l": 264, "options": CONV_OPTIONS},
            {"d": 7, "l": 37, "w": 3, "options": CONV_OPTIONS},
        ],
    ),
    "rms_norm_gated": (
        lambda **kw: cases.rms_norm_gated(7, kw.pop("d"), **kw),
        [{"d": 5120}, {"d": 640, "group_size": 64}, {"d": 37, "norm_before_gate": True}],
    ),
    "add_rms_norm": (lambda **kw: cases.add_rms_norm(7, kw.pop("d"), **kw), [{"d": 2560}, {"d": 37}]),
    "norm_linear": (
        cases.norm_linear,
        [
            {"k": 256, "n": 70, "norm": "add"},
            {"k": 2560, "n": 33, "norm": "gate before the norm"},
            {"k": 37, "n": 9, "norm": "norm"},
        ],
    ),
    "norm_linear_conv": (
        cases.norm_linear_conv,
        [{"k": 256, "n": 70, "d": 64, "begin": 6}, {"k": 37, "n": 20, "w": 3, "kept": 4}],
    ),
    "causal_conv1d_update": (
        lambda **kw: cases.causal_conv1d_update(params=kw["dtype"], **kw),
        [
            {"d": 264, "options": CONV_OPTIONS[:2]},
            {"d": 264, "k": 4, "options": CONV_OPTIONS[:2]},
            {"d": 7, "t": 2, "k": 5, "rows": 5, "options": CONV_OPTIONS[:2]},
        ],
    ),
    "selective_state_update": (
        cases.selective_state_update,
        [{"d": 40, "n": 16, "options": SCAN_OPTIONS[:4]}, {"d": 7, "t": 2, "g": 1, "rows": 5}],
    ),
    "ssd_state_update": (
        cases.ssd_state_update,
        [{"p": 64, "n": 128, "options": SSD_OPTIONS[:5]}, {"p": 5, "n": 7, "t": 2, "rows": 5}],
    ),
}


class Mapped:
    """Memory in the CUDA array interface."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
        }


def on_the_host(nbytes: int, at_the_end: bool) -> Tensor:
    page, libc, no_access = mmap.PAGESIZE, ctypes.CDLL(None), 0
    size = -(-nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (begin, begin + page + size):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), no_access) == 0
    offset = page + (size - nbytes if at_the_end else 0)
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=offset)


def on_the_gpu(nbytes: int, at_the_end: bool) -> Tensor:
    """Never given back: the process is short."""
    driver = ctypes.CDLL("libcuda.so.1")
    here = (ctypes.c_int * 2)(1, torch.cuda.current_device())  # CUmemLocation: of a device
    properties = (ctypes.c_int * 8)(1, 0, *here)  # CUmemAllocationProp: pinned
    access = (ctypes.c_int * 3)(*here, 3)  # CUmemAccessDesc: read and write
    granule, address, handle = ctypes.c_size_t(), ctypes.c_uint64(), ctypes.c_uint64()

    def call(name: str, *args: Any) -> None:
        error = getattr(driver, name)(*args)
        assert error == 0, f"{name}: error {error}"

    call("cuMemGetAllocationGranularity", ctypes.byref(granule), properties, 0)
    guard = granule.value
    size = ctypes.c_size_t(-(-nbytes // guard) * guard)
    whole = ctypes.c_size_t(size.value + 2 * guard)
    none = ctypes.c_uint64(0)
    call("cuMemAddressReserve", ctypes.byref(address), whole, none, none, none)
    call("cuMemCreate", ctypes.byref(handle), size, properties, none)
    begin = ctypes.c_uint64(address.value + guard)
    call("cuMemMap", begin, size, none, handle, none)
    call("cuMemSetAccess", begin, size, access, ctypes.c_size_t(1))
    first = begin.value + (size.value - nbytes if at_the_end else 0)
    return torch.as_tensor(Mapped(first, nbytes), device="cuda")


def alone(t: Tensor, at_the_end: bool) -> Tensor:
    """The same values and strides in memory that ends with t's last value, or begins with its first."""
    if t.numel() == 0:
        return t
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    memory = (on_the_gpu if t.is_cuda else on_the_host)(span * t.element_size(), at_the_end)
    values = memory.view(t.dtype)
    return values.copy_(t.as_strided((span,), (1,))).as_strided(t.shape, t.stride())


def visit(name: str, device: str, path: str) -> None:
    """Every case of an operator, forward and backward; the last line printed tells which was at work."""
    _C.set_cuda_path(path)
    make, sizes = CASES[name]
    linear = name.startswith("norm_linear")  # on a GPU a kernel for bfloat16, and torch for the rest
    dtypes = (torch.bfloat16,) if linear else (torch.bfloat16, torch.float32)
    layouts = ("contiguous",) if linear else ("contiguous", "transposed", "padded")
    packs = cases.PACKS if name in cases.PACKABLE else (None,)
    for size, dtype, layout, pack, at_the_end in product(sizes, dtypes, layouts, packs, (True, False)):
        case = size | {"dtype": dtype, "layout": layout} | ({"pack": pack} if pack else {})
        if pack == "cu_seqlens":
            case["b"] = 1
        print("at work:", name, device, path, case, "at_the_end =", at_the_end, flush=True)
        inputs = make(device=device, **case)
        inputs = {k: alone(v, at_the_end) if torch.is_tensor(v) else v for k, v in inputs.items()}
        leaves = [v for v in inputs.values() if is_float(v)]
        trains = name not in cases.UPDATES and not linear
        for leaf in leaves:
            leaf.requires_grad_(trains)
        out = getattr(mamba_ops, name)(**inputs)
        if trains:
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(out, leaves, [alone(torch.ones_like(o), at_the_end) for o in out])
        if device == "cuda":
            torch.cuda.synchronize()


@pytest.mark.parametrize(
    "device, path, names",
    [
        ("cpu", "auto", list(CASES)),
        ("cuda", "auto", list(CASES)),
        ("cuda", "portable", ["selective_scan", "ssd"]),
    ],
)
def test_arguments_beside_memory_that_is_not_there(device: str, path: str, names: list[str]) -> None:
    reason = missing_device("ssd", device)
    if reason:
        pytest.skip(reason)
    visits = "".join(f"test_bounds.visit({name!r}, {device!r}, {path!r}); " for name in names)
    done = subprocess.run(
        [sys.executable, "-c", f"from tests import test_bounds; {visits}"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=150,
    )
    last = (done.stdout.splitlines() or [""])[-1]
    assert done.returncode == 0, f"{last}\nreturned {done.returncode}\n{done.stderr[-1500:]}"
