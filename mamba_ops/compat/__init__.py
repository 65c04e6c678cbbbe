"""mamba_ops in the place of mamba_ssm, causal_conv1d and the torch functions of transformers' models.

    mamba_ops.compat.install()             # import mamba_ssm, import causal_conv1d: these are mamba_ops now
    mamba_ops.compat.patch_transformers()  # transformers' Mamba-like models run mamba_ops, loaded or not yet
    python -m mamba_ops.compat train.py    # both, for a script that knows nothing of it

Both return an `Undo`.
"""

from .patch import patch_transformers
from .stand_in import install
from .undo import Undo

__all__ = ["Undo", "install", "patch_transformers"]
