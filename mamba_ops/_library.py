"""What the operator modules share: autocast registration and small argument helpers."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

_library = torch.library.Library("mamba_ops", "FRAGMENT")  # type: ignore[no-untyped-call]


def register_autocast(name: str, positions: Iterable[int]) -> None:
    """Under ``torch.autocast`` casts the arguments at `positions` to its dtype; the others keep theirs.

    ``torch.library.register_autocast`` would cast every argument, decay rates and states included.
    """
    op = getattr(torch.ops.mamba_ops, name).default
    chosen = frozenset(positions)

    def register(device: str) -> None:
        def kernel(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = [_lower(a, dtype) if i in chosen else a for i, a in enumerate(args)]
            with torch.autocast(device, enabled=False):
                return op(*cast)

        _library.impl(name, kernel, f"Autocast{device.upper()}")  # type: ignore[no-untyped-call]

    register("cpu")
    register("cuda")


def _lower(arg: Any, dtype: torch.dtype) -> Any:
    if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64:
        return arg.to(dtype)
    return arg


def register_fake(name: str) -> Callable[[F], F]:
    """Registers the decorated function as the shapes, dtypes and layouts that operator `name` returns."""

    def register(function: F) -> F:
        @functools.wraps(function)
        def fake(*args: Any) -> Any:
            devices = {arg.device for arg in args if isinstance(arg, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{name}: tensors must be on one device, got {sorted(map(str, devices))}")
            return function(*args)

        torch.library.register_fake(f"mamba_ops::{name}", fake)
        return function

    return register


def register_autograd(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Makes operator `name` differentiable, by functions as for ``torch.library.register_autograd``.

    The wrapper of that one reads the schema again in every call, which takes longer than a small operator.
    """
    op = getattr(torch.ops.mamba_ops, name).default

    def below(keyset: Any, args: Iterable[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        output = below(keyset, inputs)
        setup_context(ctx, inputs, output)
        return output

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*backward(ctx, *grads), None)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args, keyset)
        return below(keyset, args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def register_once_differentiable(name: str) -> None:
    """Makes differentiating the backward operator `name` an error; torch would drop the result silently."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: the operators of mamba_ops are once differentiable (no double backward)")

    register_autograd(name, lambda *_: None, refuse)


def state_as(op: str, state: Tensor, dtype: torch.dtype) -> Tensor:
    """The initial state in the dtype of the arithmetic."""
    if not (state.is_floating_point() or (state.is_complex() and dtype.is_complex)):
        kinds = "floating-point or complex" if dtype.is_complex else "floating-point"
        raise TypeError(f"{op}: initial_state must be {kinds}, got {state.dtype}")
    return state.to(dtype)


def step_limits(op: str, dt_limit: Sequence[float]) -> tuple[float, float]:
    """dt_limit as two numbers; the operators check their order."""
    try:
        low, high = dt_limit
        return float(low), float(high)
    except (TypeError, ValueError):
        raise ValueError(f"{op}: dt_limit must be (low, high), got {dt_limit!r}") from None


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allows_tf32(data: Tensor) -> bool:
    """Whether products of `data` may be of TF32: torch's setting for float32 matrices on CUDA."""
    return data.dtype == torch.float32 and data.is_cuda and torch_allows_tf32()


# Dynamo cannot trace this, but compiles anew where the setting has changed.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def torch_allows_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def is_silu(op: str, activation: str | None) -> bool:
    """True for "silu" and its other name "swish", False for None; anything else is refused."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'{op}: activation must be None, "silu" or "swish", got {activation!r}')
    return activation is not None


def state_rows(b: int, cu_seqlens: Tensor | None) -> int:
    """Rows of the states of a call: one per batch row, or per packed sequence."""
    return b if cu_seqlens is None else cu_seqlens.shape[0] - 1


def grad_like(argument: Tensor | None, like: Tensor) -> Tensor:
    """The gradient that a backward operator's fake returns for an argument: 0 elements for an absent one."""
    return like.new_empty(0) if argument is None else torch.empty_like(argument)


def kept(
    grads: Iterable[Tensor], arguments: Iterable[Tensor | None], needed: Iterable[bool]
) -> Iterator[Tensor | None]:
    """What a backward operator returned, as autograd takes it: None for absent arguments."""
    wanted = zip(grads, arguments, needed, strict=False)
    return (grad if given is not None and need else None for grad, given, need in wanted)
