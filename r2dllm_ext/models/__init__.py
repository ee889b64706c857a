# SPDX-License-Identifier: Apache-2.0
"""Native masked-diffusion transformer and its checkpoints."""

from .checkpoint import load_model, save_model
from .config import ModelConfig
from .transformer import ModelOutput, Transformer

__all__ = ["ModelConfig", "ModelOutput", "Transformer", "load_model", "save_model"]
