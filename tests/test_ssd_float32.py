"""ssd in float32: no value drowns in others, and products of TF32 where torch allows them, not elsewhere."""

from collections.abc import Iterator

import pytest
import torch

import mamba_ops
from mamba_ops import reference
from mamba_ops._library import torch_allows_tf32
from tests import cases, compare
from tests.compare import check, evaluate
from tests.test_ssd import TOKENS, WITHOUT_LIMIT

OPERATOR = "ssd"


def test_values_of_very_different_sizes(device: str) -> None:
    """In float32 no channel, token or state drowns in the rounding of others."""
    p, n = 33, 20
    inputs = cases.ssd(1, 150, 2, p, n, options=("dt_softplus", "return_final_state"), device=device)
    channels = 10 ** torch.linspace(-15, 15, p, device=device)
    columns = 10 ** torch.linspace(-2, 2, n, device=device)
    inputs["x"] = inputs["x"] * channels
    inputs["B"] = inputs["B"] * columns
    inputs["C"] = inputs["C"] / columns
    inputs["B"][:, ::7] *= 1e4
    inputs["C"][:, 1::5] *= 1e-12
    double = {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}
    for got, exact, sizes in zip(
        mamba_ops.ssd(**inputs), reference.ssd(**double), (channels, channels[:, None] * columns), strict=True
    ):
        error, exact = (got - exact) / sizes, exact / sizes
        for dim in range(exact.dim()):
            others = [k for k in range(exact.dim()) if k != dim]
            share = torch.linalg.vector_norm(error, dim=others) / torch.linalg.vector_norm(exact, dim=others)
            assert share.max() < 1e-5


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("n", [16, 128, 200])
def test_products_of_tf32(device: str, tf32: None, n: int) -> None:
    """Factors of 11 bits where torch allows them, and no fewer; on the CPU nothing changes."""
    inputs = cases.ssd(2, 150, 4, 64, n, options=WITHOUT_LIMIT, device=device)
    if device == "cpu":
        check(OPERATOR, inputs)
        return
    double = {k: v.double() if compare.is_float(v) else v for k, v in inputs.items()}
    truth = evaluate(reference.ssd, double, ("y", "final_state"), torch.float32)
    got = evaluate(mamba_ops.ssd, inputs, ("y", "final_state"))
    errors = {
        name: (torch.linalg.vector_norm(got[name] - exact) / torch.linalg.vector_norm(exact)).item()
        for name, exact in truth.items()
    }
    limits = {name: 1e-2 if name in compare.DIFFERENCES["ssd"] else 1e-3 for name in errors}
    assert all(errors[name] < limit for name, limit in limits.items()), errors
    assert all(errors[name] > 1e-5 for name in ("y", "final_state", "grad x", "grad B", "grad C")), errors


def test_compiled_code_follows_the_tf32_setting(tf32: None) -> None:
    compiled = torch.compile(lambda x: x + torch_allows_tf32(), fullgraph=True, backend="eager")
    for setting in ("tf32", "ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = setting
        assert compiled(torch.zeros(1)) == (setting == "tf32")


def test_tf32_is_the_setting_of_each_run(device: str, tf32: None) -> None:
    """The backward follows the setting of its own time; other dtypes do not follow it."""
    inputs = cases.ssd(1, 70, 2, 16, 32, options=WITHOUT_LIMIT, device=device)
    halves = cases.ssd(1, 70, 2, 16, 32, options=WITHOUT_LIMIT, dtype=torch.bfloat16, device=device)
    leaves = inputs | {name: inputs[name].requires_grad_() for name in TOKENS}

    def gradients(at: str, back: str) -> tuple[torch.Tensor, ...]:
        torch.backends.cuda.matmul.fp32_precision = at
        y, _ = mamba_ops.ssd(**leaves)
        torch.backends.cuda.matmul.fp32_precision = back
        return torch.autograd.grad(y.sum(), [leaves[name] for name in TOKENS])

    exact, rounded = gradients("ieee", "ieee"), gradients("tf32", "tf32")
    mixed = gradients("ieee", "tf32"), gradients("tf32", "ieee")
    assert all(torch.equal(a, b) for a, b in zip(mixed[0], rounded, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(mixed[1], exact, strict=True))
    assert torch.equal(exact[0], rounded[0]) == (device == "cpu")
    with torch.no_grad():
        half = mamba_ops.ssd(**halves)[0]
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert torch.equal(mamba_ops.ssd(**halves)[0], half)
