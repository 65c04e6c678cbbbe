"""A language model of Mamba or Mamba-2 blocks: the model, generation, and checkpoints."""

from .checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_model, save_checkpoint
from .generation import generate, stream
from .lm import LanguageModel, LMConfig

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LMConfig",
    "LanguageModel",
    "generate",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
    "stream",
]
