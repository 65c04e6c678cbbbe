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
from .mamba_ssm.ops.selective_scan_interface import (
    mamba_inner_fn,
    packed_selective_scan,
    selective_scan_fn,
)
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


class _Call(threading.local):
    """Of the model and the mixer that this thread is running: what their functions are not told."""

    seq_idx: Any = None  # the model was given
    checkpointed = False  # the model's layers run again in the backward, outside of it
    scan_seq_idx: Any = None  # the mixer's
    split = False  # the fused functions would not do


_call = _Call()


def patch_transformers() -> Undo:
    """Makes transformers' models with Mamba layers run mamba_ops, on CPUs and GPUs.

    Models that exist already change as well. Logits, gradients and states are those of transformers' own
    torch functions but for rounding; packed batches (seq_idx) work, which these refuse. Under torch.export
    the models keep transformers' functions.

    Where the fused functions of the original packages would differ from the torch functions, the split ones
    run: on batches with an attention mask, whose padding the fused ones let into the scan; for FalconMamba,
    whose step norm they apply elsewhere; with an activation other than SiLU.

    seq_idx (batch, seqlen) given to a model reaches all its Mamba layers, in models too whose code drops it
    on the way (Mamba, Mamba-2, FalconMamba, Jamba); attention keeps sequences apart by position_ids.

    Returns:
        Puts the functions back.

    Raises:
        RuntimeError: later, by a model that drops seq_idx under gradient checkpointing, where it would be
            lost when layers run again.
    """
    global _users
    _users += 1
    if _users == 1:
        for name, module in list(sys.modules.items()):
            if _MODELING.fullmatch(name) and any(function in vars(module) for function in FUNCTIONS):
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
            _rebind(module, name, _adapted(function, original, name in FUSED))
    for cls in list(vars(module).values()):
        if not isinstance(cls, type) or cls.__module__ != module.__name__ or "forward" not in vars(cls):
            continue
        if _calls_patched(cls):
            _rebind(cls, "forward", _telling(vars(cls)["forward"]))
        elif any(base.__name__ == "PreTrainedModel" for base in cls.__mro__):
            _rebind(cls, "forward", _noting_packs(vars(cls)["forward"]))


def _rebind(owner: ModuleType | type, name: str, value: Any) -> None:
    _originals[owner, name] = vars(owner)[name]
    setattr(owner, name, value)


def _calls_patched(cls: type) -> bool:
    """Whether cls is a Mamba mixer: its forward calls one of the scans."""
    code = getattr(inspect.unwrap(vars(cls)["forward"]), "__code__", None)
    scans = [name for name in FUNCTIONS if "scan" in name]
    return code is not None and any(name in scans for name in code.co_names)


def _adapted(function: Callable[..., Any], original: Callable[..., Any], fused: bool) -> Callable[..., Any]:
    """function as the modeling files call theirs: further keywords are dropped, a fused one may say None."""
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_exporting() or kwargs.get("activation") not in ACTIVATIONS:
            return original(*args, **kwargs)
        if fused and (_call.split or kwargs.get("dt_rms_weight") is not None):
            return None
        kwargs = {name: value for name, value in kwargs.items() if name in known}
        if function is selective_scan_fn:
            return packed_selective_scan(_call.scan_seq_idx, *args, **kwargs)
        if function is mamba_inner_fn and _call.scan_seq_idx is not None:
            return None
        return function(*args, **kwargs)

    return call


def _telling(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A mixer's forward that notes what its functions have to know, and hands on the model's seq_idx."""
    place = list(inspect.signature(forward).parameters).index("attention_mask")

    @functools.wraps(forward)
    def telling(*args: Any, **kwargs: Any) -> Any:
        mask = args[place] if len(args) > place else kwargs.get("attention_mask")
        if kwargs.get("seq_idx") is None and _call.seq_idx is not None:
            if _call.checkpointed:
                raise RuntimeError(
                    f"{type(args[0]).__name__}: this transformers model does not hand seq_idx to its layers, "
                    "so that gradient checkpointing would lose it; use seq_idx without it"
                )
            kwargs["seq_idx"] = _call.seq_idx
        before = _call.split, _call.scan_seq_idx
        _call.split = mask is not None or getattr(args[0], "activation", None) not in ACTIVATIONS
        _call.scan_seq_idx = kwargs.get("seq_idx")
        try:
            return forward(*args, **kwargs)
        finally:
            _call.split, _call.scan_seq_idx = before

    return telling


def _noting_packs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward that notes its seq_idx."""

    @functools.wraps(forward)
    def noting(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("seq_idx") is None:
            return forward(*args, **kwargs)
        before = _call.seq_idx, _call.checkpointed
        _call.seq_idx = kwargs["seq_idx"]
        _call.checkpointed = args[0].training and any(
            getattr(module, "gradient_checkpointing", False) for module in args[0].modules()
        )
        try:
            return forward(*args, **kwargs)
        finally:
            _call.seq_idx, _call.checkpointed = before

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
