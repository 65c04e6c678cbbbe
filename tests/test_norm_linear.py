"""norm_linear and norm_linear_conv against the formulas of their parts: every norm, any number of rows, sizes
and strides."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mamba_ops
from mamba_ops import reference
from tests import cases
from tests.cases import LAYOUTS, NORMS, Inputs
from tests.compare import FEW, clone_strided
from tests.conftest import missing_device

OPERATOR = "norm_linear"  # on the CPU by its parts


def half(*sizes: Any, **options: Any) -> Inputs:
    return cases.norm_linear(*sizes, dtype=torch.bfloat16, **options)


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    z: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    total = x
    if residual is not None and norm_weight is not None:
        x, total = reference.add_rms_norm(x, residual, norm_weight, **options)
    elif norm_weight is not None:
        x = reference.rms_norm_gated(x, norm_weight, z, **options)
    return F.linear(x, weight, bias), total


def plain_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *,
    begin: int,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    y, total = plain(x, weight, bias, norm_weight, **options)
    columns = y[:, begin : begin + len(conv_weight)]
    conv_state = conv_state.clone()
    columns.copy_(
        reference.causal_conv1d_update(columns, conv_state, conv_weight, conv_bias, activation="silu")
    )
    return y, total, conv_state


def conv(conv_state: Tensor, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """norm_linear_conv on a state that stays, in the same strides; with the new state."""
    state = clone_strided(conv_state)
    return *mamba_ops.norm_linear_conv(conv_state=state, **inputs), state


Results = tuple[Tensor, ...]


def check(
    inputs: Inputs,
    operator: Callable[..., Results] = mamba_ops.norm_linear,
    formula: Callable[..., Results] = plain,
) -> None:
    """Errors (2-norm) at most twice those of the formula in the inputs' own dtypes on the CPU, and last bits;
    four times for few elements, as in tests/compare.py."""
    host = {k: v.cpu() if torch.is_tensor(v) else v for k, v in inputs.items()}
    exact = formula(**{k: v.double() if torch.is_tensor(v) else v for k, v in host.items()})
    for got, own, truth in zip(operator(**inputs), formula(**host), exact, strict=True):
        assert (got.shape, got.dtype) == (own.shape, own.dtype)
        error, base = ((t.cpu().double() - truth).norm() for t in (got, own))
        factor = 2 if got.numel() >= FEW else 4
        last_bits = torch.finfo(got.dtype).eps / 2 if got.dtype != torch.float64 else 1e-14
        assert error <= factor * base + last_bits * truth.norm(), f"{error} against {base}"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("b", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_follows_the_formula(device: str, dtype: torch.dtype, b: int, norm: str) -> None:
    check(cases.norm_linear(b, 768, 1100, norm, dtype=dtype, device=device))


SIZES = [(1, 1), (7, 9), (8, 8), (40, 2565), (511, 70), (512, 70), (520, 9), (2560, 3000), (5120, 1100)]
SIZES += [(5121, 33), (16384, 9), (16392, 9)]


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("norm", ["add to float32", "gate before the norm"])
def test_sizes(device: str, norm: str, k: int, n: int) -> None:
    for b in (1, 3, 8):
        check(half(b, k, n, norm, device=device))


@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_layouts_and_weights(device: str, norm: str, layout: str, params: torch.dtype) -> None:
    check(half(4, 264, 70, norm, params=params, layout=layout, device=device))


def test_rows_at_any_address(device: str) -> None:
    inputs = half(4, 264, 70, "add", params=torch.bfloat16, device=device)
    for name in ("x", "residual", "weight", "norm_weight"):
        whole = torch.zeros(inputs[name].numel() + 1, dtype=torch.bfloat16, device=device)
        whole[1:] = inputs[name].flatten()
        check(inputs | {name: whole[1:].view(inputs[name].shape)})


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 8, 0), (2, 0, 3)])
def test_empty(device: str, shape: tuple[int, int, int]) -> None:
    check(half(*shape, "none", device=device))


def test_without_bias(device: str) -> None:
    inputs = half(1, 64, 9, "add", device=device)
    y, total = mamba_ops.norm_linear(**inputs | {"bias": None})
    check(inputs | {"bias": torch.zeros_like(inputs["bias"])})
    assert y.shape == (1, 9) and total.dtype == torch.bfloat16


def test_nan_stays_in_its_row(device: str) -> None:
    inputs = half(3, 520, 40, "add", device=device)
    inputs["x"][1, 7] = torch.nan
    y, total = mamba_ops.norm_linear(**inputs)
    assert total.isnan().sum() == 1
    assert y.isnan().all(dim=1).tolist() == [False, True, False] and y.isnan().sum() == 40


def test_gradients_flow() -> None:
    inputs = cases.norm_linear(2, 16, 5, "add", dtype=torch.float64)
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if torch.is_tensor(v)}
    grads = [
        torch.autograd.grad(f(**inputs | leaves)[0].sum(), list(leaves.values()))
        for f in (mamba_ops.norm_linear, plain)
    ]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_weight": None}, "residual and z are of the norm, but norm_weight is None"),
        ({"z": torch.zeros(3, 8)}, "residual and z exclude one another"),
    ],
)
def test_bad_combinations(changes: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match="norm_linear: " + message):
        mamba_ops.norm_linear(**cases.norm_linear(3, 8, 5) | changes)


# --- norm_linear_conv -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "norm", "add", "add to float32"])
@pytest.mark.parametrize("b", [1, 3, 8, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conv_follows_the_formula(device: str, dtype: torch.dtype, b: int, norm: str) -> None:
    check(
        cases.norm_linear_conv(b, 768, 1100, 700, 4, 300, norm, dtype=dtype, device=device), conv, plain_conv
    )


SLICES = [(64, 9, 9, 0), (512, 70, 1, 69), (2560, 1058, 538, 512), (8, 40, 13, 3)]


@pytest.mark.parametrize("w", [2, 3, 4])
@pytest.mark.parametrize(("k", "n", "d", "begin"), SLICES)
def test_conv_of_some_columns(device: str, k: int, n: int, d: int, begin: int, w: int) -> None:
    for b in (1, 5):
        inputs = cases.norm_linear_conv(b, k, n, d, w, begin, dtype=torch.bfloat16, device=device)
        check(inputs, conv, plain_conv)


@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_layouts_and_weights(device: str, layout: str, params: torch.dtype) -> None:
    options: Inputs = {"params": params, "layout": layout, "dtype": torch.bfloat16, "device": device}
    inputs = cases.norm_linear_conv(4, 264, 70, 33, 4, 20, **options)
    check(inputs, conv, plain_conv)
    taps = inputs["conv_weight"].t().contiguous().t()
    check(
        inputs | {"conv_weight": taps, "conv_bias": None, "bias": torch.zeros_like(inputs["bias"])},
        conv,
        plain_conv,
    )


def test_conv_that_keeps_more_inputs(device: str) -> None:
    inputs = cases.norm_linear_conv(2, 64, 30, 20, 3, 4, kept=5, dtype=torch.bfloat16, device=device)
    check(inputs, conv, plain_conv)


def test_conv_goes_on(device: str) -> None:
    """Three tokens after one another are those of the operators one by one."""
    inputs = cases.norm_linear_conv(2, 264, 90, 40, 4, 30, dtype=torch.bfloat16, device=device)
    state = inputs.pop("conv_state")
    own = state.clone()
    rest = {k: v for k, v in inputs.items() if not k.startswith("conv") and k != "begin"}
    for _ in range(3):
        y, _ = mamba_ops.norm_linear_conv(conv_state=state, **inputs)
        expected, _ = mamba_ops.norm_linear(**rest)
        taken = mamba_ops.causal_conv1d_update(
            expected[:, 30:70], own, inputs["conv_weight"], inputs["conv_bias"], "silu"
        )
        assert torch.equal(state, own)
        torch.testing.assert_close(y[:, 30:70], taken, rtol=2**-8, atol=1e-6)
        assert torch.equal(y[:, :30], expected[:, :30]) and torch.equal(y[:, 70:], expected[:, 70:])


def test_conv_refuses_gradients() -> None:
    inputs = cases.norm_linear_conv()
    with pytest.raises(RuntimeError, match="norm_linear_conv: has no backward"):
        mamba_ops.norm_linear_conv(**inputs | {"x": inputs["x"].requires_grad_()})


@pytest.mark.parametrize("begin", [-1, 15])
def test_conv_outside_of_y(begin: int) -> None:
    message = (
        f"norm_linear_conv: the d = 6 columns from begin must be among the n = 20 of y, got begin = {begin}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        mamba_ops.norm_linear_conv(**cases.norm_linear_conv(begin=begin))


def test_conv_weight_of_other_dims() -> None:
    inputs = cases.norm_linear_conv()
    for wrong in (inputs["conv_weight"][:, 0], inputs["conv_weight"][:, None]):
        with pytest.raises(ValueError, match=r"norm_linear_conv: conv_weight must be \(d, w\), got \(6,"):
            mamba_ops.norm_linear_conv(**inputs | {"conv_weight": wrong})


# --- the kernel -------------------------------------------------------------------------------------------


def operator(**inputs: Any) -> tuple[Tensor, Tensor]:
    names = ("x", "residual", "z", "norm_weight", "weight", "bias")
    tensors = [inputs.get(name) for name in names]
    y, total = torch.ops.mamba_ops.norm_linear(
        *tensors, inputs.get("eps", 1e-5), inputs.get("norm_before_gate", False)
    )
    return y, total


def conv_operator(**inputs: Any) -> tuple[Tensor, Tensor]:
    names = ("x", "residual", "norm_weight", "weight", "bias", "conv_state", "conv_weight", "conv_bias")
    tensors = [inputs.get(name) for name in names]
    y, total = torch.ops.mamba_ops.norm_linear_conv(*tensors, inputs["eps"], inputs["begin"])
    return y, total


@pytest.fixture
def gpu() -> str:
    reason = missing_device("norm_linear", "cuda")
    if reason:
        pytest.skip(reason)
    return "cuda"


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(gpu: str, norm: str) -> None:
    inputs = half(3, 40, 9, norm, device=gpu)
    tensors = [inputs.get(name) for name in ("x", "residual", "z", "norm_weight", "weight", "bias")]
    torch.library.opcheck(torch.ops.mamba_ops.norm_linear.default, (*tensors, 1e-5, False))


def test_rows_beyond_one_launch(gpu: str) -> None:
    """The operator takes any number; norm_linear leaves more than eight to torch."""
    inputs = half(21, 5120, 300, "add", device=gpu)
    y, total = operator(**inputs)
    for rows in (slice(0, 8), slice(8, 16), slice(16, 21)):
        part = inputs | {name: inputs[name][rows] for name in ("x", "residual")}
        expected, expected_total = mamba_ops.norm_linear(**part)
        assert torch.equal(y[rows], expected)
        assert torch.equal(total[rows], expected_total)


def test_conv_opcheck(gpu: str) -> None:
    inputs = cases.norm_linear_conv(dtype=torch.bfloat16, device=gpu)
    names = ("x", "residual", "norm_weight", "weight", "bias", "conv_state", "conv_weight", "conv_bias")
    torch.library.opcheck(
        torch.ops.mamba_ops.norm_linear_conv.default, (*(inputs[name] for name in names), 1e-5, 5)
    )


def test_conv_rows_beyond_one_launch(gpu: str) -> None:
    inputs = cases.norm_linear_conv(21, 5120, 300, 100, 4, 150, dtype=torch.bfloat16, device=gpu)
    parts = [{k: inputs[k][i : i + 8].clone() for k in ("x", "residual", "conv_state")} for i in (0, 8, 16)]
    y, total = conv_operator(**inputs)
    for i, part in enumerate(parts):
        expected, expected_total = mamba_ops.norm_linear_conv(**inputs | part)
        rows = slice(8 * i, 8 * i + 8)
        assert torch.equal(y[rows], expected) and torch.equal(total[rows], expected_total)
        assert torch.equal(inputs["conv_state"][rows], part["conv_state"])


def test_the_same_bits_every_run_and_in_a_graph(gpu: str) -> None:
    inputs = half(5, 2560, 1000, "add to float32", device=gpu)
    expected = mamba_ops.norm_linear(**inputs)
    source, inputs["x"] = inputs["x"], torch.zeros_like(inputs["x"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inputs["x"].copy_(source)
        captured = mamba_ops.norm_linear(**inputs)
    for _ in range(3):
        graph.replay()
        for got, again, want in zip(captured, mamba_ops.norm_linear(**inputs), expected, strict=True):
            assert torch.equal(got, want) and torch.equal(again, want)


def test_launches_that_read_what_the_one_before_wrote(gpu: str) -> None:
    """As x, as weight and as conv_state; the launches overlap."""
    inputs = cases.norm_linear_conv(8, 512, 512, 300, 4, 100, "norm", dtype=torch.bfloat16, device=gpu)

    def chain(wait: Callable[[], None]) -> list[Tensor]:
        state, y, outs = inputs["conv_state"].clone(), inputs["x"], []
        for _ in range(40):
            y = mamba_ops.norm_linear_conv(**inputs | {"x": y, "conv_state": state})[0]
            wait()
            outs.append(mamba_ops.norm_linear(inputs["x"], y)[0])
            wait()
            outs.append(mamba_ops.norm_linear(y, inputs["weight"], inputs["bias"], inputs["norm_weight"])[0])
            y = outs[-1]
            wait()
        return [*outs, state]

    for got, want in zip(chain(lambda: None), chain(torch.cuda.synchronize), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 8)}, "x must be bfloat16, got float32"),
        ({"x": torch.zeros(8).bfloat16()}, "x must be (b, k), got (8,)"),
        ({"residual": torch.zeros(3, 7)}, "residual must be (b, k) = (3, 8), got (3, 7)"),
        ({"weight": torch.zeros(5, 7).bfloat16()}, "weight must be (n, k) = (n, 8), got (5, 7)"),
        ({"weight": torch.zeros(5, 8)}, "weight must be bfloat16, got float32"),
        ({"norm_weight": torch.zeros(7)}, "norm_weight must be (k) = (8), got (7,)"),
        ({"bias": torch.zeros(4)}, "bias must be (n) = (5), got (4,)"),
        ({"eps": -1.0}, "eps must be >= 0, got -1"),
    ],
)
def test_bad_input(gpu: str, changes: Inputs, message: str) -> None:
    changes = {k: v.to(gpu) if torch.is_tensor(v) else v for k, v in changes.items()}
    with pytest.raises(RuntimeError, match="norm_linear: " + re.escape(message)):
        operator(**half(3, 8, 5, device=gpu) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_state": torch.zeros(3, 6, 4)}, "conv_state must be bfloat16, got float32"),
        (
            {"conv_state": torch.zeros(3, 6, 4).bfloat16()},
            "conv_state must be (b, d, w - 1) = (3, 6, 3), got (3, 6, 4)",
        ),
        ({"conv_weight": torch.zeros(6, 5)}, "conv_weight must be (d, w) with w in 2..4, got (6, 5)"),
        ({"conv_bias": torch.zeros(5)}, "conv_bias must be (d) = (6), got (5,)"),
        (
            {"begin": 15},
            "the d = 6 columns from conv_begin must be among the n = 20 of y, got conv_begin = 15",
        ),
    ],
)
def test_conv_bad_input(gpu: str, changes: Inputs, message: str) -> None:
    changes = {k: v.to(gpu) if torch.is_tensor(v) else v for k, v in changes.items()}
    with pytest.raises(RuntimeError, match="norm_linear_conv: " + re.escape(message)):
        conv_operator(**cases.norm_linear_conv(dtype=torch.bfloat16, device=gpu) | changes)


def test_conv_state_that_rows_share(gpu: str) -> None:
    inputs = cases.norm_linear_conv(dtype=torch.bfloat16, device=gpu)
    shared = inputs["conv_state"][:1].expand(3, 6, 3)
    message = "conv_state is updated in place: every value needs memory of its own, got stride 0 in dim 0"
    with pytest.raises(RuntimeError, match="norm_linear_conv: " + message):
        conv_operator(**inputs | {"conv_state": shared})
