"""What torch expects of an operator: schema, fakes, autograd, compile, export, transforms, autocast."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

import mamba_ops
from tests import cases
from tests.cases import ALL, OPERATORS, PACKABLE, UPDATES, Inputs, full
from tests.compare import clone_strided, evaluate, is_float


def differentiable(inputs: Inputs) -> Inputs:
    return {k: v.detach().requires_grad_() if is_float(v) else v for k, v in inputs.items()}


class Recorder(TorchFunctionMode):
    """Notes which torch.ops.mamba_ops run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "mamba_ops":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def recorded(name: str, inputs: Inputs) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    with Recorder() as recorder:
        getattr(mamba_ops, name)(**inputs)
    (call,) = recorder.calls
    return call


# torch.library


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "projected", "expanded"])
@pytest.mark.parametrize("name", ALL)
def test_opcheck(name: str, layout: str, dtype: torch.dtype) -> None:
    inputs = full(name, layout=layout, dtype=dtype)
    inputs = inputs if name in UPDATES else differentiable(inputs)
    op, args, kwargs = recorded(name, inputs)
    assert op.name() == f"mamba_ops::{name}" + ("" if name in UPDATES else "_fwd")
    torch.library.opcheck(op, args, kwargs)


@pytest.mark.parametrize("pack", cases.PACKS[1:])
@pytest.mark.parametrize("name", PACKABLE)
def test_opcheck_of_packs(name: str, pack: str) -> None:
    torch.library.opcheck(*recorded(name, differentiable(full(name, pack=pack))))


@pytest.mark.parametrize("groups", [(None, 2), (0, 0)])
def test_opcheck_of_complex_rates(groups: tuple[int | None, int | None]) -> None:
    inputs = full("selective_scan", complex_A=True, groups=groups)
    torch.library.opcheck(*recorded("selective_scan", differentiable(inputs)))


@pytest.mark.parametrize("name", ALL)
def test_opcheck_without_options(name: str) -> None:
    inputs = cases.rms_norm_gated(3, 8, gate=False) if name == "rms_norm_gated" else getattr(cases, name)()
    torch.library.opcheck(*recorded(name, inputs if name in UPDATES else differentiable(inputs)))


@pytest.mark.parametrize("name", ALL)
def test_meta_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    inputs = full(name, layout="transposed", dtype=torch.bfloat16)
    expected = evaluate(getattr(mamba_ops, name), inputs)
    meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in inputs.items()}
    out = getattr(mamba_ops, name)(**meta)
    for got, real in zip(out if isinstance(out, tuple) else (out,), expected.values(), strict=False):
        assert (got.shape, got.dtype, got.stride()) == (real.shape, real.dtype, real.stride())


# Gradients


def assert_gradients(name: str, inputs: Inputs) -> None:
    leaves = {k: v for k, v in differentiable(inputs).items() if is_float(v)}

    def call(*values: Tensor) -> Any:
        return getattr(mamba_ops, name)(**inputs | dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("name", PACKABLE)
def test_gradcheck(name: str, pack: str | None) -> None:
    assert_gradients(name, full(name, 5, pack=pack, dtype=torch.float64))


@pytest.mark.parametrize("groups", [(None, None), (0, 0), (2, 0)])
@pytest.mark.parametrize("complex_A", [False, True])
def test_gradcheck_of_the_scan(complex_A: bool, groups: tuple[int | None, int | None]) -> None:
    inputs = full("selective_scan", 4, groups=groups, complex_A=complex_A, dtype=torch.float64)
    assert_gradients("selective_scan", inputs)


@pytest.mark.parametrize("D_per_channel", [False, True])
def test_gradcheck_of_ssd(D_per_channel: bool) -> None:
    assert_gradients("ssd", full("ssd", 6, D_per_channel=D_per_channel, dtype=torch.float64))


@pytest.mark.parametrize("before", [False, True])
def test_gradcheck_of_the_norm(before: bool) -> None:
    assert_gradients(
        "rms_norm_gated", full("rms_norm_gated", 3, norm_before_gate=before, dtype=torch.float64)
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_each_input_alone_may_need_a_gradient(name: str) -> None:
    inputs = full(name)
    expected = evaluate(getattr(mamba_ops, name), inputs, ("y",))
    for k in [k for k, v in inputs.items() if is_float(v)]:
        leaf = inputs[k].detach().clone().requires_grad_()
        y = getattr(mamba_ops, name)(**inputs | {k: leaf})
        y = y[0] if isinstance(y, tuple) else y
        generator = torch.Generator().manual_seed(y.dim())
        weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        torch.testing.assert_close(torch.autograd.grad(y, leaf, weights)[0], expected[f"grad {k}"])


@pytest.mark.parametrize("name", OPERATORS)
def test_a_second_backward_is_refused(name: str) -> None:
    inputs = differentiable(full(name))
    leaf = inputs["u" if "u" in inputs else "x"]
    out = getattr(mamba_ops, name)(**inputs)
    y = out[0] if isinstance(out, tuple) else out
    with pytest.raises(RuntimeError, match="differentiable"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (grad,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        grad.square().sum().backward()


@pytest.mark.parametrize("name", OPERATORS)
def test_inputs_and_their_versions_are_untouched(name: str) -> None:
    inputs = full(name)
    before = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
    evaluate(getattr(mamba_ops, name), inputs, ("y", "final_state"))
    for k, v in before.items():
        assert torch.equal(inputs[k], v)
        assert inputs[k]._version == 0


# Compile, export, transforms, autocast


def loss_of(name: str) -> Callable[..., Tensor]:
    def loss(inputs: Inputs) -> Tensor:
        out = getattr(mamba_ops, name)(**inputs)
        out = out if isinstance(out, tuple) else (out,)
        return torch.stack([o.float().square().mean() for o in out]).sum()

    return loss


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("name", OPERATORS)
def test_compile_does_not_recompile_per_length(name: str, pack: str | None) -> None:
    if pack and name not in PACKABLE:
        pytest.skip("no pack")
    options = {"pack": pack} if pack else {}
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of(name), backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for l in (9, 30, 17, 64):
        inputs, other = (differentiable(full(name, l, **options)) for _ in range(2))
        if pack == "cu_seqlens":  # the number of sequences is a shape too: keep it
            offsets = torch.tensor([0, 0, 5, l], dtype=torch.int32)
            states = inputs["initial_state"][:3].detach()
            for one in (inputs, other):
                one |= {"cu_seqlens": offsets, "initial_state": states.clone().requires_grad_()}
        got, expected = compiled(inputs), loss_of(name)(other)
        torch.testing.assert_close(got, expected)
        got.backward()
        expected.backward()
        for k in [k for k, v in inputs.items() if is_float(v)]:
            torch.testing.assert_close(inputs[k].grad, other[k].grad)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 4  # torch may trace the first call twice, for Python floats


@pytest.mark.parametrize("name", OPERATORS)
def test_compile_without_options(name: str) -> None:
    torch._dynamo.reset()
    inputs = cases.rms_norm_gated(3, 8, gate=False) if name == "rms_norm_gated" else getattr(cases, name)()
    expected = evaluate(getattr(mamba_ops, name), inputs, ("y",))
    compiled = torch.compile(getattr(mamba_ops, name), backend="aot_eager", fullgraph=True)
    for k, v in evaluate(compiled, inputs, ("y",)).items():
        torch.testing.assert_close(v, expected[k])


@pytest.mark.parametrize("name", UPDATES)
def test_compile_of_an_update_in_place(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda kw: getattr(mamba_ops, name)(**kw), backend="aot_eager", fullgraph=True)
    inputs = full(name)
    other = inputs | {"state": clone_strided(inputs["state"])}
    for _ in range(2):
        assert torch.equal(compiled(inputs), getattr(mamba_ops, name)(**other))
        assert torch.equal(inputs["state"], other["state"])


class Call(torch.nn.Module):
    def __init__(self, name: str, rest: Inputs) -> None:
        super().__init__()
        self.name, self.rest = name, rest

    def forward(self, tokens: dict[str, Tensor]) -> Any:
        return getattr(mamba_ops, self.name)(**self.rest, **tokens)


@pytest.mark.parametrize("name", OPERATORS)
def test_export(name: str) -> None:
    dim = {"selective_scan": 2, "ssd": 1, "causal_conv1d": 2, "rms_norm_gated": 1}[name]
    names = [k for k in ("u", "delta", "x", "dt", "B", "C", "z") if k in full(name)]

    def tokens(inputs: Inputs) -> dict[str, Tensor]:
        return {k: inputs[k] for k in names}

    inputs = full(name, 16)
    rest = {k: v for k, v in inputs.items() if k not in names}
    length = torch.export.Dim("l", min=2)
    axis = {
        k: {inputs[k].dim() - 1 if name in ("selective_scan", "causal_conv1d") else dim: length}
        for k in names
    }
    program = torch.export.export(Call(name, rest), (tokens(inputs),), dynamic_shapes=(axis,))
    for l in (16, 33):
        longer = full(name, l)
        expected = getattr(mamba_ops, name)(**rest | tokens(longer))
        torch.testing.assert_close(program.module()(tokens(longer)), expected, rtol=0, atol=0)


def test_a_layer_of_operators_under_inductor() -> None:
    def layer(x: Tensor, z: Tensor, w: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
        u = mamba_ops.causal_conv1d(x, w, activation="silu")
        y = mamba_ops.selective_scan(u * 2, dt, A, B, B, delta_softplus=True)
        y = y + mamba_ops.ssd(u.mT[..., None], dt.mT, A[:, 0], B.mT[:, :, None], B.mT[:, :, None])[..., 0].mT
        return mamba_ops.rms_norm_gated(y.mT, w[:, 0], z.mT).mean()

    torch._dynamo.reset()
    scan, conv = cases.selective_scan(2, 8, 30, 3, options=("z",)), cases.causal_conv1d(2, 8, 30, 4)
    values = (scan["u"], scan["z"], conv["weight"], scan["delta"], scan["A"], scan["B"])
    ours, theirs = ([v.clone().requires_grad_() for v in values] for _ in range(2))
    got, expected = torch.compile(layer, fullgraph=True)(*ours), layer(*theirs)
    torch.testing.assert_close(got, expected)
    got.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_is_a_loop(name: str) -> None:
    inputs = full(name)
    key = "u" if "u" in inputs else "x"
    batch = torch.stack([inputs[key], 2 * inputs[key], -inputs[key]])

    def call(value: Tensor) -> Tensor:
        out = getattr(mamba_ops, name)(**inputs | {key: value})
        return out[0] if isinstance(out, tuple) else out

    torch.testing.assert_close(torch.vmap(call)(batch), torch.stack([call(v) for v in batch]), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATORS)
def test_func_vjp_is_right_or_refused(name: str) -> None:
    inputs = full(name)
    key = "u" if "u" in inputs else "x"
    leaf = inputs[key].clone().requires_grad_()
    loss = loss_of(name)
    expected = torch.autograd.grad(loss(inputs | {key: leaf}), leaf)[0]
    try:
        _, vjp = torch.func.vjp(lambda value: loss(inputs | {key: value}), inputs[key])
    except RuntimeError as error:
        assert "setup_context" in str(error)  # what torch.func asks of an autograd.Function
        return
    torch.testing.assert_close(vjp(torch.tensor(1.0))[0], expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_lowers_data_and_keeps_parameters(name: str) -> None:
    data = ("u", "delta", "x", "dt", "B", "C", "z")
    inputs = full(name)
    if name == "causal_conv1d":
        data += ("initial_state",)
    lowered = {k: v.bfloat16() if k in data else v for k, v in inputs.items()}
    expected = evaluate(getattr(mamba_ops, name), lowered)

    def autocast(**kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return getattr(mamba_ops, name)(**kwargs)

    got = evaluate(autocast, inputs, ("y",))
    for k, v in expected.items():
        assert got[k].dtype is v.dtype
        torch.testing.assert_close(got[k], v, rtol=0, atol=0)
    for k in [k for k, v in inputs.items() if is_float(v)]:
        assert got[f"grad {k}"].dtype is inputs[k].dtype
        assert got[f"grad {k}"].isfinite().all()
