"""How an operator or a peer becomes something that can be checked and timed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import baselines

Inputs = dict[str, Any]
Results = dict[str, Tensor]
Run = Callable[[], Results]
Direction = Literal["forward", "both"]

OURS = "mamba_ops"
COPY = "copy of its bytes"


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work.

    Attributes:
        name: for people, and the key in the results.
        prepare: from the case's inputs to a call that does the work once and returns what it made, by name.
            It, or the first call, raises ImportError where a library is missing.
        longest: sequences longer than this are not tried; None: any.
    """

    name: str
    prepare: Callable[[Inputs], Run]
    longest: int | None = None


def peer(
    name: str,
    call: Callable[..., Tensor],
    direction: Direction,
    *,
    longest: int | None = None,
    layout: Literal["given", "contiguous"] = "given",
) -> Contender:
    """A function of the operator's arguments, timed forward, or forward and backward to every float input.

    A peer that would first copy its inputs to another layout gets them in that `layout`.
    """

    def prepare(inputs: Inputs) -> Run:
        if layout == "contiguous":
            inputs = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        return (_forward if direction == "forward" else _both)(call, inputs)

    return Contender(name, prepare, longest)


def compiled(
    name: str, call: Callable[..., Tensor], direction: Direction, *, longest: int | None = None
) -> Contender:
    """The same under torch.compile, for the case's shapes; on the CPU it needs a C++ compiler."""

    def prepare(inputs: Inputs) -> Run:
        return peer(name, torch.compile(call, dynamic=False), direction).prepare(inputs)

    return Contender(name, prepare, longest)


def operator(name: str, direction: Direction, path: str = "auto") -> Contender:
    """The operator of this package; `path`: the CUDA kernels that it may take."""

    def prepare(inputs: Inputs) -> Run:
        import mamba_ops
        from mamba_ops import _C

        call = peer(OURS, getattr(mamba_ops, name), direction).prepare(inputs)

        def run() -> Results:
            _C.set_cuda_path(path)
            try:
                return call()
            finally:
                _C.set_cuda_path("auto")

        return call if path == "auto" else run

    return Contender(OURS, prepare)


class Fresh:
    """A run that times itself: the milliseconds that Python code prints last, in a process of its own."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __call__(self) -> Results:
        return {}

    def milliseconds(self) -> float:
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run([sys.executable, "-c", self.code], capture_output=True, text=True, cwd=root)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
        return float(done.stdout.split()[-1])


def copy(n_bytes: int) -> Contender:
    """A copy on the GPU that reads and writes so many bytes together; there is nothing to check."""

    def prepare(inputs: Inputs) -> Run:
        source = torch.zeros(n_bytes // 2, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)

        def run() -> Results:
            target.copy_(source)
            return {}

        return run

    return Contender(COPY, prepare)


def updating(name: str, call: Callable[..., Tensor] | None = None) -> Contender:
    """A one-token update, ours by default, with a state of its own that it updates again and again."""

    def prepare(inputs: Inputs) -> Run:
        import mamba_ops

        function = call or getattr(mamba_ops, name)
        return _forward(function, {**inputs, "state": inputs["state"].clone()})

    return Contender(OURS if call is None else name, prepare)


def attention(l: int, device: str, dtype: torch.dtype, direction: Direction) -> Contender:
    """Causal attention with as many channels as a layer has, for the pictures; there is nothing to check."""
    h, p, longest = (24, 64, 8192) if device == "cpu" else (16, 128, 131072)

    def prepare(inputs: Inputs) -> Run:
        training = direction == "both"
        q, k, v = (torch.randn(1, h, l, p, dtype=dtype, device=device, requires_grad=training) for _ in "qkv")
        weights = torch.ones_like(q)

        def run() -> Results:
            with torch.set_grad_enabled(training):
                out = baselines.attention(q, k, v)
            if training:
                torch.autograd.grad(out, (q, k, v), weights)
            return {}

        return run

    return Contender("attention in torch", prepare, longest)


def _forward(call: Callable[..., Tensor], inputs: Inputs) -> Run:
    def run() -> Results:
        with torch.no_grad():
            return {"y": call(**inputs)}

    return run


def _both(call: Callable[..., Tensor], inputs: Inputs) -> Run:
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    like_y = inputs["u" if "u" in inputs else "x"]
    generator = torch.Generator(like_y.device).manual_seed(1)
    exact_in_any_dtype = {"dtype": torch.bfloat16, "device": like_y.device}
    drawn = torch.randn(like_y.shape, generator=generator, **exact_in_any_dtype)
    weights = torch.empty_like(like_y).copy_(drawn)

    def run() -> Results:
        y = call(**{**inputs, **leaves})
        grads = torch.autograd.grad(y, list(leaves.values()), weights)
        return {"y": y.detach(), **{f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}}

    return run
