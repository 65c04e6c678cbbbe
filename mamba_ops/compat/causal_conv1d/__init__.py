"""Stand-in for the package causal_conv1d on mamba_ops' operators, for CPU and CUDA tensors."""

from .causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__version__ = "1.6.1"  # the version whose interface this is

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
