"""``python -m mamba_ops doctor``: what is installed, what runs here, what to do about what is missing."""

from __future__ import annotations

import importlib.util
import platform
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mamba_ops
from mamba_ops import _C

EXTRAS = {"safetensors": "train", "tqdm": "train", "matplotlib": "train", "transformers": "test"}
SIZES = {
    "causal_conv1d": {"b": 1, "d": 1536, "l": 2048, "w": 4},
    "selective_scan": {"b": 1, "d": 1536, "l": 2048, "n": 16},
    "ssd": {"b": 1, "l": 2048, "h": 24, "p": 64, "n": 128},
    "rms_norm_gated": {"b": 1, "l": 2048, "d": 1536},
    "add_rms_norm": {"b": 1, "l": 2048, "d": 768},
    "causal_conv1d_update": {"b": 1, "d": 1536, "w": 4},
    "selective_state_update": {"b": 1, "d": 1536, "n": 16},
    "ssd_state_update": {"b": 1, "h": 24, "p": 64, "n": 128},
}


def add_arguments(parser: ArgumentParser) -> None:
    """The command has no options."""


def run(options: Namespace) -> int:
    """Prints the report; returns 1 if an operator does not give the reference's result, else 0."""
    build, advice = mamba_ops.build_info(), []
    print(f"mamba_ops {mamba_ops.__version__}")
    print(f"  Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}")
    print(f"  built with {build['compiler']} on the stable ABI of {build['stable_abi']}")
    isas = _C.cpu_isas()
    print(
        f"CPU\n  {torch.get_num_threads()} threads; kernels for {_C.cpu_isa()}, "
        f"of {', '.join(isas)} that run here"
    )
    if _C.cpu_isa() != isas[-1]:
        advice.append(
            f"the CPU can run {isas[-1]}: unset MAMBA_OPS_CPU_ISA, or call mamba_ops._C.set_cpu_isa"
        )

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    print(
        "GPU\n  "
        + ("; ".join(f"{g.name} (sm_{g.major}{g.minor})" for g in gpus) or "none that torch can see")
    )
    print(f"  CUDA kernels: {_cuda_text(build)}")
    if gpus and not build.get("cuda"):
        advice.append(
            "torch sees a GPU, but this build has no CUDA kernels: install with nvcc on PATH, or with "
            "MAMBA_OPS_WITH_CUDA=WHEEL, which takes nvcc from PyPI"
        )
    if not gpus and torch.version.cuda is None:
        advice.append(
            "this torch is built without CUDA: for a GPU install another torch, then mamba_ops again"
        )

    devices = ["cpu"] + (["cuda"] if gpus and build.get("cuda") else [])
    wrong = [name for device in devices for name in _operators(device)]
    if wrong:
        advice.append(f"no right results from {', '.join(wrong)}: reinstall, and report it with this output")
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    present = [name for name in EXTRAS if name not in missing]
    print("optional packages\n  " + (f"found: {', '.join(present)}" if present else "none found"))
    for extra in sorted({EXTRAS[name] for name in missing}):
        names = ", ".join(name for name in missing if EXTRAS[name] == extra)
        advice.append(f"{names} not installed: pip install 'mamba_ops[{extra}]'")
    print("to do\n  " + ("\n  ".join(advice) or "nothing: all is well"))
    return 1 if wrong else 0


def _cuda_text(build: dict[str, str]) -> str:
    if build.get("cuda"):
        return f"CUDA {build['cuda']}, for {build.get('cuda_architectures', 'unknown targets')}"
    return f"none ({build.get('without_cuda_because', 'built without CUDA')})"


def _operators(device: str) -> list[str]:
    """Prints what each operator would run on the device, and returns those whose result is wrong."""
    print(f"operators on {device} (sizes of a 768-wide layer, float32)")
    wrong = []
    for name, sizes in SIZES.items():
        plan = mamba_ops.plan(name, device, torch.float32, **sizes)
        text = ", ".join([plan.pop("kernel"), *(f"{key} {value}" for key, value in plan.items())])
        try:
            verdict = "right" if _agrees(name, device) else "WRONG"
        except RuntimeError as error:
            verdict, text = "FAILED", " ".join(str(error).split())
        if verdict != "right":
            wrong.append(f"{name} on {device}")
        print(f"  {name:24}{verdict:8}{text}")
    return wrong


def _agrees(name: str, device: str) -> bool:
    """Whether an operator gives the reference's result on a small float64 example."""
    expected = _call(getattr(mamba_ops.reference, name), name, "cpu")
    got = _call(getattr(mamba_ops, name), name, device)
    return all(torch.allclose(a.cpu(), b, rtol=1e-9, atol=1e-9) for a, b in zip(got, expected, strict=True))


def _call(function: Callable[..., Any], name: str, device: str) -> list[Tensor]:
    """The function's result, and the state that it updates, on fixed small inputs."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(device)

    b, d, l, n, h, p = 2, 8, 5, 3, 2, 4  # noqa: E741
    if name == "causal_conv1d":
        return [function(tensor(b, d, l), tensor(d, 4), tensor(d), "silu")]
    if name == "selective_scan":
        return [function(tensor(b, d, l), tensor(b, d, l), -tensor(d, n), tensor(b, n, l), tensor(b, n, l))]
    if name == "ssd":
        return [
            function(tensor(b, l, h, p), tensor(b, l, h), -tensor(h), tensor(b, l, 1, n), tensor(b, l, 1, n))
        ]
    if name == "rms_norm_gated":
        return [function(tensor(b, l, d), tensor(d), tensor(b, l, d))]
    if name == "add_rms_norm":
        return list(function(tensor(b, l, d), tensor(b, l, d), tensor(d)))
    if name == "causal_conv1d_update":
        state = tensor(b, d, 3)
        return [function(tensor(b, d), state, tensor(d, 4), tensor(d), "silu"), state]
    if name == "selective_state_update":
        state = tensor(b, d, n)
        return [function(state, tensor(b, d), tensor(b, d), -tensor(d, n), tensor(b, n), tensor(b, n)), state]
    state = tensor(b, h, p, n)
    return [
        function(state, tensor(b, h, p), tensor(b, h), -tensor(h), tensor(b, 1, n), tensor(b, 1, n)),
        state,
    ]
