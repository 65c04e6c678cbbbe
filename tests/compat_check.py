"""The stand-ins against plain torch: outputs, and the gradient of every float argument."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import Inputs
from tests.compare import LIMIT, cast, clone_strided, describe, is_float

dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float64))
layouts = st.sampled_from(("contiguous", "transposed", "padded", "projected"))
MUTATED = ("state", "conv_state")  # updated in place: compared as results


def run(function: Callable[..., Any], inputs: Inputs, gradients: bool) -> dict[str, Tensor]:
    """Outputs, states left in place, and gradients of the outputs' sum weighted by random numbers."""
    leaves = {k: v.detach().requires_grad_(gradients) for k, v in inputs.items() if is_float(v)}
    call = inputs | leaves
    for name in MUTATED:
        if name in inputs:
            call[name] = clone_strided(inputs[name])
    out = function(**call)
    outs = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if t is not None]
    results = {f"out {i}": t for i, t in enumerate(outs)}
    if gradients:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outs]
        wanted = {k: v for k, v in leaves.items() if k not in MUTATED}
        grads = torch.autograd.grad(outs, list(wanted.values()), weights, materialize_grads=True)
        results |= {f"grad {k}": g for k, g in zip(wanted, grads, strict=True)}
    return {k: t.detach() for k, t in results.items()} | {k: call[k].detach() for k in MUTATED if k in call}


def follows(
    stand_in: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Inputs,
    dtype: torch.dtype,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """Asserts that the stand-in's results are the plain function's in float64, to LIMIT[dtype] in the 2-norm.

    Where cancellation keeps even the plain function in dtype above that, to twice its error. Returns the
    stand-in's results.
    """
    truth = run(plain, cast(inputs, torch.float64), gradients)
    base = run(plain, cast(inputs, dtype), gradients)
    got = run(stand_in, inputs, gradients)
    assert got.keys() == truth.keys()
    for key, expected in truth.items():
        assert got[key].shape == expected.shape, key
        exact = torch.complex128 if expected.is_complex() else torch.float64

        def error(t: Tensor, exact: torch.dtype = exact, expected: Tensor = expected) -> float:
            return torch.linalg.vector_norm(t.cpu().to(exact) - expected).item()

        scale = torch.linalg.vector_norm(expected).item()
        limit = max(LIMIT[dtype], LIMIT.get(got[key].dtype, 0))
        bound = max(limit * scale, 2 * error(base[key]))
        assert error(got[key]) <= bound, f"{key}: {error(got[key])} > {bound} in {describe(inputs)}"
    return got


def subset(options: tuple[str, ...]) -> Any:
    return st.sets(st.sampled_from(options))


def renamed(inputs: Inputs, **names: str) -> Inputs:
    """With keys by upstream's names."""
    return {names.get(key, key): value for key, value in inputs.items()}


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    error = torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(b.float())
    assert error <= {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-6}[dtype]


def per_head(t: Tensor, *shape: int) -> Tensor:
    """One number a head, expanded with stride 0."""
    return t[(..., *[None] * len(shape))].expand(*t.shape, *shape)
