# SPDX-License-Identifier: Apache-2.0
"""The whole recipe: roll out, score, select, train, evaluate; resumed by calling it again."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import DecodeConfig
from ..models import Transformer, load_model, save_model
from .artefacts import (
    read_json,
    read_lines,
    remove_folder,
    settle,
    settle_lines,
    write_json,
    write_lines,
)
from .evaluation import summarise
from .objective import Example
from .prompts import Prompt, Verifier, check_prompts
from .ranks import current_ranks
from .rollout import Rollout, roll_out
from .selection import Selection, select_rollouts
from .training import Trainer, Training, add_lora, train


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that the result of a run depends on, beside its prompts.

    model: folder or hub id that `load_model` takes.
    rollout: how the pool is decoded; by the base rule alone, so that there is redundancy to see.
    selection, training: see there.
    decoders: by name, what model and fine-tuned model are evaluated with.
    verifier: its name, or None.
    """

    model: str
    rollout: Rollout
    selection: Selection
    training: Training
    decoders: dict[str, DecodeConfig]
    verifier: str | None = None


def run(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    decode: Callable[[list[int]], str],
    evaluate_on: Sequence[Prompt] = (),
    verifier: Verifier | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    micro_batch_size: int | None = None,
    parallel: str = "ddp",
    save_every: int = 100,
    model: Transformer | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Fine-tune a model to decode in fewer steps, on its own lean answers.

    Everything is in `folder`, in files that can be read at any time: `recipe.json`,
    `prompts.jsonl`, `evaluation_prompts.jsonl`, `rollouts/*.jsonl`, `selected.jsonl` and
    `selection.json`, `train/log.jsonl` and a checkpoint, `model/` (the fine-tuned model, for
    `load_model`), `evaluation/*/*.jsonl` and `evaluation.json`. Each is written whole or not at
    all. The same call after a kill goes on where the last one stopped and ends in the same files.

    Under `torchrun` all processes call this (inside `process_group`, on one file system): they
    share the decoding and train together.

    Args:
        decode: token ids to text.
        evaluate_on: prompts for the comparison at the end; none = no comparison.
        verifier: the callable behind `recipe.verifier`.
        device, dtype: of decoding; training keeps float32 weights.
        micro_batch_size, parallel, save_every: see `Trainer` and `train`.
        model: `recipe.model`, if it is loaded already.

    Returns:
        The content of `evaluation.json`.

    Raises:
        ValueError: no prompt, a prompt that does not fit, another recipe than the folder was begun
            with, a damaged file, or nothing to train on. What is in the folder stays.
    """
    ranks, folder = current_ranks(), Path(folder)
    load = _Loader(recipe.model, torch.device(device), dtype)
    model = load() if model is None else model
    pad_id = model.config.pad_id or 0
    _check(recipe, prompts, evaluate_on, model)
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.is_first:
        settle(folder / "recipe.json", dataclasses.asdict(recipe))
        settle_lines(folder / "prompts.jsonl", _lines(prompts))
        settle_lines(folder / "evaluation_prompts.jsonl", _lines(evaluate_on))
    ranks.wait()

    decoded = partial(roll_out, decode=decode, verifier=verifier, pad_id=pad_id, progress=progress)
    rollouts = decoded(model, prompts, recipe.rollout, folder / "rollouts")
    selected = _select(rollouts, recipe.selection, folder)
    _evaluate(model, "base", recipe, evaluate_on, folder, decoded)
    del model

    if not (folder / "model").is_dir():
        examples = [
            Example(prompts[r["prompt"]].ids, r["token_ids"], r["commit_step"]) for r in selected
        ]
        _train(load, examples, recipe, folder, micro_batch_size, parallel, save_every, progress)
    if ranks.is_first:  # here, as a run may have been killed right after its last export
        for checkpoint in (folder / "train").glob("step-*"):
            remove_folder(checkpoint)
    tuned = load(folder / "model")
    _evaluate(tuned, "tuned", recipe, evaluate_on, folder, decoded)
    summary = {
        "selection": read_json(folder / "selection.json"),
        "evaluation": {
            name: {
                which: summarise(_read_folder(folder / "evaluation" / f"{which}-{name}"))
                for which in ("base", "tuned")
            }
            for name in (recipe.decoders if evaluate_on else ())
        },
    }
    if ranks.is_first:
        write_json(folder / "evaluation.json", summary)
    ranks.wait()
    return summary


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Loads models alike, whatever stage they are for."""

    name: str
    device: torch.device
    dtype: torch.dtype | None

    def __call__(self, path: Path | None = None) -> Transformer:
        return load_model(path or self.name, device=self.device, dtype=self.dtype)

    def for_training(self, lora: bool) -> Transformer:
        """float32, as small updates would be rounded away; frozen weights as they are."""
        return load_model(self.name, device=self.device, dtype=None if lora else torch.float32)

    def plain(self) -> Transformer:
        """On the CPU, in the checkpoint's own precision."""
        return load_model(self.name)


def _check(
    recipe: Recipe, prompts: Sequence[Prompt], evaluate_on: Sequence[Prompt], model: Transformer
) -> None:
    if not prompts:
        raise ValueError("there is no prompt to roll out")
    mask_id = recipe.rollout.mask_id
    if mask_id >= model.config.embedding_size:
        raise ValueError(
            f"mask_id: token id {mask_id}, the model takes 0..{model.config.embedding_size - 1}"
        )
    for group in (prompts, evaluate_on):
        check_prompts(group, gen_length=recipe.rollout.gen_length, config=model.config)


def _lines(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    return [prompt.record | {"prompt_ids": prompt.ids} for prompt in prompts]


def _select(
    rollouts: list[dict[str, Any]], selection: Selection, folder: Path
) -> list[dict[str, Any]]:
    """Chooses anew each time: it is quick, and can't disagree with the rollouts."""
    selected, report = select_rollouts(rollouts, selection)
    if current_ranks().is_first:
        write_lines(folder / "selected.jsonl", selected)
        write_json(folder / "selection.json", report)
    current_ranks().wait()
    return selected


def _train(
    load: _Loader,
    examples: list[Example],
    recipe: Recipe,
    folder: Path,
    micro_batch_size: int | None,
    parallel: str,
    save_every: int,
    progress: bool,
) -> None:
    ranks, training = current_ranks(), recipe.training
    trained = load.for_training(bool(training.lora_rank))
    trainer = Trainer(
        trained,
        examples,
        training,
        mask_id=recipe.rollout.mask_id,
        block_length=recipe.rollout.block_length,
        logits_shift=recipe.rollout.logits_shift,
        pad_id=trained.config.pad_id or 0,
        micro_batch_size=micro_batch_size,
        parallel=parallel,
    )
    train(trainer, folder / "train", save_every=save_every, progress=progress)
    weights = trainer.trained_weights()
    del trainer, trained
    gc.collect()
    if ranks.is_first:
        export(load.plain(), weights, training, folder / "model")
    ranks.wait()


def export(
    model: Transformer, weights: dict[str, torch.Tensor], training: Training, folder: Path
) -> None:
    """Writes `model` with the weights of `Trainer.trained_weights`, adapters merged."""
    tuner = add_lora(model, training.lora_rank, training.lora_alpha) if training.lora_rank else None
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise ValueError(f"export: weights that the model does not have: {', '.join(unknown)}")
    if tuner is not None:
        model = tuner.merge_and_unload()
    for name, weight in model.named_parameters():  # also what overflows in the model's precision
        if not weight.isfinite().all():
            raise ValueError(
                f"export: {name} is not finite in {weight.dtype}; try a lower learning_rate"
            )
    part = folder.with_name(folder.name + ".part")
    remove_folder(part)
    save_model(model, part)
    os.replace(part, folder)


def _evaluate(
    model: Transformer,
    which: str,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    folder: Path,
    decoded: Callable[..., Any],
) -> None:
    for name, config in recipe.decoders.items():
        if prompts:
            rollout = dataclasses.replace(recipe.rollout, config=config, samples=1)
            where = folder / "evaluation" / f"{which}-{name}"
            decoded(model, prompts, rollout, where, name=f"{which} {name}")


def _read_folder(folder: Path) -> list[dict[str, Any]]:
    return [record for file in sorted(folder.glob("*.jsonl")) for record in read_lines(file)]
