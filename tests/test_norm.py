"""rms_norm_gated against its formula."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mamba_ops
from tests import cases
from tests.compare import check

OPERATOR = "rms_norm_gated"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group_size", [None, 1, 5, 32, 160])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_and_gates(
    device: str, dtype: torch.dtype, group_size: int | None, before: bool, gate: bool
) -> None:
    options = {"group_size": group_size, "norm_before_gate": before, "dtype": dtype, "device": device}
    check(OPERATOR, cases.rms_norm_gated(2, 9, 160, gate=gate, **options))


@pytest.mark.parametrize("shape", [(7,), (1, 1), (3, 64), (70, 65), (2, 3, 4, 8), (1, 2000), (300, 3)])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(device: str, dtype: torch.dtype, before: bool, shape: tuple[int, ...]) -> None:
    check(OPERATOR, cases.rms_norm_gated(*shape, norm_before_gate=before, dtype=dtype, device=device))


@pytest.mark.parametrize("d", [4096, 5120, 8192, 8200, 20481])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows(device: str, dtype: torch.dtype, before: bool, d: int) -> None:
    """Beyond what the registers of a block hold, too."""
    check(OPERATOR, cases.rms_norm_gated(3, d, norm_before_gate=before, dtype=dtype, device=device))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("rows", [1, 130, 3000])
def test_many_rows_of_a_few_groups(device: str, rows: int, gate: bool) -> None:
    """Runs of rows of every length, whose sums of dweight are added in a second pass."""
    options = {"gate": gate, "dtype": torch.bfloat16, "device": device}
    for d, group_size in ((64, 64), (640, 320), (96, 8), (1040, 1040)):
        check(OPERATOR, cases.rms_norm_gated(rows, d, group_size=group_size, **options))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(device: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    check(OPERATOR, cases.rms_norm_gated(*shape, layout=layout, group_size=4, dtype=dtype, device=device))


@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16])
def test_weight_in_either_dtype(device: str, params: torch.dtype) -> None:
    check(OPERATOR, cases.rms_norm_gated(5, 24, dtype=torch.bfloat16, params=params, device=device))


@pytest.mark.parametrize("eps", [1e-5, 1e-2, 1.0])
def test_eps_carries_a_row_of_zeros(device: str, eps: float) -> None:
    inputs = cases.rms_norm_gated(4, 24, eps=eps, device=device)
    inputs["x"][1] = 0
    inputs["z"][2] = 0
    check(OPERATOR, inputs)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    check(OPERATOR, cases.rms_norm_gated(*shape, group_size=4, device=device))


def test_more_than_2_to_the_31_elements(large_gpu: str) -> None:
    """The last rows come out as they do alone."""
    d = 4096
    x = torch.randn(2**31 // d + 9, d, dtype=torch.bfloat16, device=large_gpu).requires_grad_()
    weight = torch.randn(d, device=large_gpu)

    def last_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = mamba_ops.rms_norm_gated(x, weight, x)
        (dx,) = torch.autograd.grad(y, x, torch.ones(1, 1, dtype=y.dtype, device=y.device).expand_as(y))
        return y[-9:].clone(), dx[-9:].clone()

    whole, alone = last_rows(x), last_rows(x.detach()[-9:].clone().requires_grad_())
    assert x.numel() > 2**31
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    group=st.integers(1, 70),
    groups=st.integers(1, 4),
    before=st.booleans(),
    gate=st.booleans(),
    layout=st.sampled_from(cases.LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_options(
    device: str,
    shape: list[int],
    group: int,
    groups: int,
    before: bool,
    gate: bool,
    layout: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    layout = layout if shape else "contiguous"
    options = {"norm_before_gate": before, "gate": gate, "layout": layout, "dtype": dtype, "seed": seed}
    sizes = (*shape, group * groups)
    check(OPERATOR, cases.rms_norm_gated(*sizes, group_size=group, device=device, **options))
