"""mamba_ssm.utils.torch: autocast for autograd functions on GPUs."""

from functools import partial

import torch

custom_fwd = partial(torch.amp.custom_fwd, device_type="cuda")
custom_bwd = partial(torch.amp.custom_bwd, device_type="cuda")

__all__ = ["custom_bwd", "custom_fwd"]
