"""mamba_inner and mamba_split_conv1d_scan against the composition of the plain formulas, and as operators.

In float64 they follow the reference, in every dtype the same composition of our operators: of a chain of
rounded steps only the same steps have an error to compare with.
"""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mamba_ops
from mamba_ops import reference
from tests import cases, layer_cases
from tests.cases import Inputs
from tests.compare import LIMIT, cast, describe, dtype_of, evaluate, is_float
from tests.compare import check as check_float64
from tests.conftest import missing_device
from tests.layer_cases import INNER_OPTIONS, LAYER_OPERATORS, LOSS, SPLIT_OPTIONS, full
from tests.test_contract import assert_gradients, differentiable, recorded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PIECES = ("causal_conv1d", "selective_scan", "ssd", "rms_norm_gated")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that the operators which a test's operator is made of can run on."""
    name = request.node.callspec.params.get("name", request.node.name)
    scan = "selective_scan" if "inner" in name else "ssd"
    for piece in ("causal_conv1d", scan, "rms_norm_gated"):
        reason = missing_device(piece, request.param)
        if reason:
            pytest.skip(reason)
    return str(request.param)


def check(name: str, inputs: Inputs, loss: tuple[str, ...] = LOSS) -> None:
    dtype = dtype_of(inputs)
    check_float64(name, cast(inputs, torch.float64), loss)
    if dtype is torch.float64:
        return
    got = evaluate(getattr(mamba_ops, name), inputs, loss)
    biases = {k: v.to(dtype) for k, v in inputs.items() if "proj_bias" in k and v is not None}
    with mock.patch.multiple(reference, **{piece: getattr(mamba_ops, piece) for piece in PIECES}):
        expected = evaluate(getattr(reference, name), inputs | biases, loss)
    for key, value in expected.items():
        assert got[key].shape == value.shape, key
        assert got[key].dtype is (inputs[key[5:]].dtype if key[5:] in inputs else value.dtype), key
        error = torch.linalg.vector_norm(got[key] - value).item()
        scale = torch.linalg.vector_norm(value).item()
        assert error <= LIMIT[dtype] * scale, f"{name} {key}: {error} of {scale} in {describe(inputs)}"


@pytest.mark.parametrize("l", [1, 2, 3, 63, 130, 260])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_lengths(device: str, name: str, dtype: torch.dtype, l: int) -> None:
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    if name == "mamba_inner":
        inputs = layer_cases.mamba_inner(2, 24, l, 16, r=3, m=17, options=INNER_OPTIONS, **options)
    else:
        inputs = layer_cases.mamba_split_conv1d_scan(
            2, l, 16, 4, 16, g=2, k=5, m=17, options=SPLIT_OPTIONS, **options
        )
    check(name, inputs)


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("option", [None, *INNER_OPTIONS])
def test_each_option_of_inner_alone(device: str, option: str | None, pack: str | None) -> None:
    inputs = layer_cases.mamba_inner(
        1 if pack == "cu_seqlens" else 2, options=[option] if option else [], pack=pack, device=device
    )
    check("mamba_inner", inputs)


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("option", [None, *SPLIT_OPTIONS])
def test_each_option_of_split_alone(device: str, option: str | None, pack: str | None) -> None:
    options = ["outproj_weight", option] if option == "outproj_bias" else [option] if option else []
    inputs = layer_cases.mamba_split_conv1d_scan(
        1 if pack == "cu_seqlens" else 2, options=options, pack=pack, device=device
    )
    check("mamba_split_conv1d_scan", inputs)


@pytest.mark.parametrize("layout", ["transposed", "padded", "projected", "expanded"])
@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_layouts(device: str, name: str, layout: str) -> None:
    check(name, full(name, layout=layout, device=device))


@pytest.mark.parametrize("sizes", [(0, 9), (2, 0)])
@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_empty(device: str, name: str, sizes: tuple[int, int]) -> None:
    inputs = full(name, sizes[1], device=device)
    for key in ("xz", "zxbcdt", "conv_state", "initial_state"):
        if key in inputs:
            inputs[key] = inputs[key][: sizes[0]]
    check(name, inputs)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_projections_without_rows(device: str, layout: str) -> None:
    inner = full("mamba_inner", layout=layout, device=device)
    steps = {
        "delta_proj_weight": inner["delta_proj_weight"][:, :0],
        "x_proj_weight": inner["x_proj_weight"][2:],
    }
    check("mamba_inner", inner | steps)
    for name, ends in (("mamba_inner", ("out_proj_",)), ("mamba_split_conv1d_scan", ("outproj_",))):
        inputs = full(name, layout=layout, device=device)
        check(name, inputs | {k: v[:0] for k, v in inputs.items() if k.startswith(ends)})


@pytest.mark.parametrize("loss", LOSS)
@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_a_loss_of_one_output(device: str, name: str, loss: str) -> None:
    check(name, full(name, device=device), (loss,))


@settings(max_examples=40)
@given(data=st.data())
def test_any_inner(data: st.DataObject) -> None:
    draw = data.draw
    pack = draw(st.sampled_from(cases.PACKS))
    inputs = layer_cases.mamba_inner(
        1 if pack == "cu_seqlens" else draw(st.integers(1, 3)),
        draw(st.integers(5, 20)),
        draw(st.integers(1, 70)),
        draw(st.integers(4, 9)),
        r=draw(st.integers(1, 4)),
        m=draw(st.integers(1, 9)),
        w=draw(st.integers(2, 4)),
        given=sorted(draw(st.sets(st.sampled_from("BC")))),
        complex_A=draw(st.booleans()),
        options=draw(st.sets(st.sampled_from(INNER_OPTIONS))),
        pack=pack,
        layout=draw(st.sampled_from(cases.LAYOUTS)),
        dtype=draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16))),
        seed=draw(st.integers(0, 1000)),
    )
    check("mamba_inner", inputs)


@settings(max_examples=40)
@given(data=st.data())
def test_any_split(data: st.DataObject) -> None:
    draw = data.draw
    pack = draw(st.sampled_from(cases.PACKS))
    g = draw(st.integers(1, 3))
    inputs = layer_cases.mamba_split_conv1d_scan(
        1 if pack == "cu_seqlens" else draw(st.integers(1, 3)),
        draw(st.integers(1, 90)),
        g * draw(st.integers(2, 3)),
        draw(st.integers(3, 9)),
        draw(st.integers(4, 9)),
        g=g,
        k=draw(st.integers(0, 4)),
        m=draw(st.integers(1, 9)),
        w=draw(st.integers(2, 4)),
        activation=draw(st.sampled_from((None, "silu", "swish"))),
        norm_before_gate=draw(st.booleans()),
        D_per_channel=draw(st.booleans()),
        options=draw(st.sets(st.sampled_from(SPLIT_OPTIONS))),
        pack=pack,
        layout=draw(st.sampled_from(cases.LAYOUTS)),
        dtype=draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16))),
        seed=draw(st.integers(0, 1000)),
    )
    check("mamba_split_conv1d_scan", inputs)


# What torch expects of an operator


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_gradcheck(name: str, pack: str | None) -> None:
    assert_gradients(name, full(name, 5, pack=pack, dtype=torch.float64))


@pytest.mark.parametrize("given", [(), ("B",), ("B", "C")])
@pytest.mark.parametrize("complex_A", [False, True])
def test_gradcheck_of_inner(complex_A: bool, given: tuple[str, ...]) -> None:
    options: dict[str, Any] = {"given": given, "complex_A": complex_A, "dtype": torch.float64}
    assert_gradients("mamba_inner", full("mamba_inner", 4, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    inputs = full(name, dtype=dtype, layout="projected")
    torch.library.opcheck(*recorded(name, differentiable(inputs)))
    inputs = getattr(layer_cases, name)()
    torch.library.opcheck(*recorded(name, differentiable(inputs)))


@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_meta_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    inputs = full(name, dtype=torch.bfloat16)
    expected = evaluate(getattr(mamba_ops, name), inputs)
    meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in inputs.items()}
    for got, real in zip(getattr(mamba_ops, name)(**meta), expected.values(), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_compiles_for_any_length(name: str) -> None:
    inputs = full(name)
    compiled = torch.compile(getattr(mamba_ops, name), fullgraph=True, dynamic=True, backend="aot_eager")
    for l in (9, 12, 21):
        inputs = full(name, l)
        expected = evaluate(getattr(mamba_ops, name), inputs, LOSS)
        got = evaluate(compiled, inputs, LOSS)
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_autocast_lowers_data_and_projections(name: str) -> None:
    """What a layer gives under autocast, and gradients in the parameters' own dtypes."""
    inputs = full(name)
    data = {"xz", "zxbcdt", "conv_state"} | {key for key in inputs if "proj" in key}
    lowered = {k: v.bfloat16() if k in data and torch.is_tensor(v) else v for k, v in inputs.items()}
    expected = getattr(mamba_ops, name)(**lowered)
    leaves = differentiable(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = getattr(mamba_ops, name)(**leaves)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    torch.autograd.backward([t.float().sum() for t in got])
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values() if is_float(leaf))


@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_no_double_backward(name: str) -> None:
    leaves = differentiable(layer_cases.full(name, 4))
    data = leaves["xz" if name == "mamba_inner" else "zxbcdt"]
    out = getattr(mamba_ops, name)(**leaves)[0]
    (grad,) = torch.autograd.grad(out.square().sum(), data, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable|derivative .* not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_activation_checkpointing(name: str) -> None:
    """Reading a saved tensor may run the forward again, which then has to save its own."""
    plain, again = (differentiable(full(name)) for _ in range(2))

    def call(data: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
        key = "xz" if name == "mamba_inner" else "zxbcdt"
        return tuple(getattr(mamba_ops, name)(**inputs | {key: data * 2}))

    for inputs, run in ((plain, call), (again, partial(checkpoint, call, use_reentrant=False))):
        data = inputs["xz" if name == "mamba_inner" else "zxbcdt"]
        torch.autograd.backward([t.sum() for t in run(data, inputs)])
    for key in [key for key, value in plain.items() if is_float(value)]:
        assert torch.equal(plain[key].grad, again[key].grad), key


@pytest.mark.parametrize("frozen", ["weights", "data"])
@pytest.mark.parametrize("name", LAYER_OPERATORS)
def test_frozen_arguments(name: str, frozen: str) -> None:
    """Gradients of some arguments are those that they have beside all the others."""
    inputs = full(name)
    expected = evaluate(getattr(mamba_ops, name), inputs, ("y",))
    chosen = {k for k, v in inputs.items() if is_float(v) and ("weight" in k) == (frozen == "data")}
    leaves = {k: inputs[k].detach().requires_grad_() for k in sorted(chosen)}
    out = getattr(mamba_ops, name)(**inputs | leaves)[0]
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(out.dim()), dtype=torch.float64
    ).to(out)
    out.backward(weights)
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[f"grad {key}"])


# Errors


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "mamba_inner",
            {"xz": torch.ones(2, 9, 5)},
            r"xz must be \(b, 2 d, l\) = \(b, 8, l\), got",
        ),
        ("mamba_inner", {"x_proj_weight": torch.ones(7, 4)}, r"x_proj_weight must have .* 6 rows, got 7"),
        ("mamba_inner", {"delta_proj_weight": torch.ones(5, 2)}, r"delta_proj_weight must be \(d, r\)"),
        ("mamba_inner", {"out_proj_weight": torch.ones(3, 5)}, r"out_proj_weight must be \(m, d\)"),
        ("mamba_inner", {"out_proj_bias": torch.ones(4)}, r"out_proj_bias must be \(m\) = \(3\), got \(4,\)"),
        ("mamba_inner", {"out_proj_weight": torch.ones(3, 4).double()}, "out_proj_weight must be float32"),
        ("mamba_inner", {"B": torch.ones(4, 2)}, "the bias and norm of B need it projected"),
        ("mamba_inner", {"dt_rms_weight": torch.ones(5)}, r"dt_rms_weight must be \(d\) = \(4\)"),
        ("mamba_inner", {"conv_state": torch.ones(2, 4, 2)}, r"conv_state must be .* = \(2, 4, 3\), got"),
        ("mamba_inner", {"conv1d_weight": torch.ones(4, 1, 4)}, r"conv1d_weight must be \(d, w\) = \(4, w\)"),
        ("mamba_inner", {"A": torch.ones(4, 0)}, r"A must be \(d, n\) with n >= 1"),
        ("mamba_split_conv1d_scan", {"conv_state": torch.ones(3, 9, 3)}, "conv_state must be .*, got"),
        ("mamba_split_conv1d_scan", {"zxbcdt": torch.ones(2, 9, 47)}, "zxbcdt must have .* columns, got 47"),
        ("mamba_split_conv1d_scan", {"conv1d_weight": torch.ones(9, 4)}, "conv1d_weight must have .*, got 9"),
        ("mamba_split_conv1d_scan", {"ngroups": 3}, "ngroups divide h = 4, got 2 and 3"),
        ("mamba_split_conv1d_scan", {"headdim": None}, "headdim must be given"),
        ("mamba_split_conv1d_scan", {"outproj_weight": torch.ones(3, 8)}, r"\(m, k \+ d\) = \(m, 11\)"),
        ("mamba_split_conv1d_scan", {"outproj_weight": None}, "outproj_bias needs outproj_weight"),
        (
            "mamba_split_conv1d_scan",
            {"rmsnorm_weight": torch.ones(5)},
            r"rmsnorm_weight must be \(d\)",
        ),
    ],
)
def test_errors(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(mamba_ops, name)(**full(name) | change)


def test_no_heads() -> None:
    out = mamba_ops.mamba_split_conv1d_scan(
        torch.ones(2, 5, 8), torch.ones(8, 4), None, None, torch.ones(0), headdim=3, ngroups=2
    )
    assert out.shape == (2, 5, 0)


def test_unknown_activation() -> None:
    inputs = full("mamba_split_conv1d_scan") | {"activation": "gelu"}
    with pytest.raises(ValueError, match="activation must be"):
        mamba_ops.mamba_split_conv1d_scan(**inputs)
