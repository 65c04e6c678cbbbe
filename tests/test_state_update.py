"""The one-token updates against the reference: outputs, states left behind, rows of a cache."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mamba_ops
from tests import cases
from tests.cases import CONV_OPTIONS, SCAN_OPTIONS, SSD_OPTIONS
from tests.compare import check

OPERATOR = "selective_state_update"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONV, SCAN, SSD = CONV_OPTIONS[:2], SCAN_OPTIONS[:4], SSD_OPTIONS[:5]


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("k", [None, 4, 9])
@pytest.mark.parametrize("t", [None, 1, 3, 6])
@pytest.mark.parametrize("w", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv(
    device: str, dtype: torch.dtype, w: int, t: int | None, k: int | None, rows: int | None
) -> None:
    options = {"rows": rows, "options": CONV, "dtype": dtype, "device": device}
    check("causal_conv1d_update", cases.causal_conv1d_update(3, 70, w, t=t, k=k, **options))


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("k", [3, 4, 5])
@pytest.mark.parametrize("d", [6, 24, 1032])
@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_in_whole_packs(device: str, dtype: torch.dtype, d: int, k: int, rows: int | None) -> None:
    """Kernels move channels that are contiguous and aligned in packs, also those of a wider row."""
    parameters = {dtype, torch.promote_types(dtype, torch.float32)}
    for options, params in product(((), CONV), parameters):
        inputs = cases.causal_conv1d_update(
            3, d, 4, k=k, rows=rows, options=options, dtype=dtype, params=params, device=device
        )
        check("causal_conv1d_update", inputs)
        wide = torch.zeros(3, d + 24, dtype=dtype, device=device)
        wide[:, 8 : 8 + d] = inputs["x"]
        check("causal_conv1d_update", inputs | {"x": wide[:, 8 : 8 + d]})


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("g", [None, 1, 2])
@pytest.mark.parametrize("t", [None, 1, 4])
@pytest.mark.parametrize("complex_A", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scan(
    device: str, dtype: torch.dtype, complex_A: bool, t: int | None, g: int | None, rows: int | None
) -> None:
    options = {"complex_A": complex_A, "options": SCAN, "dtype": dtype, "device": device}
    check(OPERATOR, cases.selective_state_update(3, 22, 17, t=t, g=g, rows=rows, **options))


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("groups", [(1, 1), (2, 4)])
@pytest.mark.parametrize("t", [None, 1, 4])
@pytest.mark.parametrize("D_per_channel", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ssd(
    device: str,
    dtype: torch.dtype,
    D_per_channel: bool,
    t: int | None,
    groups: tuple[int, int],
    rows: int | None,
) -> None:
    options = {"groups": groups, "options": SSD, "dtype": dtype, "device": device}
    check(
        "ssd_state_update",
        cases.ssd_state_update(3, 4, 9, 17, t=t, rows=rows, D_per_channel=D_per_channel, **options),
    )


@pytest.mark.parametrize("n", [4, 16, 24, 64, 128, 256, 260, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_whole_packs(device: str, dtype: torch.dtype, n: int) -> None:
    """Kernels move states that are contiguous and aligned in packs, up to some size."""
    for t, state_dtype in ((None, torch.float32), (3, torch.float32), (None, dtype), (2, dtype)):
        options = {"t": t, "rows": 7, "state_dtype": state_dtype, "dtype": dtype, "device": device}
        check(OPERATOR, cases.selective_state_update(3, 70, n, g=2, options=SCAN, **options))
        for p in (5, 64):
            inputs = cases.ssd_state_update(3, 4, p, n, groups=(2, 4), options=SSD, **options)
            check("ssd_state_update", inputs)


@pytest.mark.parametrize("n", [4, 16, 24, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_token_as_layers_have_it(device: str, dtype: torch.dtype, n: int) -> None:
    """A contiguous state, a row of it for each batch row, one B and one C: kernels know the strides."""
    for state_dtype, params in product({torch.float32, dtype}, {torch.float32, dtype}):
        options = {"state_dtype": state_dtype, "dtype": dtype, "params": params, "device": device}
        for d in (70, 128):
            check(OPERATOR, cases.selective_state_update(3, d, n, options=SCAN, **options))
        check(OPERATOR, cases.selective_state_update(3, 70, n, **options))
        for p, per_channel in product((5, 64), (False, True)):
            sizes = (3, 4, p, n)
            inputs = cases.ssd_state_update(*sizes, options=SSD, D_per_channel=per_channel, **options)
            check("ssd_state_update", inputs)
        inputs = cases.ssd_state_update(3, 4, 64, n, **options)
        check("ssd_state_update", inputs)
        check("ssd_state_update", inputs | {"A": (-inputs["A"]).log(), "A_is_log": True})


@pytest.mark.parametrize("option", [None, *SCAN])
def test_each_scan_option_alone(device: str, option: str | None) -> None:
    options = () if option is None else (option,)
    check(OPERATOR, cases.selective_state_update(options=options, device=device))


@pytest.mark.parametrize("option", [None, *SSD])
def test_each_ssd_option_alone(device: str, option: str | None) -> None:
    options = () if option is None else (option,)
    check("ssd_state_update", cases.ssd_state_update(options=options, device=device))


@pytest.mark.parametrize("option", [None, *CONV])
def test_each_conv_option_alone(device: str, option: str | None) -> None:
    options = () if option is None else (option,)
    check("causal_conv1d_update", cases.causal_conv1d_update(options=options, device=device))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [None, 2])
def test_states_in_any_dtype(device: str, t: int | None, state_dtype: torch.dtype) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        options = {"t": t, "state_dtype": state_dtype, "dtype": dtype, "device": device}
        check(OPERATOR, cases.selective_state_update(options=SCAN, **options))
        check("ssd_state_update", cases.ssd_state_update(options=SSD, **options))


@pytest.mark.parametrize("params", [None, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 4, 9, 17), (2, 4, 64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logarithms_of_the_rates(
    device: str, dtype: torch.dtype, sizes: tuple[int, ...], params: torch.dtype | None
) -> None:
    """As the layers' A_log, in its dtype."""
    if params is not None and dtype is not params:
        pytest.skip("a parameter is float32 or as the inputs")
    inputs = cases.ssd_state_update(*sizes, t=2, options=SSD, dtype=dtype, params=params, device=device)
    inputs["A"] = (-inputs["A"]).log()
    check("ssd_state_update", inputs | {"A_is_log": True})


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("t", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(device: str, dtype: torch.dtype, t: int | None, layout: str) -> None:
    options = {"t": t, "rows": 5, "layout": layout, "dtype": dtype, "device": device}
    check(OPERATOR, cases.selective_state_update(g=2, options=SCAN, **options))
    check("ssd_state_update", cases.ssd_state_update(options=SSD, **options))
    check("causal_conv1d_update", cases.causal_conv1d_update(k=5, options=CONV, **options))


def test_parameters_expanded_from_heads(device: str) -> None:
    """As transformers calls it: one rate, step and skip per head, broadcast over its channels."""
    inputs = cases.selective_state_update(3, 6, 5, options=SCAN, device=device)
    for name, dim in (("A", 1), ("delta", 1), ("delta_bias", 0), ("D", 0)):
        inputs[name] = inputs[name].narrow(dim, 0, 1).expand(inputs[name].shape)
    check(OPERATOR, inputs)


UPDATES: dict[str, Callable[..., cases.Inputs]] = {
    "causal_conv1d_update": cases.causal_conv1d_update,
    "selective_state_update": cases.selective_state_update,
    "ssd_state_update": cases.ssd_state_update,
}


@pytest.mark.parametrize("name", UPDATES)
def test_strides_beyond_32_bits(device: str, name: str) -> None:
    """Whole packs, but for kernels that count in 32 bits."""
    sizes = {"causal_conv1d_update": (64, 4), "selective_state_update": (64, 16)}.get(name, (4, 64, 16))
    inputs = UPDATES[name](1, *sizes, options=SCAN_OPTIONS[:1], device=device)
    state = inputs["state"]
    check(name, inputs | {"state": state.as_strided(state.shape, (2**40, *state.stride()[1:]))})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", UPDATES)
def test_padding_rows_touch_nothing(device: str, name: str, dtype: torch.dtype) -> None:
    inputs = UPDATES[name](4, rows=9, device=device)
    inputs["state_indices"] = torch.tensor([7, -1, 2, -5], dtype=dtype, device=device)
    before = inputs["state"].clone()
    y = getattr(mamba_ops, name)(**inputs)
    assert y[[1, 3]].count_nonzero() == 0
    others = [0, 1, 3, 4, 5, 6, 8]
    assert torch.equal(inputs["state"][others], before[others])
    assert not torch.equal(inputs["state"][[7, 2]], before[[7, 2]])


@pytest.mark.parametrize("name", UPDATES)
def test_nothing_but_padding(device: str, name: str) -> None:
    inputs = UPDATES[name](2, rows=3, device=device)
    inputs["state_indices"] = torch.tensor([-1, -1], device=device)
    before = inputs["state"].clone()
    assert getattr(mamba_ops, name)(**inputs).count_nonzero() == 0
    assert torch.equal(inputs["state"], before)


@pytest.mark.parametrize("t", [None, 2])
@pytest.mark.parametrize("name", UPDATES)
def test_rows_that_share_a_state_take_their_turns(device: str, name: str, t: int | None) -> None:
    """Equal to one call after the other. The state is float32: it is rounded nowhere in between."""
    rows = torch.tensor([2, 0, 2, -1, 2, 0] + 40 * [1], device=device)
    sizes = {"causal_conv1d_update": (70, 4), "selective_state_update": (70, 8)}.get(name, (2, 35, 8))
    inputs = UPDATES[name](46, *sizes, t=t, rows=46, device=device)
    inputs["state"], inputs["state_indices"] = inputs["state"][:3].clone(), rows
    batched = ("x", "dt", "u", "delta", "B", "C", "z")
    state, ys = inputs["state"].clone(), []
    for i in range(46):
        row = {k: v[i : i + 1] if k in batched else v for k, v in inputs.items()}
        row |= {"state": state, "state_indices": rows[i : i + 1]}
        ys.append(getattr(mamba_ops, name)(**row))
    y = getattr(mamba_ops, name)(**inputs)
    torch.testing.assert_close(y, torch.cat(ys), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs["state"], state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", UPDATES)
def test_an_index_beyond_the_state_cannot_raise_on_cuda(device: str, name: str) -> None:
    inputs = UPDATES[name](3, rows=5, device=device)
    before = inputs["state"].clone()
    inputs["state_indices"] = torch.tensor([1, 5, 3], device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="state_indices must be below s = 5, got 5 at position 1"):
            getattr(mamba_ops, name)(**inputs)
        return
    y = getattr(mamba_ops, name)(**inputs)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()
    assert torch.equal(inputs["state"][[0, 2, 4]], before[[0, 2, 4]])
    assert not torch.equal(inputs["state"][[1, 3]], before[[1, 3]])


def test_the_largest_state_of_a_gpu(device: str) -> None:
    """48 KiB a row, in float32 and complex128; the CPU has no limit."""
    scan = cases.selective_state_update(1, 2, 12288, options=SCAN, device=device)
    wide = {"complex_A": True, "dtype": torch.float64, "device": device}
    check(OPERATOR, scan)
    check(OPERATOR, cases.selective_state_update(1, 2, 3072, options=SCAN, **wide))
    check("ssd_state_update", cases.ssd_state_update(1, 2, 2, 12288, options=SSD, device=device))
    if device == "cuda":
        with pytest.raises(RuntimeError, match="n <= 12288 on CUDA, got n = 12289"):
            mamba_ops.ssd_state_update(**cases.ssd_state_update(1, 2, 2, 12289, device=device))
        with pytest.raises(RuntimeError, match="n <= 3072 on CUDA, got n = 3073"):
            mamba_ops.selective_state_update(**cases.selective_state_update(1, 2, 3073, **wide))


@pytest.mark.parametrize("name", UPDATES)
def test_an_empty_batch(device: str, name: str) -> None:
    inputs = UPDATES[name](0, rows=3, device=device)
    before = inputs["state"].clone()
    y = getattr(mamba_ops, name)(**inputs)
    assert y.shape == (inputs["u"] if "u" in inputs else inputs["x"]).shape
    assert torch.equal(inputs["state"], before)


def steps(
    operator: Callable[..., Any], inputs: cases.Inputs, dim: int, names: tuple[str, ...]
) -> torch.Tensor:
    """The outputs of one-token calls, joined along dim."""
    length = inputs[names[0]].shape[dim]
    tokens = [{k: inputs[k].select(dim, t) for k in names if k in inputs} for t in range(length)]
    return torch.stack([operator(**inputs | token) for token in tokens], dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_one_by_one_equal_tokens_at_once(device: str, dtype: torch.dtype) -> None:
    for name, dim, names, inputs in (
        ("causal_conv1d_update", 2, ("x",), cases.causal_conv1d_update(t=5, options=CONV, dtype=dtype)),
        (
            "selective_state_update",
            -1,
            ("u", "delta", "B", "C", "z"),
            cases.selective_state_update(t=5, options=SCAN, dtype=dtype),
        ),
        (
            "ssd_state_update",
            1,
            ("x", "dt", "B", "C", "z"),
            cases.ssd_state_update(t=5, options=SSD, dtype=dtype),
        ),
    ):
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        operator, state = getattr(mamba_ops, name), inputs["state"].clone()
        y = operator(**inputs | {"state": state})
        torch.testing.assert_close(steps(operator, inputs, dim, names), y)
        torch.testing.assert_close(inputs["state"], state)


@pytest.mark.parametrize("name", UPDATES)
def test_states_of_more_than_2_to_the_31_elements(large_gpu: str, name: str) -> None:
    """The last row of the state, beside the same row in a small state."""
    sizes = {"causal_conv1d_update": (4096, 4), "selective_state_update": (4096, 128)}.get(
        name, (64, 64, 128)
    )
    inputs = UPDATES[name](2, *sizes, rows=4, dtype=torch.bfloat16, device=large_gpu)
    inputs["state"] = small = inputs["state"].bfloat16()
    s = 2**31 // small[0].numel() + 5
    large = torch.zeros(s, *small.shape[1:], dtype=small.dtype, device=large_gpu)
    large[[s - 1, 1]] = small[[3, 1]]
    assert large.numel() > 2**31
    for indices, state in (([3, 1], small), ([s - 1, 1], large)):
        inputs["state_indices"], inputs["state"] = torch.tensor(indices, device=large_gpu), state
        y = getattr(mamba_ops, name)(**inputs)
        if state is small:
            expected = y
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(large[[s - 1, 1]], small[[3, 1]])
    assert large[2 : s - 1 : 1000].count_nonzero() == 0


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_and_options(data: st.DataObject) -> None:
    draw = data.draw
    b = draw(st.integers(1, 4))
    shared = {
        "t": draw(st.sampled_from([None, 1, 2, 5])),
        "rows": draw(st.sampled_from([None, b, b + 3])),
        "layout": draw(st.sampled_from(cases.LAYOUTS)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 1000)),
    }
    n = draw(st.integers(1, 40))
    conv = draw(st.sets(st.sampled_from(CONV)))
    check(
        "causal_conv1d_update",
        cases.causal_conv1d_update(b, n, draw(st.integers(2, 4)), options=conv, **shared),
    )
    scan = draw(st.sets(st.sampled_from(SCAN)))
    d = draw(st.integers(1, 40))
    check(
        OPERATOR, cases.selective_state_update(b, d, n, options=scan, complex_A=draw(st.booleans()), **shared)
    )
    ssd = draw(st.sets(st.sampled_from(SSD)))
    groups = draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (4, 4)]))
    sizes = (b, 4, draw(st.integers(1, 20)), n)
    check("ssd_state_update", cases.ssd_state_update(*sizes, groups=groups, options=ssd, **shared))
