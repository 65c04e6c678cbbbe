"""ssd against the recurrence: every option, dtype, layout and length."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mamba_ops
from mamba_ops import _C, reference
from tests import cases
from tests.cases import SSD_OPTIONS
from tests.compare import cast, check, evaluate

OPERATOR = "ssd"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOKENS = ("x", "dt", "B", "C")
WITHOUT_LIMIT = tuple(option for option in SSD_OPTIONS if option != "dt_limit")
WITHOUT_GATE = tuple(option for option in WITHOUT_LIMIT if option != "z")


@pytest.mark.parametrize("decay", ["weak", "strong"])
@pytest.mark.parametrize("l", [1, 63, 64, 65, 127, 129, 135])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(device: str, dtype: torch.dtype, l: int, decay: str) -> None:
    options = {"options": WITHOUT_LIMIT, "decay": decay, "dtype": dtype, "device": device}
    check(OPERATOR, cases.ssd(l=l, groups=(2, 2), **options))


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_sizes(device: str, dtype: torch.dtype, chunk_size: int) -> None:
    options = {"options": WITHOUT_LIMIT, "decay": "strong", "dtype": dtype, "device": device}
    for l in {chunk_size - 1, chunk_size, chunk_size + 1, 2 * chunk_size + 7} if chunk_size <= 64 else {263}:
        check(OPERATOR, cases.ssd(1, l, 2, 5, 3, chunk_size=chunk_size, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long(device: str, dtype: torch.dtype) -> None:
    check(OPERATOR, cases.ssd(1, 4096, 2, 4, 8, options=WITHOUT_LIMIT, dtype=dtype, device=device))


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("option", [None, *SSD_OPTIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_option_alone(device: str, dtype: torch.dtype, option: str | None, pack: str | None) -> None:
    options = () if option is None else (option,)
    b = 1 if pack == "cu_seqlens" else 2
    check(OPERATOR, cases.ssd(b, l=70, options=options, pack=pack, dtype=dtype, device=device))


@pytest.mark.parametrize("decay", ["weak", "strong"])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_options_with_limits(device: str, dtype: torch.dtype, softplus: bool, decay: str) -> None:
    options = [option for option in SSD_OPTIONS if softplus or option != "dt_softplus"]
    check(OPERATOR, cases.ssd(l=70, options=options, decay=decay, dtype=dtype, device=device))


def test_a_step_at_its_limit_passes_the_gradient(device: str) -> None:
    inputs = cases.ssd(options=("dt_limit",), device=device)
    inputs["dt_limit"] = (0.25, 0.5)
    values = torch.tensor([0.125, 0.25, 0.375, 0.5, 0.625], device=device)
    inputs["dt"] = values[torch.arange(inputs["dt"].numel(), device=device) % 5].view(inputs["dt"].shape)
    gradient = check(OPERATOR, inputs)["grad dt"]
    outside = (inputs["dt"] < 0.25) | (inputs["dt"] > 0.5)
    assert torch.equal(gradient == 0, outside)


@pytest.mark.parametrize("groups", [(1, 1), (2, 2), (6, 6), (1, 6), (6, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups(device: str, dtype: torch.dtype, groups: tuple[int, int]) -> None:
    options = {"groups": groups, "options": SSD_OPTIONS, "dtype": dtype, "device": device}
    check(OPERATOR, cases.ssd(2, 70, 6, **options))
    check(OPERATOR, cases.ssd(1, 70, 6, pack="cu_seqlens", D_per_channel=True, **options))


@pytest.mark.parametrize("pack", cases.PACKS[1:])
@pytest.mark.parametrize("l", [1, 2, 64, 128, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packs(device: str, dtype: torch.dtype, l: int, pack: str) -> None:
    b = 1 if pack == "cu_seqlens" else 2
    inputs = cases.ssd(b, l, options=WITHOUT_LIMIT, pack=pack, decay="strong", dtype=dtype, device=device)
    check(OPERATOR, inputs)
    check(OPERATOR, inputs | {"chunk_size": 16})


@pytest.mark.parametrize("D_per_channel", [False, True])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(device: str, dtype: torch.dtype, layout: str, D_per_channel: bool) -> None:
    options = {"groups": (2, 4), "D_per_channel": D_per_channel, "dtype": dtype, "device": device}
    check(OPERATOR, cases.ssd(l=70, options=SSD_OPTIONS, layout=layout, **options))


def test_broadcast_over_heads_and_channels(device: str) -> None:
    inputs = cases.ssd(l=70, options=SSD_OPTIONS, D_per_channel=True, device=device)
    for name, dim in (
        ("A", 0),
        ("dt_bias", 0),
        ("D", 1),
        ("dt", 2),
        ("z", 2),
        ("B", 1),
        ("initial_state", 1),
    ):
        inputs[name] = inputs[name].narrow(dim, 0, 1).expand(inputs[name].shape)
    check(OPERATOR, inputs)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 17, 33, 64, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_and_state_sizes(device: str, dtype: torch.dtype, size: int) -> None:
    options = {"options": WITHOUT_LIMIT, "dtype": dtype, "device": device}
    check(OPERATOR, cases.ssd(1, 67, 2, size, 3, **options))
    check(OPERATOR, cases.ssd(1, 67, 2, 3, size, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sizes_of_a_layer(device: str, dtype: torch.dtype) -> None:
    options = {"options": WITHOUT_LIMIT, "dtype": dtype, "device": device}
    check(OPERATOR, cases.ssd(1, 150, 3, 64, 128, **options))


@pytest.mark.parametrize("options", [WITHOUT_GATE, WITHOUT_LIMIT])
@pytest.mark.parametrize("decay", ["weak", "strong"])
@pytest.mark.parametrize("l", [1, 64, 129, 200])
@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiles_of_tensor_cores(
    device: str, dtype: torch.dtype, n: int, l: int, decay: str, options: tuple[str, ...]
) -> None:
    """The sizes for which Hopper has a backward of its own."""
    inputs = cases.ssd(2, l, 3, 64, n, options=options, decay=decay, dtype=dtype, device=device)
    check(OPERATOR, inputs)


@pytest.mark.parametrize("groups", [(1, 1), (2, 2), (6, 6), (1, 6), (6, 2), (2, 3)])
@pytest.mark.parametrize("D_per_channel", [False, True])
@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "projected"])
def test_groups_and_layouts_of_tensor_cores(
    device: str, layout: str, params: torch.dtype, D_per_channel: bool, groups: tuple[int, int]
) -> None:
    """Projected: not aligned, for the portable kernels."""
    options = {"options": WITHOUT_LIMIT, "dtype": torch.bfloat16, "params": params, "device": device}
    options |= {"groups": groups, "D_per_channel": D_per_channel, "layout": layout}
    inputs = cases.ssd(2, 150, 6, 64, 64, **options)
    check(OPERATOR, inputs)
    check(OPERATOR, inputs | {"dt": inputs["dt"].float()})


def test_tensor_cores_repeat_bitwise(device: str) -> None:
    inputs = cases.ssd(1, 300, 6, 64, 128, options=WITHOUT_LIMIT, dtype=torch.bfloat16, device=device)
    first, second = (evaluate(mamba_ops.ssd, inputs, ("y", "final_state")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("D_per_channel", [False, True])
@pytest.mark.parametrize(("p", "n"), [(64, 128), (64, 64), (128, 64), (32, 16), (48, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_tiles_of_tensor_cores(
    device: str, dtype: torch.dtype, p: int, n: int, D_per_channel: bool
) -> None:
    options = {"options": WITHOUT_LIMIT, "D_per_channel": D_per_channel, "dtype": dtype, "device": device}
    check(OPERATOR, cases.ssd(2, 130, 3, p, n, decay="strong", **options))


@pytest.mark.parametrize("groups", [(2, 2), (3, 3), (6, 6), (2, 3)])
def test_groups_and_gates_of_tensor_cores(device: str, groups: tuple[int, int]) -> None:
    options = {"options": SSD_OPTIONS, "dtype": torch.bfloat16, "device": device}
    check(OPERATOR, cases.ssd(2, 70, 6, 64, 64, groups=groups, **options))


@pytest.mark.parametrize("D_per_channel", [False, True])
@pytest.mark.parametrize(("p", "n"), [(64, 128), (64, 64), (37, 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_D_before_a_gate(
    device: str, dtype: torch.dtype, p: int, n: int, D_per_channel: bool
) -> None:
    """What it sums, the gradient before the gate, is in 16 bits elsewhere; the sum is one of float32."""
    options = {"options": WITHOUT_LIMIT, "params": torch.float32, "dtype": dtype, "device": device}
    inputs = cases.ssd(2, 200, 3, p, n, D_per_channel=D_per_channel, **options)
    got = evaluate(mamba_ops.ssd, inputs, ("y",))["grad D"].double().cpu()
    truth = evaluate(reference.ssd, cast(inputs, torch.float64), ("y",), dtype)["grad D"].double().cpu()
    assert torch.linalg.vector_norm(got - truth) <= 2e-6 * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("pack", cases.PACKS[1:])
@pytest.mark.parametrize("options", [("D", "dt_bias", "dt_softplus"), WITHOUT_GATE, WITHOUT_LIMIT])
@pytest.mark.parametrize("decay", ["weak", "strong"])
@pytest.mark.parametrize("n", [64, 128])
def test_packs_of_tensor_cores(device: str, n: int, decay: str, options: tuple[str, ...], pack: str) -> None:
    b = 1 if pack == "cu_seqlens" else 2
    kind = {"options": options, "decay": decay, "pack": pack, "dtype": torch.bfloat16, "device": device}
    inputs = cases.ssd(b, 300, 4, 64, n, groups=(2, 2), **kind)
    check(OPERATOR, inputs)
    check(OPERATOR, inputs | {"dt": inputs["dt"].float()})


@pytest.mark.parametrize("n", [64, 128])
def test_slices_of_a_projection(device: str, n: int) -> None:
    """As in a layer: z, x, B, C, dt lie side by side in one (b, l, d) tensor."""
    inputs = cases.ssd(2, 130, 4, 64, n, options=WITHOUT_LIMIT, dtype=torch.bfloat16, device=device)
    names = ("z", "x", "B", "C", "dt")
    flat = [inputs[name].flatten(2) for name in names]
    joined = torch.cat([*flat, torch.full_like(flat[-1], math.nan)], 2)
    parts = joined.split([t.shape[2] for t in flat] + [flat[-1].shape[2]], 2)
    views = {}
    for name, part in zip(names, parts, strict=False):
        views[name] = part.unflatten(2, inputs[name].shape[2:])
    check(OPERATOR, inputs | views)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_states_off_their_alignment(device: str, offset: int) -> None:
    """A contiguous state may begin at any of its elements."""
    inputs = cases.ssd(1, 70, 2, 64, 64, options=WITHOUT_LIMIT, dtype=torch.bfloat16, device=device)
    state = inputs["initial_state"]
    inputs["initial_state"] = torch.cat([state.new_zeros(offset), state.flatten()])[offset:].view_as(state)
    check(OPERATOR, inputs)


@pytest.mark.parametrize(
    ("b", "l", "h", "n"), [(2, 130, 134, 64), (3, 130, 89, 64), (3, 130, 89, 128), (1, 1100, 2, 128)]
)
def test_work_that_a_gpu_cuts(device: str, b: int, l: int, h: int, n: int) -> None:
    """More heads than multiprocessors: sequences cut between blocks; few and long ones: in segments."""
    options = {"options": WITHOUT_LIMIT, "dtype": torch.bfloat16, "device": device}
    inputs = cases.ssd(b, l, h, 64, n, **options)
    got = check(OPERATOR, inputs, loss=())
    y, state = mamba_ops.ssd(**inputs)
    assert torch.equal(y, got["y"]) and torch.equal(state, got["final_state"])


@pytest.mark.parametrize("pack", [None, "seq_idx"])
@pytest.mark.parametrize(
    ("b", "l", "h", "n"), [(1, 1100, 3, 64), (1, 1100, 3, 128), (3, 70, 89, 64), (3, 70, 89, 128)]
)
def test_gradients_of_work_that_a_gpu_cuts(
    device: str, b: int, l: int, h: int, n: int, pack: str | None
) -> None:
    """Few and long sequences: the states of the backward are made in segments; many heads: in pieces."""
    options = {"options": WITHOUT_GATE, "pack": pack, "dtype": torch.bfloat16, "device": device}
    inputs = cases.ssd(b, l, h, 64, n, **options)
    first = check(OPERATOR, inputs)
    second = evaluate(mamba_ops.ssd, inputs, ("y", "final_state"))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize(("b", "l", "h"), [(2, 130, 134), (1, 1100, 2)])
def test_a_replayed_graph_follows_its_inputs(device: str, b: int, l: int, h: int) -> None:
    if device == "cpu":
        pytest.skip("graphs are of CUDA")
    options = {"options": WITHOUT_LIMIT, "dtype": torch.bfloat16, "device": device}
    inputs = cases.ssd(b, l, h, 64, 64, **options)
    mamba_ops.ssd(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, state = mamba_ops.ssd(**inputs)
    for seed in (1, 2):
        fresh = cases.ssd(b, l, h, 64, 64, seed=seed, **options)
        for name, value in fresh.items():
            if isinstance(value, torch.Tensor):
                inputs[name].copy_(value)
        graph.replay()
        expected_y, expected_state = mamba_ops.ssd(**fresh)
        assert torch.equal(y, expected_y) and torch.equal(state, expected_state)


@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16])
def test_parameters_in_either_dtype(device: str, params: torch.dtype) -> None:
    inputs = cases.ssd(l=70, options=SSD_OPTIONS, dtype=torch.bfloat16, params=params, device=device)
    check(OPERATOR, inputs)
    check(OPERATOR, inputs | {"dt": inputs["dt"].float()})


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("sizes", [(0, 23, 4, 3, 5), (2, 0, 4, 3, 5), (0, 0, 4, 3, 5), (1, 0, 4, 3, 5)])
def test_empty(device: str, sizes: tuple[int, int, int, int, int], pack: str | None) -> None:
    if pack == "cu_seqlens" and sizes[0] != 1:
        pytest.skip("a pack has batch 1")
    check(OPERATOR, cases.ssd(*sizes, options=SSD_OPTIONS, pack=pack, device=device))


@pytest.mark.parametrize("loss", [("y",), ("final_state",)])
def test_a_loss_of_one_output(device: str, loss: tuple[str]) -> None:
    check(OPERATOR, cases.ssd(l=70, options=SSD_OPTIONS, device=device), loss)


def test_softplus_beyond_its_threshold(device: str) -> None:
    inputs = cases.ssd(2, 40, options=("dt_softplus",), device=device)
    inputs["dt"][:, ::5] = torch.linspace(15, 25, 8 * 4, device=device).view(8, 4)
    inputs["A"] *= 0.01
    check(OPERATOR, inputs)


def test_a_gate_of_zero(device: str) -> None:
    inputs = cases.ssd(options=SSD_OPTIONS, device=device)
    inputs["z"][:, :, ::2] = 0
    check(OPERATOR, inputs)


def test_decay_that_underflows(device: str) -> None:
    """exp(s_i - s_j) masked after exp would be inf * 0 here."""
    inputs = cases.ssd(l=150, options=SSD_OPTIONS, decay="strong", device=device)
    inputs["A"] *= 100
    check(OPERATOR, inputs)


@pytest.mark.parametrize("growth", [0.0, 0.5])
def test_rates_that_do_not_decay(device: str, growth: float) -> None:
    inputs = cases.ssd(l=70, options=SSD_OPTIONS, device=device)
    inputs["A"] = torch.full_like(inputs["A"], growth)
    got = check(OPERATOR, inputs)
    assert math.isfinite(got["y"].abs().max())


def test_a_pack_equals_its_sequences(device: str) -> None:
    inputs = cases.ssd(1, 150, options=SSD_OPTIONS, pack="cu_seqlens", device=device)
    y, state = mamba_ops.ssd(**inputs)
    cuts = inputs.pop("cu_seqlens").tolist()
    for k, (begin, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        tokens = {name: inputs[name][:, begin:end] for name in ("x", "dt", "B", "C", "z")}
        row = inputs["initial_state"][k : k + 1]
        y_k, state_k = mamba_ops.ssd(**inputs | tokens | {"initial_state": row})
        torch.testing.assert_close(y[:, begin:end], y_k)
        torch.testing.assert_close(state[k : k + 1], state_k)


def long_inputs(device: str, dtype: torch.dtype, l: int, h: int, p: int, n: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    return {
        "x": normal(1, l, h, p),
        "dt": normal(1, l, h) - 4,
        "A": -torch.linspace(0.01, 4, h, device=device),
        "B": normal(1, l, 1, n),
        "C": normal(1, l, 1, n),
        "dt_softplus": True,
        "return_final_state": True,
    }


def test_a_long_call_equals_its_parts(device: str) -> None:
    """On a GPU the backward runs span by span of the sequence here: its workspace is bounded."""
    sizes = (2048, 2, 8, 8) if device == "cpu" else (16384, 48, 256, 256)
    inputs = long_inputs(device, torch.float32, *sizes)
    leaves = inputs | {name: inputs[name].clone().requires_grad_() for name in TOKENS}
    y, state = mamba_ops.ssd(**leaves)
    whole = torch.autograd.grad(y.sum() + state.sum(), [leaves[name] for name in TOKENS])

    parts = [{name: inputs[name].chunk(4, 1)[i].requires_grad_() for name in TOKENS} for i in range(4)]
    carried, loss = None, torch.zeros((), device=device)
    for part in parts:
        y, carried = mamba_ops.ssd(**inputs | part, initial_state=carried)
        loss = loss + y.sum()
    assert carried is not None
    (loss + carried.sum()).backward()
    torch.testing.assert_close(state, carried, rtol=1e-4, atol=1e-4 * carried.abs().max().item())
    for name, grad in zip(TOKENS, whole, strict=True):
        expected = torch.cat([part[name].grad for part in parts], 1)
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


# What fits in 99 KB of shared memory a block: all but the backward of float64 with n over 128.
SMALL = [(dtype, n) for dtype in DTYPES for n in (64, 128, 256) if (dtype, n) != (torch.float64, 256)]


@pytest.mark.parametrize("pack", [None, "seq_idx"])
@pytest.mark.parametrize(("dtype", "n"), SMALL)
def test_little_shared_memory(device: str, dtype: torch.dtype, n: int, pack: str | None) -> None:
    """Smaller tiles, as on GPUs like sm_86; a long call, whose sequence is cut in pieces."""
    if device == "cpu":
        pytest.skip("the tiles are of CUDA kernels")
    _C.set_cuda_path("small")
    options = {"options": SSD_OPTIONS, "pack": pack, "dtype": dtype, "device": device}
    check(OPERATOR, cases.ssd(1, 150, 3, 64, n, **options))
    check(OPERATOR, cases.ssd(1, 2100, 1, 16, n, **options), loss=())


def test_what_little_shared_memory_refuses(device: str) -> None:
    if device == "cpu":
        pytest.skip("the tiles are of CUDA kernels")
    _C.set_cuda_path("small")
    inputs = cases.ssd(1, 70, 2, 16, 129, dtype=torch.float64, device=device)
    check(OPERATOR, inputs, loss=())
    with pytest.raises(RuntimeError, match="shared memory"):
        evaluate(mamba_ops.ssd, inputs, ("y",))


@pytest.mark.parametrize("path", ["auto", "portable"])
def test_more_than_2_to_the_31_elements(large_gpu: str, path: str) -> None:
    """The last tokens equal those of a short call that continues from the state before them."""
    h, p, tail = 32, 64, 130
    inputs = long_inputs(large_gpu, torch.bfloat16, 2**31 // (h * p) + 1000, h, p, 16)
    assert inputs["x"].numel() > 2**31
    _C.set_cuda_path(path)
    try:
        leaves = inputs | {name: inputs[name].requires_grad_() for name in TOKENS}
        y, final = mamba_ops.ssd(**leaves)
        dy = torch.zeros_like(y)
        dy[:, -tail:] = 1
        grads = torch.autograd.grad(y, [leaves[name] for name in TOKENS], dy)
        with torch.no_grad():
            _, state = mamba_ops.ssd(**inputs | {name: inputs[name][:, :-tail] for name in TOKENS})
        last = {name: inputs[name].detach()[:, -tail:].requires_grad_() for name in TOKENS}
        y_last, final_last = mamba_ops.ssd(**inputs | last, initial_state=state)
        grads_last = torch.autograd.grad(y_last, list(last.values()), dy[:, -tail:])
    finally:
        _C.set_cuda_path("auto")
    got_all = (y[:, -tail:], final, *(grad[:, -tail:] for grad in grads))
    for got, expected in zip(got_all, (y_last, final_last, *grads_last), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-2 * expected.abs().max().item())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_options(device: str, data: st.DataObject) -> None:
    draw = data.draw
    pack = draw(st.sampled_from(cases.PACKS))
    h = draw(st.integers(2, 6))
    groups = st.sampled_from([g for g in range(1, h + 1) if h % g == 0])
    inputs = cases.ssd(
        1 if pack == "cu_seqlens" else draw(st.integers(1, 3)),
        draw(st.integers(1, 150)),
        h,
        draw(st.integers(1, 20)),
        draw(st.integers(1, 20)),
        groups=(draw(groups), draw(groups)),
        chunk_size=draw(st.sampled_from([None, 1, 8, 30, 64, 128])),
        D_per_channel=draw(st.booleans()),
        options=draw(st.sets(st.sampled_from(SSD_OPTIONS))),
        pack=pack,
        decay=draw(st.sampled_from(sorted(cases.STEPS))),
        layout=draw(st.sampled_from(cases.LAYOUTS)),
        dtype=draw(st.sampled_from(DTYPES)),
        device=device,
        seed=draw(st.integers(0, 1000)),
    )
    check(OPERATOR, inputs)
