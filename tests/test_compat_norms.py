"""mamba_ssm's norms and activations as the stand-in has them, against plain torch."""

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mamba_ops import reference
from mamba_ops.compat.mamba_ssm.ops.triton import (
    k_activations,
    layer_norm,
    layernorm_gated,
)
from tests import cases
from tests.cases import Inputs
from tests.compat_check import close, dtypes, follows


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
