# SPDX-License-Identifier: Apache-2.0
"""Export: trained weights become a checkpoint folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from ..models import Transformer, save_model
from .artefacts import write_folder
from .training import Training, add_lora


def export(
    model: Transformer, weights: dict[str, Tensor], training: Training, folder: Path
) -> None:
    """Writes `model` with the weights of `Trainer.trained_weights`, adapters merged."""
    tuner = add_lora(model, training.lora_rank, training.lora_alpha) if training.lora_rank else None
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"export: weights that the model does not have: {', '.join(unknown)}")
    if tuner is not None:
        model = tuner.merge_and_unload()
    _write(model, folder)


def export_blend(first: Transformer, last: Transformer, share: float, folder: Path) -> None:
    """Writes `last` with the weights share * last + (1 - share) * first, computed in float32."""
    for weight, before in zip(last.parameters(), first.parameters(), strict=True):
        weight.data.copy_(before.data.float().lerp(weight.data.float(), share))
    _write(last, folder)


def _write(model: Transformer, folder: Path) -> None:
    if wrong := non_finite(model):  # also what overflows in the model's precision
        raise ValueError(
            f"export: {wrong} is not finite in {model.dtype}; try a lower learning_rate"
        )
    write_folder(folder, partial(save_model, model))


def non_finite(model: Transformer) -> str:
    """The name of a weight with NaN or inf in it; "" if there is none."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            return name
    return ""
