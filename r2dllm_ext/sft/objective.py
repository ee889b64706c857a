# SPDX-License-Identifier: Apache-2.0
"""From chosen answers to the loss of a training step: batches, and the module that is wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import instance, integer, refuse
from ..corruption import IGNORE_INDEX, corrupt
from ..generation import left_padded
from ..models import Transformer
from ..ops import linear_sft_loss

if TYPE_CHECKING:
    from .training import Training


class Example(NamedTuple):
    """A prompt and the answer to learn, all G tokens of it.

    commit_step: the forward that decided each token; -1 = never reached, as behind a stop token:
        always hidden and never learned, for decoding does not look there. None = all are learned.
    token_weights: of the loss, beside those of `corrupt`; None = 1.
    serial: tokens that decoding decides late and in order (`Task.serial`); of frontier masks.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    commit_step: list[int] | None = None
    token_weights: list[float] | None = None
    serial: list[bool] | None = None


# What an example says of each token of its answer.
_BESIDE = ("commit_step", "token_weights", "serial")


def check_examples(where: str, examples: Sequence[Example]) -> None:
    """Raises TypeError or ValueError naming example and field.

    A list that is shorter or longer than the answer would say its values of other tokens.
    """
    for place, example in enumerate(examples):  # of every step: quick, so ids are not looked at
        name = f"examples[{place}]"
        instance(where, name, example, Example)
        for field, values in example._asdict().items():
            if values is None and field in _BESIDE:
                continue
            if not isinstance(values, (list, tuple)):
                refuse(TypeError, where, f"{name}.{field}", "a list", values)
        tokens, like = len(example.answer_ids), len(examples[0].answer_ids)
        if not tokens or tokens != like:
            takes = f"one token or more, as many as examples[0] ({like})"
            refuse(ValueError, where, f"{name}.answer_ids", takes, tokens)
        for field in _BESIDE:
            values = getattr(example, field)
            if values is not None and len(values) != tokens:
                takes = f"{tokens} values, one for each token of the answer"
                refuse(ValueError, where, f"{name}.{field}", takes, len(values))


class Batch(NamedTuple):
    """What one forward of training takes: n sequences, N rows of logits that carry loss."""

    ids: Tensor  # [n, T] int64
    keys: Tensor | None  # [n, T] bool, False on padding; None if nothing is
    rows: Tensor  # [N] int64, places in [n * T]
    targets: Tensor  # [N] int64
    weights: Tensor  # [N] float32

    def to(self, device: torch.device) -> Batch:
        moved = {
            name: x.to(device, non_blocking=True)
            for name, x in self._asdict().items()
            if x is not None
        }
        return self._replace(**moved)


class Masking(NamedTuple):
    """How answers are masked: shares of the examples by mode of `corrupt`, the others by block."""

    training: Training
    mask_id: int
    block_length: int

    def modes(self, places: Tensor, step: int) -> list[str]:
        """The mode of the example at each place of a step: any few examples have the shares, as
        the multiples of the golden ratio are spread evenly."""
        golden, other = (5**0.5 - 1) / 2, 2**0.5 - 1
        share = (
            self.training.trajectory_share,
            self.training.iid_share,
            self.training.frontier_share,
        )
        shares = torch.tensor(share, dtype=torch.float64, device="cpu").cumsum(0)
        u = ((places.double() + 1) * golden + step * other) % 1
        names = ("trajectory", "iid", "frontier", "block")
        return [names[i] for i in torch.searchsorted(shares, u, right=True).tolist()]


def make_batch(
    examples: Sequence[Example],
    places: Sequence[int],
    step: int,
    masking: Masking,
    *,
    logits_shift: int,
    pad_id: int,
) -> Batch:
    """Examples that stand at `places` of the whole batch of a step, corrupted, on the CPU.

    The masks of an example hang on step and place alone. Blocks and whole answers have a second
    view, their complement, with `Training.complementary`. States of a decode have none: no decode
    comes by with its last tokens decided and its first ones not.
    """
    check_examples("make_batch", examples)
    if not examples or len(places) != len(examples):
        takes = f"one for each of the examples ({len(examples)}), at least one"
        refuse(ValueError, "make_batch", "places", takes, list(places))
    training = masking.training
    logits_shift = integer("make_batch", "logits_shift", logits_shift, 0, 1)
    prompts, real = left_padded([example.prompt_ids for example in examples], pad_id)
    P = prompts.shape[1]
    answers = torch.tensor(
        [example.answer_ids for example in examples], dtype=torch.int64, device="cpu"
    )
    tokens = torch.cat([prompts, answers], 1)
    when = _beside(examples, tokens, "commit_step", torch.int64, 0)
    reached = torch.cat([torch.zeros_like(real), when[:, P:] >= 0], 1)
    tokens[:, P:] = tokens[:, P:].masked_fill(~reached[:, P:], masking.mask_id)
    serial = _beside(examples, tokens, "serial", torch.bool, False)
    own_weights = _beside(examples, tokens, "token_weights", torch.float32, 1.0)
    keys = torch.cat([real, torch.ones_like(answers, dtype=torch.bool)], 1)
    place = torch.tensor(places, dtype=torch.int64, device="cpu")

    modes = masking.modes(place, step)
    found: list[tuple[Tensor, ...]] = []  # ids, keys, targets and weights of the views of a mode
    for mode in dict.fromkeys(modes):
        own = torch.tensor([m == mode for m in modes], dtype=torch.bool, device="cpu")
        for needs, name in (("trajectory", "commit_step"), ("frontier", "serial")):
            if mode == needs and any(getattr(e, name) is None for e in examples):
                raise ValueError(f"mode {mode!r} takes examples with {name}, got one without")
        views, targets, weights = corrupt(
            tokens[own],
            reached[own],
            mask_id=masking.mask_id,
            block_length=masking.block_length,
            mode=mode,
            ratio=training.ratio,
            seed=training.seed,
            complementary=training.complementary and mode in ("block", "iid"),
            commit_step=when[own] if mode == "trajectory" else None,
            serial=serial[own] if mode == "frontier" else None,
            weighting=training.weighting,
            row=place[own],
            step=step,
        )
        if mode == "trajectory" and training.near:
            weights = weights * _far_weights(targets, when[own], training)
        weights = weights * own_weights[own]
        parts = (views, keys[own].expand_as(views), targets, weights)
        found.append(tuple(part.flatten(0, 1) for part in parts))
    ids, keys, targets, weights = (torch.cat(group) for group in zip(*found, strict=True))
    learned = (targets != IGNORE_INDEX).flatten().nonzero().flatten()
    # The row that predicts a token stands `logits_shift` to its left, but never before the first
    # token of its own sequence: neither in the padding nor at the end of the sequence before.
    sequence, position = learned // tokens.shape[1], learned % tokens.shape[1]
    before = position - (~keys).sum(1)[sequence]  # tokens to its left
    return Batch(
        ids=ids,
        keys=None if bool(real.all()) else keys,
        rows=learned - before.clamp(max=logits_shift),
        targets=targets.flatten()[learned],
        weights=weights.flatten()[learned],
    )


def _beside(
    examples: Sequence[Example], tokens: Tensor, name: str, dtype: torch.dtype, default: Any
) -> Tensor:
    """What the examples say of their answers' tokens, [n, T]; `default` where they say nothing."""
    table = torch.full(tokens.shape, default, dtype=dtype, device="cpu")
    for row, example in enumerate(examples):
        values = getattr(example, name)
        if values is not None:
            table[row, -len(values) :] = torch.tensor(values, dtype=dtype, device="cpu")
    return table


def _far_weights(targets: Tensor, when: Tensor, training: Training) -> Tensor:
    """1 for tokens that were decided less than `near` forwards later, else `far_weight`."""
    learned = targets != IGNORE_INDEX
    never = torch.iinfo(torch.int64).max
    now = when.expand_as(targets).masked_fill(~learned, never).amin(-1, keepdim=True)
    return torch.where(learned & (when - now >= training.near), training.far_weight, 1.0).float()


class Objective(nn.Module):
    """The loss as a module, so that DDP and FSDP see one forward, the head's included.

    Only rows that carry loss reach the head.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 1.0,
        entropy_gate: str = "correct",
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = partial(
            linear_sft_loss,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
            entropy_gate=entropy_gate,
        )

    def forward(self, batch: Batch) -> Tensor:
        """Mean weighted loss of the batch's rows, a scalar."""
        hidden, _ = self.model.hidden_states(batch.ids, attention_mask=batch.keys)
        hidden = hidden.flatten(0, 1).index_select(0, batch.rows)
        return self.loss(
            hidden,
            self.model.lm_head_weight,
            batch.targets,
            batch.weights,
            max_rows=len(batch.targets),  # known here, so CUDA need not count
        )
