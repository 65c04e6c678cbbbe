"""mamba_ssm's SSD, its pieces and the fused Mamba-2 layer as the stand-in has them, against plain torch."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_ops import reference
from mamba_ops.compat.mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
from mamba_ops.compat.mamba_ssm.ops import selective_scan_interface as scan
from mamba_ops.compat.mamba_ssm.ops.triton import (
    ssd_bmm,
    ssd_chunk_scan,
    ssd_chunk_state,
    ssd_combined,
)
from mamba_ops.compat.mamba_ssm.ops.triton import ssd_state_passing as passing
from tests import cases, layer_cases
from tests.compat_check import close, dtypes, follows, layouts, renamed, run, subset


def plain_ssd(
    return_final_states: bool = False, chunk_size: int = 64, initial_states: Any = None, **inputs: Any
) -> Any:
    return reference.ssd(**inputs, initial_state=initial_states, return_final_state=return_final_states)


@settings(max_examples=30)
@given(data=st.data())
def test_mamba_chunk_scan_combined(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(dtypes)
    g = draw(st.sampled_from((1, 2)))
    inputs = cases.ssd(
        draw(st.integers(1, 2)),
        draw(st.integers(1, 70)),
        4,
        3,
        5,
        groups=(g, g),
        chunk_size=draw(st.sampled_from((8, 64, 256))),
        D_per_channel=draw(st.booleans()),
        options=draw(subset(cases.SSD_OPTIONS)),
        pack=draw(st.sampled_from((None, "seq_idx"))),
        layout=draw(layouts),
        dtype=dtype,
        seed=draw(st.integers(0, 99)),
    )
    inputs = renamed(inputs, initial_state="initial_states", return_final_state="return_final_states")
    if "dt_limit" in inputs:
        inputs["dt_limit"] = list(inputs["dt_limit"])  # a configuration's
    got = follows(ssd_combined.mamba_chunk_scan_combined, plain_ssd, inputs, dtype)
    if "return_final_states" in inputs:
        assert got["out 1"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("final", [False, True])
def test_varlen_states(final: bool, tail: int) -> None:
    """cu_seqlens keeps the sequences apart; tokens behind them are one more, which the final state is of."""
    inputs = cases.ssd(1, 21 + tail, 4, 3, 5, options=("D", "dt_bias", "dt_softplus"), dtype=torch.bfloat16)
    cuts = torch.tensor([0, 4, 5, 5, 21], dtype=torch.int32)
    first = torch.randn(1, 4, 3, 5)
    options = {"return_varlen_states": True, "return_final_states": final, "initial_states": first}
    out, *finals, varlen = ssd_combined.mamba_chunk_scan_combined(
        **inputs, chunk_size=8, cu_seqlens=cuts, **options
    )
    ends = [0, 4, 5, 5, 21] + ([24] if tail else [])
    starts = torch.cat([first, torch.zeros(len(ends) - 2, 4, 3, 5)])
    expected, states = reference.ssd(
        **{k: v.float() if torch.is_tensor(v) else v for k, v in inputs.items()},
        cu_seqlens=torch.tensor(ends),
        initial_state=starts,
        return_final_state=True,
    )
    close(out, expected, torch.bfloat16)
    assert varlen.shape == (4, 4, 3, 5) and varlen.dtype == torch.bfloat16
    close(varlen, states[:4], torch.bfloat16)
    if final:
        close(finals[0], states[-1:], torch.bfloat16)
        assert finals[0].dtype == torch.float32
    else:
        assert not finals
    wide = ssd_combined.mamba_chunk_scan_combined(
        **inputs, chunk_size=8, cu_seqlens=cuts, return_varlen_states=True, state_dtype=torch.float32
    )[1]
    assert wide.dtype == torch.float32


def test_initial_states_enter_the_first_stretch_of_any_id() -> None:
    inputs = cases.ssd(2, 12, options=("dt_softplus",)) | {"chunk_size": 8}
    states = torch.randn(2, 4, 3, 5)
    ids = torch.tensor([3] * 5 + [9] * 7, dtype=torch.int32).expand(2, -1)
    got = ssd_combined.mamba_chunk_scan_combined(**inputs, seq_idx=ids, initial_states=states)
    alone = ssd_combined.mamba_chunk_scan_combined(**inputs, initial_states=states)
    torch.testing.assert_close(got[:, :5], alone[:, :5])
    fresh = {k: v[:, 5:] if torch.is_tensor(v) and v.dim() > 1 else v for k, v in inputs.items()}
    torch.testing.assert_close(got[:, 5:], ssd_combined.mamba_chunk_scan_combined(**fresh))


@settings(max_examples=20)
@given(data=st.data())
def test_mamba_split_conv1d_scan_combined(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(dtypes)
    names = ("conv1d_bias", "dt_limit", "rmsnorm_weight", "outproj_weight", "outproj_bias", "initial_state")
    options = {"D", "dt_bias", *draw(subset((*names, "return_final_states")))}
    inputs = layer_cases.mamba_split_conv1d_scan(
        2,
        draw(st.integers(1, 40)),
        4,
        4,
        8,
        g=draw(st.sampled_from((1, 2))),
        k=draw(st.sampled_from((0, 3))),
        m=9,
        activation=draw(st.sampled_from((None, "silu", "swish"))),
        D_per_channel=draw(st.booleans()),
        norm_before_gate=draw(st.booleans()),
        options=options,
        pack=draw(st.sampled_from((None, "seq_idx"))),
        layout=draw(layouts),
        dtype=dtype,
    )
    inputs = renamed(inputs, initial_state="initial_states") | {"chunk_size": 16}

    def plain(initial_states: Any = None, return_final_states: bool = False, **rest: Any) -> Any:
        out, _, state = reference.mamba_split_conv1d_scan(
            **rest, initial_state=initial_states, mask_negative=True, return_final_states=True
        )
        return (out, state) if return_final_states else out

    got = follows(ssd_combined.mamba_split_conv1d_scan_combined, plain, inputs, dtype)
    known = ("initial_states", "seq_idx", "return_final_states")
    if not any(key in inputs for key in known):
        close(ssd_combined.mamba_split_conv1d_scan_ref(**inputs), got["out 0"], dtype)


def test_padding_tokens_leave_the_split_form_empty() -> None:
    """As upstream: a negative seq_idx is padding, whose output is that of zeros."""
    inputs = layer_cases.mamba_split_conv1d_scan(options=("D", "dt_bias", "conv1d_bias"))
    inputs |= {"chunk_size": 8, "seq_idx": torch.tensor([[-1] * 3 + [0] * 14, [5] * 12 + [-1] * 5])}
    out = ssd_combined.mamba_split_conv1d_scan_combined(**inputs)
    assert out[0, :3].count_nonzero() == 0 and out[1, 12:].count_nonzero() == 0
    assert out[0, 3:].count_nonzero() > 0


def test_the_scans_in_other_words() -> None:
    """mamba_chunk_scan, ssd_selective_scan, the references and the listing agree with the operator."""
    inputs = cases.ssd(2, 30, 4, 3, 5, groups=(2, 2), options=("D", "z", "dt_bias", "dt_softplus"))
    expected = ssd_combined.mamba_chunk_scan_combined(**inputs, chunk_size=16)
    for function in (ssd_combined.mamba_chunk_scan, ssd_combined.ssd_chunk_scan_combined_ref):
        torch.testing.assert_close(function(**inputs, chunk_size=16), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ssd_combined.ssd_selective_scan(**inputs), expected, rtol=1e-4, atol=1e-5)
    limit = (0.01, 0.02)
    torch.testing.assert_close(
        ssd_combined.ssd_selective_scan(**inputs, dt_limit=limit),
        ssd_combined.mamba_chunk_scan_combined(**inputs, chunk_size=16, dt_limit=limit),
        rtol=1e-4,
        atol=1e-5,
    )
    B, C = (M.repeat_interleave(2, 2) for M in (inputs["B"], inputs["C"]))
    step, states = inputs["dt"].abs(), torch.randn(2, 1, 4, 3, 5)
    got, final = ssd_minimal_discrete(
        inputs["x"] * step[..., None], step * inputs["A"], B, C, 8, initial_states=states
    )
    expected, last = reference.ssd(
        inputs["x"], step, inputs["A"], B, C, initial_state=states[:, 0], return_final_state=True
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-4, atol=1e-5)


def test_mamba_conv1d_scan_ref() -> None:
    inputs = layer_cases.mamba_split_conv1d_scan(g=2, options=("D", "dt_bias", "conv1d_bias"))
    z, xBC, dt = torch.split(inputs["zxbcdt"], [12, 32, 4], dim=-1)
    scan_inputs = {k: inputs[k] for k in ("conv1d_weight", "conv1d_bias", "A", "D", "dt_bias")}
    got = ssd_combined.mamba_conv1d_scan_ref(
        xBC, dt=dt, z=z, chunk_size=8, dt_softplus=True, ngroups=2, **scan_inputs
    )
    expected = reference.mamba_split_conv1d_scan(**inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pack", [None, "seq_idx"])
def test_the_pieces_make_the_scan(pack: str | None) -> None:
    """Steps, chunk states, state passing, C B^T and chunk scan, and their references token by token."""
    inputs = cases.ssd(2, 37, 4, 3, 5, groups=(2, 2), options=("dt_bias", "dt_softplus"), pack=pack)
    x, B, C, seq_idx = inputs["x"], inputs["B"], inputs["C"], inputs.get("seq_idx")
    q, first = 8, torch.randn(2, 4, 3, 5)
    dA_cumsum, dt = ssd_chunk_state._chunk_cumsum_fwd(inputs["dt"], inputs["A"], q, inputs["dt_bias"], True)
    states = ssd_chunk_state._chunk_state_fwd(B, x, dt, dA_cumsum, seq_idx=seq_idx)
    before, final = passing._state_passing_fwd(
        states.flatten(-2), dA_cumsum[..., -1], first.flatten(-2), seq_idx, q
    )
    _, expected = ssd_combined.mamba_chunk_scan_combined(
        **inputs, chunk_size=q, initial_states=first, return_final_states=True
    )
    torch.testing.assert_close(final.view_as(expected), expected, rtol=1e-4, atol=1e-5)
    whole = ssd_combined._mamba_chunk_scan_combined_fwd(**inputs, chunk_size=q, initial_states=first)
    torch.testing.assert_close(whole[2], dt)
    torch.testing.assert_close(whole[4].flatten(-2), before)
    torch.testing.assert_close(whole[5], expected)
    CB = ssd_bmm._bmm_chunk_fwd(C, B, q, seq_idx=seq_idx, output_dtype=torch.float64)
    assert CB.shape == (2, 5, 2, q, q) and CB.dtype == torch.float64
    torch.testing.assert_close(CB[0, 1, 1, 3, 3].float(), (C[0, 11, 1] * B[0, 11, 1]).sum())
    if pack is not None:
        return
    torch.testing.assert_close(ssd_chunk_state.chunk_state(B, x, dt, dA_cumsum), states)
    torch.testing.assert_close(ssd_chunk_state.chunk_state_ref(B, x, dt, dA_cumsum), states)
    ref_before, ref_final = passing.state_passing_ref(
        states.flatten(-2), dA_cumsum[..., -1], first.flatten(-2)
    )
    torch.testing.assert_close(ref_before, before)
    torch.testing.assert_close(ref_final, final)
    D, z = torch.randn(4), torch.randn_like(x)
    out = ssd_chunk_scan.chunk_scan(B, C, x, dt, dA_cumsum, before.view_as(states), D, z)
    expected = ssd_combined.mamba_chunk_scan_combined(**inputs, chunk_size=q, initial_states=first, D=D, z=z)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    ref = ssd_chunk_scan.chunk_scan_ref(B, C, x, dt, dA_cumsum, before.view_as(states), D, z)
    torch.testing.assert_close(ref, expected, rtol=1e-4, atol=1e-5)


def test_chunk_state_varlen() -> None:
    inputs = cases.ssd(1, 40, 4, 3, 5, groups=(2, 2), options=("dt_bias", "dt_softplus"))
    cuts = torch.tensor([0, 3, 16, 16, 37, 40], dtype=torch.int32)
    ids = torch.arange(6).repeat_interleave(torch.diff(cuts, append=torch.tensor([40])))[None].int()
    forward = ssd_combined._mamba_chunk_scan_combined_fwd(**inputs, chunk_size=8, seq_idx=ids)
    _, _, dt, dA_cumsum, states, _ = forward
    args = (inputs["B"][0], inputs["x"][0], dt[0], dA_cumsum[0], cuts, states[0])
    _, expected = reference.ssd(**inputs, cu_seqlens=cuts, return_final_state=True)
    torch.testing.assert_close(ssd_chunk_state.chunk_state_varlen(*args), expected, rtol=1e-4, atol=1e-5)


def test_the_backward_by_itself() -> None:
    """_mamba_chunk_scan_combined_bwd fills what it is given, and gives what autograd does."""
    inputs = cases.ssd(2, 20, 4, 3, 5, options=("D", "z", "dt_bias", "dt_softplus"))
    states = torch.randn(2, 4, 3, 5)
    expected = run(
        lambda **k: ssd_combined.mamba_chunk_scan_combined(**k, chunk_size=8, return_final_states=True),
        inputs | {"initial_states": states},
        True,
    )
    generator = torch.Generator().manual_seed(0)
    dout, dfinal = (
        torch.randn(expected[k].shape, generator=generator, dtype=torch.float64).float()
        for k in ("out 0", "out 1")
    )
    dx = torch.full((2, 20, 4, 6), math.nan)[..., ::2]
    grads = ssd_combined._mamba_chunk_scan_combined_bwd(
        dout,
        out=expected["out 0"],
        chunk_size=8,
        initial_states=states,
        dfinal_states=dfinal,
        dx=dx,
        recompute_output=True,
        **inputs,
    )
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    for grad, name in zip(grads, names, strict=False):
        torch.testing.assert_close(grad, expected[f"grad {name}"])
    assert grads[0] is dx
    torch.testing.assert_close(grads[-1], expected["out 0"])


def test_strides_for_kernels_that_ask() -> None:
    t = torch.randn(2, 5, 772)
    aligned = ssd_combined.ensure_stride(t)
    assert torch.equal(aligned, t) and all(s % 8 == 0 for s in aligned.stride()[:-1])
    assert ssd_combined.ensure_stride(aligned) is aligned
    assert ssd_combined.rearrange_and_update_stride(t, "b s d -> b d s").shape == (2, 772, 5)


def test_errors_of_the_fused_forms() -> None:
    inputs = layer_cases.mamba_split_conv1d_scan(options=("D", "dt_bias")) | {"chunk_size": 8}
    function = ssd_combined.mamba_split_conv1d_scan_combined
    with pytest.raises(AssertionError, match="headdim"):
        function(**inputs | {"headdim": None})
    with pytest.raises(AssertionError, match="outproj_bias"):
        function(**inputs, outproj_bias=torch.ones(3))
    with pytest.raises(AssertionError, match="activation"):
        function(**inputs | {"activation": "gelu"})
    with pytest.raises(AssertionError, match="cu_seqlens must be provided"):
        ssd_combined.mamba_chunk_scan_combined(**cases.ssd(), chunk_size=8, return_varlen_states=True)
    with pytest.raises(AssertionError, match="batch dimension is 1"):
        ssd_combined.mamba_chunk_scan_combined(**cases.ssd(), chunk_size=8, cu_seqlens=torch.tensor([0, 23]))
    with pytest.raises(AssertionError, match="checkpoint_lvl"):
        scan.mamba_inner_fn(**layer_cases.mamba_inner(), checkpoint_lvl=2)
    with pytest.raises(RuntimeError, match="delta must be"):
        scan.selective_scan_fn(**cases.selective_scan() | {"delta": torch.ones(2, 6, 22)})
