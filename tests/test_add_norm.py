"""add_rms_norm against its formula, its gradients, and what torch expects of an operator."""

import re

import pytest
import torch
from torch import Tensor

import mamba_ops
from mamba_ops import reference
from tests import cases
from tests.cases import Inputs
from tests.compare import FEW

OPERATOR = "add_rms_norm"
HALF = (torch.bfloat16, torch.float16)
DTYPES = [(t, t) for t in (torch.float32, torch.float64, *HALF)] + [(t, torch.float32) for t in HALF]


def outcome(inputs: Inputs, dtype: torch.dtype | None = None, plain: bool = False) -> dict[str, Tensor]:
    """Outputs and gradients of the operator, or of the reference with every tensor in dtype on the CPU."""
    tensors = {k: v.detach() for k, v in inputs.items() if torch.is_tensor(v)}
    if dtype is not None:
        tensors = {k: v.to("cpu", dtype) for k, v in tensors.items()}
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    operator = reference.add_rms_norm if plain else mamba_ops.add_rms_norm
    y, total = operator(**inputs | leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16() for _ in range(2)]
    loss = [(y, weights[0].to(y)), (total, weights[1].to(total))]
    grads = torch.autograd.grad([t for t, _ in loss], list(leaves.values()), [w for _, w in loss])
    return {"y": y.detach(), "sum": total.detach()} | {
        f"grad {k}": g for k, g in zip(leaves, grads, strict=True)
    }


def check(inputs: Inputs) -> None:
    """Errors (2-norm) at most twice those of the reference in the inputs' own dtypes, and last bits.

    Four times for a result of few elements, where chance decides, as in tests/compare.py.
    """
    truth = outcome(inputs, torch.float64, plain=True)
    own = outcome({k: v.cpu() if torch.is_tensor(v) else v for k, v in inputs.items()}, plain=True)
    for name, got in outcome(inputs).items():
        assert got.shape == truth[name].shape and got.dtype == own[name].dtype, name
        if not got.numel():
            continue
        error, base = ((t.cpu().double() - truth[name]).norm() for t in (got, own[name]))
        last_bits = 4 * torch.finfo(torch.float32).eps + torch.finfo(got.dtype).eps / 2
        last_bits = last_bits if got.dtype != torch.float64 else 1e-14
        factor = 2 if got.numel() >= FEW else 4
        assert error <= factor * base + last_bits * truth[name].norm(), f"{name}: {error} against {base}"


@pytest.mark.parametrize("shape", [(1, 1), (7,), (3, 64), (70, 65), (2, 3, 40), (2, 9000), (300, 3)])
@pytest.mark.parametrize(("dtype", "residual"), DTYPES)
def test_follows_the_formula(
    device: str, dtype: torch.dtype, residual: torch.dtype, shape: tuple[int, ...]
) -> None:
    check(cases.add_rms_norm(*shape, dtype=dtype, residual=residual, device=device))


@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts_and_weights(device: str, layout: str, params: torch.dtype) -> None:
    kinds = {"dtype": torch.bfloat16, "residual": torch.float32, "params": params}
    check(cases.add_rms_norm(2, 5, 24, layout=layout, device=device, eps=1e-2, **kinds))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    check(cases.add_rms_norm(*shape, device=device))


def test_y_is_of_the_sum_as_stored(device: str) -> None:
    """In bfloat16 1 + 2**-9 is 1: the addition is lost to both outputs."""
    one = torch.ones(1, 8, device=device, dtype=torch.bfloat16)
    y, total = mamba_ops.add_rms_norm(one * 2**-9, one, one[0])
    assert torch.equal(total, one) and (y == one).all()


def test_nan_stays_in_its_row(device: str) -> None:
    inputs = cases.add_rms_norm(3, 40, device=device)
    inputs["x"][1, 7] = torch.nan
    y, total = mamba_ops.add_rms_norm(**inputs)
    assert y.isnan().all(dim=1).tolist() == [False, True, False] and total.isnan().sum() == 1


@pytest.mark.parametrize("kept", [0, 1])
def test_one_output_alone(device: str, kept: int) -> None:
    inputs = cases.add_rms_norm(3, 8, dtype=torch.float64, device=device)
    leaves = [t.requires_grad_() for t in inputs.values()]
    grads = [
        torch.autograd.grad(f(*leaves[:2], weight=leaves[2])[kept].sin().sum(), leaves, allow_unused=True)
        for f in (mamba_ops.add_rms_norm, reference.add_rms_norm)
    ]
    for got, expected in zip(*grads, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("isa", mamba_ops._C.cpu_isas())
def test_every_instruction_set(isa: str) -> None:
    before = mamba_ops._C.cpu_isa()
    mamba_ops._C.set_cpu_isa(isa)
    try:
        check(cases.add_rms_norm(9, 111, dtype=torch.bfloat16, residual=torch.float32))
        check(cases.add_rms_norm(9, 111))
    finally:
        mamba_ops._C.set_cpu_isa(before)


@pytest.mark.parametrize(("dtype", "residual"), [DTYPES[0], DTYPES[-1]])
def test_opcheck(dtype: torch.dtype, residual: torch.dtype) -> None:
    inputs = cases.add_rms_norm(3, 8, dtype=dtype, residual=residual)
    tensors = [t.requires_grad_() for t in inputs.values()]
    torch.library.opcheck(torch.ops.mamba_ops.add_rms_norm.default, (*tensors, 1e-5))


def test_a_second_backward_is_refused() -> None:
    leaves = [t.requires_grad_() for t in cases.add_rms_norm(3, 8).values()]
    grads = torch.autograd.grad(mamba_ops.add_rms_norm(*leaves)[0].sin().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grads[0].sum().backward()


def test_gradcheck() -> None:
    leaves = [t.requires_grad_() for t in cases.add_rms_norm(3, 5, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *t: mamba_ops.add_rms_norm(*t, eps=0.1), leaves)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.int32)}, "x must be float32 or bfloat16.*got int32"),
        ({"x": torch.tensor(1.0)}, "x must be (..., d), got a tensor without dims"),
        ({"residual": torch.zeros(3, 7)}, "residual must be shaped like x = (3, 8), got (3, 7)"),
        ({"residual": torch.zeros(3, 8).bfloat16()}, "residual must be float32, got bfloat16"),
        ({"weight": torch.zeros(7)}, "weight must be (d) = (8), got (7,)"),
        ({"weight": torch.zeros(8).half()}, "weight must be float32, got float16"),
        ({"eps": -1.0}, "eps must be >= 0, got -1"),
    ],
)
def test_bad_input(changes: Inputs, message: str) -> None:
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(RuntimeError, match="add_rms_norm: " + pattern):
        mamba_ops.add_rms_norm(**cases.add_rms_norm(3, 8) | changes)
