"""selective_scan against the recurrence: every option, dtype, layout and length."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mamba_ops
from tests import cases
from tests.cases import SCAN_OPTIONS
from tests.compare import check, evaluate

OPERATOR = "selective_scan"
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)
GROUPS = [(None, None), (1, 2), (3, None), (0, 0), (0, 6), (2, 0)]


@pytest.mark.parametrize("decay", ["weak", "strong"])
@pytest.mark.parametrize("l", [1, 63, 64, 127, 128, 129, 263])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(device: str, dtype: torch.dtype, l: int, decay: str) -> None:
    check(OPERATOR, cases.selective_scan(l=l, options=SCAN_OPTIONS, decay=decay, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long(device: str, dtype: torch.dtype) -> None:
    check(OPERATOR, cases.selective_scan(1, 3, 4096, 2, options=SCAN_OPTIONS, dtype=dtype, device=device))


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("option", [None, *SCAN_OPTIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_option_alone(device: str, dtype: torch.dtype, option: str | None, pack: str | None) -> None:
    options = () if option is None else (option,)
    b = 1 if pack == "cu_seqlens" else 2
    check(OPERATOR, cases.selective_scan(b, options=options, pack=pack, dtype=dtype, device=device))


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinds_of_A_B_C(
    device: str, dtype: torch.dtype, groups: tuple[int | None, int | None], complex_A: bool
) -> None:
    options = {"groups": groups, "complex_A": complex_A, "dtype": dtype, "device": device}
    check(OPERATOR, cases.selective_scan(l=70, options=SCAN_OPTIONS, decay="strong", **options))
    check(OPERATOR, cases.selective_scan(1, l=150, options=SCAN_OPTIONS, pack="cu_seqlens", **options))


@pytest.mark.parametrize("pack", cases.PACKS[1:])
@pytest.mark.parametrize("l", [1, 2, 128, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packs(device: str, dtype: torch.dtype, l: int, pack: str) -> None:
    b = 1 if pack == "cu_seqlens" else 3
    inputs = cases.selective_scan(b, l=l, options=SCAN_OPTIONS, pack=pack, dtype=dtype, device=device)
    check(OPERATOR, inputs)


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("groups", [(None, 2), (0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(
    device: str, dtype: torch.dtype, groups: tuple[int | None, int | None], layout: str, complex_A: bool
) -> None:
    options = {"groups": groups, "complex_A": complex_A, "dtype": dtype, "device": device}
    check(OPERATOR, cases.selective_scan(l=40, options=SCAN_OPTIONS, layout=layout, **options))


def test_broadcast_over_channels_and_states(device: str) -> None:
    inputs = cases.selective_scan(2, 6, 40, 4, options=SCAN_OPTIONS, device=device)
    for name, dim in (("A", 1), ("B", 1), ("delta", 1), ("z", 1), ("D", 0), ("delta_bias", 0)):
        inputs[name] = inputs[name].narrow(dim, 0, 1).expand(inputs[name].shape)
    check(OPERATOR, inputs)


@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 3, 8, 15, 16, 17, 33, 65])
def test_channels(device: str, d: int, params: torch.dtype) -> None:
    sizes = {"options": SCAN_OPTIONS[:4], "dtype": torch.bfloat16, "params": torch.float32, "device": device}
    inputs = cases.selective_scan(1, d, 37, 3, **sizes)
    for name in ("D", "delta_bias"):
        inputs[name] = inputs[name].to(params)
    check(OPERATOR, inputs)


@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 16, 17, 64, 256])
def test_states(device: str, n: int, complex_A: bool) -> None:
    check(
        OPERATOR, cases.selective_scan(1, 2, 37, n, options=SCAN_OPTIONS, complex_A=complex_A, device=device)
    )


# Sizes that the tuned CUDA kernels take, and their edges: groups of 8 tokens and channels, windows of 64
# tokens, blocks of 32 channels. Contiguous rows move in pairs of tokens, B and C in fours.
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(
    ("d", "l"), [(8, 8), (24, 64), (32, 60), (34, 72), (40, 128), (70, 132), (6, 204), (9, 64)]
)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_sixteen_states(device: str, dtype: torch.dtype, d: int, l: int, layout: str) -> None:
    sizes = {"layout": layout, "dtype": dtype, "device": device}
    check(OPERATOR, cases.selective_scan(2, d, l, 16, options=SCAN_OPTIONS, **sizes))
    check(OPERATOR, cases.selective_scan(1, d, l, 16, options=("D",), decay="strong", **sizes))


@pytest.mark.parametrize("l", [1, 7, 65, 131])
@pytest.mark.parametrize("groups", [(None, None), (1, 2), (4, 2)])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_sixteen_states_in_groups(
    device: str, dtype: torch.dtype, groups: tuple[int | None, int | None], l: int
) -> None:
    options = {"groups": groups, "layout": "transposed", "dtype": dtype, "device": device}
    check(OPERATOR, cases.selective_scan(2, 32, l, 16, options=SCAN_OPTIONS, **options))
    check(OPERATOR, cases.selective_scan(1, 64, l, 16, options=("z", "initial_state"), **options))


@pytest.mark.parametrize("decay", ["weak", "strong"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_states_long(device: str, dtype: torch.dtype, layout: str, decay: str) -> None:
    """A chain whose windows of 64 tokens, and groups of 8, are taken in turn; the last ones are cut short."""
    sizes = {"decay": decay, "layout": layout, "dtype": dtype, "device": device}
    check(OPERATOR, cases.selective_scan(1, 16, 4100, 16, options=SCAN_OPTIONS, **sizes))


@pytest.mark.parametrize("device", ["cuda", "cuda portable"], indirect=True)
@pytest.mark.parametrize(("b", "dtype"), [(250, torch.float32), (600, torch.bfloat16), (600, torch.float32)])
def test_sixteen_states_of_many_rows(device: str, b: int, dtype: torch.dtype) -> None:
    """Rows enough to fill a GPU. What more rows leave for later is cut into pieces of 512 tokens."""
    sizes = {"layout": "transposed", "dtype": dtype, "device": device}
    check(OPERATOR, cases.selective_scan(b, 24, 600, 16, options=SCAN_OPTIONS, **sizes))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    ("l", "layout"), [(1, "transposed"), (8, "contiguous"), (75, "transposed"), (132, "contiguous")]
)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_sixteen_states_of_many_short_rows(device: str, dtype: torch.dtype, l: int, layout: str) -> None:
    sizes = {"layout": layout, "dtype": dtype, "device": device}
    check(OPERATOR, cases.selective_scan(600, 24, l, 16, options=SCAN_OPTIONS, **sizes))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_paths_agree_where_partial_sums_exceed_their_memory(device: str) -> None:
    """The sums over channels then take several launches. Too large for the reference."""
    small = cases.selective_scan(
        1, 2048, 1000, 16, options=SCAN_OPTIONS[:4], layout="transposed", dtype=torch.bfloat16, device=device
    )
    inputs = {
        name: torch.cat([value.mT] * 36, 1).mT if name in ("u", "delta", "B", "C", "z") else value
        for name, value in small.items()
    }
    results = []
    for path in ("auto", "portable"):
        mamba_ops._C.set_cuda_path(path)
        try:
            results.append(evaluate(mamba_ops.selective_scan, inputs, ("y",)))
        finally:
            mamba_ops._C.set_cuda_path("auto")
    for name, value in results[0].items():
        error = torch.linalg.vector_norm((value - results[1][name]).float())
        assert error <= 1e-2 * torch.linalg.vector_norm(results[1][name].float()), name


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("sizes", [(0, 6, 23, 4), (2, 6, 0, 4), (0, 6, 0, 4), (2, 0, 23, 4), (1, 6, 0, 4)])
def test_empty(device: str, sizes: tuple[int, int, int, int], pack: str | None) -> None:
    if pack == "cu_seqlens" and sizes[0] != 1:
        pytest.skip("a pack has batch 1")
    check(OPERATOR, cases.selective_scan(*sizes, options=SCAN_OPTIONS, pack=pack, device=device))


@pytest.mark.parametrize("loss", [("y",), ("final_state",)])
def test_a_loss_of_one_output(device: str, loss: tuple[str]) -> None:
    check(OPERATOR, cases.selective_scan(options=SCAN_OPTIONS, device=device), loss)


def test_softplus_beyond_its_threshold(device: str) -> None:
    inputs = cases.selective_scan(2, 6, 40, 4, options=("delta_softplus",), device=device)
    inputs["delta"][:, ::2, ::5] = torch.linspace(15, 25, 3 * 8, device=device).view(3, 8)
    inputs["A"] *= 0.01
    check(OPERATOR, inputs)


def test_a_gate_of_zero(device: str) -> None:
    """The output before the gate cannot be recovered from y: 0 / 0."""
    inputs = cases.selective_scan(options=SCAN_OPTIONS, device=device)
    inputs["z"][:, ::2] = 0
    check(OPERATOR, inputs)


def test_decay_that_underflows(device: str) -> None:
    inputs = cases.selective_scan(options=SCAN_OPTIONS, decay="strong", device=device)
    inputs["A"] *= 100
    check(OPERATOR, inputs)


def test_a_pack_equals_its_sequences(device: str) -> None:
    inputs = cases.selective_scan(1, 6, 60, 4, options=SCAN_OPTIONS, pack="cu_seqlens", device=device)
    y, state = mamba_ops.selective_scan(**inputs)
    cuts = inputs.pop("cu_seqlens").tolist()
    for k, (begin, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        tokens = {name: inputs[name][..., begin:end] for name in ("u", "delta", "B", "C", "z")}
        row = inputs["initial_state"][k : k + 1]
        y_k, state_k = mamba_ops.selective_scan(**inputs | tokens | {"initial_state": row})
        torch.testing.assert_close(y[..., begin:end], y_k)
        torch.testing.assert_close(state[k : k + 1], state_k)


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_and_options(data: st.DataObject) -> None:
    draw = data.draw
    pack = draw(st.sampled_from(cases.PACKS))
    d = draw(st.integers(4, 20))
    groups = st.sampled_from([None, 0, *(g for g in range(1, d + 1) if d % g == 0)])
    inputs = cases.selective_scan(
        1 if pack == "cu_seqlens" else draw(st.integers(1, 3)),
        d,
        draw(st.integers(1, 140)),
        draw(st.integers(1, 20)),
        groups=(draw(groups), draw(groups)),
        complex_A=draw(st.booleans()),
        options=draw(st.sets(st.sampled_from(SCAN_OPTIONS))),
        pack=pack,
        decay=draw(st.sampled_from(sorted(cases.STEPS))),
        layout=draw(st.sampled_from(cases.LAYOUTS)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1000)),
    )
    check(OPERATOR, inputs)


@pytest.mark.parametrize("growth", [0.0, 0.5])
def test_rates_that_do_not_decay(device: str, growth: float) -> None:
    """A = 0 sums, A > 0 grows: the caller's choice, not an error."""
    inputs = cases.selective_scan(l=50, options=SCAN_OPTIONS, device=device)
    inputs["A"] = torch.full_like(inputs["A"], growth)
    got = check(OPERATOR, inputs)
    assert math.isfinite(got["y"].abs().max())
