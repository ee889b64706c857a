# SPDX-License-Identifier: Apache-2.0
"""The whole recipe: rounds of roll out, select, train; then evaluate. Called again, it resumes."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..config import DecodeConfig
from ..models import Transformer, load_model
from ..tasks import Task
from .artefacts import is_made, remove_folder, settle, settle_lines, write_folder, write_json
from .evaluation import summarise
from .exporting import export, export_blend, non_finite
from .objective import Example
from .prompts import Prompt, Verifier, check_prompts
from .ranks import current_ranks
from .rollout import Rollout, roll_out
from .rounds import Decoded, Rounds, choose, examples, patient
from .selection import Selection
from .training import Trainer, Training, train


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that the result of a run depends on, beside its prompts.

    model: folder (a path too) or hub id that `load_model` takes.
    rollout: how the pool is decoded.
    selection, training, rounds: see there.
    decoders: by name, what model and fine-tuned model are evaluated with.
    verifier: its name, or None.
    task: name of the task whose tokens have weights and an order of their own, or None.
    """

    model: str
    rollout: Rollout
    selection: Selection
    training: Training
    decoders: dict[str, DecodeConfig]
    rounds: Rounds = Rounds()
    verifier: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", os.fspath(self.model))  # as recipe.json holds it


def run(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    decode: Callable[[list[int]], str],
    evaluate_on: Sequence[Prompt] = (),
    verifier: Verifier | None = None,
    task: Task | None = None,
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
    `prompts.jsonl`, `evaluation_prompts.jsonl`; of each round `round-N/rollouts/*.jsonl`,
    `hard/*.jsonl`, `selected.jsonl`, `selection.json`, `train/log.jsonl` with a checkpoint,
    `model/` and `validation/*.jsonl` (`train-again` and so on, where it was trained once more);
    `validation/*.jsonl` of the model as it was; `model/` (the fine-tuned model, for `load_model`),
    `evaluation/*/*.jsonl` and `evaluation.json`. Each is written whole or not at all. The same call
    after a kill goes on where the last one stopped and ends in the same files.

    Under `torchrun` all processes call this (inside `process_group`, on one file system): they
    share the decoding and train together.

    Args:
        decode: token ids to text.
        evaluate_on: prompts for the comparison at the end; none = no comparison.
        verifier: the callable behind `recipe.verifier`.
        task: the one behind `recipe.task`.
        device, dtype: of decoding; training keeps float32 weights, and a round hands its model on
            in the checkpoint's precision.
        micro_batch_size, parallel, save_every: see `Trainer` and `train`.
        model: `recipe.model`, if it is loaded already.

    Returns:
        The content of `evaluation.json`.

    Raises:
        ValueError: no prompt, a prompt that does not fit, another recipe than the folder was begun
            with, a damaged file, nothing to train on, or no round that the validation lets pass.
            What is in the folder stays.
    """
    ranks, folder = current_ranks(), Path(folder)
    load = _Loader(recipe.model, torch.device(device), dtype)
    model = load() if model is None else load.checked(model)
    pad_id = model.config.pad_id or 0
    _check(recipe, prompts, evaluate_on, model, verifier, task)
    dealt, held_back = recipe.rounds.deal(prompts)
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.is_first:
        settle(folder / "recipe.json", dataclasses.asdict(recipe))
        settle_lines(folder / "prompts.jsonl", _lines(prompts))
        settle_lines(folder / "evaluation_prompts.jsonl", _lines(evaluate_on))
    ranks.wait()

    decoded = partial(roll_out, decode=decode, verifier=verifier, pad_id=pad_id, progress=progress)
    trained = partial(
        _train,
        recipe=recipe,
        micro_batch_size=micro_batch_size,
        parallel=parallel,
        save_every=save_every,
        progress=progress,
    )
    validated = partial(_share_right, prompts=held_back, rollout=recipe.rollout, decoded=decoded)
    first = validated(model, folder / "validation")
    reports: list[dict[str, Any]] = []
    texts: list[list[Example]] = []
    for number, own in enumerate(dealt, start=1):
        where = folder / f"round-{number}"
        chosen, report = choose(
            model, own, recipe.rollout, recipe.selection, recipe.rounds, where, decoded
        )
        del model
        texts = texts[-recipe.rounds.replay :] if recipe.rounds.replay else []
        texts.append(examples(chosen, own, task, recipe.selection.filter == "parts"))
        reports.append({"selection": report, "attempts": []})
        for name, training in (("", recipe.training), ("-again", recipe.training.cautious())):
            made = where / f"model{name}"
            trained(load, list(chain(*texts)), training, where / f"train{name}", made)
            model = load.of(made)()
            right = validated(model, where / f"validation{name}")
            passed = recipe.rounds.keeps(first, right)
            reports[-1]["attempts"].append({"model": f"{where.name}/{made.name}", "right": right})
            if passed:
                load = load.of(made)
                break
        else:
            break  # the round before was the last
    del model
    if not isinstance(load.source, Path):
        raise ValueError(
            f"training: {reports[0]['attempts'][-1]['right']:.1%} of the validation's answers are "
            f"right after the first round, {first:.1%} before it; try a lower learning_rate, fewer "
            "steps or more prompts"
        )
    first_model, result = load.of(recipe.model), folder / "model"
    if not is_made(result) and ranks.is_first:
        if recipe.rounds.blend < 1:
            export_blend(first_model.plain(), load.plain(), recipe.rounds.blend, result)
        else:
            write_folder(result, partial(shutil.copytree, load.source))
    ranks.wait()
    evaluation: dict[str, dict[str, Any]] = {name: {} for name in recipe.decoders if evaluate_on}
    models = {"base": first_model, "tuned": load.of(result)} if evaluate_on else {}
    for which, source in models.items():
        found = _evaluate(source(), recipe, evaluate_on, folder / "evaluation", which, decoded)
        for name, records in found.items():
            evaluation[name][which] = summarise(records)
    summary = {"validation": first, "rounds": reports, "evaluation": evaluation}
    if ranks.is_first:
        write_json(folder / "evaluation.json", summary)
    ranks.wait()
    return summary


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Loads models alike, whatever stage they are for: `recipe.model`, or that of a round."""

    source: str | Path
    device: torch.device
    dtype: torch.dtype | None

    def of(self, source: str | Path) -> _Loader:
        return dataclasses.replace(self, source=source)

    def __call__(self) -> Transformer:
        try:
            return self.checked(load_model(self.source, device=self.device, dtype=self.dtype))
        except (ValueError, FileNotFoundError) as error:
            if isinstance(self.source, str):
                raise
            raise ValueError(f"{error}; delete {self.source} to have it made anew") from error

    def checked(self, model: Transformer) -> Transformer:
        """`model`, of whose weights all are finite: of others nothing is learned."""
        if wrong := non_finite(model):
            raise ValueError(f"{self.source}: {wrong} is not finite in {model.dtype}")
        return model

    def for_training(self, lora: bool) -> Transformer:
        """float32, as small updates would be rounded away; frozen weights as they are."""
        return load_model(self.source, device=self.device, dtype=None if lora else torch.float32)

    def plain(self) -> Transformer:
        """On the CPU, in the checkpoint's own precision."""
        return load_model(self.source)


def _check(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    evaluate_on: Sequence[Prompt],
    model: Transformer,
    verifier: Verifier | None,
    task: Task | None,
) -> None:
    if not prompts:
        raise ValueError("there is no prompt to roll out")
    if verifier is None and (recipe.rounds.validation or recipe.rounds.hard_share):
        raise ValueError("Rounds: validation and hard_share take a verifier, there is none")
    if recipe.selection.filter == "parts":
        if task is None:
            raise ValueError(
                "Selection: filter 'parts' takes a task, which knows the parts' tokens"
            )
        if any("prompt" not in prompt.record for prompt in prompts):
            raise ValueError("Selection: filter 'parts' takes prompts with a text \"prompt\"")
    mask_id = recipe.rollout.mask_id
    if mask_id >= model.config.embedding_size:
        raise ValueError(
            f"mask_id: token id {mask_id}, the model takes 0..{model.config.embedding_size - 1}"
        )
    for group in (prompts, evaluate_on):
        check_prompts(group, gen_length=recipe.rollout.gen_length, config=model.config)


def _lines(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    return [prompt.record | {"prompt_ids": prompt.ids} for prompt in prompts]


def _share_right(
    model: Transformer,
    folder: Path,
    *,
    prompts: Sequence[Prompt],
    rollout: Rollout,
    decoded: Decoded,
) -> float | None:
    """Of the validation's parts, one token a step; None if there are none."""
    if not prompts:
        return None
    records = decoded(model, prompts, patient(rollout), folder, name="validate")
    return round(sum(record["right"] for record in records) / len(records), 4)


def _train(
    load: _Loader,
    texts: list[Example],
    training: Training,
    folder: Path,
    made: Path,
    *,
    recipe: Recipe,
    micro_batch_size: int | None,
    parallel: str,
    save_every: int,
    progress: bool,
) -> None:
    """Trains the model of `load`, in `folder`; its result is the folder `made`, if not there."""
    ranks = current_ranks()
    if not is_made(made):
        trained = load.for_training(bool(training.lora_rank))
        trainer = Trainer(
            trained,
            texts,
            training,
            mask_id=recipe.rollout.mask_id,
            block_length=recipe.rollout.block_length,
            logits_shift=recipe.rollout.logits_shift,
            pad_id=trained.config.pad_id or 0,
            micro_batch_size=micro_batch_size,
            parallel=parallel,
        )
        train(trainer, folder, save_every=save_every, progress=progress)
        weights = trainer.trained_weights()
        del trainer, trained
        gc.collect()
        if ranks.is_first:
            export(load.plain(), weights, training, made)
    if ranks.is_first:  # here, as a run may have been killed right after its last export
        for checkpoint in folder.glob("step-*"):
            remove_folder(checkpoint)
    ranks.wait()


def _evaluate(
    model: Transformer,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    folder: Path,
    which: str,
    decoded: Decoded,
) -> dict[str, list[dict[str, Any]]]:
    """The records of the model `which` by each decoder."""
    found = {}
    for name, config in recipe.decoders.items():
        rollout = dataclasses.replace(recipe.rollout, config=config, samples=1, autocast=False)
        where = folder / f"{which}-{name}"
        found[name] = decoded(model, prompts, rollout, where, name=f"{which} {name}")
    return found
