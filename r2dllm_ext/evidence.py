# SPDX-License-Identifier: Apache-2.0
"""`evidence`: what streaks, neighbours and runs say about a prediction beyond its confidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import instance, integer, refuse
from .trace import Trace

ERRORS = (0.005, 0.01, 0.03)  # shares of wrong commits that are asked about
BINS = 20
_LEAST_CELLS = 100  # on each side of the split: below, a fit says nothing

# What a prediction is judged by: names of columns of `_features`.
_CONFIDENCE = ("logit", "logit squared")
_STREAK = ("streak",)
_NEIGHBOURS = ("neighbour confidence", "neighbours decided")
_EQUAL = ("equal neighbours",)
MODELS = {
    "confidence": _CONFIDENCE,
    "+ streak": _CONFIDENCE + _STREAK,
    "+ neighbours": _CONFIDENCE + _NEIGHBOURS,
    "+ equal neighbours": _CONFIDENCE + _EQUAL,
    "all": _CONFIDENCE + _STREAK + _NEIGHBOURS + _EQUAL,
}


class Judge(NamedTuple):
    """A logistic regression of "this prediction is the final token" on some columns."""

    bits: float  # log-loss a cell, base 2, on rows that it was not fitted to
    committable: tuple[float, ...]  # share of the cells that it commits at each of ERRORS
    weights: dict[str, float]  # of the standardised columns


class Evidence(NamedTuple):
    """Result of `evidence`."""

    cells: int  # masked cells, all steps and rows
    stays: float  # share whose prediction was the final token
    prior_bits: float  # log-loss of that share alone
    judges: dict[str, Judge]  # by the names of MODELS
    thresholds: tuple[float | None, ...]  # least confidence that errs so often, for each of ERRORS
    calibration: Tensor  # [3, BINS] float64: cells, their mean confidence, share that stays
    calibration_error: float  # mean |confidence - share| over the bins, weighed by cells


def evidence(traces: Iterable[Trace], *, rows: Sequence[Sequence[int]] | None = None) -> Evidence:
    """What each structure that R2's rules use says beyond the confidence, on a model's own decodes.

    Every masked cell of every step is a case: its prediction came to be the final token, or not.
    Five logistic regressions judge it by its confidence alone, with the steps that the prediction
    has stood for (stability), with its two neighbours' confidence and how many of them are decided
    (windows), with how many of them are masked and predict the same token (ambiguity), and with
    all of it. They are fitted to every other row and judged on the rest. Whether a rule will help
    this model is the difference to the first.

    Args:
        traces: of `generate(..., trace=True)`; one token a step (`DecodeConfig.vanilla`) is what
            says most, since every cell is seen at every step. B may differ.
        rows: for each trace the rows that count, such as those whose answer is right. Default: all.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes; so do fewer than
            100 masked cells on either side of the split, or cells on one side that all stay, or all
            change.

    Computed on the CPU in float64; the traces lie there.

    >>> from r2dllm_ext.tasks import get_task
    >>> model, task = load_model("ledger", dtype=torch.float32), get_task("ledger")
    >>> ids = [task.tokenizer.encode(task.sample(0, i).prompt) for i in range(2)]
    >>> config = DecodeConfig.vanilla(model.mask_id)
    >>> decode = lambda prompt: generate(model, prompt, gen_length=96, config=config, trace=True)
    >>> found = evidence([decode(torch.tensor([one])).trace for one in ids])
    >>> found.cells, sorted(found.judges)[0]
    (3168, '+ equal neighbours')
    """
    traces, chosen = _check(traces, rows)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    number = 0
    for trace, some in zip(traces, chosen, strict=True):
        for row in some:
            parts[number % 2].append(_cases(trace, row))
            number += 1
    none = torch.empty(0, len(_COLUMNS), dtype=torch.float64, device="cpu")
    fitted, judged = (torch.cat([none, *part]) for part in parts)
    for cases in (fitted, judged):
        if len(cases) < _LEAST_CELLS or not 0 < float(cases[:, 0].sum()) < len(cases):
            takes = f"decodes with {_LEAST_CELLS} masked cells and some that change, in two rows"
            refuse(ValueError, "evidence", "traces", takes, f"{len(fitted)} and {len(judged)}")
    every = torch.cat([fitted, judged])
    confidence, stays = every[:, 1], every[:, 0]
    calibration = _calibration(confidence, stays)
    share = float(stays.mean())
    prior = torch.full_like(judged[:, 0], share)
    return Evidence(
        cells=len(every),
        stays=share,
        prior_bits=float(F.binary_cross_entropy(prior, judged[:, 0])) / _LN2,
        judges={name: _judge(columns, fitted, judged) for name, columns in MODELS.items()},
        thresholds=tuple(_threshold(confidence, stays, error) for error in ERRORS),
        calibration=calibration,
        calibration_error=_calibration_error(calibration),
    )


def _check(
    traces: Iterable[Trace], rows: Sequence[Sequence[int]] | None
) -> tuple[list[Trace], list[list[int]]]:
    """The traces, and of each the rows that count."""
    try:
        traces = list(traces)
        chosen = None if rows is None else [list(some) for some in rows]
    except TypeError:
        takes = "traces, and rows a sequence of indices for each of them"
        refuse(TypeError, "evidence", "traces", takes, (traces, rows))
    for trace in traces:
        instance("evidence", "traces", trace, Trace)
    counts = [trace.prediction.shape[1] for trace in traces]
    if chosen is None:
        return traces, [list(range(count)) for count in counts]
    if len(chosen) != len(traces):
        refuse(ValueError, "evidence", "rows", f"those of {len(traces)} traces", rows)
    return traces, [
        [integer("evidence", "rows", row, 0, count - 1) for row in some]
        for count, some in zip(counts, chosen, strict=True)
    ]


_LN2 = 0.6931471805599453
_COLUMNS = ("stays", "confidence", *MODELS["all"])


def _cases(trace: Trace, row: int) -> Tensor:
    """[cells, _COLUMNS] float64, of one row."""
    masked, prediction = trace.masked[:, row], trace.prediction[:, row]
    p = trace.confidence[:, row].double()
    S, L = masked.shape
    start = trace.prompt_length + trace.block * trace.block_length
    final = trace.sequences[row, start[:, None] + torch.arange(L, device="cpu")]

    # A neighbour outside the block is neither decided nor masked.
    decided = ~masked
    sure = torch.where(masked, p, 1.0).nan_to_num(0.0)
    same = masked[:, 1:] & masked[:, :-1] & (prediction[:, 1:] == prediction[:, :-1])
    logit = torch.logit(p.clamp(1e-6, 1 - 1e-6))
    columns = {
        "stays": (prediction == final).double(),
        "confidence": p,
        "logit": logit,
        "logit squared": logit.square(),
        "streak": _streaks(trace, row).double().log1p(),
        "neighbour confidence": _both_sides(sure),
        "neighbours decided": _both_sides(decided.double()),
        "equal neighbours": F.pad(same.double(), (0, 1)) + F.pad(same.double(), (1, 0)),
    }
    cases = torch.stack([columns[name] for name in _COLUMNS], dim=-1)
    return cases[masked & (prediction >= 0)]


def _streaks(trace: Trace, row: int) -> Tensor:
    """[S, L]: for how many steps before this one a cell has had the same prediction."""
    masked, prediction = trace.masked[:, row], trace.prediction[:, row]
    streaks = torch.zeros(masked.shape, dtype=torch.int64, device="cpu")
    for step in range(1, len(masked)):
        if trace.block[step] == trace.block[step - 1]:
            kept = masked[step] & masked[step - 1] & (prediction[step] == prediction[step - 1])
            streaks[step] = torch.where(kept, streaks[step - 1] + 1, 0)
    return streaks


def _both_sides(values: Tensor) -> Tensor:
    """Of each cell, the sum over the cell before it and the cell behind it; 0 outside the block."""
    return F.pad(values, (1, 0))[:, :-1] + F.pad(values, (0, 1))[:, 1:]


def _judge(names: Sequence[str], fitted: Tensor, judged: Tensor) -> Judge:
    index = [_COLUMNS.index(name) for name in names]
    x, y = fitted[:, index], fitted[:, 0]
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-9)
    weights = _logistic_regression((x - mean) / scale, y)
    score = (judged[:, index] - mean) / scale @ weights[:-1] + weights[-1]
    stays = judged[:, 0]
    return Judge(
        bits=float(F.binary_cross_entropy_with_logits(score, stays)) / _LN2,
        committable=tuple(_prefix(score, stays, error) / len(stays) for error in ERRORS),
        weights=dict(zip(names, weights[:-1].tolist(), strict=True)),
    )


def _logistic_regression(x: Tensor, y: Tensor) -> Tensor:
    """Weights and bias of the greatest likelihood, by Newton's method; a ridge of one case."""
    x = F.pad(x, (0, 1), value=1.0)
    weights = torch.zeros(x.shape[1], dtype=x.dtype, device="cpu")
    ridge = torch.eye(x.shape[1], dtype=x.dtype, device="cpu")
    for _ in range(50):
        p = (x @ weights).sigmoid()
        gradient = x.T @ (p - y) + weights
        step = torch.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge, gradient)
        # A step that is too long on a flat likelihood would never come back.
        weights = weights - step * min(1.0, 3.0 / max(float(step.norm()), 1e-12))
        if float(step.abs().max()) < 1e-9:
            break
    return weights


def _prefix(score: Tensor, stays: Tensor, error: float) -> int:
    """Most cells, in falling score, of which at most the share `error` changes. Cells of one score
    go together: no threshold parts them."""
    falling, order = score.sort(descending=True, stable=True)
    wrong = (1 - stays[order]).cumsum(0)
    fine = wrong <= error * torch.arange(1, len(order) + 1, dtype=wrong.dtype, device="cpu")
    fine[:-1] &= falling[1:] < falling[:-1]
    return int(fine.nonzero()[-1]) + 1 if bool(fine.any()) else 0


def _threshold(confidence: Tensor, stays: Tensor, error: float) -> float | None:
    count = _prefix(confidence, stays, error)
    return float(confidence.sort(descending=True).values[count - 1]) if count else None


def _calibration(confidence: Tensor, stays: Tensor) -> Tensor:
    place = (confidence * BINS).long().clamp(0, BINS - 1)
    table = torch.zeros(3, BINS, dtype=torch.float64, device="cpu")
    for line, values in enumerate((torch.ones_like(stays), confidence, stays)):
        table[line].index_add_(0, place, values)
    table[1:] /= table[0].clamp(min=1)
    return table


def _calibration_error(table: Tensor) -> float:
    return float((table[0] * (table[1] - table[2]).abs()).sum() / table[0].sum())
