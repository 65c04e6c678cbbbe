"""Checkpoints: one safetensors file with the model, what training needs to go on, and a description."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn.init import Device
from .config import LMConfig
from .lm import LanguageModel

FORMAT = "mamba_ops.lm.1"
EXTRA = "extra/"


class CheckpointError(Exception):
    """A checkpoint is missing, is not one, or does not fit; the message says which, in one line."""


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        config: shape of the model.
        step: optimizer steps taken.
        weights: the model's state dict (without lm_head.weight where it is tied).
        extra: further tensors by name (optimizer state).
        info: further facts, as JSON can hold them (settings, history).
    """

    config: LMConfig
    step: int
    weights: dict[str, Tensor]
    extra: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    path: str | os.PathLike[str],
    model: LanguageModel,
    *,
    step: int = 0,
    extra: dict[str, Tensor] | None = None,
    info: dict[str, Any] | None = None,
) -> None:
    """Writes a checkpoint atomically: a file of this name is whole at every moment, the old or the new one.

    Args:
        path: the file; its folder must exist.
        model, step, extra, info: see Checkpoint.

    Raises:
        CheckpointError: safetensors is not installed.
        OSError: the file cannot be written; an earlier one stays.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     model = LanguageModel(LMConfig(d_model=32, n_layer=1))
    ...     save_checkpoint(f"{folder}/a.safetensors", model, step=7)
    ...     load_checkpoint(f"{folder}/a.safetensors").step
    7
    """
    require_safetensors()
    weights = model.state_dict()
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]
    tensors = {name: t.detach().contiguous() for name, t in weights.items()}
    tensors |= {EXTRA + name: t.detach().contiguous() for name, t in (extra or {}).items()}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(model.config.to_dict()),
        "step": str(step),
        "info": json.dumps(info or {}),
    }
    with replacing(path) as temporary:
        write_safetensors(tensors, temporary, metadata)


def load_checkpoint(path: str | os.PathLike[str], device: Device = "cpu") -> Checkpoint:
    """Reads a checkpoint.

    Args:
        path: the file.
        device: of the tensors.

    Raises:
        CheckpointError: no such file, or not a whole checkpoint of this package, or no safetensors installed.
    """
    tensors, metadata = read_safetensors(path, device)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of mamba_ops (its metadata lacks format {FORMAT})")
    try:
        config = LMConfig.from_dict(json.loads(metadata["config"]))
        step, info = int(metadata["step"]), json.loads(metadata["info"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has unreadable metadata: {error}") from error
    return Checkpoint(
        config,
        step,
        {name: t for name, t in tensors.items() if not name.startswith(EXTRA)},
        {name.removeprefix(EXTRA): t for name, t in tensors.items() if name.startswith(EXTRA)},
        info,
    )


def load_model(source: Checkpoint | str | os.PathLike[str], device: Device = "cpu") -> LanguageModel:
    """Builds the model of a checkpoint, with its weights and their dtypes.

    Args:
        source: a checkpoint, or the file.
        device: of the model.

    Raises:
        CheckpointError: as load_checkpoint; or weights that are missing, left over, or of another shape.
    """
    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source, device)
    model = assemble(checkpoint.config, checkpoint.weights, "the checkpoint")
    return model.to(torch.device(device) if device is not None else None)


def assemble(
    config: LMConfig, weights: dict[str, Tensor], source: str, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model of a config with these weights, in the dtypes that they have or in those of a model of dtype.

    Raises CheckpointError, naming the source, where the config describes no model or the weights do not fit.
    """
    try:
        model = LanguageModel(config, device="meta", dtype=dtype)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{source}: the config does not describe a model: {error}") from error
    expected = dict(model.named_parameters())
    weights = dict(weights)
    if config.tie_embeddings and "backbone.embedding.weight" in weights:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    if dtype is not None:
        weights = {name: t.to(expected[name].dtype) if name in expected else t for name, t in weights.items()}
    flags = {name: vars(p) for name, p in expected.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reasons = " ".join(str(error).split())
        raise CheckpointError(f"{source}: the weights do not fit the config: {reasons}") from error
    if config.tie_embeddings:
        model.lm_head.weight = model.backbone.embedding.weight
    for name, parameter in model.named_parameters():
        vars(parameter).update(flags[name])
    return model


def read_safetensors(
    path: str | os.PathLike[str], device: Device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises CheckpointError where it is missing or not whole."""
    require_safetensors()
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a file, of which safetensors is known to be installed. Raises OSError where it cannot."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def require_safetensors() -> None:
    """Raises CheckpointError where safetensors is not installed."""
    if importlib.util.find_spec("safetensors") is None:
        raise CheckpointError(
            "checkpoints need safetensors, not installed here: pip install 'mamba_ops[train]'"
        )


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a file name beside path to write to, then brings that file to the disk and renames it to path.

    Where the block raises, path stays as it was and the file beside it goes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: str | os.PathLike[str]) -> None:
    """Asks the system to bring a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
