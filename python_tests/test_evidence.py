# SPDX-License-Identifier: Apache-2.0
"""`evidence` and `r2dllm evidence`: on made-up decodes whose truth is known, and on a real one."""

import dataclasses
import json
import math

import pytest
import torch

import r2dllm_ext as r2
from r2dllm_ext.evidence import BINS, ERRORS, _cases, _logistic_regression, _streaks
from r2dllm_ext.trace import Trace


def made_up(seed: int, truth, steps: int = 120, length: int = 32, rows: int = 6) -> Trace:
    """Cells of confidence p ~ U(0, 1) whose prediction is the final token with chance truth(p).

    Every prediction stands for the whole decode, and no two neighbours share one.
    """
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(steps, rows, length, generator=g)
    final = torch.arange(length).expand(rows, length)
    stays = torch.rand(p.shape, generator=g) < truth(p)
    zeros = torch.zeros(rows, length, dtype=torch.int64)
    return Trace(
        prompt_length=3,
        block_length=length,
        block=torch.zeros(steps, dtype=torch.int64),
        full_pass=torch.ones(steps, dtype=torch.bool),
        prediction=torch.where(stays, final, final + length),
        confidence=p,
        masked=torch.rand(p.shape, generator=g) < 0.8,
        rule=torch.zeros(p.shape, dtype=torch.uint8),
        commit_step=zeros,
        commit_rule=zeros.to(torch.uint8),
        sequences=torch.cat([zeros[:, :3], final], dim=1),
    )


def test_a_calibrated_model():
    """Nothing is known beyond p: bits, shares and thresholds are those of p ~ U(0, 1)."""
    found = r2.evidence([made_up(0, lambda p: p), made_up(1, lambda p: p)])
    assert found.cells == pytest.approx(2 * 120 * 6 * 32 * 0.8, rel=0.02)
    assert found.stays == pytest.approx(0.5, abs=0.01) and found.prior_bits <= 1.0 + 1e-6
    # The mean entropy of p ~ U(0, 1) is 1/2 nat. A fit on n cases is off by about k / 2n.
    for judge in found.judges.values():
        assert judge.bits == pytest.approx(0.5 / math.log(2), abs=0.02)
    # Errors of the cells above t: the mean of 1 - p there, (1 - t) / 2.
    shares = found.judges["confidence"].committable
    for threshold, share, error in zip(found.thresholds, shares, ERRORS, strict=True):
        assert threshold == pytest.approx(1 - 2 * error, abs=0.02)
        assert share == pytest.approx(2 * error, abs=0.02)
    assert found.calibration.shape == (3, BINS) and found.calibration_error < 0.03


def test_no_threshold_parts_cells_of_one_confidence():
    """Of cells that are all sure, 70 % stay: none can be committed at an error of 3 %."""
    truth = made_up(0, lambda p: p * 0 + 0.7, length=20, rows=10)
    sure = dataclasses.replace(truth, confidence=torch.ones_like(truth.confidence))
    found = r2.evidence([sure, sure])
    assert found.thresholds == (None,) * len(ERRORS)
    assert found.judges["confidence"].committable == (0,) * len(ERRORS)


def test_a_model_that_is_too_sure():
    found = r2.evidence([made_up(2, lambda p: p / 2)])
    # |p - p / 2| over U(0, 1)
    assert found.calibration_error == pytest.approx(0.25, abs=0.02)
    assert (
        found.thresholds == (None, None, None)
        or max(t for t in found.thresholds if t is not None) > 0.98
    )


def test_what_a_streak_says_is_found():
    trace = made_up(3, lambda p: torch.full_like(p, 0.5))
    streak = torch.stack([_streaks(trace, row) for row in range(6)], dim=1)
    g = torch.Generator().manual_seed(4)
    stays = torch.rand(streak.shape, generator=g) < torch.where(streak > 0, 0.9, 0.2)
    final = trace.sequences[:, 3:]
    # A prediction that goes on as it was is right more often; its id has to stay to be a streak.
    changed = torch.where(stays, final, trace.prediction)
    found = r2.evidence([Trace(**{**vars(trace), "prediction": changed})])
    alone, with_streak = found.judges["confidence"], found.judges["+ streak"]
    assert with_streak.bits < alone.bits - 0.005
    assert with_streak.weights["streak"] > 0.1


def test_columns_of_a_case():
    """One row by hand: what stands beside a cell, and how long it has stood."""
    trace = made_up(5, lambda p: p, steps=3, length=4, rows=1)
    masked = torch.tensor([[[1, 1, 1, 0]], [[1, 1, 0, 0]], [[1, 1, 0, 0]]], dtype=torch.bool)
    prediction = torch.tensor([[[7, 7, 2, -1]], [[7, 8, -1, -1]], [[7, 8, -1, -1]]])
    confidence = torch.tensor([[[0.5, 0.25, 0.75, 0]], [[0.5, 0.5, 0, 0]], [[0.5, 0.5, 0, 0]]])
    sequences = torch.tensor([[0, 0, 0, 7, 1, 2, 3]])
    trace = Trace(
        **{
            **vars(trace),
            "masked": masked,
            "prediction": prediction,
            "confidence": confidence,
            "sequences": sequences,
        }
    )
    cases = _cases(trace, 0)
    log2, log3 = math.log(2), math.log(3)
    # stays, confidence, ..., streak, neighbours' confidence, decided, equal
    want = [
        [1, 0.50, 0, 0.25, 0, 1],
        [0, 0.25, 0, 0.5 + 0.75, 0, 1],
        [1, 0.75, 0, 0.25 + 1, 1, 0],
        [1, 0.50, log2, 0.5, 0, 0],
        [0, 0.50, 0, 0.5 + 1, 1, 0],
        [1, 0.50, log3, 0.5, 0, 0],
        [0, 0.50, log2, 0.5 + 1, 1, 0],
    ]
    got = cases[:, [0, 1, 4, 5, 6, 7]]
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64))


def test_the_regression_finds_the_weights_of_its_data():
    g = torch.Generator().manual_seed(6)
    x = torch.randn(20000, 2, generator=g, dtype=torch.float64)
    want = torch.tensor([1.5, -0.75, 0.5], dtype=torch.float64)
    p = (x @ want[:2] + want[2]).sigmoid()
    y = (torch.rand(len(x), generator=g, dtype=torch.float64) < p).double()
    # Four standard errors of a logistic weight at n = 20,000, 1 / sqrt(n * 0.15).
    assert (_logistic_regression(x, y) - want).abs().max() < 4 / math.sqrt(20000 * 0.15)
    # Separable data: the ridge keeps it finite.
    assert _logistic_regression(x[:, :1], (x[:, 0] > 0).double()).isfinite().all()


@pytest.mark.parametrize("rows", [[[]], [[0]]])
def test_too_little_to_say(rows):
    with pytest.raises(ValueError, match="evidence: traces takes decodes with 100 masked cells"):
        r2.evidence([made_up(0, lambda p: p)], rows=rows)


def test_the_command(run, tmp_path):
    out = tmp_path / "curve.svg"
    decode = ("--samples", 4, "--batch-size", 4, "--preset", "fast_dllm", "--all")
    result = run("evidence", *decode, "--json", "--out", out)
    assert result.status == 0, result.err
    found = json.loads(result.out)
    assert found["answers"] == 4 and found["cells"] > 200
    assert list(found["judges"]) == [
        "confidence", "+ streak", "+ neighbours", "+ equal neighbours", "all",
    ]  # fmt: skip
    assert sum(found["calibration"][0]) == found["cells"]
    assert out.read_text().startswith("<?xml")
    table = run("evidence", *decode)
    assert table.status == 0 and "+ neighbours" in table.out
    assert f"{found['cells']} masked cells of 4 answers" in table.out


def test_the_command_refuses(run, tmp_path):
    refused = run("evidence", "--out", tmp_path / "curve.txt")
    assert refused.status == 2 and "--out takes a name in" in refused.err
    refused = run("evidence", "--out", tmp_path / "nowhere" / "curve.png")
    assert refused.status == 2 and "--out: there is no folder" in refused.err
    assert run("evidence", "--samples", 0).status == 2
