# SPDX-License-Identifier: Apache-2.0
"""Roll out: decode prompts with a trace, score and judge the answers, keep them as JSON lines."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import choice, flag, instance, integer, make_plain, refuse
from ..config import DecodeConfig, Rule
from ..generate_checks import embedding_rows
from ..generation import NoProgressError, generate, left_padded
from ..model_driver import CACHES
from ..redundancy import redundancy_score
from ..row_params import RowParams
from ..stop_ids import StopId, answer_length, stop_ids
from ..trace import Trace
from .artefacts import read_lines, write_lines
from .progress import bar
from .prompts import Prompt, Verifier
from .ranks import current_ranks
from .records import check_record

Item = tuple[int, int]  # prompt, sample


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How prompts are decoded. The fields are those of `generate`, and

    samples: answers to a prompt; more than one need config.temperature > 0.
    greedy_first: the first of several is decoded at temperature 0.
    batch_size: answers decoded together, and lines of a file.
    autocast: the model computes in bfloat16; its weights stay what they are.
    """

    config: DecodeConfig
    gen_length: int
    block_length: int = 32
    cache: str = "none"
    logits_shift: int = 0
    stop_id: StopId = None
    samples: int = 1
    greedy_first: bool = False
    batch_size: int = 32
    autocast: bool = False

    def __post_init__(self) -> None:
        instance("Rollout", "config", self.config, DecodeConfig)
        make_plain(self, integer, "gen_length", "block_length", "samples", "batch_size", low=1)
        make_plain(self, integer, "logits_shift", low=0, high=1)
        make_plain(self, choice, "cache", choices=CACHES)
        make_plain(self, flag, "greedy_first", "autocast")
        stops = stop_ids(self.stop_id, where="Rollout")
        several = len(stops) > 1 or isinstance(self.stop_id, (list, tuple))
        stop_id = None if not stops else stops if several else stops[0]
        object.__setattr__(self, "stop_id", stop_id)  # as recipe.json holds it
        if self.gen_length % self.block_length:
            raise ValueError(
                f"Rollout: gen_length takes a multiple of block_length ({self.block_length}), got "
                f"{self.gen_length}"
            )
        if self.samples > 1 and self.config.temperature == 0:
            raise ValueError(
                f"Rollout: samples takes 1 without temperature, got {self.samples}: all samples of "
                "a prompt are the same"
            )

    @property
    def mask_id(self) -> int:
        """Of the config, which has one."""
        if self.config.mask_id is None:
            refuse(ValueError, "Rollout", "config.mask_id", "the model's mask token", None)
        return self.config.mask_id


def roll_out(
    model: Any,
    prompts: Sequence[Prompt],
    rollout: Rollout,
    folder: str | os.PathLike[str],
    *,
    decode: Callable[[list[int]], str],
    pad_id: int = 0,
    verifier: Verifier | None = None,
    progress: bool = False,
    name: str = "roll out",
) -> list[dict[str, Any]]:
    """Answers to `prompts`, one record each, in the order of the prompts.

    A batch of answers is a file of `folder`, written whole when it is done: a killed run goes on
    with the next one, and any number of processes (`torchrun`) share the batches. A batch depends
    on its number alone, not on who decodes it.

    Args:
        model: of `generate`.
        decode: ids to the text that the verifier is shown, and that the record holds.
        verifier: called with the prompt's JSON object and the text; None = nobody knows.

    Returns:
        Records with prompt and sample (numbers from 0), token_ids (all G), text (up to the stop
        token), length (tokens up to it, itself included), complete (it is there, or none was asked
        for), nfe (forwards in which the row had masked cells), commit_step (a token's forward; -1 =
        filled up), rule_counts (of the answer's tokens), score (`RedundancyScore`, judged by the
        rules of `DecodeConfig.r2`), right (share of its parts; None without a verifier), correct
        (all of them).

    Raises:
        ValueError: a file of `folder` that is not whole or not of this run.

    An answer that the model can't finish (`NoProgressError` of `generate`) costs the others
    nothing: its record is neither complete nor correct, and there is a warning.
    """
    ranks, folder = current_ranks(), Path(folder)
    items = [(p, s) for p in range(len(prompts)) for s in range(rollout.samples)]
    size = rollout.batch_size
    batches = [items[i : i + size] for i in range(0, len(items), size)]
    files = [folder / f"{number:06}.jsonl" for number in range(len(batches))]
    # What is there is read first: a damaged file should not cost the work that comes before it.
    read = partial(_read, gen_length=rollout.gen_length, judged=verifier is not None, model=model)
    for file, batch in zip(files, batches, strict=True):
        if file.exists():
            read(file, batch)
    # Shared evenly among those that are left, the same way in every process.
    todo = [number for number, file in enumerate(files) if not file.exists()]
    ranks.wait()
    mine = todo[ranks.rank :: ranks.world]
    with bar(progress and ranks.is_first, name, sum(len(batches[n]) for n in mine), "answer") as b:
        for number in mine:
            batch = batches[number]
            ids = [prompts[p].ids for p, _ in batch]
            greedy = [rollout.greedy_first and rollout.samples > 1 and s == 0 for _, s in batch]
            trace, unfinished = _decode(model, ids, rollout, number, pad_id, greedy)
            records = _records(trace, unfinished, batch, prompts, rollout, decode, verifier)
            write_lines(files[number], records)
            b.update(len(batch))
    ranks.wait()
    return [
        record for file, batch in zip(files, batches, strict=True) for record in read(file, batch)
    ]


def _read(
    file: Path, batch: list[Item], *, gen_length: int, judged: bool, model: Any
) -> list[dict[str, Any]]:
    hint = "; delete the file to have it made anew"
    records = read_lines(file, hint=hint)
    found = [(record.get("prompt"), record.get("sample")) for record in records]
    if found != batch:
        raise ValueError(
            f"{file}: {len(found)} answers, takes {len(batch)} to (prompt, sample) "
            f"{batch[0]} .. {batch[-1]}{hint}"
        )
    for number, record in enumerate(records, start=1):
        try:
            check_record(record, gen_length, judged, embedding_rows(model))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: line {number}: {error}{hint}") from error
    return records


def _decode(
    model: Any,
    ids: list[list[int]],
    rollout: Rollout,
    number: int,
    pad_id: int,
    greedy: list[bool],
) -> tuple[Trace, Sequence[int]]:
    """The trace of a batch, and its rows that the model can't finish."""
    tokens, real = left_padded(ids, pad_id)
    device = getattr(model, "device", tokens.device)
    rows = None
    if any(greedy):
        temperature = [0.0 if is_greedy else rollout.config.temperature for is_greedy in greedy]
        rows = RowParams(temperature=torch.tensor(temperature, dtype=torch.float32, device=device))
    # A seed for each batch: within it, random numbers differ by row and step.
    seed = (rollout.config.seed * 1_000_003 + number) % 2**63
    unfinished: Sequence[int] = ()
    try:
        # Off, it would end an autocast of the caller's.
        narrow = torch.autocast(device.type, torch.bfloat16) if rollout.autocast else nullcontext()
        with narrow:
            generation = generate(
                model,
                tokens.to(device),
                gen_length=rollout.gen_length,
                block_length=rollout.block_length,
                config=rollout.config.replace(seed=seed),
                rows=rows,
                cache=rollout.cache,
                logits_shift=rollout.logits_shift,
                attention_mask=real.to(device),
                stop_id=rollout.stop_id,
                trace=True,
            )
    except NoProgressError as error:
        generation, unfinished = error.generation, error.rows
        warnings.warn(f"roll out: {len(unfinished)} of {len(ids)} answers: {error}", stacklevel=2)
    assert generation.trace is not None  # asked for
    return generation.trace, unfinished


def _records(
    trace: Trace,
    unfinished: Sequence[int],
    batch: list[Item],
    prompts: Sequence[Prompt],
    rollout: Rollout,
    decode: Callable[[list[int]], str],
    verifier: Verifier | None,
) -> list[dict[str, Any]]:
    stops = stop_ids(rollout.stop_id, where="Rollout")
    judge = DecodeConfig.r2(rollout.config.mask_id)
    scores = redundancy_score(trace, judge, stop_id=rollout.stop_id)
    answers: Tensor = trace.sequences[:, trace.prompt_length :]
    nfe = trace.row_nfe()
    records = []
    for row, (p, s) in enumerate(batch):
        ids = answers[row].tolist()
        words, ended = answer_length(ids, stops)
        text, whole = decode(ids[:words]), row not in unfinished
        right = None if verifier is None else whole * _verdict(verifier, prompts[p], p, text)
        rules = torch.bincount(trace.commit_rule[row, : words + ended].long(), minlength=len(Rule))
        records.append(
            {
                "prompt": p,
                "sample": s,
                "text": text,
                "right": right,
                "correct": None if right is None else right == 1,
                "complete": whole and (ended or not stops),
                "length": words + ended,
                "nfe": int(nfe[row]),
                "score": {name: float(x[row]) for name, x in scores._asdict().items()},
                "rule_counts": {r.name.lower(): int(rules[r]) for r in Rule if r},
                "token_ids": ids,
                "commit_step": trace.commit_step[row].tolist(),
            }
        )
    return records


def _verdict(verifier: Verifier, prompt: Prompt, number: int, text: str) -> float:
    try:
        found: Any = verifier(prompt.record, text)
        share = found.item() if getattr(found, "ndim", None) == 0 else found  # numpy's and torch's
        if not isinstance(share, Real) or not 0 <= float(share) <= 1:
            raise ValueError(f"it says {found!r}, takes a bool or a share in [0, 1]")
    except Exception as error:
        raise ValueError(
            f"the verifier failed on prompt {number + 1} and the answer {text!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return float(share)
