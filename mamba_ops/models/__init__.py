"""Language models of Mamba and Mamba-2 layers, and hybrids: the model, generation, and checkpoints."""

from .checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_model, save_checkpoint
from .config import LMConfig
from .generation import generate, stream
from .lm import LanguageModel
from .published import load_pretrained, save_pretrained
from .session import Session
from .state import ModelCache

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LMConfig",
    "LanguageModel",
    "ModelCache",
    "Session",
    "generate",
    "load_checkpoint",
    "load_model",
    "load_pretrained",
    "save_checkpoint",
    "save_pretrained",
    "stream",
]
