"""The Mamba-1 selective scan and the Mamba-2 chunked SSD as torch operators with C++ and CUDA kernels."""

import torch  # noqa: F401  loads libtorch, which libmamba_ops.so finds by its soname

from . import _C, reference
from .causal_conv1d import causal_conv1d
from .norm import rms_norm_gated
from .selective_scan import selective_scan
from .state_update import causal_conv1d_update, selective_state_update, ssd_state_update
from .ssd import ssd
