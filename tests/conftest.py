"""What every test stands on: devices, NaN in uninitialised memory, a fixed seed, a known thread count."""

import functools
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import mamba_ops
from mamba_ops import _C
from tests import cases

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs in deterministic mode
settings.register_profile("mamba_ops", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("mamba_ops")


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    """Deterministic mode fills torch.empty with NaN: an element that a kernel leaves out cannot pass."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@functools.cache
def missing_device(operator: str, device: str) -> str | None:
    """Why the operator cannot run on the device here, or None."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no GPU"
    inputs = cases.rms_norm_gated(2, 8) if operator == "rms_norm_gated" else getattr(cases, operator)()
    try:
        getattr(mamba_ops, operator)(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in inputs.items()})
    except RuntimeError as error:
        if "built without CUDA" in str(error):
            return str(error)
        raise
    return None


@pytest.fixture
def large_gpu(request: pytest.FixtureRequest) -> str:
    """A GPU with room for tensors of more than 2**31 elements; torch.empty no longer fills them."""
    reason = missing_device(request.module.OPERATOR, "cuda")
    if reason is None:
        torch.cuda.empty_cache()
    if reason is None and torch.cuda.mem_get_info()[0] < 40 << 30:
        reason = "needs 40 GiB of GPU memory"
    if reason:
        pytest.skip(reason)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return "cuda"


# A call that takes an operator's fast CUDA kernels, where it has some for the GPU.
FAST = {"selective_scan": {"d": 64, "l": 64, "n": 16}, "ssd": {"b": 4, "l": 4096, "h": 80, "p": 64, "n": 128}}


@pytest.fixture(params=["cpu", "cuda", "cuda portable"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each device that the operator of the test file (its OPERATOR) can run on; a GPU also by its portable
    kernels, where the operator has others."""
    operator = request.module.OPERATOR
    name, _, path = request.param.partition(" ")
    reason = missing_device(operator, name)
    if not reason and path:
        plan = mamba_ops.plan(operator, "cuda", torch.bfloat16, **FAST.get(operator, {}))
        if {text for text in plan.values() if text.startswith("cuda ")} <= {"cuda portable"}:
            reason = "no other kernels"
    if reason:
        pytest.skip(reason)
    _C.set_cuda_path(path or "auto")
    yield name
    _C.set_cuda_path("auto")
