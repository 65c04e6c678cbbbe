"""Layers: Mamba, Mamba2, attention and the gated MLP for hybrids, norms, and the caches of their states."""

from .attention import Attention
from .cache import AttentionCache, Cache, LayerCache
from .mamba import Mamba
from .mamba2 import Mamba2
from .mlp import GatedMLP
from .norm import RMSNormGated

__all__ = [
    "Attention",
    "AttentionCache",
    "Cache",
    "GatedMLP",
    "LayerCache",
    "Mamba",
    "Mamba2",
    "RMSNormGated",
]
