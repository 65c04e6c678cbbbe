"""Dtypes of the stand-ins: autocast leaves them alone as it does the originals; weights of any dtype."""

from typing import Any

import pytest
import torch

from mamba_ops.compat import selective_scan_cuda
from mamba_ops.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, cpp_functions
from mamba_ops.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ops.compat.mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
from mamba_ops.compat.mamba_ssm.ops.triton.layernorm_gated import layernorm_fn, rmsnorm_fn
from mamba_ops.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ops.compat.mamba_ssm.ops.triton.ssd_combined import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)
from tests import cases, layer_cases
from tests.cases import Inputs
from tests.compat_check import close, renamed

HALVES = (torch.bfloat16, torch.float16)


def calls() -> dict[str, tuple[Any, Inputs]]:
    norm = {"x": torch.randn(3, 8), "weight": torch.randn(8), "bias": None}
    update = cases.selective_state_update(options=("D", "z"))
    return {
        "selective_scan_fn": (selective_scan_fn, cases.selective_scan(options=("D", "z"))),
        "mamba_chunk_scan_combined": (mamba_chunk_scan_combined, cases.ssd() | {"chunk_size": 8}),
        "causal_conv1d_fn": (causal_conv1d_fn, cases.causal_conv1d(options=("bias",))),
        "causal_conv1d_update": (
            causal_conv1d_update,
            renamed(cases.causal_conv1d_update(), state="conv_state"),
        ),
        "selective_state_update": (selective_state_update, renamed(update, u="x", delta="dt")),
        "rmsnorm_fn": (rmsnorm_fn, norm),
        "layernorm_fn": (layernorm_fn, norm),
        "layer_norm_fn": (layer_norm_fn, norm),
        "rms_norm_fn": (rms_norm_fn, norm),
    }


def result(function: Any, inputs: Inputs) -> torch.Tensor:
    """The first output; states are not shared between calls."""
    copies = {k: v.clone() if "state" in k and torch.is_tensor(v) else v for k, v in inputs.items()}
    out = function(**copies)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", calls())
def test_autocast_lowers_nothing(name: str) -> None:
    function, inputs = calls()[name]
    expected = result(function, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = result(function, inputs)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_autocast_lowers_the_weights_of_the_fused_forms() -> None:
    options = ("D", "dt_bias", "outproj_weight", "outproj_bias")
    inputs = layer_cases.mamba_split_conv1d_scan(options=options) | {"chunk_size": 8}
    inputs["zxbcdt"] = inputs["zxbcdt"].bfloat16()
    with pytest.raises(RuntimeError, match="outproj_weight must be bfloat16"):
        mamba_split_conv1d_scan_combined(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert mamba_split_conv1d_scan_combined(**inputs).dtype == torch.bfloat16


def test_autocast_lowers_nothing_of_the_bare_kernels() -> None:
    scan = cases.selective_scan(options=("D", "z"))
    scan_args = [scan.get(k) for k in ("u", "delta", "A", "B", "C", "D", "z")]
    conv = cases.causal_conv1d()
    dy = torch.randn_like(conv["x"])

    def run() -> list[torch.Tensor]:
        ends = (None, None, None, False, False)
        return [
            *selective_scan_cuda.fwd(*scan_args, None, False),
            *selective_scan_cuda.bwd(*scan_args, None, torch.ones_like(scan["u"]), *ends),
            cpp_functions.causal_conv1d_fwd_function(conv["x"], conv["weight"], *[None] * 4, True),
            *cpp_functions.causal_conv1d_bwd_function(
                conv["x"], conv["weight"], None, dy, *[None] * 4, False, True
            )[:2],
        ]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("weights", HALVES)
def test_weights_of_another_dtype_for_the_bare_convolution(weights: torch.dtype) -> None:
    inputs = cases.causal_conv1d(options=("bias",))
    x, weight, bias = inputs["x"], inputs["weight"].to(weights), inputs["bias"].to(weights)
    wide = (x, weight.float(), bias.float())
    out = cpp_functions.causal_conv1d_fwd_function(x, weight, bias, None, None, None, True)
    close(out, cpp_functions.causal_conv1d_fwd_function(*wide, None, None, None, True), x.dtype)
    ends = (torch.ones_like(x), None, None, None, None, False, True)
    got, exact = (cpp_functions.causal_conv1d_bwd_function(*w, *ends) for w in ((x, weight, bias), wide))
    assert [g.dtype for g in got[:3]] == [x.dtype, weights, weights]
    for a, b in zip(got[:3], exact[:3], strict=True):
        close(a, b, torch.bfloat16)


@pytest.mark.parametrize("weights", HALVES)
@pytest.mark.parametrize("data", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal_conv1d_fn", "causal_conv1d_update", "rmsnorm_fn", "rms_norm_fn"])
def test_weights_of_another_dtype(name: str, data: torch.dtype, weights: torch.dtype) -> None:
    function, inputs = calls()[name]
    parameters = ("weight", "bias")
    rounded = {k: v.to(weights) for k, v in inputs.items() if k in parameters and v is not None}
    rounded |= {k: v.to(data) for k, v in inputs.items() if torch.is_tensor(v) and k not in parameters}
    got = result(function, inputs | rounded)
    wide = {k: v.float() for k, v in rounded.items()}
    assert got.dtype == data
    close(got, result(function, inputs | wide), data if data == torch.float32 else torch.bfloat16)
