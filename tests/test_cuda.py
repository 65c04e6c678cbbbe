"""What holds for every operator that has CUDA kernels: repeatable, on any stream and device, in graphs, at
any size, with little memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_ops
from tests import cases
from tests.cases import ALL, OPERATORS, PACKABLE, SCAN_OPTIONS, UPDATES, Inputs, full
from tests.compare import clone_strided, evaluate, is_float
from tests.conftest import missing_device
from tests.test_contract import assert_gradients, differentiable, loss_of
from tests.test_determinism import CASES, assert_bitwise
from tests.test_memory import saved_bytes


def require(name: str) -> None:
    reason = missing_device(name, "cuda")
    if reason:
        pytest.skip(reason)


def outputs_and_gradients(name: str, inputs: Inputs) -> Callable[[], list[Tensor]]:
    """A call without host work: outputs, then for all but updates the gradients of a fixed loss."""
    leaves = {k: v for k, v in differentiable(inputs).items() if is_float(v)}

    def call() -> list[Tensor]:
        if name in UPDATES:
            state = clone_strided(inputs["state"])
            return [getattr(mamba_ops, name)(**inputs | {"state": state}), state]
        out = getattr(mamba_ops, name)(**inputs | leaves)
        out = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(out, list(leaves.values()), [torch.ones_like(o) for o in out])
        return [*(o.detach() for o in out), *grads]

    return call


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_every_run(case: str, dtype: torch.dtype) -> None:
    name, make, sizes = CASES[case]
    require(name)
    loss = () if name in UPDATES else ("y", "final_state")
    inputs = make(dtype=dtype, device="cuda", **sizes)
    expected = evaluate(getattr(mamba_ops, name), inputs, loss)
    for _ in range(3):
        assert_bitwise(evaluate(getattr(mamba_ops, name), inputs, loss), expected)


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("name", ALL)
def test_replay_of_a_graph(name: str, pack: str | None) -> None:
    if pack and name not in PACKABLE:
        pytest.skip("no pack")
    require(name)
    options = {"pack": pack} if pack else {}
    inputs = full(name, device="cuda", **options)
    call = outputs_and_gradients(name, inputs)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    other = full(name, device="cuda", seed=1, **options)
    with torch.no_grad():
        for key, value in inputs.items():
            if torch.is_tensor(value):
                value.copy_(other[key])
    graph.replay()
    assert_equal(captured, call())


@pytest.mark.parametrize("name", ALL)
def test_a_side_stream(name: str) -> None:
    require(name)
    inputs = full(name, device="cuda")
    expected = outputs_and_gradients(name, inputs)()
    late = {k: torch.zeros_like(v) if torch.is_tensor(v) else v for k, v in inputs.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for key, value in inputs.items():
            if torch.is_tensor(value):
                late[key].copy_(value)
        got = outputs_and_gradients(name, late)()
    stream.synchronize()
    assert_equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_launches_that_read_what_the_one_before_wrote(dtype: torch.dtype) -> None:
    """Those of a layer's step start while the one before still runs."""
    for name in UPDATES:
        require(name)
    conv = cases.causal_conv1d_update(2, 160, 4, k=3, dtype=dtype, device="cuda")
    update = cases.ssd_state_update(2, 5, 32, 16, dtype=dtype, device="cuda")
    weight = torch.ones(160, dtype=dtype, device="cuda")

    def chain(wait: Callable[[], None]) -> list[Tensor]:
        conv_state, state, stream, outs = conv["state"].clone(), update["state"].clone(), conv["x"], []
        x = stream
        for _ in range(40):
            x = mamba_ops.causal_conv1d_update(**conv | {"x": x, "state": conv_state})
            wait()
            x = mamba_ops.ssd_state_update(**update | {"x": x.view(2, 5, 32), "state": state})
            wait()
            x = mamba_ops.rms_norm_gated(x.view(2, 160), weight, stream)
            wait()
            x, stream = mamba_ops.add_rms_norm(x, stream, weight)
            wait()
            outs += [x, stream]
        return [*outs, conv_state, state]

    assert_equal(chain(lambda: None), chain(torch.cuda.synchronize))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", ALL)
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    require(name)
    expected = outputs_and_gradients(name, full(name, device="cuda:0"))()
    got = outputs_and_gradients(name, full(name, device="cuda:1"))()
    assert torch.cuda.current_device() == 0
    assert_equal([t.cpu() for t in got], [t.cpu() for t in expected])


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("name", PACKABLE)
def test_gradcheck(name: str, pack: str | None) -> None:
    require(name)
    assert_gradients(name, full(name, 5, pack=pack, dtype=torch.float64, device="cuda"))


@pytest.mark.parametrize("groups", [(None, None), (0, 0), (2, 0)])
@pytest.mark.parametrize("complex_A", [False, True])
def test_gradcheck_of_the_scan(complex_A: bool, groups: tuple[int | None, int | None]) -> None:
    require("selective_scan")
    options: dict[str, Any] = {"groups": groups, "complex_A": complex_A, "dtype": torch.float64}
    assert_gradients("selective_scan", full("selective_scan", 4, device="cuda", **options))


@pytest.mark.parametrize("name", OPERATORS)
def test_compile(name: str) -> None:
    require(name)
    torch._dynamo.reset()
    compiled = torch.compile(loss_of(name), backend="aot_eager", fullgraph=True, dynamic=True)
    for l in (9, 200):
        inputs, other = (differentiable(full(name, l, device="cuda")) for _ in range(2))
        got, expected = compiled(inputs), loss_of(name)(other)
        torch.testing.assert_close(got, expected)
        got.backward()
        expected.backward()
        for k in [k for k, v in inputs.items() if is_float(v)]:
            torch.testing.assert_close(inputs[k].grad, other[k].grad)


@pytest.mark.parametrize("offsets", [[0, 5, 3, 23], [1, 5, 23], [0, 5, 24], [0, 5, 22], [0, -9, 2**31 - 1]])
@pytest.mark.parametrize("name", PACKABLE)
def test_bad_offsets_give_nan_everywhere(name: str, offsets: list[int]) -> None:
    require(name)
    inputs = full(name, 23, pack="cu_seqlens", device="cuda")
    states = inputs["initial_state"]
    inputs["initial_state"] = states.new_ones(len(offsets) - 1, *states.shape[1:])
    inputs["cu_seqlens"] = torch.tensor(offsets, device="cuda")
    for key, value in evaluate(getattr(mamba_ops, name), inputs, ("y", "final_state")).items():
        assert value.isnan().all(), key


# The scan: memory and size


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("l", [63, 64, 1000])
def test_the_scan_saves_a_state_every_64_tokens(l: int, complex_A: bool) -> None:
    require("selective_scan")
    inputs = cases.selective_scan(2, 24, l, 16, options=SCAN_OPTIONS, complex_A=complex_A, device="cuda")
    assert saved_bytes("selective_scan", inputs) <= 2 * 24 * 16 * (8 if complex_A else 4) * (l // 64)


def test_the_scan_holds_no_states_of_all_tokens() -> None:
    require("selective_scan")
    b, d, l, n = 1, 256, 16384, 64
    inputs = differentiable(cases.selective_scan(b, d, l, n, options=SCAN_OPTIONS, device="cuda"))
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, state = mamba_ops.selective_scan(**inputs)
    torch.autograd.grad(y.sum() + state.sum(), [v for v in inputs.values() if is_float(v)])
    tensors = sum(v.numel() * 4 for v in inputs.values() if torch.is_tensor(v)) + 3 * y.numel() * 4
    partials = min(256 << 20, d // 32 * l * 2 * n * 4)
    extra = torch.cuda.max_memory_allocated() - before - tensors - partials
    assert extra <= b * d * l * n * 4 / 16


def test_sums_over_channels_in_several_launches() -> None:
    """The partial sums of dB and dC are bounded: many channels and states take several launches."""
    require("selective_scan")
    d, l, n, parts = 4096, 6000, 64, 4
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    inputs: Inputs = {
        "u": normal(1, d, l),
        "delta": normal(1, d, l) - 3,
        "A": -normal(d, n).exp(),
        "B": normal(1, n, l),
        "C": normal(1, n, l),
        "delta_softplus": True,
    }
    dy = normal(1, d, l)
    leaves = differentiable(inputs)
    floats = [k for k, v in leaves.items() if is_float(v)]
    grads = torch.autograd.grad(mamba_ops.selective_scan(**leaves), [leaves[k] for k in floats], dy)
    whole = dict(zip(floats, grads, strict=True))
    sums = {k: torch.zeros_like(inputs[k]) for k in ("B", "C")}
    for part in range(parts):
        rows = slice(part * d // parts, (part + 1) * d // parts)
        some = inputs | {k: inputs[k][:, rows] for k in ("u", "delta")} | {"A": inputs["A"][rows]}
        leaves = differentiable(some)
        y = mamba_ops.selective_scan(**leaves)
        grads = torch.autograd.grad(y, [leaves[k] for k in floats], dy[:, rows])
        for key, grad in zip(floats, grads, strict=True):
            if key in sums:
                sums[key] += grad
            else:
                expected = whole[key][rows] if key == "A" else whole[key][:, rows]
                torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    for key, total in sums.items():
        torch.testing.assert_close(whole[key], total, rtol=1e-4, atol=1e-4 * total.abs().max().item())


def test_the_scan_of_more_than_2_to_the_31_elements() -> None:
    """The last tokens equal those of a short scan that continues from the state before them."""
    require("selective_scan")
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    d, n, tail = 2048, 2, 100
    l = 2**31 // d + 1000
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    u = normal(1, l, d).mT.requires_grad_()
    delta = (normal(1, l, 1).mT.expand(1, d, l) - 3).requires_grad_()
    B, C = (normal(1, l, n).mT.requires_grad_() for _ in range(2))
    A = -torch.ones(d, n, device="cuda")
    assert u.numel() > 2**31

    def scan(tokens: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        parts = (t[..., tokens] for t in (u, delta))
        options: dict[str, Any] = {"delta_softplus": True, "return_final_state": True}
        u_part, delta_part = parts
        return mamba_ops.selective_scan(  # type: ignore[return-value]
            u_part, delta_part, A, B[..., tokens], C[..., tokens], initial_state=state, **options
        )

    y, final = scan(slice(l), None)
    last = slice(l - tail, l)
    dy = torch.zeros_like(y)
    dy[..., last] = 1
    du, ddelta, dB = torch.autograd.grad(y, [u, delta, B], dy)
    assert not du[..., last].isnan().any()
    with torch.no_grad():
        _, state = scan(slice(l - tail), None)
    y_last, final_last = scan(last, state)
    grads = torch.autograd.grad(y_last, [u, delta, B], dy[..., last])
    torch.testing.assert_close(y[..., last], y_last)
    torch.testing.assert_close(final, final_last)
    for whole, short in zip((du, ddelta, dB), grads, strict=True):
        torch.testing.assert_close(whole[..., last], short[..., last])
