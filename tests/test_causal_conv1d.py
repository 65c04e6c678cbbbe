"""causal_conv1d against the sum over its taps: every option, dtype, layout and length."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mamba_ops
from tests import cases
from tests.cases import CONV_OPTIONS
from tests.compare import check

OPERATOR = "causal_conv1d"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("w", [2, 3, 4])
@pytest.mark.parametrize("l", [1, 2, 3, 4, 63, 64, 65, 135, 1023, 1025, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(device: str, dtype: torch.dtype, l: int, w: int) -> None:
    """Down to lengths that leave part of the initial state in the final one."""
    check(OPERATOR, cases.causal_conv1d(l=l, w=w, options=CONV_OPTIONS, dtype=dtype, device=device))


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("option", [None, *CONV_OPTIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_option_alone(device: str, dtype: torch.dtype, option: str | None, pack: str | None) -> None:
    options = () if option is None else (option,)
    b = 1 if pack == "cu_seqlens" else 2
    check(OPERATOR, cases.causal_conv1d(b, options=options, pack=pack, dtype=dtype, device=device))


@pytest.mark.parametrize("pack", cases.PACKS[1:])
@pytest.mark.parametrize("l", [1, 2, 3, 70, 1100, 2100])
@pytest.mark.parametrize("w", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packs(device: str, dtype: torch.dtype, w: int, l: int, pack: str) -> None:
    b = 1 if pack == "cu_seqlens" else 3
    inputs = cases.causal_conv1d(b, l=l, w=w, options=CONV_OPTIONS, pack=pack, dtype=dtype, device=device)
    check(OPERATOR, inputs)


@pytest.mark.parametrize("begin", [1, 2, 3, 20, 21, 22])
def test_the_final_state_is_that_of_the_last_run(device: str, begin: int) -> None:
    inputs = cases.causal_conv1d(options=CONV_OPTIONS, device=device)
    inputs["seq_idx"] = (torch.arange(23, device=device) >= begin).int().expand(2, -1)
    state = check(OPERATOR, inputs)["final_state"]
    tokens = min(23 - begin, 3)
    assert torch.equal(state[..., 3 - tokens :], inputs["x"][..., 23 - tokens :])
    assert state[..., : 3 - tokens].count_nonzero() == 0


@pytest.mark.parametrize("begin", range(1019, 1027))
@pytest.mark.parametrize("length", [1, 2, 4, 7])
def test_runs_at_the_edge_of_a_piece(device: str, length: int, begin: int) -> None:
    """Kernels cut long sequences into pieces of a power of two: states reach over the cut."""
    inputs = cases.causal_conv1d(1, 5, begin + length, options=CONV_OPTIONS, pack="cu_seqlens", device=device)
    cuts = torch.tensor([0, begin, begin + length], dtype=torch.int32, device=device)
    check(OPERATOR, inputs | {"cu_seqlens": cuts, "initial_state": inputs["initial_state"][:2]})
    inputs = cases.causal_conv1d(2, 5, begin + length, options=CONV_OPTIONS, device=device)
    runs = (torch.arange(begin + length, device=device) >= begin).int().expand(2, -1)
    check(OPERATOR, inputs | {"seq_idx": runs})


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("w", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_packs(device: str, dtype: torch.dtype, w: int, pack: str | None, layout: str) -> None:
    """Sizes that kernels can move in packs, with tokens enough for strips of full length."""
    b, options = 1 if pack == "cu_seqlens" else 3, {"options": CONV_OPTIONS, "dtype": dtype, "device": device}
    for d, l in ((256, 1024), (136, 264)):
        check(OPERATOR, cases.causal_conv1d(b, d, l, w, pack=pack, layout=layout, **options))


@pytest.mark.parametrize("options", [CONV_OPTIONS, CONV_OPTIONS[:2]])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("pack", cases.PACKS)
def test_many_tiles(device: str, pack: str | None, layout: str, options: tuple[str, ...]) -> None:
    """Large enough that the threads of a GPU take several packs each, and the last ones fewer."""
    if device == "cpu":
        pytest.skip("a path of CUDA")
    sizes = (1, 1040, 4936) if pack == "cu_seqlens" else (2, 1040, 2472)
    inputs = cases.causal_conv1d(
        *sizes, options=options, layout=layout, dtype=torch.bfloat16, device=device, pack=pack
    )
    check(OPERATOR, inputs)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(device: str, dtype: torch.dtype, pack: str | None, layout: str) -> None:
    options = {"options": CONV_OPTIONS, "pack": pack, "dtype": dtype, "device": device}
    check(OPERATOR, cases.causal_conv1d(1 if pack == "cu_seqlens" else 2, 70, 40, layout=layout, **options))


def test_the_output_keeps_the_layout(device: str) -> None:
    x = cases.causal_conv1d(device=device, layout="transposed")["x"]
    assert mamba_ops.causal_conv1d(x, x.new_ones(6, 4)).stride() == x.stride()


@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 7, 16, 63, 64, 65, 130])
def test_channels(device: str, d: int, params: torch.dtype) -> None:
    options = {"options": CONV_OPTIONS, "dtype": torch.bfloat16, "params": params, "device": device}
    check(OPERATOR, cases.causal_conv1d(2, d, 70, **options))
    check(OPERATOR, cases.causal_conv1d(2, d, 70, layout="projected", **options))


@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("sizes", [(0, 6, 23), (2, 6, 0), (2, 0, 23), (1, 6, 0)])
def test_empty(device: str, sizes: tuple[int, int, int], pack: str | None) -> None:
    if pack == "cu_seqlens" and sizes[0] != 1:
        pytest.skip("a pack has batch 1")
    check(OPERATOR, cases.causal_conv1d(*sizes, options=CONV_OPTIONS, pack=pack, device=device))


@pytest.mark.parametrize("loss", [("y",), ("final_state",)])
def test_a_loss_of_one_output(device: str, loss: tuple[str]) -> None:
    check(OPERATOR, cases.causal_conv1d(options=CONV_OPTIONS, device=device), loss)


def test_swish_is_silu(device: str) -> None:
    inputs = cases.causal_conv1d(options=CONV_OPTIONS, device=device)
    silu = mamba_ops.causal_conv1d(**inputs)[0]
    assert torch.equal(mamba_ops.causal_conv1d(**inputs | {"activation": "swish"})[0], silu)


@pytest.mark.parametrize("channel_last", [False, True])
def test_more_than_2_to_the_31_elements(large_gpu: str, channel_last: bool) -> None:
    """The last tokens come out as they do in a short sequence."""
    d = 2048
    l = 2**31 // d + 16
    shape = (1, l, d) if channel_last else (1, d, l)
    x = torch.randn(shape, dtype=torch.bfloat16, device=large_gpu)
    x = (x.mT if channel_last else x).requires_grad_()
    weight, bias = torch.randn(d, 4, device=large_gpu), torch.randn(d, device=large_gpu)

    def last_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = mamba_ops.causal_conv1d(x, weight, bias, "silu")
        assert isinstance(y, torch.Tensor)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return y[..., -20:].clone(), dx[..., -20:].clone()

    whole, alone = last_tokens(x), last_tokens(x.detach()[..., -32:].clone().requires_grad_())
    assert x.numel() > 2**31
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_options(device: str, data: st.DataObject) -> None:
    draw, whole = data.draw, st.integers(1, 20).map(lambda i: 8 * i)
    pack = draw(st.sampled_from(cases.PACKS))
    inputs = cases.causal_conv1d(
        1 if pack == "cu_seqlens" else draw(st.integers(1, 3)),
        draw(st.integers(4, 80) | whole),
        draw(st.integers(1, 200) | whole),
        draw(st.integers(2, 4)),
        options=draw(st.sets(st.sampled_from(CONV_OPTIONS))),
        pack=pack,
        layout=draw(st.sampled_from(cases.LAYOUTS)),
        dtype=draw(st.sampled_from(DTYPES)),
        device=device,
        seed=draw(st.integers(0, 1000)),
    )
    check(OPERATOR, inputs)
