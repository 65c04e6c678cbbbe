"""Every function of the stand-ins for mamba_ssm and causal_conv1d over its options, against plain torch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba_ops import reference
from mamba_ops.compat import selective_scan_cuda
from mamba_ops.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ops.compat.causal_conv1d import causal_conv1d_interface as conv
from mamba_ops.compat.causal_conv1d import causal_conv1d_varlen as conv_varlen
from mamba_ops.compat.causal_conv1d import cpp_functions as cpp
from mamba_ops.compat.mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
from mamba_ops.compat.mamba_ssm.ops import selective_scan_interface as scan
from mamba_ops.compat.mamba_ssm.ops.triton import (
    k_activations,
    layer_norm,
    layernorm_gated,
    ssd_bmm,
    ssd_chunk_scan,
    ssd_chunk_state,
    ssd_combined,
)
from mamba_ops.compat.mamba_ssm.ops.triton import selective_state_update as update
from mamba_ops.compat.mamba_ssm.ops.triton import ssd_state_passing as passing
from tests import cases, layer_cases
from tests.cases import Inputs
from tests.compat_check import follows, run

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(("contiguous", "transposed", "padded", "projected"))


def subset(options: tuple[str, ...]) -> Any:
    return st.sets(st.sampled_from(options))


def renamed(inputs: Inputs, **names: str) -> Inputs:
    """With keys by upstream's names."""
    return {names.get(key, key): value for key, value in inputs.items()}


# selective scan


def interleaved(M: Tensor) -> Tensor:
    """A complex (..., l) as upstream takes it, (..., 2 l)."""
    return torch.view_as_real(M).flatten(-2) if M.is_complex() and M.dim() > 2 else M


def plain_scan(return_last_state: bool = False, **inputs: Any) -> Any:
    A = inputs["A"]
    matrices = {
        k: torch.complex(*(inputs[k].to(A.real.dtype)[..., part::2] for part in (0, 1)))
        for k in "BC"
        if A.is_complex() and not inputs[k].is_complex()
    }
    softplus = bool(inputs.pop("delta_softplus", False))
    return reference.selective_scan(
        **inputs | matrices, delta_softplus=softplus, return_final_state=return_last_state
    )


@settings(max_examples=30)
@given(data=st.data())
def test_selective_scan_fn(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(dtypes)
    groups = st.sampled_from((None, 0, 1, 2))
    options = draw(subset(("D", "z", "delta_bias", "delta_softplus", "return_final_state")))
    inputs = cases.selective_scan(
        draw(st.integers(1, 2)),
        6,
        draw(st.integers(1, 40)),
        3,
        groups=(draw(groups), draw(groups)),
        complex_A=draw(st.booleans()),
        options=options,
        layout=draw(layouts),
        dtype=dtype,
        seed=draw(st.integers(0, 99)),
    )
    inputs = renamed(inputs, return_final_state="return_last_state")
    inputs |= {k: interleaved(inputs[k]).to(dtype) for k in "BC" if inputs[k].dim() > 2}
    if "delta_softplus" not in options:
        inputs["delta_softplus"] = draw(st.sampled_from((None, False)))
    got = follows(scan.selective_scan_fn, plain_scan, inputs, dtype)
    assert got["out 0"].dtype == dtype
    if "return_final_state" in options:
        assert got["out 1"].dtype == inputs["A"].dtype  # float32 or complex64 at half precision too


@pytest.mark.parametrize("gated", [False, True])
def test_selective_scan_fn_lies_as_delta_or_z(gated: bool) -> None:
    inputs = cases.selective_scan(options=("z",) if gated else ())
    other = "z" if gated else "delta"
    inputs[other] = inputs[other].mT.contiguous().mT
    assert scan.selective_scan_fn(**inputs).stride() == inputs[other].stride()
    half = torch.cat([inputs[other]] * 2, dim=1)[:, :6]  # as of an xz that is cut in two
    out = scan.selective_scan_fn(**inputs | {other: half})
    assert out.stride() == torch.empty_like(half).stride()


def test_selective_scan_cuda() -> None:
    """The extension module's fwd and bwd: states at the end of every chunk, gradients like autograd's."""
    inputs = cases.selective_scan(2, 4, 4100, 2, options=("D", "z", "delta_bias"))
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    args = [inputs[k] for k in names]
    out, x, out_z = selective_scan_cuda.fwd(*args, True)
    expected, last = scan.selective_scan_fn(*args, True, return_last_state=True)
    close(out_z, expected, torch.float32)
    assert x.shape == (2, 4, 3, 4)
    close(x[:, :, -1, 1::2], last, torch.float32)
    step = F.softplus(inputs["delta"] + inputs["delta_bias"][:, None])[..., :2048].sum(-1)
    torch.testing.assert_close(x[:, :, 0, 0::2], torch.exp(step[..., None] * inputs["A"]), rtol=1e-3, atol=0)
    leaves = [t.clone().requires_grad_() for t in args]
    dout = torch.randn_like(expected)
    scan.selective_scan_fn(*leaves, True).backward(dout)
    dz = torch.full_like(inputs["z"], math.nan)
    grads = selective_scan_cuda.bwd(*args, dout, x, out, dz, True, True)
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z")
    for grad, name in zip(grads, order, strict=False):
        torch.testing.assert_close(grad, leaves[names.index(name)].grad)
    assert grads[7] is dz
    torch.testing.assert_close(grads[8], expected)


@settings(max_examples=15)
@given(data=st.data())
def test_mamba_inner_fn(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(dtypes)
    options = draw(subset(layer_cases.INNER_OPTIONS[:9]))
    inputs = layer_cases.mamba_inner(
        2, 6, draw(st.integers(1, 30)), 8, options=options, layout=draw(layouts), dtype=dtype
    )
    inputs["delta_softplus"] = draw(st.booleans())

    def plain(conv1d_weight: Tensor, b_c_dt_rms_eps: float, checkpoint_lvl: int, **rest: Any) -> Any:
        return reference.mamba_inner(conv1d_weight=conv1d_weight.squeeze(1), rms_eps=b_c_dt_rms_eps, **rest)

    inputs["conv1d_weight"] = inputs["conv1d_weight"].unsqueeze(1)
    inputs |= {"b_c_dt_rms_eps": 1e-3, "checkpoint_lvl": draw(st.integers(0, 1))}
    got = follows(scan.mamba_inner_fn, plain, inputs, dtype)
    assert got["out 0"].shape == (2, inputs["xz"].shape[2], 5)
    if not any("rms" in key for key in options):
        known = {k: v for k, v in inputs.items() if k not in ("b_c_dt_rms_eps", "checkpoint_lvl")}
        close(scan.mamba_inner_ref(**known), got["out 0"], dtype)


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    error = torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(b.float())
    assert error <= {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-6}[dtype]


def test_rms_norm_forward() -> None:
    x, weight = torch.randn(5, 8), torch.randn(8)
    expected = reference.rms_norm_gated(x, weight, eps=1e-3)
    torch.testing.assert_close(scan.rms_norm_forward(x, weight, None, 1e-3), expected)


# SSD


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


# State update


def per_head(t: Tensor, *shape: int) -> Tensor:
    """One number a head, expanded with stride 0."""
    return t[(..., *[None] * len(shape))].expand(*t.shape, *shape)


def plain_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, **rest: Any) -> Tensor:
    rest = {k: v.flatten() if k in ("D", "dt_bias") and v is not None else v for k, v in rest.items()}
    rest = renamed(rest, dt_bias="delta_bias", dt_softplus="delta_softplus")
    rest = renamed(rest, state_batch_indices="state_indices")
    z = rest.pop("z", None)
    z = z if z is None else z.flatten(1)
    flat = state.flatten(1, -2) if state.dim() == 4 else state
    y = reference.selective_state_update(flat, x.flatten(1), dt.flatten(1), A.flatten(0, -2), z=z, **rest)
    state.copy_(flat.view(state.shape))
    return y.view(x.shape)


@settings(max_examples=40)
@given(data=st.data())
def test_selective_state_update(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(dtypes)
    b, h, p, n = draw(st.integers(1, 3)), 4, 3, 5
    heads, tied = draw(st.booleans()), draw(st.booleans())
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seed)

    lead = (h, p) if heads else (h * p,)
    tied = heads and tied
    base = (h,) if tied else lead
    inputs: Inputs = {
        "state": normal(b + 2, *lead, n).to(draw(st.sampled_from((torch.float32, dtype)))),
        "x": normal(b, *lead).to(dtype),
        "dt": normal(b, *base).to(dtype),
        "A": -normal(*(base if tied else (*lead, n))).exp(),
        "B": normal(b, 2, n).to(dtype),
        "C": normal(b, 2, n).to(dtype),
        "dt_softplus": draw(st.booleans()),
    }
    for name in draw(subset(("D", "dt_bias"))):
        inputs[name] = normal(*base)
    if draw(st.booleans()):
        inputs["z"] = normal(b, *lead).to(dtype)

    def tie(function: Any) -> Any:
        """Calls it with the numbers of heads expanded as transformers and mamba_ssm's layers expand them."""

        def call(**inputs: Any) -> Any:
            shapes = {"A": (p, n), "dt": (p,), "D": (p,), "dt_bias": (p,)} if tied else {}
            expanded = {k: per_head(inputs[k], *shape) for k, shape in shapes.items() if k in inputs}
            return function(**inputs | expanded)

        return call

    stand_in, plain = tie(update.selective_state_update), tie(plain_update)
    if draw(st.booleans()):
        rows = torch.randperm(b + 2, generator=seed)[:b].int()
        rows[draw(st.integers(0, b - 1))] = -1
        inputs["state_batch_indices"] = rows
    else:
        inputs["state"] = inputs["state"][:b]
    got = follows(stand_in, plain, inputs, dtype, gradients=False)
    assert got["out 0"].dtype == dtype and got["state"].dtype == inputs["state"].dtype
    if "state_batch_indices" in inputs:
        padding = inputs["state_batch_indices"] < 0
        assert got["out 0"][padding].count_nonzero() == 0
    else:
        follows(stand_in, plain, inputs, dtype)  # while gradients are recorded
        state = inputs["state"].clone()
        known = {k: v for k, v in inputs.items() if k != "state"}
        close(tie(update.selective_state_update_ref)(state=state, **known), got["out 0"], dtype)


def test_a_state_that_is_no_view_of_channels() -> None:
    state = torch.randn(3, 4, 5, 2).transpose(2, 3)[:, ::2]
    x, dt, A = torch.randn(3, 2, 2), torch.rand(3, 2, 2), -torch.rand(2, 2, 5)
    inputs = {"state": state, "x": x, "dt": dt, "A": A, "B": torch.randn(3, 5), "C": torch.randn(3, 5)}
    follows(update.selective_state_update, plain_update, inputs, torch.float32, gradients=False)


def test_gradients_reach_the_first_token_through_the_state() -> None:
    """In grad mode steps are differentiable, the state included, where the original drops gradients."""
    x = torch.randn(1, 4, requires_grad=True)
    state = torch.zeros(1, 4, 2)
    one = torch.ones(1, 2)
    args = (torch.rand(1, 4), -torch.rand(4, 2), one, one)
    update.selective_state_update(state, x, *args)
    update.selective_state_update(state, x.detach(), *args).sum().backward()
    assert x.grad is not None and x.grad.count_nonzero() == 4


def test_gradients_and_indices_do_not_go_together() -> None:
    one, x = torch.ones(1, 2), torch.randn(1, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no backward"):
        update.selective_state_update(
            torch.zeros(1, 4, 2),
            x,
            torch.rand(1, 4),
            -torch.rand(4, 2),
            one,
            one,
            state_batch_indices=torch.zeros(1, dtype=torch.int32),
        )


# Convolution


def plain_conv(
    seq_idx: Any = None,
    initial_states: Any = None,
    return_final_states: bool = False,
    **inputs: Any,
) -> Any:
    out = reference.causal_conv1d(
        **inputs,
        seq_idx=seq_idx,
        initial_state=initial_states,
        return_final_state=return_final_states,
    )
    return out if seq_idx is None else out.masked_fill(seq_idx[:, None] < 0, 0)


@settings(max_examples=40)
@given(data=st.data())
def test_causal_conv1d_fn(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(dtypes)
    pack = draw(st.sampled_from((None, "seq_idx")))
    names = ("bias", "activation") if pack else cases.CONV_OPTIONS
    inputs = cases.causal_conv1d(
        2,
        draw(st.integers(1, 12)),
        draw(st.integers(1, 30)),
        draw(st.integers(2, 4)),
        options=draw(subset(names)),
        pack=pack,
        layout=draw(layouts),
        dtype=dtype,
        seed=draw(st.integers(0, 99)),
    )
    inputs = renamed(inputs, initial_state="initial_states", return_final_state="return_final_states")
    got = follows(causal_conv1d_fn, plain_conv, inputs, dtype)
    x = inputs["x"]
    assert (
        causal_conv1d_fn(**inputs | {"return_final_states": False}).stride() == torch.empty_like(x).stride()
    )
    if "return_final_states" in inputs:
        state = causal_conv1d_fn(**inputs)[1]
        assert state.dtype == dtype and state.transpose(1, 2).is_contiguous()
        mine = torch.full_like(state, math.nan)
        assert causal_conv1d_fn(**inputs, final_states_out=mine)[1] is mine
        assert torch.equal(mine, got["out 1"])
    if pack is None:
        expected = conv.causal_conv1d_ref(**inputs)
        close(expected[0] if isinstance(expected, tuple) else expected, got["out 0"], dtype)


def test_conv_of_padding_is_zero() -> None:
    x, ids = torch.randn(1, 3, 8), torch.tensor([[-1, -1, 0, 0, 1, 1, -1, -1]], dtype=torch.int32)
    out = causal_conv1d_fn(x, torch.randn(3, 4), torch.randn(3), seq_idx=ids, activation="silu")
    assert out[..., ids[0] < 0].count_nonzero() == 0 and out[..., ids[0] >= 0].count_nonzero() == 12


def test_conv_errors() -> None:
    x, weight, ids = torch.randn(1, 3, 8), torch.randn(3, 4), torch.zeros(1, 8, dtype=torch.int32)
    for function in (causal_conv1d_fn, conv.causal_conv1d_ref):
        with pytest.raises(NotImplementedError, match="activation"):
            function(x, weight, activation="gelu")
    with pytest.raises(NotImplementedError, match="activation"):
        causal_conv1d_update(x, x, weight, activation="gelu")
    with pytest.raises(AssertionError, match="initial_states must be None"):
        causal_conv1d_fn(x, weight, seq_idx=ids, initial_states=torch.zeros(1, 3, 3))
    with pytest.raises(AssertionError, match="final_states"):
        causal_conv1d_fn(x, weight, seq_idx=ids, return_final_states=True)
    with pytest.raises(RuntimeError, match="weight must be"):
        causal_conv1d_fn(x, torch.randn(4, 4))
    with pytest.raises(RuntimeError, match="conv_state must keep"):
        causal_conv1d_update(x, x[..., :2], weight, cache_seqlens=torch.zeros(1, dtype=torch.int32))


@settings(max_examples=40)
@given(data=st.data())
def test_causal_conv1d_update(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(dtypes)
    w, t = draw(st.integers(2, 4)), draw(st.sampled_from((None, 1, 2)))
    inputs = cases.causal_conv1d_update(
        3,
        5,
        w,
        t=t,
        k=draw(st.integers(max(w - 1, t or 1), 6)),
        rows=draw(st.sampled_from((None, 5))),
        options=draw(subset(("bias", "activation"))),
        layout=draw(layouts),
        dtype=dtype,
    )
    inputs = renamed(inputs, state="conv_state", state_indices="conv_state_indices")
    if draw(st.booleans()):
        inputs["cache_seqlens"] = torch.tensor([0, 3, 17], dtype=torch.int32)

    def plain(conv_state: Tensor, conv_state_indices: Any = None, **rest: Any) -> Tensor:
        if conv_state_indices is None:
            return conv.causal_conv1d_update_ref(conv_state=conv_state, **rest)
        out = torch.zeros_like(rest["x"])
        for row, place in enumerate(conv_state_indices.tolist()):
            one = {k: v[row : row + 1] if k in ("x", "cache_seqlens") else v for k, v in rest.items()}
            if place >= 0:
                state = conv_state[place : place + 1]
                out[row : row + 1] = conv.causal_conv1d_update_ref(conv_state=state, **one)
        return out

    follows(causal_conv1d_update, plain, inputs, dtype, gradients=False)
    if "conv_state_indices" not in inputs:
        follows(causal_conv1d_update, plain, inputs, dtype)


def test_a_ring_is_the_sequence() -> None:
    """Token by token through a ring of 5 slots: as the whole convolution."""
    x, weight, ring = torch.randn(2, 3, 13), torch.randn(3, 4), torch.zeros(2, 3, 5)
    steps = [
        causal_conv1d_update(x[..., t], ring, weight, cache_seqlens=torch.full((2,), t, dtype=torch.int32))
        for t in range(13)
    ]
    torch.testing.assert_close(torch.stack(steps, -1), causal_conv1d_fn(x, weight))


def test_varlen_states_of_the_conv() -> None:
    x, cuts = torch.randn(12, 3), torch.tensor([0, 2, 2, 9, 12], dtype=torch.int32)
    got = conv_varlen.causal_conv1d_varlen_states(x, cuts, 4)
    expected = conv_varlen.causal_conv1d_varlen_states_ref(x, cuts, 4)
    assert torch.equal(got, expected) and got.shape == (4, 3, 4)
    assert got.transpose(1, 2).is_contiguous()


def test_cpp_functions() -> None:
    inputs = cases.causal_conv1d(2, 6, 9, options=("bias", "activation", "initial_state"))
    x, weight, bias, first = (inputs[k] for k in ("x", "weight", "bias", "initial_state"))
    final = torch.full((2, 6, 3), math.nan)
    out = cpp.causal_conv1d_fwd_function(x, weight, bias, None, first, final, True)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, first)]
    y, state = causal_conv1d_fn(*leaves[:3], None, leaves[3], True, None, "silu")
    torch.testing.assert_close((out, final), (y, state))
    dout, dfinal = torch.randn_like(y), torch.randn_like(state)
    torch.autograd.backward([y, state], [dout, dfinal])
    dx = torch.full((2, 12, 9), math.nan)[:, :6]
    grads = cpp.causal_conv1d_bwd_function(x, weight, bias, dout, None, first, dfinal, dx, True, True)
    assert grads[0] is dx
    for grad, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad)
    ids = torch.tensor([[-1] * 4 + [0] * 5] * 2, dtype=torch.int32)
    leaf = x.clone().requires_grad_()
    causal_conv1d_fn(leaf, weight, bias, ids).backward(dout)
    grads = cpp.causal_conv1d_bwd_function(x, weight, bias, dout, ids, None, None, None, False, False)
    torch.testing.assert_close(grads[0], leaf.grad)
    assert grads[3] is None
    conv_state = torch.randn(2, 6, 4)
    mine, theirs = conv_state.clone(), conv_state.clone()
    got = cpp.causal_conv1d_update_function(x[..., 0], mine, weight, bias, True, None, None)
    torch.testing.assert_close(got, causal_conv1d_update(x[..., 0], theirs, weight, bias, "silu"))
    assert torch.equal(mine, theirs)


# Norms and activations


@settings(max_examples=30)
@given(data=st.data())
def test_gated_norms(data: st.DataObject) -> None:
    draw, dtype = data.draw, data.draw(dtypes)
    rms = draw(st.booleans())
    inputs: Inputs = cases.rms_norm_gated(3, 5, 12, gate=draw(st.booleans()), dtype=dtype)
    options = {
        "bias": torch.randn(12) if draw(st.booleans()) else None,
        "eps": 1e-3,
        "group_size": draw(st.sampled_from((None, 4))),
        "norm_before_gate": draw(st.booleans()),
    }

    def plain(bias: Any, **rest: Any) -> Tensor:
        x, z, before = rest["x"], rest.get("z"), rest["norm_before_gate"]
        if not rms or bias is not None:
            v = x if before or z is None else x * F.silu(z)
            groups = v.unflatten(-1, (-1, rest["group_size"] or 12))
            groups = groups if rms else groups - groups.mean(-1, keepdim=True)
            scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + rest["eps"])
            y = (groups * scale).flatten(-2) * rest["weight"] + (0 if bias is None else bias)
            return (y * F.silu(z) if before and z is not None else y).to(x.dtype)
        return reference.rms_norm_gated(**rest)

    function: Any = layernorm_gated.rmsnorm_fn if rms else layernorm_gated.layernorm_fn
    got = follows(function, plain, inputs | options, dtype)
    if rms:
        close(layernorm_gated.rms_norm_ref(**inputs | options), got["out 0"], dtype)
        both = layernorm_gated.layernorm_fn(**inputs | options, is_rms_norm=True)
        assert torch.equal(both, got["out 0"])


def test_norm_modules() -> None:
    x, z = torch.randn(3, 8), torch.randn(3, 8)
    for module in (layernorm_gated.RMSNorm(8, group_size=4), layernorm_gated.LayerNorm(8, eps=1e-3)):
        assert (module.norm_before_gate, module.weight.shape) == (True, (8,))
        function: Any = layernorm_gated.rmsnorm_fn if module.bias is None else layernorm_gated.layernorm_fn
        expected = function(x, module.weight, module.bias, z, module.eps, module.group_size, True)
        assert torch.equal(module(x, z), expected)

    class Mine(layernorm_gated.RMSNorm):  # as Megatron subclasses it
        pass

    assert dict(Mine(8).named_parameters()).keys() == {"weight"} and Mine(8).bias is None


@settings(max_examples=40)
@given(data=st.data())
def test_layer_norm_fn(data: st.DataObject) -> None:
    """Residual, a second input and output, rowscale, prenorm and dtypes, against the step-by-step form."""
    draw, dtype = data.draw, data.draw(dtypes)
    rms = draw(st.booleans())

    def maybe(t: Tensor) -> Tensor | None:
        return t if draw(st.booleans()) else None

    two, wide = draw(st.booleans()), torch.promote_types(dtype, torch.float32)
    inputs: Inputs = {
        "x": torch.randn(2, 3, 16).to(dtype),
        "weight": torch.randn(16),
        "bias": maybe(torch.randn(16)),
        "residual": maybe(torch.randn(2, 3, 16).to(draw(st.sampled_from((dtype, wide))))),
        "x1": torch.randn(2, 3, 16).to(dtype) if two else None,
        "weight1": maybe(torch.randn(16)),
        "rowscale": None if two else maybe(torch.rand(2, 3)),
        "eps": 1e-3,
        "prenorm": draw(st.booleans()),
    }
    inputs["bias1"] = maybe(torch.randn(16)) if inputs["weight1"] is not None else None
    function: Any = layer_norm.rms_norm_fn if rms else layer_norm.layer_norm_fn
    plain: Any = layer_norm.rms_norm_ref if rms else layer_norm.layer_norm_ref
    fp32 = {"residual_in_fp32": True} if draw(st.booleans()) else {}
    got = follows(lambda **k: function(**k, **fp32), plain, inputs, dtype)
    if inputs["prenorm"]:
        kept = inputs["residual"].dtype if inputs["residual"] is not None else dtype
        kept = torch.promote_types(kept, torch.float32) if inputs["residual"] is None and fp32 else kept
        assert got["out 2" if inputs["weight1"] is not None else "out 1"].dtype == kept
    assert got["out 0"].dtype == dtype


def test_layer_norm_dropout() -> None:
    x, weight, residual = torch.randn(4, 64), torch.ones(64), torch.randn(4, 64)
    options: Any = {"dropout_p": 0.5, "prenorm": True, "return_dropout_mask": True}
    y, total, mask, mask1 = layer_norm.layer_norm_fn(x, weight, None, residual, **options)
    assert mask1 is None and 0.3 < mask.float().mean() < 0.7
    torch.testing.assert_close(total, residual + x * mask / 0.5)
    expected = layer_norm.layer_norm_ref(x, weight, None, residual, dropout_p=0.5, dropout_mask=mask)
    torch.testing.assert_close(y, expected)


def test_layer_norm_linear_and_raw_forward() -> None:
    x, residual, weight, bias = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8), torch.randn(8)
    linear, shift = torch.randn(6, 8), torch.randn(6)
    out, total = layer_norm.layer_norm_linear_fn(x, weight, bias, linear, shift, residual, prenorm=True)
    expected = F.linear(F.layer_norm(x + residual, (8,), weight, bias, 1e-6), linear, shift)
    torch.testing.assert_close((out, total), (expected, x + residual))
    y, y1, mean, rstd, residual_out, seeds, *masks = layer_norm._layer_norm_fwd(
        x, weight, bias, 1e-6, residual, out_dtype=torch.float64
    )
    assert y.dtype == torch.float64 and y1 is seeds is masks[0] is masks[1] is None
    torch.testing.assert_close(mean, (x + residual).mean(-1))
    torch.testing.assert_close(rstd, torch.rsqrt((x + residual).var(-1, correction=0) + 1e-6))
    torch.testing.assert_close(residual_out, x + residual)
    assert layer_norm._layer_norm_fwd(x, weight, None, 1e-6, is_rms_norm=True)[4] is x


def test_swiglu() -> None:
    xy = torch.randn(3, 10)
    expected = F.silu(xy[:, :5]) * xy[:, 5:]
    assert torch.equal(k_activations.swiglu(xy), expected)
    assert torch.equal(k_activations.SwiGLU.apply(xy), expected)


def test_the_autograd_functions_by_name() -> None:
    inputs = cases.selective_scan(options=("D", "z"))
    names = ("u", "delta", "A", "B", "C", "D", "z")
    args = [inputs[k] for k in names]
    assert torch.equal(scan.SelectiveScanFn.apply(*args), scan.selective_scan_fn(*args))


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
