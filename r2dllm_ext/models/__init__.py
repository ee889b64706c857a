"""Native masked-diffusion transformer and its checkpoints."""

from .checkpoint import load_model, save_model
from .transformer import ModelConfig, ModelOutput, Transformer

__all__ = ["ModelConfig", "ModelOutput", "Transformer", "load_model", "save_model"]
