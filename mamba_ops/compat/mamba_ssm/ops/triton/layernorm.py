"""mamba_ssm.ops.triton.layernorm: the older path of ``layer_norm``."""

from .layer_norm import (
    RMSNorm,
    _layer_norm_fwd,
    layer_norm_fn,
    layer_norm_linear_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)

__all__ = [
    "RMSNorm",
    "_layer_norm_fwd",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]
