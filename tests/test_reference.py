"""Identities that need no reference, in float64: of the reference itself and of the kernels."""

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mamba_ops
from mamba_ops import reference
from tests import cases
from tests.cases import CONV_OPTIONS, SCAN_OPTIONS, SSD_OPTIONS, Inputs
from tests.compare import check, evaluate

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
STATES = ("initial_state", "return_final_state")
TOKENS = {
    "selective_scan": (-1, ("u", "delta", "B", "C", "z", "seq_idx")),
    "ssd": (1, ("x", "dt", "B", "C", "z", "seq_idx")),
    "causal_conv1d": (-1, ("x", "seq_idx")),
}


@pytest.fixture(params=[reference, mamba_ops], ids=["reference", "kernels"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def slice_tokens(name: str, inputs: Inputs, begin: int, end: int) -> Inputs:
    dim, names = TOKENS[name]
    return inputs | {k: inputs[k].movedim(dim, 0)[begin:end].movedim(0, dim) for k in names if k in inputs}


def whole_options(name: str) -> Inputs:
    if name == "selective_scan":
        return cases.selective_scan(l=70, groups=(2, None), options=SCAN_OPTIONS, **DOUBLE)
    if name == "ssd":
        return cases.ssd(l=150, groups=(2, 1), options=SSD_OPTIONS, **DOUBLE)
    return cases.causal_conv1d(l=70, options=CONV_OPTIONS, **DOUBLE)


# Forms and special cases


@pytest.mark.parametrize("chunk_size", [1, 6, 64, 70])
@pytest.mark.parametrize("pack", cases.PACKS)
@pytest.mark.parametrize("form", ["quadratic", "chunked"])
def test_three_forms_are_equal(form: str, pack: str | None, chunk_size: int) -> None:
    b = 1 if pack == "cu_seqlens" else 2
    inputs = cases.ssd(b, 70, groups=(2, 4), options=SSD_OPTIONS, pack=pack, chunk_size=chunk_size, **DOUBLE)
    expected = evaluate(reference.ssd, inputs, ("y", "final_state"))
    got = evaluate(lambda **kw: reference.ssd(form=form, **kw), inputs, ("y", "final_state"))
    for key in expected:
        same(got[key], expected[key])


def test_scan_is_a_matrix() -> None:
    """y_i = Σ_{j<=i} C_i·exp(A Σ_{i>=t>j} Δ_t) B_j Δ_j u_j, written out."""
    inputs = cases.selective_scan(2, 6, 9, 4, groups=(2, 3), **DOUBLE)
    u, delta, A = inputs["u"], inputs["delta"], inputs["A"]
    B, C = inputs["B"].repeat_interleave(3, 1), inputs["C"].repeat_interleave(2, 1)
    expected = torch.zeros_like(u)
    for i in range(9):
        for j in range(i + 1):
            decay = torch.exp(A * delta[:, :, j + 1 : i + 1].sum(-1)[..., None])
            expected[..., i] += (C[..., i] * decay * B[..., j]).sum(-1) * delta[..., j] * u[..., j]
    same(reference.selective_scan(**inputs), expected)


def test_ssd_with_heads_of_one_channel_is_a_scan_with_shared_rates(ops: ModuleType) -> None:
    inputs = cases.ssd(
        2, 70, 6, 1, 5, groups=(2, 2), options=("initial_state", "return_final_state"), **DOUBLE
    )
    y, state = ops.ssd(**inputs)
    scan_y, scan_state = ops.selective_scan(
        inputs["x"][..., 0].mT,
        inputs["dt"].mT,
        inputs["A"][:, None].expand(6, 5),
        inputs["B"].permute(0, 2, 3, 1),
        inputs["C"].permute(0, 2, 3, 1),
        initial_state=inputs["initial_state"][:, :, 0],
        return_final_state=True,
    )
    same(scan_y.mT, y[..., 0])
    same(scan_state, state[:, :, 0])


def test_ssd_is_a_scan_with_repeated_steps_and_rates(ops: ModuleType) -> None:
    inputs = cases.ssd(2, 70, 4, 3, 5, groups=(2, 2), options=("D", "dt_bias", "dt_softplus", "z"), **DOUBLE)
    y = ops.ssd(**inputs)
    scan_y = ops.selective_scan(
        inputs["x"].flatten(2).mT,
        inputs["dt"].repeat_interleave(3, 2).mT,
        inputs["A"].repeat_interleave(3)[:, None].expand(12, 5),
        inputs["B"].permute(0, 2, 3, 1),
        inputs["C"].permute(0, 2, 3, 1),
        inputs["D"].repeat_interleave(3),
        inputs["z"].flatten(2).mT,
        inputs["dt_bias"].repeat_interleave(3),
        True,
    )
    same(scan_y.mT.reshape(y.shape), y)


@pytest.mark.parametrize("complex_A", [False, True])
def test_a_time_invariant_scan_is_a_convolution(ops: ModuleType, complex_A: bool) -> None:
    """y = K * u with K_t = κ Re(C·exp(tΔA) Δ B), by FFT."""
    inputs = cases.selective_scan(2, 6, 70, 4, groups=(0, 0), complex_A=complex_A, **DOUBLE)
    inputs["delta"] = torch.full_like(inputs["delta"], 0.3)
    A, B, C, u = (inputs[name] for name in "ABCu")
    t = torch.arange(70, dtype=torch.float64)
    kernel = (C * 0.3 * B * torch.exp(0.3 * A * t[:, None, None])).sum(-1).T
    kernel = 2 * kernel.real if complex_A else kernel
    expected = torch.fft.irfft(torch.fft.rfft(u, 140) * torch.fft.rfft(kernel, 140), 140)[..., :70]
    same(ops.selective_scan(**inputs), expected)


def test_conv_is_the_convolution_of_torch(ops: ModuleType) -> None:
    inputs = cases.causal_conv1d(2, 6, 70, 4, options=("bias",), **DOUBLE)
    padded = F.pad(inputs["x"], (3, 0))
    expected = F.conv1d(padded, inputs["weight"][:, None], inputs["bias"], groups=6)
    same(ops.causal_conv1d(**inputs), expected)


def test_norm_is_the_norm_of_torch(ops: ModuleType) -> None:
    inputs = cases.rms_norm_gated(5, 24, eps=1e-3, **DOUBLE)
    x, z, weight = inputs["x"], inputs["z"], inputs["weight"]
    same(ops.rms_norm_gated(x, weight, eps=1e-3), F.rms_norm(x, (24,), weight, 1e-3))
    same(ops.rms_norm_gated(x, weight, z, eps=1e-3), F.rms_norm(x * F.silu(z), (24,), weight, 1e-3))
    before = ops.rms_norm_gated(x, weight, z, eps=1e-3, norm_before_gate=True)
    same(before, F.rms_norm(x, (24,), weight, 1e-3) * F.silu(z))


# States


@pytest.mark.parametrize("seq_idx", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 33, 64])
@pytest.mark.parametrize("name", TOKENS)
def test_two_parts_with_the_state_passed_equal_the_whole(
    ops: ModuleType, name: str, cut: int, seq_idx: bool
) -> None:
    inputs = whole_options(name)
    operator, dim = getattr(ops, name), TOKENS[name][0]
    if seq_idx:  # runs end before, at and after the cut, but a run may not begin in the second part unseen
        l = inputs["u" if name == "selective_scan" else "x"].shape[dim]
        inputs["seq_idx"] = (torch.arange(l) // 5).expand(2, -1).clone()
        inputs["seq_idx"][:, cut] = inputs["seq_idx"][:, cut - 1]
    y, state = operator(**inputs)
    first, middle = operator(**slice_tokens(name, inputs, 0, cut))
    second, last = operator(**slice_tokens(name, inputs, cut, 10**9) | {"initial_state": middle})
    same(torch.cat([first, second], dim), y)
    same(last, state)


@pytest.mark.parametrize("name", TOKENS)
def test_prefill_then_steps_equal_the_whole(ops: ModuleType, name: str) -> None:
    update = {
        "selective_scan": "selective_state_update",
        "ssd": "ssd_state_update",
        "causal_conv1d": "causal_conv1d_update",
    }[name]
    inputs = slice_tokens(name, whole_options(name), 0, 70)
    dim, names = TOKENS[name]
    y, final = getattr(ops, name)(**inputs)
    _, state = getattr(ops, name)(**slice_tokens(name, inputs, 0, 60))
    rest = {k: v for k, v in slice_tokens(name, inputs, 60, 70).items() if k not in STATES}
    for t in range(10):
        token = {k: rest[k].select(dim, t).contiguous() for k in names if k in rest}
        same(getattr(ops, update)(state=state, **rest | token), y.select(dim, 60 + t))
    same(state, final)


@pytest.mark.parametrize("name", ["selective_scan", "ssd"])
def test_affine_in_the_initial_state(ops: ModuleType, name: str) -> None:
    inputs = {k: v for k, v in whole_options(name).items() if k not in ("z", "D")}
    S, R = inputs["initial_state"], torch.randn_like(inputs["initial_state"])
    at_zero, at_S, at_R, mixed = (
        getattr(ops, name)(**inputs | {"initial_state": state}) for state in (0 * S, S, R, 2 * S - 3 * R)
    )
    for i in range(2):
        same(mixed[i] - at_zero[i], 2 * (at_S[i] - at_zero[i]) - 3 * (at_R[i] - at_zero[i]))


@pytest.mark.parametrize("name", ["selective_scan", "ssd"])
def test_a_step_of_zero_keeps_the_state_and_may_be_deleted(ops: ModuleType, name: str) -> None:
    step = "delta" if name == "selective_scan" else "dt"
    make = cases.selective_scan if name == "selective_scan" else cases.ssd
    inputs = make(l=70, options=STATES, **DOUBLE)
    dim = TOKENS[name][0]
    _, state = getattr(ops, name)(**inputs | {step: 0 * inputs[step]})
    same(state, inputs["initial_state"])
    keep = torch.rand(70) > 0.5
    mask = keep[:, None] if name == "ssd" else keep
    y, state = getattr(ops, name)(**inputs | {step: inputs[step] * mask})
    kept = {k: inputs[k].index_select(dim, keep.nonzero()[:, 0]) for k in TOKENS[name][1] if k in inputs}
    y_kept, state_kept = getattr(ops, name)(**inputs | kept)
    same(y.index_select(dim, keep.nonzero()[:, 0]), y_kept)
    same(state, state_kept)


def test_permuting_heads_of_a_group_permutes_outputs(ops: ModuleType) -> None:
    inputs = cases.ssd(l=70, groups=(2, 2), options=SSD_OPTIONS, **DOUBLE)
    order = torch.tensor([1, 0, 3, 2])
    y, state = ops.ssd(**inputs)
    permuted = {k: inputs[k][:, :, order] for k in ("x", "dt", "z")}
    permuted |= {k: inputs[k][order] for k in ("A", "D", "dt_bias")}
    y_p, state_p = ops.ssd(**inputs | permuted | {"initial_state": inputs["initial_state"][:, order]})
    same(y_p, y[:, :, order])
    same(state_p, state[:, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TOKENS)
def test_the_future_leaves_the_past_bitwise_unchanged(name: str, dtype: torch.dtype) -> None:
    inputs = {k: v.to(dtype) if k in TOKENS[name][1] else v for k, v in whole_options(name).items()}
    if name == "causal_conv1d":
        inputs["initial_state"] = inputs["initial_state"].to(dtype)
    inputs = {
        k: v.float() if torch.is_tensor(v) and v.dtype is torch.float64 else v for k, v in inputs.items()
    }
    dim, names = TOKENS[name]
    y = getattr(mamba_ops, name)(**inputs)[0]
    for k in names:
        if k in inputs:
            inputs[k] = inputs[k].clone()
            inputs[k].narrow(dim, 41, inputs[k].shape[dim] - 41).mul_(1.5)
    changed = getattr(mamba_ops, name)(**inputs)[0]
    assert torch.equal(changed.narrow(dim, 0, 41), y.narrow(dim, 0, 41))
    assert not torch.equal(changed, y)


# Gradients


def test_time_reversal(ops: ModuleType) -> None:
    """The gradient of X = Δ x is the scan of the gradient of y in reverse, with B and C exchanged."""
    inputs = cases.ssd(l=70, groups=(2, 4), options=STATES, **DOUBLE)
    x, dt, A = inputs["x"].requires_grad_(), inputs["dt"], inputs["A"]
    S0 = inputs["initial_state"].requires_grad_()
    y, S = ops.ssd(**inputs)
    gy, gS = torch.randn_like(y), torch.randn_like(S)
    gx, gS0 = torch.autograd.grad([y, S], [x, S0], [gy, gS])
    # Reversed step 0 keeps the state gS + gy Cᵀ (step size 0); the others decay by the token that follows.
    later = torch.cat([torch.zeros_like(dt[:, :1]), dt.flip(1)[:, :-1]], 1)
    go = gy.flip(1) / torch.cat([torch.ones_like(dt[:, :1]), later[:, 1:]], 1)[..., None]
    last = gS + gy[:, -1, :, :, None] * inputs["C"][:, -1].unsqueeze(2)
    gX, end = ops.ssd(
        go, later, A, inputs["C"].flip(1), inputs["B"].flip(1), initial_state=last, return_final_state=True
    )
    same(gX.flip(1) * dt[..., None], gx)
    same(torch.exp(dt[:, 0] * A)[..., None, None] * end, gS0)


@pytest.mark.parametrize("name", ["selective_scan", "ssd"])
def test_scaling_and_adjoint_identities(ops: ModuleType, name: str) -> None:
    """B against C, Δ against A and x, x with the state: a scaling that changes nothing ties gradients."""
    if name == "ssd":
        inputs, x, step = cases.ssd(l=70, groups=(2, 1), options=("D", *STATES), **DOUBLE), "x", "dt"
        D = inputs["D"][:, None]
    else:
        inputs, x, step = cases.selective_scan(l=70, options=("D", *STATES), **DOUBLE), "u", "delta"
        D = inputs["D"][:, None]
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if torch.is_tensor(v)}
    y, S = getattr(ops, name)(**inputs)
    gy, gS = torch.randn_like(y), torch.randn_like(S)
    g = dict(zip(leaves, torch.autograd.grad([y, S], list(leaves.values()), [gy, gS]), strict=True))
    without_skip = dot(g[x] - D * gy, inputs[x])
    state_in, state_out = dot(g["initial_state"], inputs["initial_state"]), dot(gS, S)
    same(dot(g["B"], inputs["B"]) + state_in, dot(g["C"], inputs["C"]) + state_out)
    same(dot(g[step], inputs[step]), dot(g["A"], inputs["A"]) + without_skip)
    same(without_skip + state_in, dot(gy, y - D * inputs[x]) + state_out)


def test_conv_is_linear_in_inputs_and_in_taps(ops: ModuleType) -> None:
    """<gy, y> + <gS, S> = <gx, x> + <gS0, S0>, and without the final state = <gW, W>."""
    inputs = cases.causal_conv1d(2, 6, 70, 4, options=STATES, **DOUBLE)
    x, S0, W = (inputs[k].requires_grad_() for k in ("x", "initial_state", "weight"))
    y, S = ops.causal_conv1d(**inputs)
    gy, gS = torch.randn_like(y), torch.randn_like(S)
    gx, gS0, gW = torch.autograd.grad([y, S], [x, S0, W], [gy, gS])
    same(dot(gx, x) + dot(gS0, S0), dot(gy, y) + dot(gS, S))
    same(dot(gW, W), dot(gy, y))


def test_norm_does_not_see_the_scale_of_a_group(ops: ModuleType) -> None:
    inputs = cases.rms_norm_gated(5, 24, group_size=8, eps=0.0, gate=False, **DOUBLE)
    x = inputs["x"].requires_grad_()
    y = ops.rms_norm_gated(**inputs)
    scale = torch.rand(5, 3, 1, dtype=torch.float64) + 0.5
    same(ops.rms_norm_gated(**inputs | {"x": (x.view(5, 3, 8) * scale).reshape(5, 24)}), y)
    (gx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    same((gx * x).view(5, 3, 8).sum(-1), torch.zeros(5, 3, dtype=torch.float64))


# The comparison


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda y: y * 1.001, "y: relative error"),
        (lambda y: y + (torch.arange(y.numel()).view(y.shape) == 7) * 1e-4, "y: maximum of the error"),
        (
            lambda y: y.masked_fill(torch.arange(y.numel()).view(y.shape) == 7, float("nan")),
            "y: maximum.* nan",
        ),
        (lambda y: y.double(), "y: torch.float64"),
        (lambda y: y[..., :-1], "y: shape"),
        (lambda y: y + (y - y.detach()) * 1e-3, "grad x: relative error"),
        (lambda y: y.masked_fill(torch.arange(y.numel()).view(y.shape) == 7, 0) + 0 * y, "grad weight"),
    ],
)
def test_the_comparison_sees(fault: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = cases.causal_conv1d()
    check("causal_conv1d", inputs)
    monkeypatch.setattr(mamba_ops, "causal_conv1d", lambda **kw: fault(reference.causal_conv1d(**kw)))
    with pytest.raises(AssertionError, match=words):
        check("causal_conv1d", inputs)
