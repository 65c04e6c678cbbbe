"""The one assertion about numbers: no result is worse than twice the plain formula in the same dtype."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mamba_ops
from mamba_ops import reference
from tests.cases import Inputs, complex_of

# Relative error (2-norm) of every result; ten times that where the chunked form takes differences of sums.
LIMIT = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DIFFERENCES = {"ssd": ("grad A", "grad dt", "grad dt_bias")}
FEW = 16
UNDERFLOW = 1e-35  # no kernel computes an exponential below float32's normal numbers
EPS = torch.finfo(torch.float32).eps

Results = dict[str, Tensor]


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def dtype_of(inputs: Inputs) -> torch.dtype:
    """The dtype that names a case: that of the data."""
    data: Tensor = next(inputs[name] for name in ("u", "x", "xz", "zxbcdt") if name in inputs)
    return data.dtype


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs on the CPU, contiguous, real tensors in dtype, complex ones in its complex counterpart."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not is_float(value):
            return value.cpu()
        return value.detach().to("cpu", complex_of(dtype) if value.is_complex() else dtype).contiguous()

    return {name: one(value) for name, value in inputs.items()}


def clone_strided(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def evaluate(
    operator: Callable[..., Any], inputs: Inputs, loss: tuple[str, ...] = (), dtype: torch.dtype | None = None
) -> Results:
    """Outputs by name, for an update the state that it leaves, and the gradient of every float input.

    The loss is the sum of the outputs that it names, weighted by random numbers rounded to dtype (default:
    that of the inputs); without names there are no gradients.
    """
    leaves = {k: v.detach().requires_grad_(bool(loss)) for k, v in inputs.items() if is_float(v)}
    call = inputs | leaves
    if "state" in inputs:
        call["state"] = clone_strided(inputs["state"])
    out = operator(**call)
    outputs = out if isinstance(out, tuple) else (out,)
    names = ("y", "final_state") if len(outputs) < 3 else ("y", "conv_state", "final_state")
    results: Results = dict(zip(names, outputs, strict=False))
    if "state" in inputs:
        results["state"] = call["state"]
    summed = [name for name in loss if name in results]
    if summed:
        weights = [_weights(results[name], dtype or dtype_of(inputs)) for name in summed]
        sums = [results[name] for name in summed]
        grads = torch.autograd.grad(sums, list(leaves.values()), weights, materialize_grads=True)
        results |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def check(name: str, inputs: Inputs, loss: tuple[str, ...] = ("y", "final_state")) -> Results:
    """Asserts that the operator follows the reference in every output and gradient; returns its results.

    Truth is the reference in float64. The error of a result may be, in the 2-norm, twice that of the
    reference with every tensor in the inputs' dtype (ssd: the worse of its recurrent and chunked forms); four
    times in the maximum, and for a result of few elements, where chance decides. To that come last bits: the
    rounding of the result, and 4 to 8 eps of float32, as the float32 reference typically errs in this case.
    The relative 2-norm stays within LIMIT, or where cancellation keeps even the references above, within
    twice theirs. NaN never passes. Updates have no gradients.
    """
    dtype = dtype_of(inputs)
    loss = () if "state" in inputs else loss
    plain: Callable[..., Any] = getattr(reference, name)
    truth = evaluate(plain, cast(inputs, torch.float64), loss, dtype)
    forms = [plain, functools.partial(plain, form="chunked")] if name == "ssd" else [plain]
    base = [evaluate(form, cast(inputs, dtype), loss) for form in forms]
    single = base
    if dtype is not torch.float32:
        single = [evaluate(form, cast(inputs, torch.float32), loss, dtype) for form in forms]
    got = evaluate(getattr(mamba_ops, name), inputs, loss)
    assert got.keys() == truth.keys(), f"{name}: results {list(got)}, expected {list(truth)}"
    typical = sorted(_relative(single[0][key], truth[key]) for key in truth)[len(truth) // 2]
    faults = []
    for key, value in got.items():
        expected = _result_dtype(key, inputs)
        if value.dtype is not expected:
            faults.append(f"{key}: {value.dtype}, expected {expected}")
        limit = max(LIMIT[dtype], LIMIT.get(value.dtype, 0)) * (10 if key in DIFFERENCES.get(name, ()) else 1)
        references = [[results[key] for results in run] for run in (base, single)]
        faults += _faults(key, value, *references, truth[key], limit, typical)
    assert not faults, f"{name}: {describe(inputs)}\n  " + "\n  ".join(faults)
    return got


def describe(inputs: Inputs) -> str:
    def one(value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        if not is_float(value) and value.numel() <= 20:
            return str(value.tolist())
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind}{tuple(value.shape)}" + ("" if value.is_contiguous() else f" strides {value.stride()}")

    return ", ".join(f"{name} {one(value)}" for name, value in inputs.items())


def _weights(result: Tensor, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(result.dim())
    exact = torch.complex128 if result.is_complex() else torch.float64
    weights = torch.randn(result.shape, generator=generator, dtype=exact)
    return weights.to(complex_of(dtype) if result.is_complex() else dtype).to(result)


def _result_dtype(key: str, inputs: Inputs) -> torch.dtype:
    if key.removeprefix("grad ") in inputs:
        dtype: torch.dtype = inputs[key.removeprefix("grad ")].dtype
        return dtype
    dtype = dtype_of(inputs)
    if key == "final_state" and "weight" not in inputs:  # a recurrent state; a convolution's holds inputs
        dtype = torch.float64 if dtype is torch.float64 else torch.float32
        return complex_of(dtype) if inputs["A"].is_complex() else dtype
    return dtype


def _relative(got: Tensor, truth: Tensor) -> float:
    scale = torch.linalg.vector_norm(truth).item()
    return torch.linalg.vector_norm(got.to(truth.dtype) - truth).item() / scale if scale else 0.0


def _faults(
    key: str,
    got: Tensor,
    base: list[Tensor],
    single: list[Tensor],
    truth: Tensor,
    limit: float,
    typical: float,
) -> list[str]:
    if got.shape != truth.shape:
        return [f"{key}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"]
    if truth.numel() == 0:
        return []
    rounding = torch.finfo(got.dtype).eps / 2
    last_bits = rounding + min(max(typical, 4 * EPS), 8 * EPS)
    nothing = max(torch.finfo(got.dtype).smallest_normal * rounding, UNDERFLOW) * math.sqrt(truth.numel())
    faults = []
    for norm, size in (("maximum", torch.amax), ("2-norm", torch.linalg.vector_norm)):
        factor = 2 if norm == "2-norm" and truth.numel() >= FEW else 4

        def error_of(result: Tensor, size: Callable[[Tensor], Tensor] = size) -> float:
            return size((result.cpu().to(truth.dtype) - truth).abs()).item()

        error, scale = error_of(got), size(truth.abs()).item()
        bound, single_bound = max(map(error_of, base)), max(map(error_of, single))
        if base[0].dtype != truth.dtype and not error <= factor * bound + last_bits * scale + nothing:
            times = _ratio(error, bound)
            faults.append(f"{key}: {norm} of the error {error:.3g}, {times} x the reference's {bound:.3g}")
        if norm == "2-norm" and not error <= max(limit * scale, factor * max(bound, single_bound), nothing):
            faults.append(f"{key}: relative error {_ratio(error, scale)}, limit {limit:.0e}")
    return faults


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.3g}" if b else str(math.inf)
