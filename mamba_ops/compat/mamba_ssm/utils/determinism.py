"""mamba_ssm.utils.determinism: mamba_ops is deterministic always; the switch is kept for its callers."""

from __future__ import annotations

import os

import torch

_override: bool | None = None


def use_deterministic_mode() -> bool:
    """What was set last, else whether MAMBA_DETERMINISTIC is 1 or torch is in deterministic mode."""
    if _override is not None:
        return _override
    env = os.environ.get("MAMBA_DETERMINISTIC")
    return env[0] == "1" if env else torch.are_deterministic_algorithms_enabled()


def set_deterministic_mode(value: bool | None) -> None:
    """Sets the switch, None: back to the environment."""
    global _override
    _override = value
