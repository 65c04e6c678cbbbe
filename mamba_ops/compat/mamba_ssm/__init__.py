"""Stand-in for the package mamba_ssm on mamba_ops' operators, for CPU and CUDA tensors."""

__version__ = "2.3.2.post1"  # the version whose interface this is

from .models.mixer_seq_simple import MambaLMHeadModel
from .modules.mamba2 import Mamba2
from .modules.mamba3 import Mamba3
from .modules.mamba_simple import Mamba
from .ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__all__ = ["Mamba", "Mamba2", "Mamba3", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"]
