"""causal_conv1d as the stand-in has it, against plain torch."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba_ops import reference
from mamba_ops.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ops.compat.causal_conv1d import causal_conv1d_interface as conv
from mamba_ops.compat.causal_conv1d import causal_conv1d_varlen as conv_varlen
from mamba_ops.compat.causal_conv1d import cpp_functions as cpp
from tests import cases
from tests.compat_check import close, dtypes, follows, layouts, renamed, subset


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
