# SPDX-License-Identifier: Apache-2.0
"""Answers worked out by hand, for the oracle and for the extension alike."""

import math

import numpy as np
import pytest
import torch
from cases import (
    OFF,
    RANDOM123,
    STREAKS,
    assert_same,
    clone,
    mass_error,
    roundings,
    state_tensors,
    sure_logits,
)

from r2dllm_ext import reference
from r2dllm_ext.config import DecodeConfig, Rule
from r2dllm_ext.row_params import RowParams
from r2dllm_ext.state import Counter, DecodeState

NAN, INF = math.nan, math.inf
MASK = 15


def bools(text: str) -> torch.Tensor:
    """[B, L] cells drawn as "x.x xx.": x is True; rows are separated by blanks."""
    return torch.tensor([[c == "x" for c in row] for row in text.split()])


def drawing(cells: torch.Tensor) -> str:
    return " ".join("".join("x" if c else "." for c in row) for row in cells.tolist())


def rules_of(step) -> str:
    """One character per cell: the first letter of its rule, "." where there is none."""
    return " ".join("".join(".tfwasbne"[c] for c in row) for row in step.rule.tolist())


# ---- token_confidence ------------------------------------------------------------------------


def test_token_confidence(implementation):
    ops, device = implementation
    logits = sure_logits([(3, 0.5), (7, 1.0), (0, 0.25), (9, 0.8)]).to(device)
    prediction, confidence = ops.token_confidence(logits)
    assert prediction.tolist() == [[3, 7, 0, 9]]
    assert confidence[0, :3].tolist() == [0.5, 1.0, 0.25]
    # Of mass_error the share 1 - 0.8, 4 roundings; that of the logit, and of the result.
    assert confidence[0, 3].item() == pytest.approx(0.8, rel=roundings(8))


def test_token_confidence_of_candidates_only(implementation):
    ops, device = implementation
    logits = sure_logits([(3, 0.5), (7, 1.0), (0, 0.25)]).to(device)
    logits[0, 1] = NAN
    prediction, confidence = ops.token_confidence(logits, candidates=bools("x.x").to(device))
    assert prediction.tolist() == [[3, -1, 0]]
    assert confidence.tolist() == [[0.5, 0.0, 0.25]]


def test_token_confidence_of_invalid_rows(implementation):
    """Maximum NaN or +inf, or all -inf: -1 and NaN; a single -inf is nothing special."""
    ops, device = implementation
    logits = sure_logits([(3, 0.5)] * 4).to(device)
    logits[0, 0, 9], logits[0, 1, 9], logits[0, 2], logits[0, 3, 9] = NAN, INF, -INF, -INF
    prediction, confidence = ops.token_confidence(logits)
    assert prediction.tolist() == [[-1, -1, -1, 3]]
    assert confidence.isnan().tolist() == [[True, True, True, False]]


def test_token_confidence_without_a_column(implementation):
    ops, device = implementation
    logits = sure_logits([(3, 0.5), (7, 1.0), (2, 0.5)]).to(device)
    prediction, confidence = ops.token_confidence(logits, exclude_id=3)
    assert prediction.tolist() == [[4, 7, 2]]
    assert confidence.tolist() == [[1.0, 1.0, 1.0]]


# ---- window_pool -----------------------------------------------------------------------------

WINDOWS = [
    # confidence, masked, window, min_confidence, max_unmasked, selected
    ([0.9, 0.8, 0.1], "xxx", 2, 0.8, None, "xx."),
    ([0.95, 0.7, 0.95, 0.1], "xxxx", 2, 0.8, None, "xxx."),  # windows do not see each other
    ([0.9, 0.1, 0.9], "xxx", 1, 0.8, None, "x.x"),
    ([0.9, 0.9, 0.9], "xxx", 3, 0.8, None, "xxx"),
    ([0.9, 0.9, 0.9], "xxx", 4, 0.8, None, "..."),  # W > L
    ([0.9, 0.0, 0.9], "x.x", 3, 0.8, None, "x.x"),  # the mean is over masked cells alone
    ([0.9, 0.0, 0.9], "x.x", 3, 0.8, 1, "x.x"),
    ([0.9, 0.0, 0.9], "x.x", 3, 0.8, 0, "..."),
    ([0.9, 0.0, 0.9], "x.x", 3, 0.8, 99, "x.x"),  # U > W
    ([0.9, 0.9, 0.9, 0.9], "x..x", 2, 0.8, 0, "...."),
    ([0.5, 0.5, 0.25, 0.75], "xxxx", 2, 0.5, None, "xxxx"),  # inclusive
    ([0.5, 0.5, 0.25, 0.7], "xxxx", 2, 0.5, None, "xx.."),
    ([0.8, 0.8], "xx", 2, 0.8, None, "xx"),  # 0.8 means float32(0.8)
    ([0.9, NAN, 0.9, 0.9], "xxxx", 2, 0.8, None, "..xx"),
    ([0.9, INF, 0.9, 0.9], "xxxx", 2, 0.8, None, "..xx"),
    ([0.9, -INF, INF, 0.9], "xxxx", 4, 0.0, None, "...."),
    ([0.9, NAN, 0.9, 0.9], "x.xx", 2, 0.8, None, "x.xx"),  # a committed cell's NaN is not seen
    ([0.0, 0.0], "xx", 1, 0.0, None, "xx"),
    ([0.9, 0.9], "..", 1, 0.0, None, ".."),
]


@pytest.mark.parametrize("confidence, masked, window, least, unmasked, want", WINDOWS)
def test_window_pool(implementation, confidence, masked, window, least, unmasked, want):
    ops, device = implementation
    options = {"window": window, "min_confidence": least, "max_unmasked": unmasked}
    p = torch.tensor([confidence], device=device)
    assert drawing(ops.window_pool(p, bools(masked).to(device), **options)) == want


# ---- positional_ambiguity --------------------------------------------------------------------

AMBIGUITIES = [
    # prediction, confidence, masked, options, chosen
    ([5, 5, 5, 7, 7, 9], [0.5, 0.9, 0.9, 0.85, 0.2, 0.99], "xxxxxx", {}, ".x.x.."),
    ([5, 5, 5, 7, 7, 9], [0.5, 0.9, 0.9, 0.85, 0.2, 0.99], "xxxxxx", {"mode": "mid"}, ".x..x."),
    ([5, 5, 5, 5], [0.9, 0.1, 0.1, 0.1], "xxxx", {"mode": "mid"}, "..x."),
    ([5, 5, 5, 7, 7], [0.9] * 5, "xxxxx", {"min_run": 3}, "x...."),
    ([5, 6], [0.9, 0.9], "xx", {"min_run": 1}, "xx"),
    ([5, 5], [0.8, 0.8], "xx", {}, ".."),  # strict
    ([5, 5], [0.8, 0.81], "xx", {}, ".x"),
    ([5, 5, 5], [0.9, 0.9, 0.9], "x.x", {}, "..."),  # a committed cell cuts the run
    ([5, 5, 5, 5], [0.9, 0.85, 0.9, 0.95], ".xxx", {}, "...x"),
    ([-1, -1, -1], [0.9, 0.9, 0.9], "xxx", {}, "..."),
    ([5, 5, 5], [0.9, NAN, 0.9], "xxx", {}, "..."),
    ([5, 5, 5], [0.9, INF, 0.9], "xxx", {"min_run": 1}, "x.x"),
    ([5, 5], [NAN, NAN], "xx", {}, ".."),
]


@pytest.mark.parametrize("prediction, confidence, masked, options, want", AMBIGUITIES)
def test_positional_ambiguity(implementation, prediction, confidence, masked, options, want):
    ops, device = implementation
    ids = torch.tensor([prediction], device=device)
    p = torch.tensor([confidence], device=device)
    cells = bools(masked).to(device)
    options = {"min_confidence": 0.8} | options
    assert drawing(ops.positional_ambiguity(ids, p, cells, **options)) == want


# ---- update_stability_ -----------------------------------------------------------------------

STREAK_RUNS = [
    # steps, min_confidence, mode, observations (id, p) of one cell, step at which it is final
    (3, 0.8, "last", [(5, 0.1), (5, 0.2), (5, 0.9)], 3),
    (3, 0.8, "last", [(5, 0.9), (5, 0.9), (5, 0.7), (5, 0.8)], 4),  # too weak: the streak stays
    (3, 0.8, "last", [(5, 0.9), (6, 0.9), (5, 0.9), (5, 0.9), (5, 0.9)], 5),  # a change restarts
    (1, 0.5, "last", [(5, 0.5)], 1),  # inclusive
    (2, 0.5, "ave", [(5, 0.25), (5, 0.75)], 2),
    (2, 0.5, "ave", [(5, 0.25), (5, 0.5), (5, 0.75)], 3),
    (2, 0.5, "ave", [(5, 0.25), (5, 0.5), (5, 0.5)], None),
    (2, 0.8, "max", [(5, 0.9), (5, 0.1)], 2),
    (2, 0.8, "max", [(5, 0.9), (6, 0.1), (6, 0.1)], None),
]


@pytest.mark.parametrize("steps, least, mode, seen, final_at", STREAK_RUNS)
def test_update_stability(implementation, steps, least, mode, seen, final_at):
    ops, device = implementation
    state = DecodeState(1, 1, device=device)
    masked = bools("x").to(device)
    for number, (token, p) in enumerate(seen, 1):
        final = ops.update_stability_(
            state,
            torch.tensor([[token]], device=device),
            torch.tensor([[p]], device=device),
            was_masked=masked,
            is_masked=masked,
            steps=steps,
            min_confidence=least,
            mode=mode,
        ).item()
        assert final == (number == final_at)
    count = state.streak_count.item()
    assert (count == 0) == (final_at is not None)


def test_update_stability_clears_and_keeps(implementation):
    """Per cell: committed, invalid twice, extended, restarted, not masked before."""
    ops, device = implementation
    state = DecodeState(1, 6, device=device)
    state.streak_count[:] = 2
    state.streak_id[:] = 5
    state.streak_sum[:] = 1.25
    state.streak_max[:] = 0.75
    final = ops.update_stability_(
        state,
        torch.tensor([[5, -1, 5, 5, 6, 5]], device=device),
        torch.tensor([[0.5, 0.5, NAN, 0.5, 0.5, 0.5]], device=device),
        was_masked=bools("xxxxx.").to(device),
        is_masked=bools(".xxxx.").to(device),
        steps=9,
        min_confidence=0.5,
    )
    assert drawing(final) == "......"
    assert state.streak_count.tolist() == [[0, 0, 0, 3, 1, 2]]
    assert state.streak_id.tolist() == [[-1, -1, -1, 5, 6, 5]]
    assert state.streak_sum.tolist() == [[0, 0, 0, 1.75, 0.5, 1.25]]
    assert state.streak_max.tolist() == [[0, 0, 0, 0.75, 0.5, 0.75]]


# ---- base rules ------------------------------------------------------------------------------


def all_count(budget: float) -> dict:
    return {"base": "budget", "error_budget": budget, "last_free": False}


BASES = [
    # options, confidence per cell, rule per cell
    ({"threshold": 0.5}, [0.5, 0.3, 1, 0.25], "t.t."),  # inclusive
    ({"threshold": 0.9}, [0.3, 0.6, 0.6, 0.2], ".f.."),  # best cell, lowest index on ties
    ({"threshold": 1.0}, [1, 0.6, 1, 0.2], "t.t."),
    ({"base": "first", "threshold": 0.1}, [0.2, 0.9, 0.9, 0.9], "b..."),
    ({"base": "schedule", "steps_per_block": 2}, [0.2, 0.7, 0.9, 0.6], ".bb."),
    ({"base": "schedule", "steps_per_block": 3}, [0.2, 0.7, 0.9, 0.6], ".bb."),  # 2, 1, 1
    ({"base": "schedule", "steps_per_block": 1}, [0.2, 0.7, 0.9, 0.6], "bbbb"),
    ({"base": "schedule"}, [0.2, 0.7, 0.9, 0.6], "..b."),
    ({"base": "factor", "factor": 1.0}, [0.5, 0.6, 0.8, 0.7], "..bb"),  # .7 >= 2/3, .6 < 3/4
    ({"base": "factor", "factor": 1.0}, [0.5, 0.6, 0.8, 0.76, 0.7], "..bb."),
    ({"base": "factor", "factor": 1.0}, [0.8, 0.7, 0.9], "bbb"),
    ({"base": "factor", "factor": 1.0}, [0.9, 0.1], "bb"),  # a single failing cell at the end
    ({"base": "factor", "factor": 1.5}, [0.25, 0.5, 1, 0.25], ".bb."),  # .5 >= 1 - 1.5 / 3
    ({"base": "factor", "factor": 0.1}, [0.9, 0.1, 0.1], "b.."),
    (all_count(0.5), [0.5, 1, 0.7, 0.9], ".bbb"),  # 0 + .1 + .3 <= .5
    (all_count(0.5), [0.5, 0.5, 1, 1], "b.bb"),  # 0.5 is still inside
    (all_count(0.5), [0.5, 0.5, 0.25, 0.25], "b..."),  # the best counts
    (all_count(0.0), [0.5, 0.6, 0.3, 0.2], ".f.."),
    (all_count(0.0), [1, 0.6, 1, 0.2], "b.b."),
    (all_count(9.0), [0.5, 0.6, 0.3, 0.2], "bbbb"),
    ({"base": "budget", "error_budget": 0.0}, [0.5, 0.6, 0.3, 0.2], ".b.."),  # the last is free
    ({"base": "budget", "error_budget": 0.0}, [1, 0.6, 1, 0.2], "bbb."),
    ({"base": "budget", "error_budget": 0.5}, [0.5, 0.5, 1, 0.25], "bbb."),  # 0 + .5 is inside
    ({"base": "budget", "error_budget": 0.4}, [0.5, 0.5, 1, 0.25], "b.b."),
    ({"base": "budget", "error_budget": 9.0}, [0.5, 0.6, 0.3, 0.2], "bbbb"),
    ({"threshold": 0.5, "compare": ">"}, [0.5, 0.3, 1, 0.25], "..t."),
    ({"threshold": 1.0, "compare": ">"}, [0.5, 1, 1, 0.25], ".f.."),
    ({"threshold": 0.5, "quota": 0}, [0.3, 0.25, 0.125, 0.3], "...."),
    ({"threshold": 0.5, "quota": 0}, [0.5, 0.25, 0.125, 0.3], "t..."),
    ({"threshold": 0.8, "quota": 3}, [0.25, 0.9, 0.25, 0.7], "ft.f"),  # ties: lowest index
    ({"threshold": 0.5, "quota": 2}, [0.5, 0.9, 0.7, 0.3], "ttt."),
    ({"threshold": 0.5, "quota": 9}, [0.5, 0.3], "tf"),
    ({"threshold": None}, [0.5, 1, 1, 0.25], ".f.."),
    ({"threshold": None, "quota": 3}, [0.5, 1, 1, 0.25], "fff."),
    ({"threshold": None, "quota": 0}, [0.5, 1, 1, 0.25], "...."),
    ({"base": "first", "quota": 3}, [0.2, 0.9, 0.1, 0.9], "bbb."),
    ({"base": "first", "quota": 0}, [0.2, 0.9, 0.1, 0.9], "...."),
    ({"base": "schedule", "steps_per_block": 4, "quota": 3}, [0.2, 0.7, 0.9, 0.6], ".fbf"),
    ({"base": "schedule", "steps_per_block": 4, "quota": 0}, [0.2, 0.7, 0.9, 0.6], "..b."),
    ({"base": "factor", "factor": 0.1, "quota": 2}, [0.9, 0.1, 0.2], "b.f"),
    ({"base": "factor", "factor": 0.1, "quota": 0}, [0.9, 0.1, 0.2], "b.."),
    (all_count(0.0) | {"quota": 0}, [0.5, 0.6, 0.3, 0.2], "...."),
    (all_count(0.0) | {"quota": 2}, [0.5, 1, 0.3, 0.5], "fb.."),
]


@pytest.mark.parametrize("options, confidence, want", BASES)
def test_base_rule(implementation, options, confidence, want):
    ops, device = implementation
    config = DecodeConfig(MASK, **(OFF | options))
    cells = [(token, p) for token, p in enumerate(confidence)]
    tokens = torch.full((1, len(cells)), MASK, device=device)
    state = DecodeState(1, len(cells), device=device)
    step = ops.decode_step(sure_logits(cells).to(device), tokens, state, config)
    assert rules_of(step) == want
    committed = step.rule[0] != Rule.NONE
    assert step.prediction.tolist() == [list(range(len(cells)))]
    assert tokens[0].tolist() == [i if committed[i] else MASK for i in range(len(cells))]
    assert step.remaining.tolist() == [want.count(".")]


def test_schedule_over_a_block(implementation):
    """7 candidates in 3 steps: 3, 2, 2; stragglers that were invalid follow in step 4, all."""
    ops, device = implementation
    config = DecodeConfig(MASK, base="schedule", steps_per_block=3, **OFF)
    logits = sure_logits([(1, 0.3 + 0.05 * i) for i in range(8)]).to(device)
    tokens = torch.full((1, 8), MASK, device=device)
    tokens[0, 0] = 3  # committed before the block began
    state = DecodeState(1, 8, device=device)
    seen = []
    for number in range(4):
        broken = logits.clone()
        if number < 3:
            broken[0, 6:] = NAN
        step = ops.decode_step(broken, tokens, state, config)
        seen.append((rules_of(step), step.remaining.item()))
    assert seen == [("...bbb..", 4), (".bb.....", 2), ("........", 2), ("......bb", 0)]
    assert state.counters.tolist() == [[0, 4, 4, 7, 0]]


def test_a_schedule_commits_while_a_cell_may_be(implementation):
    """Cells that become candidates after the block began outlive the quota: one a step is forced,
    and past the end all that are there follow."""
    ops, device = implementation
    config = DecodeConfig(MASK, base="schedule", steps_per_block=3, **OFF)
    logits = sure_logits([(1, 0.9 - 0.1 * i) for i in range(6)]).to(device)
    tokens = torch.full((1, 6), MASK, device=device)
    state = DecodeState(1, 6, device=device)
    seen = []
    for candidates in ("x.....", ".xxxxx", ".xxxxx", ".xxxxx"):
        options = {"candidates": bools(candidates).to(device) & (tokens == MASK)}
        step = ops.decode_step(logits, tokens, state, config, **options)
        seen.append((rules_of(step), step.remaining.item()))
    assert seen == [("b.....", 0), (".f....", 4), ("..f...", 3), ("...bbb", 0)]


# ---- decode_step -----------------------------------------------------------------------------


def test_all_rules_in_one_decode(implementation):
    """Cell by cell: threshold; window (mean .84 beside a committed cell); run; and stability."""
    ops, device = implementation
    config = DecodeConfig(MASK, temporal_steps=2, temporal_threshold=0.6, temporal_eval="max")
    cells = [(1, 0.95), (2, 0.88), (3, 0.8), (4, 0.2), (5, 0.7), (6, 0.3), (7, 0.85), (7, 0.1)]
    logits = sure_logits(cells).to(device)
    tokens = torch.full((1, 8), MASK, device=device)
    state = DecodeState(1, 8, device=device)
    step = ops.decode_step(logits, tokens, state, config)
    assert rules_of(step) == "tww...a."
    assert step.remaining.tolist() == [4]
    assert tokens.tolist() == [[1, 2, 3, MASK, MASK, MASK, 7, MASK]]
    assert state.streak_count.tolist() == [[0, 0, 0, 1, 1, 1, 0, 1]]
    step = ops.decode_step(logits, tokens, state, config.replace(confidence_cluster_size=0))
    assert rules_of(step) == "....f..."  # the best cell left; nothing else is ripe and strong
    assert state.streak_count.tolist() == [[0, 0, 0, 2, 0, 2, 0, 2]]
    logits[0, [3, 7]] = sure_logits([(4, 0.65), (8, 0.7)])[0].to(device)
    step = ops.decode_step(logits, tokens, state, config.replace(confidence_cluster_size=0))
    assert rules_of(step) == "...s...f"
    assert step.confidence[0, :3].tolist() == [0, 0, 0]
    assert step.prediction.tolist() == [[-1, -1, -1, 4, -1, 6, -1, 8]]
    assert state.streak_id.tolist() == [[-1, -1, -1, -1, -1, 6, -1, -1]]


def test_select_leaves_tokens(implementation):
    ops, device = implementation
    config = DecodeConfig(MASK)
    logits = sure_logits([(1, 0.95), (2, 0.88), (3, 0.3)]).to(device)
    tokens = torch.full((1, 3), MASK, device=device)
    state, twin = DecodeState(1, 3, device=device), DecodeState(1, 3, device=device)
    chosen = ops.select(logits, tokens, state, config)
    assert tokens.tolist() == [[MASK] * 3]
    done = ops.decode_step(logits, tokens, twin, config)
    assert_same(chosen, done)
    assert_same(state_tensors(state), state_tensors(twin))
    assert chosen.rule.any() and state.counters.tolist() == [[0, 1, 1, 3, 0]]


def test_explicit_candidates(implementation):
    """Candidates need not hold the mask id, and a mask that is no candidate counts as committed."""
    ops, device = implementation
    config = DecodeConfig(MASK, token_cluster=None, temporal_steps=0)
    logits = sure_logits([(1, 0.95), (2, 0.85), (3, 0.3), (4, 0.95)]).to(device)
    tokens = torch.tensor([[9, 9, MASK, MASK]], device=device)
    state = DecodeState(1, 4, device=device)
    step = ops.decode_step(logits, tokens, state, config, candidates=bools("xxx.").to(device))
    assert rules_of(step) == "t..."  # window (0, 2): mean .575; window (1, 3): mean .575
    step = ops.decode_step(logits, tokens, state, config, candidates=bools(".x..").to(device))
    assert rules_of(step) == ".f.."
    assert tokens.tolist() == [[1, 2, MASK, MASK]]
    assert step.remaining.tolist() == [0]


def test_shift_inside_the_block(implementation):
    """Cell i is judged by row i - 1, cell 0 by row 0; the last row is not used."""
    ops, device = implementation
    config = DecodeConfig(MASK, threshold=0.5, **OFF)
    logits = sure_logits([(1, 0.9), (2, 0.8), (3, 0.3), (4, 0.95)]).to(device)
    for step_with in (ops.select, ops.decode_step):
        tokens = torch.full((1, 4), MASK, device=device)
        state = DecodeState(1, 4, device=device)
        step = step_with(logits, tokens, state, config, logits_shift=1)
        assert step.prediction.tolist() == [[1, 1, 2, 3]]
        assert rules_of(step) == "ttt."
    assert tokens.tolist() == [[1, 1, 2, MASK]]


@pytest.mark.parametrize("mode", ["ban", "allow", "skip"])
def test_mask_id_as_winner(implementation, mode):
    """Allowed: "committed" but still masked. Skipped: no candidate. Banned: the column does not
    exist."""
    ops, device = implementation
    config = DecodeConfig(3, mask_prediction=mode, temporal_steps=1, temporal_threshold=0.0)
    logits = sure_logits([(3, 0.5), (3, 0.5), (5, 0.25)]).to(device)
    tokens = torch.full((1, 3), 3, device=device)
    state = DecodeState(1, 3, device=device)
    step = ops.decode_step(logits, tokens, state, config)
    if mode == "ban":
        assert step.prediction.tolist() == [[4, 4, 5]]
        assert step.confidence.tolist() == [[1.0, 1.0, 0.25]]
        assert rules_of(step) == "tts" and tokens.tolist() == [[4, 4, 5]]
        assert step.remaining.tolist() == [0]
    else:
        assert step.prediction.tolist() == [[3, 3, 5]]
        assert step.confidence.tolist() == [[0.5, 0.5, 0.25]]
        # Allowed, the quota of 1 goes to cell 0 in vain.
        assert rules_of(step) == ("..s" if mode == "allow" else "..f")
        assert tokens.tolist() == [[3, 3, 5]] and step.remaining.tolist() == [2]
    assert state.counters[0, Counter.BLOCK_MASKED] == 3
    assert all(not getattr(state, name)[:, :2].gt(0).any() for name in STREAKS)


def two_level_logits(spikes: list[float], dtype: torch.dtype) -> torch.Tensor:
    """[1, L, 60]: token 1 + i at spikes[i] over 58 tokens at 0; exact in every dtype."""
    logits = torch.zeros(1, len(spikes), 60, dtype=dtype)
    logits[0, range(len(spikes)), range(1, len(spikes) + 1)] = torch.tensor(spikes, dtype=dtype)
    return logits


@pytest.mark.parametrize(
    "dtype, mode, want, confidence",
    [
        (torch.bfloat16, "float32", "f.", 0.89931),
        (torch.bfloat16, "logits", "t.", 0.8984375),  # and 0.9 is 0.8984375 as well
        (torch.float16, "float32", "f.", 0.89931),
        (torch.float16, "logits", "f.", 0.8994140625),
        (torch.float32, "logits", "f.", 0.89931),
    ],
)
def test_rounded_confidence(implementation, dtype, mode, want, confidence):
    """e^6.25 / (e^6.25 + 58) = 0.89931 against 0.9."""
    ops, device = implementation
    logits = two_level_logits([6.25, 1.0], dtype).to(device)
    config = DecodeConfig(59, confidence_dtype=mode, **OFF)
    tokens = torch.full((1, 2), 59, device=device)
    step = ops.decode_step(logits, tokens, DecodeState(1, 2, device=device), config)
    assert rules_of(step) == want
    assert step.confidence[0, 0].item() == pytest.approx(confidence, abs=5e-6)


@pytest.mark.parametrize("mode, want", [("float32", ".f"), ("logits", "f.")])
def test_rounding_makes_ties(implementation, mode, want):
    """0.98091 and 0.98205 are both 0.98047 in bfloat16: the lowest index wins."""
    ops, device = implementation
    logits = two_level_logits([8.0, 8.0625], torch.bfloat16).to(device)
    config = DecodeConfig(59, confidence_dtype=mode, threshold=1.0, **OFF)
    tokens = torch.full((1, 2), 59, device=device)
    step = ops.decode_step(logits, tokens, DecodeState(1, 2, device=device), config)
    assert rules_of(step) == want


@pytest.mark.parametrize(
    "mode, weak, least, want",
    [  # 0.79855 times `weak`, and 0.80353; in bfloat16 0.79688 and 0.80469, a place is 0.0039
        ("float32", 2, 0.8005, "t..."),  # mean 0.80021
        ("logits", 2, 0.8005, "twww"),  # 0.79948, rounded up to 0.80078
        ("float32", 3, 0.8, "t...."),  # mean 0.79980
        ("logits", 3, 0.8, "t...."),  # 0.79883, rounded to even: 0.79688
    ],
)
def test_rounded_window_mean(implementation, mode, weak, least, want):
    ops, device = implementation
    logits = two_level_logits([9.0, *[5.4375] * weak, 5.46875], torch.bfloat16).to(device)
    config = DecodeConfig(59, confidence_dtype=mode, spatial_threshold=least, **OFF)
    config = config.replace(confidence_cluster_size=weak + 1, confidence_cluster_unmasked=None)
    tokens = torch.full((1, weak + 2), 59, device=device)
    step = ops.decode_step(logits, tokens, DecodeState(1, weak + 2, device=device), config)
    assert rules_of(step) == want


# ---- entropy, neighbours, edits, proposals, rows, slots --------------------------------------

LN2 = math.log(2)


@pytest.mark.parametrize(
    "options, p, want",
    [  # p = 1 / n has an entropy of ln n
        ({"entropy_budget": 0.0}, [0.5, 1, 0.25, 1], "bb.b"),  # the last is free
        ({"entropy_budget": 0.0, "last_free": False}, [0.5, 1, 0.25, 1], ".b.b"),
        ({"entropy_budget": 0.7}, [0.5, 1, 0.5, 0.25], "bbb."),  # ln 2 = 0.693
        ({"entropy_budget": 0.7, "last_free": False}, [0.5, 1, 0.5, 0.25], "bb.."),
        ({"entropy_budget": 0.6}, [0.25, 0.5, 0.5, 0.25], ".b.."),
        ({"entropy_budget": 0.6, "last_free": False}, [0.25, 0.5, 0.5, 0.25], ".f.."),
        ({"entropy_budget": 0.6, "last_free": False, "quota": 0}, [0.25, 0.5, 0.5, 0.25], "...."),
        ({"entropy_budget": 0.0, "quota": 3}, [0.25, 0.5, 0.5, 0.25], "fbf."),
        ({"entropy_budget": 99.0}, [0.25, 0.5, 0.5, 0.25], "bbbb"),
    ],
)
def test_entropy_rule(implementation, options, p, want):
    ops, device = implementation
    config = DecodeConfig(MASK, base="entropy", **(OFF | options))
    logits = sure_logits(list(enumerate(p))).to(device)
    tokens = torch.full((1, 4), MASK, device=device)
    step = ops.decode_step(logits, tokens, DecodeState(1, 4, device=device), config)
    assert rules_of(step) == want
    expected = torch.tensor([[-math.log(x) for x in p]])
    torch.testing.assert_close(step.entropy.cpu(), expected, rtol=roundings(16), atol=roundings(16))
    assert (step.entropy >= 0).all()


def test_entropy_on_request(implementation):
    """NaN in a bad row, 0 where a cell is not read, None unless it is asked for; the mask id's
    column counts where it may be predicted."""
    ops, device = implementation
    logits = sure_logits([(3, 0.5), (7, 0.5), (0, 0.25), (14, 0.5)]).to(device)
    logits[0, 1, 2] = NAN
    cells = bools("xx.x").to(device)
    for mode, last in (("ban", 0.0), ("allow", LN2)):
        config = DecodeConfig(15, mask_prediction=mode, report_entropy=True)
        tokens = torch.full((1, 4), 15, device=device)
        state = DecodeState(1, 4, device=device)
        step = ops.select(logits, tokens, state, config, candidates=cells)
        h = step.entropy.cpu()
        assert h.dtype == torch.float32 and h[0, 1].isnan() and h[0, 2] == 0
        assert h[0, [0, 3]].tolist() == pytest.approx([LN2, last], abs=roundings(16))
    plain = ops.select(logits, tokens, state, config.replace(report_entropy=False))
    assert plain.entropy is None


NEIGHBOURS = [
    # options, confidence, rule; threshold 0.9, neighbour_threshold 0.7
    ({"neighbour_radius": 1}, [0.95, 0.75, 0.75, 0.3, 0.75], "tn..."),
    ({"neighbour_radius": 2}, [0.95, 0.75, 0.75, 0.3, 0.75], "tnn.."),
    ({"neighbour_radius": 2}, [0.75, 0.6, 0.95, 0.6, 0.8], "n.t.n"),
    ({"neighbour_radius": 9}, [0.75, 0.6, 0.85, 0.6, 0.8], "..f.."),  # forced is no anchor
    ({"neighbour_radius": 9, "threshold": None}, [0.95, 0.75, 0.75], "f.."),
    ({"neighbour_radius": 1, "quota": 0, "base": "first"}, [0.95, 0.75, 0.95, 0.95], ".nnn"),
    ({"neighbour_radius": 1, "quota": 0, "base": "first"}, [0.3, 0.95, 0.3], "..."),  # of itself
    ({"neighbour_radius": 1, "threshold": 0.5, "neighbour_threshold": 0.25}, [0.5, 0.25], "tn"),
    (
        {"neighbour_radius": 1, "threshold": 0.25, "neighbour_threshold": 0.25, "compare": ">"},
        [0.5, 0.25],
        "t.",
    ),
]


@pytest.mark.parametrize("options, confidence, want", NEIGHBOURS)
def test_neighbours(implementation, options, confidence, want):
    ops, device = implementation
    config = DecodeConfig(MASK, **(OFF | {"neighbour_threshold": 0.7} | options))
    logits = sure_logits(list(enumerate(confidence))).to(device)
    tokens = torch.full((1, len(confidence)), MASK, device=device)
    state = DecodeState(1, len(confidence), device=device)
    step = ops.decode_step(logits, tokens, state, config)
    assert rules_of(step) == want
    assert step.remaining.tolist() == [want.count(".")]


def test_neighbours_come_after_windows_and_before_runs(implementation):
    ops, device = implementation
    options = {"confidence_cluster_size": 2, "spatial_threshold": 0.8, "temporal_steps": 0}
    options |= {"confidence_cluster_unmasked": None, "neighbour_radius": 1}
    config = DecodeConfig(MASK, **options)
    cells = [(1, 0.95), (2, 0.82), (3, 0.79), (3, 0.78), (4, 0.81), (4, 0.3), (5, 0.95), (6, 0.76)]
    logits = sure_logits(cells).to(device)
    tokens = torch.full((1, 8), MASK, device=device)
    step = ops.decode_step(logits, tokens, DecodeState(1, 8, device=device), config)
    # (0, 1): 0.82 alone is left; (1, 2): 0.805; 3 + 4: 0.795; 4 is a run's best; 7 is beside 6.
    assert rules_of(step) == "tww.a.tn"


def test_edits(implementation):
    """Cell by cell: sure of another token; sure of its own; unsure; not editable; a candidate,
    which is none of them; bad logits."""
    ops, device = implementation
    config = DecodeConfig(MASK, edit_threshold=0.5, **OFF)
    cells = [(1, 0.5), (2, 1), (3, 0.25), (4, 1), (5, 0.25), (6, 1)]
    logits = sure_logits(cells).to(device)
    logits[0, 5] = NAN
    tokens = torch.tensor([[9, 2, 9, 9, MASK, 9]], device=device)
    state = DecodeState(1, 6, device=device, step_map=True)
    options = {"editable": bools("xxx.xx").to(device)}
    chosen = ops.select(logits, tokens, state.take(0), config, **options)
    assert tokens.tolist() == [[9, 2, 9, 9, MASK, 9]]
    step = ops.decode_step(logits, tokens, state, config, **options)
    assert_same(chosen, step)
    assert rules_of(step) == "e...f." and step.remaining.tolist() == [0]
    assert tokens.tolist() == [[1, 2, 9, 9, 5, 9]]
    assert step.prediction.tolist() == [[1, 2, 3, -1, 5, -1]]
    assert step.confidence[0, :5].tolist() == [0.5, 1, 0.25, 0, 0.25]
    assert step.confidence[0, 5].isnan()
    assert state.step_map.tolist() == [[0, -1, -1, -1, 0, -1]]
    above = config.replace(compare=">")
    tokens = torch.tensor([[9, 2, 9, 9, 9, 9]], device=device)
    assert rules_of(ops.decode_step(logits, tokens, state, above, **options)) == "......"


def test_no_edit_writes_the_mask(implementation):
    ops, device = implementation
    for mode in ("allow", "skip", "ban"):
        config = DecodeConfig(3, edit_threshold=0.0, mask_prediction=mode, **OFF)
        tokens = torch.tensor([[9]], device=device)
        options = {"editable": bools("x").to(device)}
        logits = sure_logits([(3, 0.5)]).to(device)
        step = ops.decode_step(logits, tokens, DecodeState(1, 1, device=device), config, **options)
        assert tokens.item() == (4 if mode == "ban" else 9)
        assert step.prediction.item() == (4 if mode == "ban" else 3)


def test_proposed(implementation):
    """Base rule: the proposal and its probability. Stability: the argmax. No id: no base rule."""
    ops, device = implementation
    config = DecodeConfig(MASK, threshold=0.5, temporal_threshold=0.2, token_cluster=None)
    config = config.replace(confidence_cluster_size=0, temporal_steps=1, temperature=1.0)
    logits = sure_logits([(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.5), (6, 0.5)]).to(device)
    proposed = torch.tensor([[2, 9, 5, 16, -1, MASK]], device=device)
    tokens = torch.full((1, 6), MASK, device=device)
    state = DecodeState(1, 6, device=device)
    step = ops.decode_step(logits, tokens, state, config, proposed=proposed)
    assert rules_of(step) == "tsssss"
    assert tokens.tolist() == [[2, 2, 3, 4, 5, 6]]
    assert step.confidence.tolist() == [[0.5, 0.5, 0.25, 0.25, 0.5, 0.5]]
    tokens.fill_(MASK)
    plain = config.replace(temporal_steps=0, threshold=0.3, quota=3)
    step = ops.decode_step(logits, tokens, state, plain, proposed=proposed)
    # The mask has no mass; of no mass is token 9 too, and its index is lower.
    assert rules_of(step) == "tff..."
    assert step.prediction.tolist() == [[2, 9, 5, -1, -1, MASK]]
    assert step.confidence[0, [0, 1, 2, 5]].tolist() == [0.5, 0, 0.25, 0]
    assert step.confidence[0, 3:5].isnan().all()
    assert step.remaining.tolist() == [3]


def test_without_a_mask_id(implementation):
    """Candidates alone say who is masked; every token may be predicted."""
    ops, device = implementation
    config = DecodeConfig(None, **OFF)
    logits = sure_logits([(0, 0.95), (0, 1), (1, 0.3)]).to(device)
    for dtype in (torch.int64, torch.int32):
        tokens = torch.tensor([[0, 7, 0]], device=device, dtype=dtype)
        cells = bools("x.x").to(device)
        step = ops.decode_step(logits, tokens, None, config, candidates=cells)
        assert rules_of(step) == "t.." and tokens.tolist() == [[0, 7, 0]]
        assert step.prediction.dtype == torch.int64 and step.remaining.tolist() == [1]


def test_step_map(implementation):
    """The number of the step in its block, saturating; a new block begins at 0 with -1."""
    ops, device = implementation
    config = DecodeConfig(MASK, base="first", **OFF)
    logits = sure_logits([(1, 0.5)] * 3).to(device)
    tokens = torch.full((1, 3), MASK, device=device)
    state = DecodeState(1, 3, device=device, step_map=True)
    seen = []
    for _ in range(2):
        ops.decode_step(logits, tokens, state, config)
        seen.append(state.step_map.tolist())
    state.counters[0, Counter.BLOCK_STEP] = 2**40
    ops.decode_step(logits, tokens, state, config)
    seen.append(state.step_map.tolist())
    state.reset()
    assert seen == [[[0, -1, -1]], [[0, 1, -1]], [[0, 1, 32767]]]
    assert state.step_map.tolist() == [[-1, -1, -1]] and state.step_map.dtype == torch.int16


def test_rows_have_options_of_their_own(implementation):
    ops, device = implementation
    config = DecodeConfig(MASK, **OFF)
    logits = sure_logits([(1, 0.5), (2, 0.25), (3, 0.25)]).expand(4, 3, 16).contiguous().to(device)
    tokens = torch.full((4, 3), MASK, device=device)
    rows = RowParams(
        threshold=torch.tensor([0.5, 0.25, 0.9, 1.5], device=device),
        quota=torch.tensor([0, 0, 2, 3], device=device),
    )
    state = DecodeState(4, 3, device=device)
    step = ops.decode_step(logits, tokens, state, config, rows=rows)
    assert rules_of(step) == "t.. ttt ff. ..."  # 1.5 is out of range: the row is left alone
    assert step.remaining.tolist() == [2, 0, 1, 3]
    assert state.counters[:, Counter.STEP].tolist() == [1, 1, 1, 0]
    assert step.prediction[3].tolist() == [1, 2, 3]


def test_a_row_that_waits_uses_up_no_random_numbers(implementation):
    """Steps without a candidate don't count, nor do edits; those that commit nothing do."""
    ops, device = implementation
    config = DecodeConfig(MASK, threshold=0.9, quota=0, edit_threshold=0.1, **OFF)
    logits = sure_logits([(1, 0.95), (2, 0.5)]).expand(4, 2, 16).contiguous().to(device)
    tokens = torch.tensor([[MASK, MASK], [5, MASK], [5, 5], [1, 2]], device=device)
    editable = tokens != MASK
    state = DecodeState(4, 2, device=device)
    for steps in ([1, 1, 0, 0], [2, 2, 0, 0]):
        ops.decode_step(logits, tokens, state, config, editable=editable)
        assert state.counters[:, Counter.STEP].tolist() == steps
    assert tokens.tolist() == [[1, MASK], [1, MASK], [1, 2], [1, 2]]
    assert state.counters[:, Counter.BLOCK_STEP].tolist() == [2] * 4


def test_slots(implementation):
    """Row b uses row slots[b] of the state; a slot that it does not have leaves the row alone."""
    ops, device = implementation
    config = DecodeConfig(MASK, temporal_steps=3, token_cluster=None, confidence_cluster_size=0)
    logits = sure_logits([(1, 0.5), (2, 0.25)]).expand(4, 2, 16).contiguous().to(device)
    tokens = torch.full((4, 2), MASK, device=device)
    state = DecodeState(6, 2, device=device)
    slots = torch.tensor([4, 6, 0, -1], device=device)
    step = ops.decode_step(logits, tokens, state, config, slots=slots)
    assert rules_of(step) == "f. .. f. .."
    assert state.streak_count[:, 1].tolist() == [1, 0, 0, 0, 1, 0]
    assert state.counters[:, Counter.STEP].tolist() == [1, 0, 0, 0, 1, 0]
    assert step.remaining.tolist() == [1, 2, 1, 2]


# ---- random numbers and truncation (the oracle's own) ----------------------------------------


@pytest.mark.parametrize("counter, key, words", RANDOM123)
def test_philox(counter, key, words):
    assert " ".join(f"{word:08x}" for word in reference.philox4x32(counter, key)) == words


@pytest.mark.parametrize(
    "top_k, top_p, min_p, kept",
    [
        (None, None, None, [0, 1, 2, 3, 4]),
        (1, None, None, [1]),
        (2, None, None, [1, 2, 3]),  # 2 and 3 tie for the second place
        (3, None, None, [1, 2, 3]),
        (9, None, None, [0, 1, 2, 3, 4]),
        (None, 0.4, None, [1]),  # the mass of token 1 is 0.5
        (None, 0.51, None, [1, 2, 3]),
        (None, 0.92, None, [0, 1, 2, 3]),
        (None, 1.0, None, [0, 1, 2, 3, 4]),
        (3, 0.6, None, [1, 2, 3]),
        (3, 0.55, None, [1]),  # 0.5 of 0.9 is 0.5556
        (None, None, 1.0, [1]),
        (None, None, 0.41, [1]),
        (None, None, 0.39, [1, 2, 3]),  # 0.2 / 0.5 = 0.4
        (None, None, 0.1, [0, 1, 2, 3]),
        (None, 0.92, 0.3, [1, 2, 3]),
        (1, None, 0.1, [1]),
    ],
)
def test_support(top_k, top_p, min_p, kept):
    mass = torch.tensor([0.0625, 0.5, 0.2, 0.2, 0.0375], dtype=torch.float64)
    for temperature in (1.0, 0.5):
        row = mass.log() * temperature
        weights = reference.token_weights(row, temperature, top_k, top_p, min_p)
        assert weights.nonzero().flatten().tolist() == kept
        torch.testing.assert_close(weights[kept] / weights[1], mass[kept] / mass[1])


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30, 1e300])
def test_support_at_any_temperature(temperature):
    """Towards the ties of the argmax, and towards uniform; min_p follows the temperature."""
    row = torch.tensor([1.0, 3.0, -torch.inf, 3.0], dtype=torch.float64)
    kept = [1, 3] if temperature < 1 else [0, 1, 3]
    for min_p in (None, 0.5):
        weights = reference.token_weights(row, temperature, min_p=min_p)
        assert weights.nonzero().flatten().tolist() == kept
        assert weights[kept].tolist() == pytest.approx([1.0] * len(kept))


@pytest.mark.parametrize("tempered", [False, True])
def test_confidence_of_a_draw(implementation, tempered):
    """Tokens 3 and 4 of 0.5 each; at temperature 1 with top_k 1 both are kept, as they tie."""
    ops, device = implementation
    options = {"temperature": 1.0, "top_k": 1, "base": "first", **OFF}
    config = DecodeConfig(
        MASK, sampled_confidence="tempered" if tempered else "untempered", **options
    )
    logits = torch.zeros(1, 1, 16, device=device)
    logits[0, 0, 3:5] = 1.0
    tokens = torch.full((1, 1), MASK, device=device)
    step = ops.decode_step(logits, tokens, DecodeState(1, 1, device=device), config)
    assert tokens.item() in (3, 4)
    untempered = math.e / (2 * math.e + 13)  # the mask id is banned
    error = mass_error(torch.tensor(untempered), 15, device).item() + roundings(1)
    assert step.confidence.item() == pytest.approx(0.5 if tempered else untempered, rel=error)


@pytest.mark.parametrize("u, token", [(0.0, 1), (0.249, 1), (0.25, 2), (0.74, 2), (0.76, 4)])
def test_inverse_distribution(u, token):
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert reference.draw_token(weights, u) == token


def test_state_reset():
    state = DecodeState(3, 2)
    for tensor in state_tensors(state):
        tensor.fill_(7)
    state.counters[:, Counter.ROW_ID] = torch.tensor([10, 11, 12])
    whole = clone(state)
    state.reset(rows=torch.tensor([1]))
    assert state.streak_count.tolist() == [[7, 7], [0, 0], [7, 7]]
    assert state.streak_id.tolist() == [[7, 7], [-1, -1], [7, 7]]
    assert state.counters.tolist() == [[10, 7, 7, 7, 7], [11, 7, 0, -1, 7], [12, 7, 7, 7, 7]]
    whole.reset()
    assert whole.counters.tolist() == [[10 + row, 7, 0, -1, 7] for row in range(3)]
    assert not whole.streak_sum.any() and not whole.streak_max.any()


ROWS = [
    # rows, those of 4 that are meant
    ((0, 2), [0, 2]),
    ([2, 0], [2, 0]),
    ((), []),
    ([], []),
    (range(1, 4), [1, 2, 3]),
    (slice(1, None), [1, 2, 3]),
    (slice(None, None, 3), [0, 3]),
    (3, [3]),
    (-1, [3]),
    ([True, False, False, True], [0, 3]),
    (np.array([0, 2]), [0, 2]),
    (np.array([False, True, True, False]), [1, 2]),
    (np.int64(2), [2]),
    (torch.tensor([1, -1]), [1, 3]),
    (torch.tensor([1, 3], dtype=torch.uint8), [1, 3]),
    (torch.tensor([False, False, False, True]), [3]),
    (torch.tensor(2), [2]),
    (torch.tensor([], dtype=torch.int64), []),
]


def filled_state() -> DecodeState:
    """A state of 4 rows and 2 cells whose values say which row they are of."""
    state = DecodeState(4, 2)
    for tensor in state_tensors(state):
        tensor.copy_((10 + torch.arange(4, dtype=tensor.dtype))[:, None].expand_as(tensor))
    return state


@pytest.mark.parametrize("rows, meant", ROWS, ids=[str(rows) for rows, _ in ROWS])
def test_rows_of_a_state(rows, meant):
    whole, state = filled_state(), filled_state()
    taken = state.take(rows)
    assert taken.rows == len(meant) and taken.block_length == 2
    for part, tensor in zip(state_tensors(taken), state_tensors(whole), strict=True):
        assert torch.equal(part, tensor[meant]) and part.is_contiguous()
        part.fill_(99)  # not the memory of the whole
    assert_same(state_tensors(state), state_tensors(whole))

    assert state.reset(rows) is state
    block = [Counter.BLOCK_STEP, Counter.BLOCK_MASKED]
    for row in range(4):
        was = (10 + row, 10 + row)
        fresh = row in meant
        assert state.streak_count[row].tolist() == ([0, 0] if fresh else [*was])
        assert state.streak_id[row].tolist() == ([-1, -1] if fresh else [*was])
        assert state.streak_sum[row].tolist() == ([0, 0] if fresh else [*was])
        assert state.streak_max[row].tolist() == ([0, 0] if fresh else [*was])
        assert state.counters[row, block].tolist() == ([0, -1] if fresh else [*was])
        assert state.counters[row, [0, 1, 4]].tolist() == [10 + row] * 3


@pytest.mark.parametrize(
    "rows, exception",
    [
        ("02", TypeError),
        (1.0, TypeError),
        ([0, 1.0], TypeError),
        ([0, True], TypeError),
        ({}.items, TypeError),
        (np.array([0.0]), TypeError),
        (torch.tensor([0.0]), TypeError),
        (4, ValueError),
        ([-5], ValueError),
        ([True], ValueError),
        (np.array([True]), ValueError),
        (torch.ones(3, dtype=torch.bool), ValueError),
        (torch.zeros(1, 1, dtype=torch.int64), ValueError),
    ],
    ids=str,
)
def test_rows_that_a_state_has_not(rows, exception):
    state = filled_state()
    for method in ("take", "reset"):
        with pytest.raises(exception, match=f"DecodeState.{method}: rows takes .*, got "):
            getattr(state, method)(rows)
    assert_same(state_tensors(state), state_tensors(filled_state()))
