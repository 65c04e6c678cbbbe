"""Every instruction set of this machine follows the reference; all other tests run on the widest."""

import os
from collections.abc import Iterator

import pytest
import torch

from mamba_ops import _C
from tests import cases
from tests.cases import CONV_OPTIONS, SCAN_OPTIONS, SSD_OPTIONS
from tests.compare import check
from tests.test_add_norm import check as check_add_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    assert _C.cpu_isa() == request.param
    yield request.param
    _C.set_cpu_isa(before)


def test_the_baseline_is_there_and_the_fastest_is_the_default() -> None:
    assert _C.cpu_isas()[0] == "base"
    assert _C.cpu_isa() == (os.environ.get("MAMBA_OPS_CPU_ISA") or _C.cpu_isas()[-1])


def test_an_unknown_instruction_set_is_refused() -> None:
    before = _C.cpu_isa()
    with pytest.raises((RuntimeError, ValueError), match="sse9"):
        _C.set_cpu_isa("sse9")
    assert _C.cpu_isa() == before


@pytest.mark.parametrize("decay", ["weak", "strong"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("complex_A", [False, True])
def test_selective_scan(isa: str, complex_A: bool, dtype: torch.dtype, decay: str) -> None:
    options = {"options": SCAN_OPTIONS, "complex_A": complex_A, "dtype": dtype, "decay": decay}
    check("selective_scan", cases.selective_scan(2, 19, 150, 5, **options))
    check(
        "selective_scan",
        cases.selective_scan(1, 34, 60, 16, pack="cu_seqlens", layout="projected", **options),
    )


@pytest.mark.parametrize("decay", ["weak", "strong"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd(isa: str, dtype: torch.dtype, decay: str) -> None:
    options = {"options": SSD_OPTIONS[:4] + SSD_OPTIONS[5:], "dtype": dtype, "decay": decay}
    check("ssd", cases.ssd(2, 150, 4, 19, 13, groups=(2, 1), **options))
    check("ssd", cases.ssd(1, 70, 2, 64, 128, pack="seq_idx", **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_causal_conv1d(isa: str, layout: str, dtype: torch.dtype) -> None:
    for w in (2, 3, 4):
        check(
            "causal_conv1d",
            cases.causal_conv1d(2, 83, 150, w, options=CONV_OPTIONS, layout=layout, dtype=dtype),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_gated(isa: str, dtype: torch.dtype) -> None:
    check("rms_norm_gated", cases.rms_norm_gated(9, 111, group_size=37, dtype=dtype))
    check("rms_norm_gated", cases.rms_norm_gated(9, 111, norm_before_gate=True, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(isa: str, dtype: torch.dtype) -> None:
    check_add_norm(cases.add_rms_norm(9, 111, dtype=dtype))
    check_add_norm(cases.add_rms_norm(9, 111, dtype=dtype, residual=cases.parameter_dtype(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [None, 3])
def test_updates(isa: str, t: int | None, dtype: torch.dtype) -> None:
    check(
        "causal_conv1d_update",
        cases.causal_conv1d_update(3, 83, 4, t=t, options=CONV_OPTIONS[:2], dtype=dtype),
    )
    scan = {"t": t, "options": SCAN_OPTIONS[:4], "dtype": dtype}
    check("selective_state_update", cases.selective_state_update(3, 19, 13, **scan))
    check("selective_state_update", cases.selective_state_update(3, 19, 16, complex_A=True, **scan))
    check("ssd_state_update", cases.ssd_state_update(3, 2, 19, 37, t=t, options=SSD_OPTIONS[:5], dtype=dtype))
