"""transformers' Mamba-like models on mamba_ops' operators.

Their modeling files call a handful of functions by module-level names, which fall back to plain torch. These
names are rebound, in files that are loaded and in those that will be.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import re
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
from .mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from .mamba_ssm.ops.triton.selective_state_update import selective_state_update
from .mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from .undo import Undo

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
    "mamba_inner_fn": mamba_inner_fn,
    "mamba_selective_scan": selective_scan_fn,
    "mamba_selective_state_update": selective_state_update,
    "mamba2_chunk_scan": mamba_chunk_scan_combined,
    "mamba2_selective_state_update": selective_state_update,
    "mamba2_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
}
FUSED = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined")
ACTIVATIONS = (None, "silu", "swish")

_MODELING = re.compile(r"transformers\.models\.\w+\.modeling_\w+")
_originals: dict[tuple[ModuleType | type, str], Any] = {}  # where a name was rebound: what it was
_users = 0
_call = threading.local()


def patch_transformers() -> Undo:
    """Makes transformers' models with Mamba layers run mamba_ops, on CPUs and GPUs.

    Models that exist already change as well. Logits, gradients and states are those of transformers' own
    torch functions but for rounding; packed batches (seq_idx) work, which these refuse. Under torch.export
    the models keep transformers' functions.

    Where the fused functions of the original packages would differ from the torch functions, the split ones
    run: on batches with an attention mask, whose padding the fused ones let into the scan; for FalconMamba,
    whose step norm they apply elsewhere; with an activation other than SiLU.

    Returns:
        Puts the functions back.
    """
    global _users
    _users += 1
    if _users == 1:
        for name, module in list(sys.modules.items()):
            if _MODELING.fullmatch(name):
                _patch(module)
        sys.meta_path.insert(0, _finder)

    def undo() -> None:
        global _users
        _users -= 1
        if _users == 0:
            sys.meta_path.remove(_finder)
            for (owner, name), original in _originals.items():
                setattr(owner, name, original)
            _originals.clear()

    return Undo(undo)


def _patch(module: ModuleType) -> None:
    for name, function in FUNCTIONS.items():
        original = getattr(module, name, None)
        if callable(original):
            _rebind(module, name, _adapted(function, original, fused=name in FUSED))
    for mixer in vars(module).values():
        if isinstance(mixer, type) and mixer.__module__ == module.__name__ and _runs_fused(mixer):
            _rebind(mixer, "forward", _noting_options(vars(mixer)["forward"]))


def _rebind(owner: ModuleType | type, name: str, value: Any) -> None:
    _originals[owner, name] = vars(owner)[name]
    setattr(owner, name, value)


def _runs_fused(mixer: type) -> bool:
    forward = vars(mixer).get("forward")
    code = getattr(inspect.unwrap(forward), "__code__", None) if forward is not None else None
    return code is not None and any(name in FUSED for name in code.co_names)


def _adapted(function: Callable[..., Any], original: Callable[..., Any], fused: bool) -> Callable[..., Any]:
    """function as the modeling files call theirs: further keywords are dropped, a fused one may say None."""
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_exporting() or kwargs.get("activation") not in ACTIVATIONS:
            return original(*args, **kwargs)
        if fused and (getattr(_call, "split", False) or kwargs.get("dt_rms_weight") is not None):
            return None
        return function(*args, **{name: value for name, value in kwargs.items() if name in known})

    return call


def _noting_options(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A mixer's forward that notes whether the fused functions can do its work."""
    signature = inspect.signature(forward)
    place = list(signature.parameters).index("attention_mask")

    @functools.wraps(forward)
    def noting(*args: Any, **kwargs: Any) -> Any:
        mask = args[place] if len(args) > place else kwargs.get("attention_mask")
        before = getattr(_call, "split", False)
        _call.split = mask is not None or getattr(args[0], "activation", None) not in ACTIVATIONS
        try:
            return forward(*args, **kwargs)
        finally:
            _call.split = before

    return noting


def _is_exporting() -> bool:
    from transformers.utils.import_utils import is_torchdynamo_exporting

    exporting: bool = is_torchdynamo_exporting()
    return exporting


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a modeling file and rebinds its names."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if _users:
            _patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if not _MODELING.fullmatch(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


_finder = _Finder()
