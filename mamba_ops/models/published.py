"""Checkpoint folders as they are published: config.json beside weights, of mamba_ssm or of transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from ..nn.init import Device
from .checkpoint import (
    CheckpointError,
    assemble,
    read_safetensors,
    replacing,
    require_safetensors,
    write_safetensors,
)
from .lm import LanguageModel
from .naming import Naming, read_config, read_weights, write_config, write_weights

CONFIG = "config.json"
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
WEIGHTS = (SAFETENSORS, f"{SAFETENSORS}.index.json", BIN, f"{BIN}.index.json")  # the first one there counts


def load_pretrained(
    folder: str | os.PathLike[str], device: Device = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """Builds the model of a published checkpoint, with its weights.

    The folder holds config.json and model.safetensors or pytorch_model.bin, or the shards of either with
    their index.json: Mamba and Mamba-2 models of transformers and of mamba_ssm, its hybrids included.

    Args:
        folder: the folder.
        device: of the model.
        dtype: of the weights, but for those that a new model of this dtype has in float32 (A_log, D); None:
            as in the files.

    Raises:
        CheckpointError: a file is missing, is not whole, describes no model that we have, or does not fit the
            others. The message, one line, says which and why.

    >>> from tempfile import TemporaryDirectory
    >>> from mamba_ops.models import LanguageModel, LMConfig
    >>> with TemporaryDirectory() as folder:
    ...     save_pretrained(LanguageModel(LMConfig(d_model=64, n_layer=1)), folder)
    ...     load_pretrained(folder).config.layer
    'mamba2'
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"no checkpoint in {folder}: there is no {CONFIG}")
    try:
        config = read_config(_json(folder / CONFIG))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / CONFIG} describes no model that we have: {error}") from error
    weights = read_weights(_read(folder))
    embedding, head = (weights.get(f"{name}.weight") for name in ("backbone.embedding", "lm_head"))
    if config.tie_embeddings and embedding is None and head is not None:
        weights["backbone.embedding.weight"] = head
    elif config.tie_embeddings and head is not None and not torch.equal(head, embedding):  # type: ignore[arg-type]
        raise CheckpointError(f"{folder}: the config ties head and embedding, but their weights differ")
    model = assemble(config, weights, str(folder), dtype)
    return model.to(torch.device(device) if device is not None else None)


def save_pretrained(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    *,
    naming: Naming = "transformers",
    shard_bytes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as a folder that transformers (safetensors) or mamba_ssm (pytorch_model.bin) loads.

    Every file is whole at every moment, the old or the new one, and nothing is replaced before all new files
    are written: weights first, config.json last.

    Args:
        model: the model.
        folder: made where it is missing; other files in it stay.
        naming: whose names and files: "transformers" or "mamba_ssm".
        shard_bytes: weights beyond this size are split over files of at most this size, with an index; a
            tensor is never split. None: one file. mamba_ssm itself reads one file only.
        overwrite: replace a checkpoint that is there.

    Raises:
        ValueError: naming is neither, that library has no such model, or shard_bytes is below 1.
        CheckpointError: a checkpoint is there, or safetensors is not installed.
        OSError: a file cannot be written; earlier ones stay.
    """
    if naming not in ("transformers", "mamba_ssm"):
        raise ValueError(f'save_pretrained: naming must be "transformers" or "mamba_ssm", got {naming!r}')
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"save_pretrained: shard_bytes must be at least 1, got {shard_bytes}")
    config = write_config(model.config, naming)
    folder = Path(folder)
    old = _present(folder)
    if old and not overwrite:
        raise CheckpointError(f"{folder} holds a checkpoint already ({', '.join(sorted(old))})")
    weights = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    single = SAFETENSORS if naming == "transformers" else BIN
    write: Callable[[dict[str, Tensor], Path], None] = torch.save
    if naming == "transformers":
        require_safetensors()
        write = partial(write_safetensors, metadata={"format": "pt"})
        config["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
        if model.config.tie_embeddings:
            del weights["lm_head.weight"]
    shards = _shards(write_weights(weights, naming), shard_bytes)
    names = _shard_names(single, len(shards), old)
    files: dict[str, Callable[[Path], Any]] = {
        CONFIG: lambda path: path.write_text(json.dumps(config, indent=2) + "\n")
    }
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_bytes(t) for t in weights.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        files[f"{single}.index.json"] = lambda path: path.write_text(json.dumps(index, indent=2) + "\n")
    files |= {name: partial(write, shard) for name, shard in zip(names, shards, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as renames:  # unwound backwards: the weights take their names first
        for name, write_file in files.items():
            write_file(renames.enter_context(replacing(folder / name)))
    for name in old - files.keys():
        (folder / name).unlink()


def _read(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, by their published names."""
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise CheckpointError(f"no weights in {folder}: there is none of {', '.join(WEIGHTS)}")
    if not name.endswith(".json"):
        weights = _read_file(folder / name)
    else:
        weights = dict(_read_shards(folder, _weight_map(folder / name)))
    for key, tensor in weights.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{folder}: weights must be named by strings, got {key!r}")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{folder}: {key} must be a floating-point tensor, got {what}")
    return weights


def _read_shards(folder: Path, weight_map: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the shard {name} is missing")
        shard = _read_file(folder / name)
        for key in (key for key, where in weight_map.items() if where == name):
            if key not in shard:
                raise CheckpointError(f"{folder / name} has no {key}, which the index expects in it")
            yield key, shard[key]


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken archive or pickle raises
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not a whole file of torch.save: {reason}") from error
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path} must hold a dict of tensors, got {type(weights).__name__}")
    return weights


def _weight_map(path: Path) -> dict[str, str]:
    """The file of each weight, out of an index; files lie beside it."""
    try:
        weight_map: dict[str, str] = _json(path)["weight_map"]
        whole = all(isinstance(name, str) and Path(name).name == name for name in weight_map.values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of shards: {error!r}") from error
    if not whole:
        raise CheckpointError(f"{path} is no index of shards: it must name files beside it")
    return weight_map


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _present(folder: Path) -> set[str]:
    """The files of the checkpoint in a folder, if there is one."""
    found = {name for name in (CONFIG, *WEIGHTS) if (folder / name).is_file()}
    for name in found & {WEIGHTS[1], WEIGHTS[3]}:
        try:
            shards = set(_weight_map(folder / name).values())
        except CheckpointError:
            continue
        found |= {shard for shard in shards if (folder / shard).is_file()}
    return found


def _shards(weights: dict[str, Tensor], limit: int | None) -> list[dict[str, Tensor]]:
    """The weights in their order, split where a shard would exceed the limit."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if limit is not None and shards[-1] and size + _bytes(tensor) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += _bytes(tensor)
    return shards


def _shard_names(single: str, count: int, old: set[str]) -> list[str]:
    """File names of the shards; never those of old shards, to which the old index points until the end."""
    if count == 1:
        return [single]
    stem, suffix = single.rsplit(".", 1)
    names = [f"{stem}-{i + 1:05}-of-{count:05}" for i in range(count)]
    tag = f"-{uuid4().hex[:8]}" if old & {f"{name}.{suffix}" for name in names} else ""
    return [f"{name}{tag}.{suffix}" for name in names]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
