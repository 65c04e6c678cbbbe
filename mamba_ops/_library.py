"""What the operator modules share: autocast registration and small argument helpers."""

from collections.abc import Callable, Iterable
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
        torch.library.register_fake(f"mamba_ops::{name}", function)
        return function

    return register


def define(schema: str, function: Callable[..., Any]) -> Any:
    """Defines an operator that `function` computes out of other operators, on every device and for fakes."""
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mamba_ops::{name}", function)
    return getattr(torch.ops.mamba_ops, name).default


def register_once_differentiable(name: str) -> None:
    """Makes differentiating the backward operator `name` an error; torch would drop the result silently."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: the operators of mamba_ops are once differentiable (no double backward)")

    torch.library.register_autograd(f"mamba_ops::{name}", refuse)


def state_as(op: str, state: Tensor, dtype: torch.dtype) -> Tensor:
    """The initial state in the dtype of the arithmetic."""
    if not (state.is_floating_point() or state.is_complex()):
        raise TypeError(f"{op}: initial_state must be floating-point, got {state.dtype}")
    return state.to(dtype)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_silu(op: str, activation: str | None) -> bool:
    """True for "silu" and its other name "swish", False for None; anything else is refused."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f'{op}: activation must be None, "silu" or "swish", got {activation!r}')
    return activation is not None


def state_rows(b: int, cu_seqlens: Tensor | None) -> int:
    """Rows of the states of a call: one per batch row, or per packed sequence."""
    return b if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_shape(op: str, name: str, tensor: Tensor, letters: str, *sizes: int | None) -> None:
    """Raises unless `tensor` has these sizes (None: any); letters: their names, such as "(b, l, d)"."""
    if tensor.dim() == len(sizes) and all(
        want is None or have == want for have, want in zip(tensor.shape, sizes, strict=True)
    ):
        return
    names = letters.strip("()").split(", ")
    wanted = ", ".join(n if s is None else str(int(s)) for n, s in zip(names, sizes, strict=True))
    raise RuntimeError(f"{op}: {name} must be {letters} = ({wanted}), got {tuple(tensor.shape)}")


def check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises unless `tensor` has this dtype."""
    if tensor.dtype != dtype:
        want, have = (str(d).removeprefix("torch.") for d in (dtype, tensor.dtype))
        raise RuntimeError(f"{op}: {name} must be {want} like the projected input, got {have}")


def weight_grad(dout: Tensor, x: Tensor, needed: object) -> Tensor | None:
    """The gradient of the weight in ``F.linear(x, weight)``, if needed."""
    return dout.flatten(0, -2).t() @ x.flatten(0, -2) if needed else None
