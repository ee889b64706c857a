# SPDX-License-Identifier: Apache-2.0
"""`redundancy_score` on scripted traces, worked out by hand, and its cells in a picture."""

import pytest
import torch

from r2dllm_ext import DecodeConfig, Rule, generate, load_model, redundancy_score
from r2dllm_ext.redundancy import redundant_cells
from r2dllm_ext.trace import Trace
from r2dllm_ext.trace_plot import plot_trace

CONFIG = DecodeConfig.r2(99)  # windows of 3, mean 0.8, at most 1 committed; runs of 2
T, W, C, S = Rule.THRESHOLD, Rule.WINDOW, Rule.AMBIGUITY, Rule.STABILITY
STOP = 7


def scripted(*rows, block_length=4):
    """A trace from, by row and step, cells (prediction, confidence[, rule]); None = not masked.

    A row of fewer steps than another is finished: nothing of it is masked any more.
    """
    steps, L = max(map(len, rows)), block_length
    blocks = max(block for row in rows for block, _ in row) + 1
    shape = (steps, len(rows), L)
    trace = {
        "prediction": torch.full(shape, -1),
        "confidence": torch.zeros(shape),
        "masked": torch.zeros(shape, dtype=torch.bool),
        "rule": torch.zeros(shape, dtype=torch.uint8),
        "commit_step": torch.full((len(rows), blocks * L), -1),
        "commit_rule": torch.zeros(len(rows), blocks * L, dtype=torch.uint8),
    }
    sequences = torch.full((len(rows), 2 + blocks * L), STOP)
    for b, row in enumerate(rows):
        for s, (block, cells) in enumerate(row):
            assert len(cells) == L
            for i, cell in enumerate(cells):
                if cell is None:
                    continue
                token, confidence, *rule = cell
                trace["prediction"][s, b, i] = token
                trace["confidence"][s, b, i] = confidence
                trace["masked"][s, b, i] = True
                if rule:
                    trace["rule"][s, b, i] = rule[0]
                    trace["commit_step"][b, block * L + i] = s
                    trace["commit_rule"][b, block * L + i] = rule[0]
                    sequences[b, 2 + block * L + i] = token
    longest = max(rows, key=len)
    return Trace(
        prompt_length=2,
        block_length=L,
        block=torch.tensor([block for block, _ in longest]),
        full_pass=torch.ones(steps, dtype=torch.bool),
        sequences=sequences,
        **trace,
    )


def score(trace, config=CONFIG, **options):
    return {
        name: values.tolist()
        for name, values in redundancy_score(trace, config, **options)._asdict().items()
    }


def expect(got, tokens, *, total, stability, window, ambiguity, nfe, rules=0):
    want = {
        "total": total,
        "stability": stability,
        "window": window,
        "ambiguity": ambiguity,
        "nfe_per_token": nfe,
        "rule_count": rules,
    }
    assert got == {name: [pytest.approx(n / tokens)] for name, n in want.items()}


def test_stability():
    # Cell 1 says 5, 6, 6, 6: settled from step 1, committed in step 3: two slots. Cell 2 says its
    # token in step 0 but leaves it: only step 2 counts. Cell 3 changes its mind when committed.
    trace = scripted(
        [
            (0, [(1, 0.9, T), (5, 0.1), (4, 0.1), (2, 0.1)]),
            (0, [None, (6, 0.1), (3, 0.1), (3, 0.1)]),
            (0, [None, (6, 0.2), (4, 0.1), (3, 0.1)]),
            (0, [None, (6, 0.9, T), (4, 0.9, T), (2, 0.9, T)]),
        ]
    )
    expect(score(trace), 4, total=3, stability=3, window=0, ambiguity=0, nfe=4)


def test_a_cell_that_is_committed_with_another_token_than_predicted_never_stalled():
    trace = scripted([(0, [(1, 0.1), (2, 0.1)]), (0, [(1, 0.9, T), (2, 0.9, T)])], block_length=2)
    trace.prediction[1, 0, 0] = 3  # drawn by temperature: not the argmax
    expect(score(trace), 2, total=1, stability=1, window=0, ambiguity=0, nfe=2)


def test_window():
    # Cells 1-3: mean 0.75, all slots, so the window counts, and so does that of cells 0-2 with one
    # committed cell and a mean of 0.8125. Step 1: two committed cells, or a mean of 0.55.
    trace = scripted(
        [
            (0, [(1, 0.9, T), (2, 0.875), (3, 0.75), (4, 0.625)]),
            (0, [None, (5, 0.9, T), (5, 0.9), (4, 0.2)]),
            (0, [None, None, (6, 0.9, T), (5, 0.9, T)]),
        ]
    )
    config = CONFIG.replace(spatial_threshold=0.75)
    expect(score(trace, config), 4, total=3, stability=0, window=3, ambiguity=0, nfe=3)
    two = config.replace(confidence_cluster_unmasked=2)  # now step 1: cell 2 by itself
    expect(score(trace, two), 4, total=4, stability=0, window=4, ambiguity=0, nfe=3)
    strict = config.replace(spatial_threshold=0.8125)
    expect(score(trace, strict), 4, total=2, stability=0, window=2, ambiguity=0, nfe=3)
    wide = config.replace(confidence_cluster_size=4)  # one window: mean 0.75, one committed
    expect(score(trace, wide), 4, total=3, stability=0, window=3, ambiguity=0, nfe=3)


def test_ambiguity():
    # Step 0: the run 2 2 2 with best 0.81 > 0.8 (the middle one): two redundant cells. Step 1: the
    # run 4 4 has 0.8, which does not exceed 0.8.
    trace = scripted(
        [
            (0, [(1, 0.9, T), (2, 0.1), (2, 0.81), (2, 0.1)]),
            (0, [None, (3, 0.9, T), (4, 0.8), (4, 0.1)]),
            (0, [None, None, (5, 0.9, T), (6, 0.9, T)]),
        ]
    )
    expect(score(trace), 4, total=2, stability=0, window=0, ambiguity=2, nfe=3)
    lower = CONFIG.replace(spatial_threshold=0.79)
    expect(score(trace, lower), 4, total=3, stability=0, window=0, ambiguity=3, nfe=3)
    longer = CONFIG.replace(token_cluster_size=4)
    expect(score(trace, longer), 4, total=0, stability=0, window=0, ambiguity=0, nfe=3)
    expect(score(trace, exclude_ids=[2]), 4, total=0, stability=0, window=0, ambiguity=0, nfe=3)


def test_ties_and_two_runs_of_one_token():
    # 5 5 | committed | 5 5: two runs, the leftmost of equals is the best of each.
    cells = [(5, 0.9), (5, 0.9), (1, 0.9, T), (5, 0.9), (5, 0.1)]
    last = [(2, 0.9, T), (3, 0.9, T), None, (4, 0.9, T), (2, 0.9, T)]
    config = CONFIG.replace(confidence_cluster_unmasked=0)
    trace = scripted([(0, cells), (0, last)], block_length=5)
    expect(score(trace, config), 5, total=2, stability=0, window=0, ambiguity=2, nfe=2)


def test_total_is_a_union():
    # All three slots are in a window; two predict their final token; two are not best of the run.
    trace = scripted(
        [
            (0, [(1, 0.9, T), (2, 0.9), (2, 0.85), (2, 0.85)]),
            (0, [None, (2, 0.9, T), (2, 0.9, S), (3, 0.9, W)]),
        ]
    )
    expect(score(trace), 4, total=3, stability=2, window=3, ambiguity=2, nfe=2, rules=2)


def test_nothing_counts_behind_the_stop_token():
    # The answer is 1 2 7; cells 3 .. 7 repeat 7 with confidence, for ever.
    fill = (STOP, 0.95)
    trace = scripted(
        [
            (0, [(1, 0.9, T), (4, 0.1), (3, 0.1), fill]),
            (0, [None, (2, 0.9, T), (STOP, 0.9), fill]),
            (0, [None, None, (STOP, 0.9, C), (STOP, 0.9, C)]),
            (1, [fill, fill, fill, fill]),
            (1, [(STOP, 0.9, W)] * 4),
        ]
    )
    got = score(trace, stop_id=STOP)
    # Slot (1, 2) is stalled; it is no member of a run, as its prediction is the stop token, and
    # cell 3 is outside of the answer.
    expect(got, 3, total=1, stability=1, window=0, ambiguity=0, nfe=5, rules=1)
    whole = score(trace)
    assert whole["ambiguity"] == [pytest.approx((1 + 3) / 8)]
    assert whole["rule_count"] == [pytest.approx(6 / 8)]


def test_cells_filled_at_the_end_are_outside_of_the_answer():
    trace = scripted([(0, [(STOP, 0.9, T), (2, 0.1), (3, 0.1), (4, 0.1)])])
    assert trace.commit_step.tolist() == [[0, -1, -1, -1]]
    expect(score(trace, stop_id=STOP), 1, total=0, stability=0, window=0, ambiguity=0, nfe=1)


def test_rows_do_not_disturb_each_other():
    busy = [
        (0, [(1, 0.9, T), (2, 0.9), (2, 0.85), (2, 0.85)]),
        (0, [None, (2, 0.9, T), (2, 0.9, T), (3, 0.9, T)]),
    ]
    lean = [(0, [(1, 0.9, T), (2, 0.9, T), (3, 0.9, T), (4, 0.9, T)])]
    together = score(scripted(busy, lean, busy))
    for row, alone in ((0, busy), (1, lean), (2, busy)):
        assert {name: [values[row]] for name, values in together.items()} == score(scripted(alone))


def test_a_row_that_is_not_a_number_makes_no_window_and_no_run():
    nan = float("nan")
    trace = scripted(
        [
            (0, [(1, 0.9, T), (2, 0.9), (-1, nan), (2, 0.9)]),
            (0, [None, (3, 0.9, T), (1, 0.9, T), (3, 0.9, T)]),
        ]
    )
    expect(score(trace), 4, total=0, stability=0, window=0, ambiguity=0, nfe=2)


def test_a_rule_that_is_off_is_judged_by_its_default():
    trace = scripted(
        [
            (0, [(1, 0.9, T), (2, 0.9), (2, 0.85), (2, 0.85)]),
            (0, [None, (2, 0.9, T), (2, 0.9, T), (3, 0.9, T)]),
        ]
    )
    assert score(trace, DecodeConfig.fast_dllm(99)) == score(trace)


def test_empty_answers_and_batches():
    model = load_model("ledger")
    for shape, gen_length in (((1, 2), 0), ((0, 2), 32)):
        prompt = torch.ones(shape, dtype=torch.int64)
        config = DecodeConfig.r2(2)
        trace = generate(model, prompt, gen_length=gen_length, config=config, trace=True).trace
        for stop_id in (None, 1):
            got = redundancy_score(trace, config, stop_id=stop_id)
            assert all(values.tolist() == [0.0] * shape[0] for values in got)


def test_real_decodes_keep_what_the_definition_promises():
    model = load_model("ledger")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 40, (3, 8), generator=generator)
    for preset in ("fast_dllm", "r2"):
        config = getattr(DecodeConfig, preset)(2)
        trace = generate(model, prompt, gen_length=64, config=config, trace=True).trace
        got = redundancy_score(trace, config)
        slots = (trace.masked & (trace.rule == 0)).sum((0, 2)) / 64
        parts = torch.stack([got.stability, got.window, got.ambiguity])
        assert (got.total > 0).all() and (got.total <= slots).all()
        assert (parts.amax(0) <= got.total).all() and (got.total <= parts.sum(0)).all()
        assert (got.rule_count > 0).any() == (preset == "r2")


def test_the_picture_draws_the_cells_that_are_scored():
    """Dots, bars and frames of a row are its redundant cells, by position and step of the row."""
    lean = [(0, [(1, 0.9, T), (2, 0.9, T), (3, 0.9, T), (4, 0.9, T)])]
    busy = [
        (0, [(1, 0.9, T), (2, 0.875), (2, 0.85), (2, 0.1)]),
        (0, [None, (2, 0.9, T), (3, 0.7), (3, 0.4)]),
        (0, [None, None, (2, 0.9, S), (3, 0.9, W)]),
        (1, [(5, 0.9, T), (6, 0.85), (6, 0.81), (7, 0.9, T)]),
        (1, [None, (6, 0.9, T), (8, 0.9, T), None]),
    ]
    trace = scripted(lean, busy)
    cells = redundant_cells(trace, CONFIG)
    marked = {
        name: [(i + 4 * int(trace.block[s]), s) for s, i in mask[:, 1].nonzero().tolist()]
        for name, mask in cells._asdict().items()
    }
    assert marked == {
        "stability": [(1, 0), (3, 1), (5, 3)],
        "window": [(1, 0), (2, 0), (5, 3), (6, 3)],
        "ambiguity": [(2, 0), (3, 0), (6, 3)],
    }
    assert not any(mask[:, 0].any() for mask in cells)

    bars, frames, dots = plot_trace(trace, row=1, config=CONFIG).axes[0].collections[-3:]
    drawn = []
    for (left, y), (right, _) in bars.get_segments():
        drawn += [(x, round(y)) for x in range(round(left + 0.5), round(right + 0.5))]
    assert drawn == marked["window"]
    boxes = [path.get_extents().get_points().mean(0).round() for path in frames.get_paths()]
    assert [tuple(map(int, box)) for box in boxes] == marked["ambiguity"]
    assert [tuple(map(int, dot)) for dot in dots.get_offsets()] == marked["stability"]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"trace": None}, TypeError, "trace takes a Trace, got NoneType"),
        ({"config": 0.9}, TypeError, "config takes a DecodeConfig, got float"),
        ({"stop_id": "<end>"}, TypeError, "stop_id takes an integer >= 0, got '<end>'"),
        ({"stop_id": -1}, ValueError, "stop_id takes an integer >= 0, got -1"),
        ({"exclude_ids": [1, True]}, TypeError, "exclude_ids takes an integer >= 0, got True"),
    ],
)
def test_errors(change, error, message):
    arguments = {"trace": scripted([(0, [(1, 0.9, T)])], block_length=1), "config": CONFIG}
    with pytest.raises(error) as raised:
        redundancy_score(**(arguments | change))
    assert str(raised.value).startswith("redundancy_score: ") and message in str(raised.value)
    with pytest.raises(error) as raised:
        redundant_cells(**(arguments | change))
    assert str(raised.value).startswith("redundant_cells: ") and message in str(raised.value)
