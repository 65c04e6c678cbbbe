"""The Mamba-1 selective scan and the Mamba-2 chunked SSD as torch operators with C++ and CUDA kernels."""

import torch  # first: libmamba_ops.so finds libtorch by its soname

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"mamba_ops is not built in {__path__[0]} ({error}). In a checkout: pip install -e . ; an installed "
        "mamba_ops is found where Python runs outside the checkout"
    ) from error
from . import reference
from .add_norm import add_rms_norm
from .causal_conv1d import causal_conv1d
from .mamba2_step import Mamba2StepLayer, mamba2_step
from .mamba_inner import mamba_inner
from .mamba_split_conv1d_scan import mamba_split_conv1d_scan
from .nn import Mamba, Mamba2, RMSNormGated
from .norm import rms_norm_gated
from .norm_linear import norm_linear, norm_linear_conv
from .selective_scan import selective_scan
from .ssd import ssd
from .state_update import causal_conv1d_update, selective_state_update, ssd_state_update

__all__ = [
    "Mamba",
    "Mamba2",
    "Mamba2StepLayer",
    "RMSNormGated",
    "__version__",
    "add_rms_norm",
    "build_info",
    "causal_conv1d",
    "causal_conv1d_update",
    "mamba2_step",
    "mamba_inner",
    "mamba_split_conv1d_scan",
    "norm_linear",
    "norm_linear_conv",
    "plan",
    "reference",
    "rms_norm_gated",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_state_update",
]

__version__ = _C.build_info()["version"]
build_info = _C.build_info


def plan(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, str]:
    """What a call would run: the kernel, the type of its arithmetic, and how it cuts the work.

    Args:
        op: the operator's name, such as "ssd".
        device: "cpu" or "cuda".
        dtype: of the inputs.
        **sizes: the call's sizes by their letters (b, l, d, h, p, n, g, q, w, k).

    Returns:
        Facts by name. "kernel" says which one runs: "cpu" and the instruction set, "cuda", "cuda tuned",
        "cuda hopper" or "cuda portable"; "by parts" where norm_linear is a norm and torch's product.

    Raises:
        ValueError: an unknown operator, device, dtype or size, or a size that no call has.

    >>> plan("ssd", b=1, l=2048, h=24, p=64, n=128)["chunk_size"]
    '64'
    """
    return _C.plan(op, device, str(dtype).removeprefix("torch."), sizes)
