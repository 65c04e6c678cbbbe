"""mamba_ssm.utils.hf: configuration and weights from a folder or the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_config_hf(model_name: str) -> dict[str, Any]:
    """The config.json of a model."""
    found = _find(model_name, "config.json")
    if found is None:
        raise OSError(f"{model_name}: no config.json")
    config: dict[str, Any] = json.loads(found.read_text())
    return config


def load_state_dict_hf(
    model_name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The weights of a model: safetensors or pytorch_model.bin, whole or in shards.

    Unlike the original: reads more than pytorch_model.bin. float32 parameters that a half-precision model
    keeps (A_log, D) stay float32: load_state_dict casts to what the model has.
    """
    for name in _WEIGHTS:
        found = _find(model_name, name)
        if found is not None:
            return _load(found, device, dtype)
        index = _find(model_name, name + ".index.json")
        if index is not None:
            weights: dict[str, Tensor] = {}
            for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                part = _find(model_name, shard)
                if part is None:
                    raise OSError(f"{model_name}: {index.name} names {shard}, which is missing")
                weights |= _load(part, device, dtype)
            return weights
    raise OSError(f"{model_name}: neither {' nor '.join(_WEIGHTS)}, whole or in shards")


def _load(path: Path, device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights: dict[str, Tensor] = load_file(path, device=str(device or "cpu"))
    else:
        weights = torch.load(path, map_location=device or "cpu", weights_only=True)
    return {k: v.to(dtype) if _lowered(k, v, dtype) else v for k, v in weights.items()}


def _lowered(name: str, value: Tensor, dtype: torch.dtype | None) -> bool:
    keeps = name.endswith((".A_log", ".D"))
    return dtype is not None and value.is_floating_point() and not keeps


def _find(model_name: str, file: str) -> Path | None:
    folder = Path(model_name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(model_name, file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
