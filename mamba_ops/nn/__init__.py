"""Layers: Mamba, Mamba2, the gated RMS norm, and the cache that carries a layer's states."""

from .cache import LayerCache
from .mamba import Mamba
from .mamba2 import Mamba2
from .norm import RMSNormGated

__all__ = ["LayerCache", "Mamba", "Mamba2", "RMSNormGated"]
