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
    assert_same,
    clone,
    confidence_ulps,
    configs,
    laid_out,
    random_steps,
    same_bits,
    spiked_logits,
    state_tensors,
    strided_tokens,
    ulps,
)
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_window_pool(r2, device):
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
    assert selected[True] > 100 and selected[False] > 100


def test_positional_ambiguity(r2, device):
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
    assert min(chosen[mode] for mode in ("confidence", "mid", "random")) > 20


def test_update_stability(r2, device):
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
    assert min(final[mode] for mode in ("last", "ave", "max")) > 20


# ---- a whole step ----------------------------------------------------------------------------


def observe(r2, logits, tokens, state, config, candidates) -> reference.Observation:
    """What the rules of the op see, taken from the op: argmax, draw and confidences, on the CPU."""
    excluded = None if config.allow_mask_id else config.mask_id
    cells = tokens == config.mask_id if candidates is None else candidates
    top, p = r2.token_confidence(logits, candidates=cells, exclude_id=excluded)
    drawn, q = top, p
    if config.temperature > 0:
        plain = config.replace(base="first", confidence_dtype="float32", **OFF)
        step = r2.select(logits, tokens, clone(state), plain, candidates=candidates)
        drawn, q = step.prediction, step.confidence
    return reference.Observation(*on("cpu", top, p, drawn, q))


def test_decode_step(r2, device):
    """Several steps of a block under any config: decisions, tokens and state, bit for bit."""
    fired = Counter()

    @settings(max_examples=500)
    @given(
        data=st.data(),
        seed=seeds,
        rows=sizes,
        length=lengths,
        vocab=st.sampled_from((2, 3, 17, 64, 301)),
        dtype=st.sampled_from(DTYPES[device]),
        layout=st.sampled_from(LAYOUTS),
        explicit=st.booleans(),
        strided=st.booleans(),
        shift=st.integers(0, 1),
    )
    def check(data, seed, rows, length, vocab, dtype, layout, explicit, strided, shift):
        config = data.draw(configs(vocab))
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randint(vocab, (rows, length), generator=g)
        tokens[torch.rand(rows, length, generator=g) < 0.8] = config.mask_id
        there = strided_tokens(tokens.to(device)) if strided else tokens.to(device)
        state, twin = DecodeState(rows, length, device=device), DecodeState(rows, length)
        for number, z in enumerate(random_steps(seed, (rows, length, vocab), 4, config.mask_id)):
            cells = torch.rand(rows, length, generator=g) < 0.7 if explicit else None
            z = laid_out(z.to(dtype).to(device), layout)
            masked = tokens == config.mask_id if cells is None else cells
            cells_there = None if cells is None else cells.to(device)
            judged = torch.cat([z[:, :1], z[:, :-1]], dim=1) if shift else z
            seen = observe(r2, judged, there, state, config, cells_there)
            want = reference.decide(seen, masked, twin, config, dtype)
            tokens = torch.where(want.rule != Rule.NONE, want.prediction, tokens)
            options = {"candidates": cells_there, "logits_shift": shift}
            got = r2.decode_step(z, there, state, config, **options)
            assert_same(got, want, f"step {number}")
            assert_same([there], [tokens], f"step {number} tokens")
            assert_same(state_tensors(state), state_tensors(twin), f"step {number} state")
            fired.update((config.base, code) for code in want.rule.flatten().tolist())

    check()
    codes = Counter()
    for (_, code), count in fired.items():
        codes[code] += count
    assert min(codes[code] for code in Rule) > 50, codes
    own = {base: Rule.THRESHOLD if base == "threshold" else Rule.BASE for base in BASE_RULES}
    assert all(fired[base, own[base]] > 20 for base in BASE_RULES), fired
    assert all(fired[base, Rule.FORCED] > 20 for base in ("threshold", "budget")), fired


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
        config = data.draw(configs(29, base="threshold", allow_mask_id=False, **OFF))
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
    """The summed 1 - p of a step is within the budget, unless the best cell alone exceeds it."""

    @settings(max_examples=60)
    @given(seeds, st.integers(1, 20), st.sampled_from((0.0, 0.05, 0.3, 1.0)))
    def check(seed, length, budget):
        config = DecodeConfig.budget(0, error_budget=budget)
        logits = random_steps(seed, (3, length, 53), 1, 0)[0].to(device)
        tokens = torch.zeros((3, length), dtype=torch.int64, device=device)
        step = r2.select(logits, tokens, DecodeState(3, length, device=device), config)
        for p, rule in zip(step.confidence.double().cpu(), step.rule.cpu(), strict=True):
            taken, left = p[rule != Rule.NONE], p[(rule == Rule.NONE) & ~p.isnan()]
            assert len(taken) == 1 or (1 - taken).sum() <= budget
            if len(left):
                assert left.max() <= taken.min()
                assert (1 - taken).sum() + (1 - left.max()) > budget

    check()
