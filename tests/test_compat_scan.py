"""mamba_ssm's selective scan and fused Mamba layer as the stand-in has them, against plain torch."""

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
from mamba_ops.compat.mamba_ssm.ops import selective_scan_interface as scan
from tests import cases, layer_cases
from tests.compat_check import close, dtypes, follows, layouts, renamed, subset


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
    inputs |= {"b_c_dt_rms_eps": inputs.pop("rms_eps", 1e-3), "checkpoint_lvl": draw(st.integers(0, 1))}
    got = follows(scan.mamba_inner_fn, plain, inputs, dtype)
    assert got["out 0"].shape == (2, inputs["xz"].shape[2], 5)
    if not any("rms" in key for key in options):
        known = {k: v for k, v in inputs.items() if k not in ("b_c_dt_rms_eps", "checkpoint_lvl")}
        close(scan.mamba_inner_ref(**known), got["out 0"], dtype)


def test_rms_norm_forward() -> None:
    x, weight = torch.randn(5, 8), torch.randn(8)
    expected = reference.rms_norm_gated(x, weight, eps=1e-3)
    torch.testing.assert_close(scan.rms_norm_forward(x, weight, None, 1e-3), expected)


def test_the_autograd_functions_by_name() -> None:
    inputs = cases.selective_scan(options=("D", "z"))
    names = ("u", "delta", "A", "B", "C", "D", "z")
    args = [inputs[k] for k in names]
    assert torch.equal(scan.SelectiveScanFn.apply(*args), scan.selective_scan_fn(*args))
