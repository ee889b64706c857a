# SPDX-License-Identifier: Apache-2.0
"""Logits that are spread over ranks: statistics of the shards lead to the step of the whole."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from cases import (
    DTYPES,
    OFF,
    assert_same,
    confidence_ulps,
    laid_out,
    random_steps,
    same_bits,
    state_tensors,
    ulps,
)

from r2dllm_ext.config import DecodeConfig
from r2dllm_ext.state import DecodeState

SHAPE, MASK = (3, 12, 97), 40
BORDERS = (0, 1, 40, 41, 97)  # the mask id is alone on its rank


def shards(r2, logits, config, borders=BORDERS, layout="padded"):
    exclude = config.mask_id if config.mask_prediction == "ban" else None
    pairs = list(zip(borders[:-1], borders[1:], strict=True))
    parts = [
        r2.vocab_statistics(
            laid_out(logits[..., a:b], layout),
            first_id=a,
            exclude_id=exclude,
            with_entropy=config.base == "entropy",
        )
        for a, b in pairs
    ]
    return parts[0]._replace(values=torch.stack([part.values for part in parts]))


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig.r2(MASK),
        DecodeConfig.r2(MASK, base="factor", mask_prediction="allow"),
        DecodeConfig.r2(MASK, base="schedule", steps_per_block=5, confidence_dtype="logits"),
        DecodeConfig.budget(MASK),
        DecodeConfig.entropy(MASK, entropy_budget=1.0),
    ],
    ids=["r2", "factor", "schedule", "budget", "entropy"],
)
def test_steps_of_merged_shards_are_those_of_the_whole(r2, device, config):
    for dtype in DTYPES[device]:
        whole, merged = (DecodeState(*SHAPE[:2], device=device) for _ in range(2))
        tokens = torch.full(SHAPE[:2], MASK, device=device)
        sharded = tokens.clone()
        for logits in random_steps(3, SHAPE, 4, MASK):
            logits = logits.to(device, dtype)
            want = r2.decode_step(logits, tokens, whole, config)
            statistics = r2.merge_statistics(shards(r2, logits, config))
            got = r2.decode_step(statistics, sharded, merged, config)
            assert torch.equal(sharded, tokens)
            assert same_bits(got.rule, want.rule) and same_bits(got.remaining, want.remaining)
            assert same_bits(got.prediction, want.prediction)
            if config.confidence_dtype == "float32":
                finite = want.confidence.isfinite().cpu()
                distance = ulps(
                    got.confidence.cpu()[finite], want.confidence.cpu()[finite].double()
                )
                p = want.confidence.cpu()[finite].double()
                # Either of them may be that far from the softmax.
                assert (distance <= 2 * confidence_ulps(p, SHAPE[2], device) + 1).all()


def test_one_shard_is_token_confidence(r2, device):
    logits = random_steps(4, SHAPE, 1, MASK)[0].to(device)
    candidates = torch.rand(SHAPE[:2], device=device) < 0.5
    config = DecodeConfig(MASK, **OFF)
    part = r2.vocab_statistics(logits, candidates=candidates, exclude_id=MASK)
    prediction, confidence = r2.token_confidence(logits, candidates=candidates, exclude_id=MASK)
    state = DecodeState(*SHAPE[:2], device=device)
    step = r2.select(
        part, torch.full(SHAPE[:2], MASK, device=device), state, config, candidates=candidates
    )
    assert same_bits(step.prediction, prediction)
    # The probability is rounded once more on the way: 1 / (sum / term) in double.
    finite = confidence.isfinite().cpu()
    assert torch.equal(step.confidence.isfinite().cpu(), finite)
    assert ulps(step.confidence.cpu()[finite], confidence.cpu()[finite].double()).max() <= 1
    empty = part.values[~candidates]
    assert (empty[:, :3] == torch.tensor([-torch.inf, 0, -1], device=device)).all()


def test_values(r2, device):
    inf, nan = torch.inf, torch.nan
    rows = [
        [1.0, 3.0, 3.0],
        [-inf, -inf, -inf],
        [nan, 0.0, 0.0],
        [inf, 0.0, 0.0],
        [nan, -inf, -inf],
    ]
    values = r2.vocab_statistics(torch.tensor([rows], device=device), first_id=50).values[0].cpu()
    assert values[0, 0] == 3 and values[0, 2] == 51
    torch.testing.assert_close(values[0, 1].item(), 2 + torch.tensor(-2.0).double().exp().item())
    assert values[1, :3].tolist() == [-inf, 0, -1]
    assert values[:, 3].isnan().all()  # of entropies, which were not asked for
    assert values[2:, 1].isnan().all()


def test_ties_go_to_the_lowest_id_in_any_order_of_the_parts(r2, device):
    parts = [[5.0, 1, 9, -0.5], [5.0, 2, 4, -0.25], [-torch.inf, 0, -1, 0]]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        stacked = torch.tensor(parts, dtype=torch.float64)[order].view(3, 1, 1, 4).to(device)
        merged = r2.merge_statistics(r2.VocabStatistics(stacked, torch.float32, True))
        assert merged.values.flatten().tolist() == [5, 3, 4, -0.75] and merged.with_entropy


def test_a_bad_row_on_one_rank_commits_nothing(r2, device):
    for bad in (torch.nan, torch.inf):
        logits = torch.zeros(1, 2, 8, device=device)
        logits[0, 0, 6] = bad
        config = DecodeConfig(3, threshold=0.0, **OFF)
        tokens = torch.full((1, 2), 3, device=device)
        parts = shards(r2, logits, config, (0, 4, 8), "contiguous")
        merged = r2.merge_statistics(parts)
        assert merged.values[0, 0, 2] == -1 and merged.values[0, 0, 1].isnan()
        state = DecodeState(1, 2, device=device)
        step = r2.decode_step(merged, tokens, state, config)
        assert tokens.tolist() == [[3, 0]]
        assert step.confidence[0, 0].isnan() and step.prediction[0, 0] == -1


def test_empty(r2, device):
    part = r2.vocab_statistics(torch.zeros(0, 4, 5, device=device))
    assert part.values.shape == (0, 4, 4)
    stacked = r2.VocabStatistics(part.values[None], part.dtype)
    assert r2.merge_statistics(stacked).values.shape == (0, 4, 4)


def test_errors_write_nothing(r2):
    logits, config = torch.zeros(1, 2, 8), DecodeConfig(3)
    part = r2.vocab_statistics(logits, exclude_id=3)
    tokens, state = torch.full((1, 2), 3), DecodeState(1, 2)
    before = [t.clone() for t in (tokens, *state_tensors(state))]

    def step(statistics, config=config, **options):
        return r2.decode_step(statistics, tokens, state, config, **options)

    wrong = part._replace(values=part.values[..., :3])
    budget = DecodeConfig.entropy(3)
    for call, error, words in (
        (lambda: r2.vocab_statistics(logits, first_id=-1), ValueError, "first_id"),
        (lambda: r2.vocab_statistics(logits, exclude_id=-1), ValueError, "exclude_id"),
        (lambda: r2.vocab_statistics([1.0]), TypeError, "logits"),
        (lambda: r2.vocab_statistics(logits.long()), TypeError, "logits"),
        (lambda: r2.merge_statistics(part.values), TypeError, "VocabStatistics"),
        (lambda: r2.merge_statistics(part), ValueError, "statistics"),
        (lambda: step(wrong), ValueError, "statistics"),
        (
            lambda: step(r2.vocab_statistics(logits)),
            ValueError,
            "exclude_id=3, .* 'exclude_id=None'",
        ),
        (
            lambda: step(part, config.replace(mask_id=2)),
            ValueError,
            "exclude_id=2, .* got 'exclude_",
        ),
        (
            lambda: step(part, config.replace(mask_prediction="allow")),
            ValueError,
            "exclude_id=None, as config has it, got 'exclude_id=3'",
        ),
        (lambda: step(part._replace(values=part.values.float())), TypeError, "statistics"),
        (lambda: step(part._replace(values=part.values[:, :1])), ValueError, "tokens"),
        (lambda: step(part, logits_shift=1), ValueError, "logits_shift"),
        (lambda: step(part, config.replace(temperature=1.0)), ValueError, "temperature"),
        (lambda: step(part, proposed=tokens), ValueError, "proposed takes None"),
        (lambda: step(part, rows=r2.RowParams(temperature=torch.ones(1))), ValueError, "rows.temp"),
        (lambda: step(part, budget), ValueError, "with_entropy=True .* got 'with_entropy=False'"),
        (lambda: step(part, config.replace(report_entropy=True)), ValueError, "with_entropy"),
        (lambda: r2.vocab_statistics(logits, with_entropy=1), TypeError, "with_entropy takes"),
        (lambda: step(part._replace(with_entropy=None)), TypeError, "with_entropy takes a bool"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert_same((tokens, *state_tensors(state)), before)


def test_opcheck(r2, device):
    logits = torch.randn(2, 3, 9, device=device)
    ops, tests = torch.ops.r2dllm, ("test_schema", "test_faketensor")
    candidates = torch.rand(2, 3, device=device) < 0.5
    for args in ((logits,), (logits, candidates, 5, 7)):
        torch.library.opcheck(ops.vocab_statistics.default, args, test_utils=tests)
    torch.library.opcheck(ops.vocab_statistics.default, (logits, None, 0, None, True))
    parts = torch.rand(2, 2, 3, 4, dtype=torch.float64, device=device)
    torch.library.opcheck(ops.merge_statistics.default, (parts,), test_utils=tests)
    state = DecodeState(2, 3, device=device)
    args = (
        parts[0],
        torch.full((2, 3), 4, device=device),
        *state_tensors(state),
        *(None,) * 5,  # step map, candidates, editable, proposed, slots
        [],
        torch.float32,
        *DecodeConfig(4)._op_args,
    )
    for op in (ops.decode_step.statistics, ops.select.statistics):
        torch.library.opcheck(op, args, test_utils=tests)


# ---- two processes -----------------------------------------------------------------------------


def _rank(rank: int, port: int, folder: str) -> None:
    import r2dllm_ext as r2

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    config, state = DecodeConfig.r2(MASK), DecodeState(*SHAPE[:2])
    tokens = torch.full(SHAPE[:2], MASK)
    first, last = ((0, 41), (41, SHAPE[2]))[rank]
    for logits in random_steps(7, SHAPE, 3, MASK):
        part = r2.vocab_statistics(logits[..., first:last], first_id=first, exclude_id=MASK)
        r2.decode_step(r2.all_gather_statistics(part), tokens, state, config)
    torch.save((tokens, *state_tensors(state)), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_two_ranks_decode_as_one(r2, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    config, state = DecodeConfig.r2(MASK), DecodeState(*SHAPE[:2])
    tokens = torch.full(SHAPE[:2], MASK)
    for logits in random_steps(7, SHAPE, 3, MASK):
        r2.decode_step(logits, tokens, state, config)
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_same(zero, one)
    assert torch.equal(zero[0], tokens)
    assert_same(zero[1:3], (state.streak_count, state.streak_id))
