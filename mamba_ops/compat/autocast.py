"""What the original functions do under autocast: nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(function: F) -> F:
    """The function, computing in the dtypes that it is given also under ``torch.autocast``.

    mamba_ops' operators lower their data there, as torch's own do; the originals of the stand-ins do not.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return function(*args, **kwargs)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(next(tensors).device.type, enabled=False):
            return function(*args, **kwargs)

    return cast(F, call)


def parameter(t: Tensor | None, dtype: torch.dtype) -> Any:
    """A parameter as the operators take it beside data of this dtype: in it, or in float32."""
    return t if t is None or t.dtype in (dtype, torch.float32) else t.to(dtype)
