# SPDX-License-Identifier: Apache-2.0
"""Random inputs: every op against the oracle.

The pass over V is held to the float64 oracle with a tolerance. The rules after it are held to the
oracle bit for bit, on the confidences that the op itself computed: no draw has to be dropped for
being too close to a threshold.
"""

from collections import Counter

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    OFF,
    ROW_ERROR,
    assert_same,
    confidence_ulps,
    configs,
    laid_out,
    random_steps,
    same_bits,
    spiked_logits,
    state_tensors,
    ulps,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from random_steps import ALL_OPTIONS, Seen, check_block, report

from r2dllm_ext import reference
from r2dllm_ext.config import BASE_RULES, DecodeConfig, Rule
from r2dllm_ext.state import DecodeState

seeds = st.integers(0, 2**31)
sizes = st.sampled_from((4, 3, 2, 1, 0))
lengths = st.sampled_from((16, 33, 8, 7, 3, 2, 1, 0))


def on(device: str, *tensors):
    return tuple(t if t is None else t.to(device) for t in tensors)


# ---- the pass over V -------------------------------------------------------------------------


def test_token_confidence(r2, device):
    @settings(max_examples=150)
    @given(
        seed=seeds,
        rows=sizes,
        length=lengths,
        vocab=st.sampled_from((1, 2, 5, 31, 32, 33, 257, 1000, 4095, 4097, 5001)),
        dtype=st.sampled_from(DTYPES[device]),
        layout=st.sampled_from(LAYOUTS),
        pick=st.booleans(),
        exclude=st.booleans(),
        mask_id=st.integers(0, 10**6),
    )
    def check(seed, rows, length, vocab, dtype, layout, pick, exclude, mask_id):
        mask_id %= vocab
        logits = random_steps(seed, (rows, length, vocab), 1, mask_id)[0].to(dtype)
        candidates = torch.rand(rows, length) < 0.6 if pick else None
        options = {"exclude_id": mask_id if exclude else None}
        z, cells = on(device, laid_out(logits, layout), candidates)
        got = r2.token_confidence(laid_out(z, layout), candidates=cells, **options)
        want = reference.token_confidence(logits, candidates=candidates, **options)
        assert got[1].dtype == torch.float32 and got[1].device.type == device
        assert torch.equal(got[0].cpu(), want[0])
        assert torch.equal(got[1].cpu().isnan(), want[1].isnan())
        distance = ulps(got[1].cpu().nan_to_num(0.0), want[1].nan_to_num(0.0))
        assert (distance <= confidence_ulps(want[1].nan_to_num(0.0), vocab, device)).all()

    check()


@pytest.mark.parametrize("vocab, dtype", [(126464, torch.bfloat16), (152064, torch.float32)])
def test_accuracy_on_real_vocabularies(r2, device, vocab, dtype):
    """Within the kernels' bound of the float64 softmax, from flat to peaked rows."""
    g = torch.Generator().manual_seed(vocab)
    target = torch.randint(vocab, (2, 6), generator=g)
    p = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.99, 0.99999]).expand(2, 6)
    logits = spiked_logits(g, target, p, vocab, noise=2.5).to(dtype)
    got = r2.token_confidence(logits.to(device))
    want = reference.token_confidence(logits)
    assert torch.equal(got[0].cpu(), want[0])
    assert want[1].max() > 0.999 and want[1].min() < 0.05
    assert (ulps(got[1].cpu(), want[1]) <= confidence_ulps(want[1], vocab, device)).all()


def test_a_confident_row_is_rounded_once(r2):
    """One token with nearly all of the mass: what is added to it in float32 must not show."""
    g = torch.Generator().manual_seed(3)
    target = torch.randint(9000, (2, 32), generator=g)
    p = 0.9 + 0.0999 * torch.rand(2, 32, generator=g)
    logits = spiked_logits(g, target, p, 9000, noise=1.0)
    prediction, confidence = r2.token_confidence(logits)
    want = reference.token_confidence(logits)
    assert torch.equal(prediction, want[0])
    assert (ulps(confidence, want[1]) <= confidence_ulps(want[1], 9000, "cpu")).all()


# ---- rules alone: exact ----------------------------------------------------------------------


def coarse_rule_inputs(seed: int, rows: int, length: int):
    """prediction, confidence, is_masked, was_masked [B, L]: few values, so ties and exact hits."""
    g = torch.Generator().manual_seed(seed)
    shape = (rows, length)
    prediction = torch.randint(-1, 3, shape, generator=g)
    confidence = torch.randint(0, 11, shape, generator=g).float() / 10
    odd = torch.rand(shape, generator=g)
    for low, bad in ((0.0, torch.nan), (0.03, torch.inf), (0.06, -torch.inf)):
        confidence[(low < odd) & (odd < low + 0.03)] = bad
    was_masked = torch.rand(shape, generator=g) < 0.8
    is_masked = was_masked & (torch.rand(shape, generator=g) < 0.8)
    return prediction, confidence, is_masked, was_masked


thresholds = st.sampled_from((0.0, 0.1, 0.3, 0.45, 0.5, 0.7, 0.8, 0.95, 1.0))


def test_window_pool(r2, device, other_seed):
    selected = Counter()

    @settings(max_examples=200)
    @given(seeds, sizes, lengths, st.integers(1, 12), thresholds, st.sampled_from((None, 0, 1, 3)))
    def check(seed, rows, length, window, least, unmasked):
        _, p, masked, _ = coarse_rule_inputs(seed, rows, length)
        options = {"window": window, "min_confidence": least, "max_unmasked": unmasked}
        got = r2.window_pool(*on(device, p, masked), **options)
        want = reference.window_pool(p, masked, **options)
        assert same_bits(got, want)
        assert not (got.cpu() & ~masked).any()
        selected.update(want.flatten().tolist())

    check()
    if other_seed is None:
        assert selected[True] > 100 and selected[False] > 100


def test_positional_ambiguity(r2, device, other_seed):
    chosen = Counter()

    @settings(max_examples=200)
    @given(
        seed=seeds,
        rows=sizes,
        length=lengths,
        least=thresholds,
        min_run=st.integers(1, 4),
        mode=st.sampled_from(("confidence", "mid", "random")),
        stream=st.integers(-(2**63), 2**63 - 1),
        step=st.integers(0, 2**40),
        named=st.booleans(),
    )
    def check(seed, rows, length, least, min_run, mode, stream, step, named):
        ids, p, masked, _ = coarse_rule_inputs(seed, rows, length)
        row = torch.randint(-(2**40), 2**40, (rows,)) if named else None
        options = {"min_confidence": least, "min_run": min_run, "mode": mode}
        options |= {"seed": stream, "step": step}
        ids_there, p_there, masked_there, row_there = on(device, ids, p, masked, row)
        got = r2.positional_ambiguity(ids_there, p_there, masked_there, row=row_there, **options)
        want = reference.positional_ambiguity(ids, p, masked, row=row, **options)
        assert same_bits(got, want)
        assert not (got.cpu() & ~masked).any()
        chosen[mode] += int(want.sum())

    check()
    if other_seed is None:
        assert min(chosen[mode] for mode in ("confidence", "mid", "random")) > 20


def test_update_stability(r2, device, other_seed):
    final = Counter()

    @settings(max_examples=100)
    @given(
        seed=seeds,
        rows=sizes,
        length=lengths,
        steps=st.integers(1, 4),
        least=thresholds,
        mode=st.sampled_from(("last", "ave", "max")),
    )
    def check(seed, rows, length, steps, least, mode):
        state, twin = DecodeState(rows, length, device=device), DecodeState(rows, length)
        options = {"steps": steps, "min_confidence": least, "mode": mode}
        ids, p, masked, before = coarse_rule_inputs(seed, rows, length)
        for number in range(5):
            _, p, masked, before = coarse_rule_inputs(seed + number, rows, length)
            p = p * 0.7317  # sums that round
            masked_there = dict(
                zip(("is_masked", "was_masked"), on(device, masked, before), strict=True)
            )
            got = r2.update_stability_(state, *on(device, ids, p), **masked_there, **options)
            want = reference.update_stability_(
                twin, ids, p, is_masked=masked, was_masked=before, **options
            )
            assert same_bits(got, want)
            assert_same(state_tensors(state), state_tensors(twin))
            final[mode] += int(want.sum())

    check()
    if other_seed is None:
        assert min(final[mode] for mode in ("last", "ave", "max")) > 20


# ---- a whole step ----------------------------------------------------------------------------


BLOCKS = 400  # of up to 4 steps; `random_steps.py` by itself runs as many as one likes


def test_decode_step(r2, device, other_seed):
    """Random blocks under any options: decisions, tokens and state, bit for bit."""
    seen = Seen()
    for number in range(BLOCKS):
        check_block(r2, (other_seed or 0) * BLOCKS + number, seen, device)
    if other_seed is not None:
        return
    said = report(seen)
    codes = Counter()
    for (_, code), count in seen.rules.items():
        codes[code] += count
    assert min(codes[code] for code in Rule) > 50, said
    own = {base: Rule.THRESHOLD if base == "threshold" else Rule.BASE for base in BASE_RULES}
    assert all(seen.rules[base, own[base]] > 50 for base in BASE_RULES), said
    may_fall_short = set(BASE_RULES) - {"first"}
    assert all(seen.rules[base, Rule.FORCED] > 10 for base in may_fall_short), said
    assert seen.left_alone > 20, said
    assert not ALL_OPTIONS - set(+seen.changed), said


# ---- what the rules are told -----------------------------------------------------------------


# Relative error of a probability that is no argmax's: of its own term and of the sum, each within
# ROW_ERROR, and two roundings. TINY: float32 has no relative error below its least normal number.
DRAWN_ERROR = 2 * ROW_ERROR[torch.float32]
TINY = 2.0**-126
SUM_ERROR = 20 * 2.0**-52  # of up to 20 costs in another order


def test_entropy(r2, device):
    """Within a bound of the float64 entropy, relative to the sizes that it is a difference of."""

    @settings(max_examples=80)
    @given(
        seed=seeds,
        length=st.integers(1, 9),
        vocab=st.sampled_from((1, 2, 31, 257, 4097, 5001)),
        dtype=st.sampled_from(DTYPES[device]),
        layout=st.sampled_from(LAYOUTS),
        mode=st.sampled_from(("ban", "allow")),
    )
    def check(seed, length, vocab, dtype, layout, mode):
        mask_id = seed % vocab
        logits = random_steps(seed, (2, length, vocab), 1, mask_id)[0].to(dtype)
        config = DecodeConfig(mask_id, mask_prediction=mode, report_entropy=True, **OFF)
        cells = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.8
        tokens = torch.zeros(2, length, dtype=torch.int64)
        step = r2.select(
            laid_out(logits.to(device), layout), tokens.to(device), None, config,
            candidates=cells.to(device),
        )  # fmt: skip
        banned = mask_id if mode == "ban" else None
        want = reference.token_entropy(logits, candidates=cells, exclude_id=banned)
        got = step.entropy.cpu()
        assert got.dtype == torch.float32
        assert torch.equal(got.isnan(), want.isnan())
        finite = ~want.isnan()
        assert (got[finite] >= 0).all() and (got[~cells] == 0).all()
        error = (got.double() - want)[finite].abs()
        # H = ln S - M / S: both parts are as near as the terms of the sums are.
        assert (error <= ROW_ERROR[torch.float32] * (1 + 2 * want[finite])).all(), error.max()
        # Who asks for the entropy gets the same confidences.
        plain = r2.token_confidence(
            logits.to(device), candidates=cells.to(device), exclude_id=banned
        )
        assert same_bits(step.prediction, plain[0]) and same_bits(step.confidence, plain[1])

    check()


def test_statistics_of_shards(r2, device):
    """Merged, they are the float64 numbers of the whole."""

    @settings(max_examples=60)
    @given(
        seed=seeds,
        length=st.integers(1, 9),
        vocab=st.sampled_from((2, 31, 257, 4099)),
        dtype=st.sampled_from(DTYPES[device]),
        parts=st.integers(1, 4),
        pick=st.booleans(),
    )
    def check(seed, length, vocab, dtype, parts, pick):
        logits = random_steps(seed, (2, length, vocab), 1, 1)[0].to(dtype)
        cells = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.7
        cells = cells if pick else None
        borders = sorted({0, vocab, *(seed * n % vocab for n in range(1, parts))})
        shards = [
            r2.vocab_statistics(
                logits[..., a:b].to(device), first_id=a, exclude_id=seed % vocab,
                candidates=None if cells is None else cells.to(device), with_entropy=True,
            )
            for a, b in zip(borders[:-1], borders[1:], strict=True)
        ]  # fmt: skip
        stacked = torch.stack([shard.values for shard in shards])
        got = r2.merge_statistics(shards[0]._replace(values=stacked)).values.cpu()
        of_shards = reference.merge_statistics(stacked.cpu())
        want = reference.vocab_statistics(logits, candidates=cells, exclude_id=seed % vocab,
                                          with_entropy=True)  # fmt: skip
        # Without a prediction: the mass and the id say so, of the whole and of its parts merged.
        read = want[..., 1] > 0
        assert torch.equal(got[..., 1] > 0, read)
        assert torch.equal(got[..., 2], want[..., 2])
        assert torch.equal(got[read][:, 0], want[read][:, 0])
        # Of the moment, every term has one sign: its relative error is that of its terms. What the
        # floor under the terms adds is less than kLeastEntropy (rules/vocab_statistics.h).
        for merged in (got, of_shards):
            error = (merged[read] - want[read]).abs()
            assert (error <= ROW_ERROR[torch.float32] * want[read].abs() + 1e-15).all()

    check()


def test_confidence_of_proposals(r2, device):
    @settings(max_examples=80)
    @given(
        seed=seeds,
        length=st.integers(1, 9),
        vocab=st.sampled_from((1, 2, 31, 257, 4097)),
        dtype=st.sampled_from(DTYPES[device]),
        mode=st.sampled_from(("ban", "allow")),
        shift=st.integers(0, 1),
    )
    def check(seed, length, vocab, dtype, mode, shift):
        g = torch.Generator().manual_seed(seed)
        mask_id = seed % vocab
        logits = random_steps(seed, (2, length, vocab), 1, mask_id)[0].to(dtype)
        proposed = torch.randint(-1, vocab + 1, (2, length), generator=g)
        cells = torch.rand(2, length, generator=g) < 0.8
        config = DecodeConfig(mask_id, base="first", mask_prediction=mode, **OFF)
        step = r2.select(
            logits.to(device), torch.zeros_like(proposed).to(device), None, config,
            candidates=cells.to(device), proposed=proposed.to(device), logits_shift=shift,
        )  # fmt: skip
        judged = torch.cat([logits[:, :1], logits[:, :-1]], 1) if shift else logits
        banned = mask_id if mode == "ban" else None
        token, p = reference.probability_of(judged, proposed, candidates=cells, exclude_id=banned)
        assert torch.equal(step.prediction.cpu(), token)
        assert torch.equal(step.confidence.cpu().isnan(), p.isnan())
        got, want = step.confidence.cpu().double().nan_to_num(), p.nan_to_num()
        assert ((got - want).abs() <= DRAWN_ERROR * want + TINY).all()

    check()


def test_draws_and_their_confidence(r2, device):
    """Of one step: the oracle's draw and either probability of it, but for a narrow band."""
    drawn = Counter()

    @settings(max_examples=120)
    @given(
        seed=seeds,
        dtype=st.sampled_from(DTYPES[device]),
        temperature=st.sampled_from((0.3, 1.0, 2.5, 1e-300, 1e300)),
        top_k=st.sampled_from((None, 1, 5)),
        top_p=st.sampled_from((None, 0.5, 0.95)),
        min_p=st.sampled_from((None, 0.02, 0.5, 1.0)),
        tempered=st.sampled_from(("untempered", "tempered")),
    )
    def check(seed, dtype, temperature, top_k, top_p, min_p, tempered):
        logits = random_steps(seed, (2, 4, 257), 1, 5)[0].to(dtype)
        config = DecodeConfig(
            5, base="first", temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            sampled_confidence=tempered, seed=seed, **OFF,
        )  # fmt: skip
        tokens = torch.full((2, 4), 5)
        step = r2.select(
            logits.to(device), tokens.to(device), DecodeState(2, 4, device=device), config
        )
        seen = reference.observe(logits, tokens == 5, DecodeState(2, 4), config)
        same = step.prediction.cpu() == seen.token
        drawn.update(same.flatten().tolist())
        assert torch.equal(step.confidence.cpu().isnan(), seen.q.isnan())
        got, want = (q.double().nan_to_num()[same] for q in (step.confidence.cpu(), seen.q))
        assert ((got - want).abs() <= DRAWN_ERROR * want + TINY).all()

    check()
    assert drawn[True] > 500 and drawn[False] <= 2, drawn  # a number beside a step: 1e-6 of all


def test_select_is_decode_step_without_tokens(r2, device):
    @settings(max_examples=60)
    @given(data=st.data(), seed=seeds, rows=st.integers(1, 3), length=lengths)
    def check(data, seed, rows, length):
        config = data.draw(configs(37))
        logits = random_steps(seed, (rows, length, 37), 1, config.mask_id)[0].to(device)
        tokens = torch.full((rows, length), config.mask_id, device=device)
        state, twin = (DecodeState(rows, length, device=device) for _ in range(2))
        chosen = r2.select(logits, tokens, state, config)
        assert (tokens == config.mask_id).all()
        done = r2.decode_step(logits, tokens, twin, config)
        assert_same(chosen, done)
        assert_same(state_tensors(state), state_tensors(twin))
        written = torch.where(done.rule != Rule.NONE, done.prediction, config.mask_id)
        assert torch.equal(tokens, written)

    check()


def test_invariants(r2, device):
    """Progress, subset and monotonicity, whatever the other options are."""

    @settings(max_examples=100)
    @given(data=st.data(), seed=seeds, length=st.integers(1, 20), low=thresholds, high=thresholds)
    def check(data, seed, length, low, high):
        low, high = min(low, high), max(low, high)
        config = data.draw(configs(29, base="threshold", mask_prediction="ban", quota=1, **OFF))
        logits = random_steps(seed, (2, length, 29), 1, config.mask_id)[0].to(device)
        tokens = torch.full((2, length), config.mask_id, device=device)
        tokens[1, : length // 2] = (config.mask_id + 1) % 29
        candidates = tokens == config.mask_id

        def committed(threshold):
            state = DecodeState(2, length, device=device)
            step = r2.select(logits, tokens, state, config.replace(threshold=threshold))
            return step, step.rule != Rule.NONE

        step, many = committed(low)
        _, few = committed(high)
        valid = candidates & ~step.confidence.isnan()
        assert not (few & ~many).any() and not (many & ~valid).any()
        assert torch.equal(many.any(1), valid.any(1))
        assert torch.equal(step.remaining, (candidates & ~many).sum(1, dtype=torch.int32))
        assert (step.prediction[many] != config.mask_id).all()

    check()


def test_budget_bounds_expected_errors(r2, device):
    """The summed 1 - p of a step, without the last cell if that is free, is within the budget,
    unless the best cell alone exceeds it; and one more cell would not be."""

    @settings(max_examples=60)
    @given(seeds, st.integers(1, 20), st.sampled_from((0.0, 0.05, 0.3, 1.0)), st.booleans())
    def check(seed, length, budget, last_free):
        config = DecodeConfig.budget(0, error_budget=budget, last_free=last_free)
        logits = random_steps(seed, (3, length, 53), 1, 0)[0].to(device)
        tokens = torch.zeros((3, length), dtype=torch.int64, device=device)
        step = r2.select(logits, tokens, DecodeState(3, length, device=device), config)
        for p, rule in zip(step.confidence.double().cpu(), step.rule.cpu(), strict=True):
            taken, left = p[rule != Rule.NONE], p[(rule == Rule.NONE) & ~p.isnan()]
            worst = taken.min() if len(taken) else 1.0
            counted = (1 - taken).sum() - (1 - worst) * last_free
            assert len(taken) == 1 or counted <= budget + SUM_ERROR
            if len(left):
                assert left.max() <= worst
                another = (1 - worst) if last_free else (1 - left.max())
                assert counted + another > budget - SUM_ERROR

    check()
