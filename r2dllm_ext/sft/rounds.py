# SPDX-License-Identifier: Apache-2.0
"""Rounds: what a round is trained on, and whether its model may go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .._checks import integer, make_plain, number
from ..config import DecodeConfig
from ..tasks import Task
from .artefacts import write_json, write_lines
from .objective import Example
from .prompts import Prompt
from .ranks import current_ranks
from .rollout import Rollout
from .selection import Selection, select_rollouts

Decoded = Callable[..., list[dict[str, Any]]]
"""`roll_out` of model, prompts, rollout and folder, the rest being given."""


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How often the recipe is gone through, each time by the model that the last time made.

    number: rounds; the prompts are dealt out to them, so that each rolls out new ones.
    replay: rounds before whose answers are trained on too.
    hard_share: at most this share of a round's own examples answers prompts of which every sample
        was wrong: they are decoded again one token a step, and what is right then is learned. It
        keeps what only patience solves.
    validation: prompts, the last of all, that no round is trained on. A round after which fewer of
        them are right, one token a step, than `tolerance` below the first model's share, is
        trained once more with care (`Training.cautious`); if that fails too, the run ends with
        the round before. 0 = rounds are taken as they come.
    blend: share of the last round's weights in those of the result; the rest is the first model's
        (WiSE-FT, arXiv 2109.01903). Rounds make a model surer than it is right; what it was keeps
        its confidences honest.
    """

    number: int = 1
    replay: int = 1
    hard_share: float = 0.0
    validation: int = 0
    tolerance: float = 0.02
    blend: float = 1.0

    def __post_init__(self) -> None:
        make_plain(self, integer, "number", low=1)
        make_plain(self, integer, "replay", "validation", low=0)
        make_plain(self, number, "hard_share", "tolerance", low=0, high=1)
        make_plain(self, number, "blend", low=0, high=1, open_low=True)
        if self.hard_share == 1:
            raise ValueError("Rounds: hard_share takes a number in [0, 1), got 1")

    def keeps(self, before: float | None, after: float | None) -> bool:
        """Whether a round is kept, by the shares of right answers; None was not validated."""
        if before is None or after is None:
            return True
        return before - after <= self.tolerance + 1e-9  # a difference of shares is rounded

    def deal(self, prompts: Sequence[Prompt]) -> tuple[list[list[Prompt]], list[Prompt]]:
        """The prompts of each round, and those of the validation."""
        n = len(prompts) - self.validation
        if n < self.number:
            raise ValueError(
                f"{len(prompts)} prompts are too few: {self.number} rounds take one each, and "
                f"the validation takes {self.validation}"
            )
        own = list(prompts[:n])
        bounds = [n * i // self.number for i in range(self.number + 1)]
        dealt = [own[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
        return dealt, list(prompts[n:])


def patient(rollout: Rollout) -> Rollout:
    """The same, one token a step."""
    config = DecodeConfig.vanilla(rollout.mask_id, seed=rollout.config.seed)
    return dataclasses.replace(rollout, config=config, samples=1, greedy_first=False)


def choose(
    model: Any,
    prompts: Sequence[Prompt],
    rollout: Rollout,
    selection: Selection,
    rounds: Rounds,
    folder: Path,
    decoded: Decoded,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records that a round learns, and the report on the choice.

    They are chosen anew each time: it is quick, and can't disagree with the rollouts.
    """
    records = decoded(model, prompts, rollout, folder / "rollouts")
    selected, report = select_rollouts(records, selection)
    report["hard"] = 0
    if rounds.hard_share:
        solved = {r["prompt"] for r in records if r["correct"] is None or selection.takes(r)}
        numbers = [i for i in range(len(prompts)) if i not in solved]
        wanted = round(len(selected) * rounds.hard_share / (1 - rounds.hard_share))
        again = _again(model, prompts, numbers, rollout, folder, decoded)
        hard = [record for record in again if selection.takes(record)][:wanted]
        selected, report["hard"] = selected + hard, len(hard)
    if current_ranks().is_first:
        write_lines(folder / "selected.jsonl", selected)
        write_json(folder / "selection.json", report)
    current_ranks().wait()
    return selected, report


def _again(
    model, prompts, numbers, rollout, folder: Path, decoded: Decoded
) -> list[dict[str, Any]]:
    """Answers to the prompts of these numbers, decoded one token a step."""
    if not numbers:
        return []
    own = [prompts[i] for i in numbers]
    records = decoded(model, own, patient(rollout), folder / "hard", name="roll out, hard")
    return [r | {"prompt": numbers[r["prompt"]]} for r in records]


def examples(
    selected: Sequence[dict[str, Any]],
    prompts: Sequence[Prompt],
    task: Task | None,
    right_alone: bool = False,
) -> list[Example]:
    """What `Trainer` takes of the chosen records; `task` knows what its tokens weigh.

    With `right_alone` the tokens of wrong parts weigh nothing.
    """
    weights: list[Any] = [None] * len(selected)
    serial: list[Any] = [None] * len(selected)
    if task is not None and selected:
        ids = [r["token_ids"] for r in selected]
        answers = torch.tensor(ids, dtype=torch.int64, device="cpu")
        weight, serial = task.weights(answers), task.serial(answers).tolist()
        if right_alone:
            texts = [prompts[r["prompt"]].record["prompt"] for r in selected]
            right = [task.right_cells(text, row) for text, row in zip(texts, ids, strict=True)]
            weight = weight * torch.tensor(right, dtype=weight.dtype, device="cpu")
        weights = weight.tolist()
    return [
        Example(prompts[r["prompt"]].ids, r["token_ids"], r["commit_step"], weights[i], serial[i])
        for i, r in enumerate(selected)
    ]
