# SPDX-License-Identifier: Apache-2.0
"""Awkward inputs, each with the answer the contract gives."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    OFF,
    STREAKS,
    assert_same,
    clone,
    confidence_ulps,
    laid_out,
    random_steps,
    runs_cuda,
    same_bits,
    state_tensors,
    strided_tokens,
    sure_logits,
    ulps,
)
from random_steps import Call, observe
from torch.utils._pytree import tree_leaves

import r2dllm_ext
from r2dllm_ext import reference
from r2dllm_ext.config import BASE_RULES, DecodeConfig, Rule
from r2dllm_ext.models import ModelConfig, Transformer
from r2dllm_ext.state import Counter, DecodeState
from r2dllm_ext.tasks import get_task, ledger_posterior

NAN, INF = float("nan"), float("inf")
ALL_DTYPES = DTYPES["cpu"]


def supported(dtype: torch.dtype, device: str) -> torch.dtype:
    """`dtype`; the widest one that `device` takes in place of float64 elsewhere than on the CPU."""
    return dtype if dtype in DTYPES[device] else torch.float32


def block(config: DecodeConfig, shape, device: str):
    """Tokens that are all mask, and a fresh state."""
    tokens = torch.full(shape, config.mask_id, device=device)
    return tokens, DecodeState(*shape, device=device)


# ---- invalid rows ----------------------------------------------------------------------------

INVALID = {
    "nan first": lambda row: row.__setitem__(0, NAN),
    "nan last": lambda row: row.__setitem__(-1, NAN),
    "nan in a tail": lambda row: row.__setitem__(-3, NAN),
    "nan everywhere": lambda row: row.fill_(NAN),
    "nan and -inf": lambda row: row.fill_(-INF).__setitem__(7, NAN),
    "nan and +inf": lambda row: row.fill_(INF).__setitem__(-2, NAN),
    "one +inf": lambda row: row.__setitem__(5, INF),
    "all +inf": lambda row: row.fill_(INF),
    "all -inf": lambda row: row.fill_(-INF),
}


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [9, 67, 9001])
@pytest.mark.parametrize("kind", INVALID)
def test_invalid_row(r2, device, kind, vocab, dtype):
    """-1 and NaN, no rule commits it, it stays masked, and the other cells do not notice."""
    dtype = supported(dtype, device)
    config = DecodeConfig(3, threshold=0.0, spatial_threshold=0.0, temporal_steps=1)
    config = config.replace(temporal_threshold=0.0, confidence_cluster_unmasked=None)
    g = torch.Generator().manual_seed(vocab)
    clean = torch.randn(2, 3, vocab, generator=g).to(dtype).to(device)
    logits = clean.clone()
    INVALID[kind](logits[0, 1])
    want = r2.token_confidence(clean)
    got = r2.token_confidence(logits)
    others = torch.ones(2, 3, dtype=torch.bool, device=device)
    others[0, 1] = False
    assert got[0][0, 1] == -1 and got[1][0, 1].isnan()
    assert all(same_bits(a[others], b[others]) for a, b in zip(got, want, strict=True))

    tokens, state = block(config, (2, 3), device)
    step = r2.decode_step(logits, tokens, state, config)
    assert step.prediction[0, 1] == -1 and step.confidence[0, 1].isnan()
    assert torch.equal(step.rule == Rule.NONE, ~others)
    assert torch.equal(tokens == 3, ~others)
    assert step.remaining.tolist() == [1, 0]
    assert state.streak_id[0, 1] == -1 and state.streak_count[0, 1] == 0


@pytest.mark.parametrize("base", BASE_RULES)
def test_block_without_a_valid_row(r2, device, base):
    """Nothing to commit is no error, for any base rule; counters advance."""
    config = DecodeConfig(3, base=base)
    tokens, state = block(config, (2, 4), device)
    logits = torch.full((2, 4, 11), NAN, device=device)
    step = r2.decode_step(logits, tokens, state, config)
    assert (tokens == 3).all() and not step.rule.any() and step.confidence.isnan().all()
    assert step.remaining.tolist() == [4, 4]
    assert state.counters[:, 1:].tolist() == [[1, 1, 4, 0]] * 2


@pytest.mark.parametrize("bad", [NAN, INF])
def test_excluded_column_may_be_anything(r2, device, bad):
    """The mask id's logit counts as -inf whatever it is."""
    logits = torch.randn(1, 2, 301, generator=torch.Generator().manual_seed(0)).to(device)
    want = r2.token_confidence(logits, exclude_id=44)
    logits[..., 44] = bad
    assert_same(r2.token_confidence(logits, exclude_id=44), want)


def test_rows_that_are_not_candidates_are_not_read(r2, device):
    """NaN there does not show; all cells committed leaves nothing to do."""
    config = DecodeConfig(3)
    logits = torch.full((2, 3, 11), NAN, device=device)
    tokens = torch.tensor([[0, 1, 2], [4, 5, 6]], device=device)
    before, state = tokens.clone(), DecodeState(2, 3, device=device)
    step = r2.decode_step(logits, tokens, state, config)
    assert torch.equal(tokens, before) and not step.rule.any()
    assert (step.prediction == -1).all() and (step.confidence == 0).all()
    assert step.remaining.tolist() == [0, 0]


# ---- shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_empty(r2, device, shape, temperature):
    config = DecodeConfig(1, temperature=temperature)
    tokens, state = block(config, shape, device)
    logits = torch.zeros(*shape, 5, device=device)
    step = r2.decode_step(logits, tokens, state, config)
    assert [tuple(t.shape) for t in step[:4]] == [shape, shape, shape, shape[:1]]
    assert step.entropy is None
    assert not step.remaining.any()
    prediction, confidence = r2.token_confidence(logits)
    assert prediction.shape == confidence.shape == shape
    masked = tokens == 1
    least, masks = {"min_confidence": 0.5}, {"was_masked": masked, "is_masked": masked}
    marked = r2.window_pool(confidence, masked, window=1, **least)
    chosen = r2.positional_ambiguity(prediction, confidence, masked, **least)
    final = r2.update_stability_(state, prediction, confidence, **masks, steps=1, **least)
    assert marked.shape == chosen.shape == final.shape == shape


def test_one_token_vocabulary(r2, device):
    """V = 1: its probability is 1; as mask id it is either excluded or never leaves the mask."""
    logits = torch.full((1, 2, 1), -3.0, device=device)
    prediction, confidence = r2.token_confidence(logits)
    assert prediction.tolist() == [[0, 0]] and confidence.tolist() == [[1.0, 1.0]]
    for mask, want in (("ban", [-1, -1]), ("allow", [0, 0])):
        config = DecodeConfig(0, mask_prediction=mask)
        tokens, state = block(config, (1, 2), device)
        step = r2.decode_step(logits, tokens, state, config)
        assert step.prediction.tolist() == [want] and step.remaining.tolist() == [2]
        assert step.confidence.isnan().all() if mask == "ban" else (step.confidence == 1).all()


def test_one_cell(r2, device):
    """L = 1: the best cell; no window of 3 and no run of 2 fits."""
    config = DecodeConfig(15, threshold=1.0, spatial_threshold=0.0)
    tokens, state = block(config, (1, 1), device)
    step = r2.decode_step(sure_logits([(4, 0.5)]).to(device), tokens, state, config)
    assert tokens.tolist() == [[4]] and step.rule.tolist() == [[Rule.FORCED]]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_small_vocabulary(r2, device, dtype):
    """V = 1 .. 130, the maximum anywhere: every tail of a vector, at every alignment."""
    dtype = supported(dtype, device)
    g = torch.Generator().manual_seed(1)
    for vocab in range(1, 131):
        values = torch.randn(1, 5, vocab, generator=g).to(dtype)
        where = torch.randint(vocab, (5,), generator=g)
        values[0, range(5), where] = 6
        buffer = torch.zeros(values.numel() + vocab % 8, dtype=dtype, device=device)
        logits = buffer[vocab % 8 :].view(values.shape).copy_(values)
        prediction, confidence = r2.token_confidence(logits)
        want = reference.token_confidence(values)[1]
        assert prediction.cpu().tolist() == [where.tolist()], vocab
        assert (ulps(confidence.cpu(), want) <= confidence_ulps(want, vocab, device)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_layout_of_logits_does_not_matter(r2, device, dtype, layout):
    """Row strides, gaps, odd storage offsets, swapped dimensions, expanded rows: same bits."""
    dtype = supported(dtype, device)
    values = random_steps(3, (3, 5, 1037), 1, 0)[0].to(dtype).to(device)
    assert_same(r2.token_confidence(laid_out(values, layout)), r2.token_confidence(values))
    one = values[:1, :1]
    assert_same(
        r2.token_confidence(one.expand(3, 5, 1037)),
        [t.expand(3, 5) for t in r2.token_confidence(one)],
    )


def test_shifted_view(r2, device):
    """The Dream shift as a view of the model's output: rows start - 1 .. end - 2."""
    whole = random_steps(5, (2, 12, 257), 1, 0)[0].to(device)
    config = DecodeConfig(0)
    results = []
    for logits in (whole[:, 3:7], whole[:, 3:7].clone()):
        tokens, state = block(config, (2, 4), device)
        results.append((*r2.decode_step(logits, tokens, state, config), tokens))
    assert_same(*results)


@pytest.mark.parametrize("kind", ["slice", "strided", "transposed"])
def test_tokens_may_be_a_view(r2, device, kind):
    """Only the block is written; what lies around it stays."""
    config = DecodeConfig(0)
    logits = random_steps(7, (2, 4, 31), 1, 0)[0].to(device)
    plain, state = block(config, (2, 4), device)
    want = r2.decode_step(logits, plain, state, config)
    if kind == "slice":
        whole = torch.full((2, 12), 9, device=device)
        view = whole[:, 5:9]
    elif kind == "strided":
        view = strided_tokens(torch.zeros((2, 4), dtype=torch.int64, device=device))
        whole = view._base
    else:
        whole = torch.full((4, 2), 9, device=device)
        view = whole.t()
    view.zero_()
    around = whole.clone()
    got = r2.decode_step(logits, view, DecodeState(2, 4, device=device), config)
    assert_same([*got, view], [*want, plain])
    assert whole.sum() == around.sum() + plain.sum() and plain.any()


@pytest.mark.parametrize("transposed", [False, True])
def test_candidates_may_be_strided(r2, device, transposed):
    config = DecodeConfig(0, **OFF)
    logits = random_steps(9, (4, 4, 31), 1, 0)[0].to(device)
    cells = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    cells = (cells[:, ::2].t() if transposed else cells[:, ::2]).to(device)
    results = []
    for candidates in (cells, cells.contiguous()):
        tokens, state = block(config, (4, 4), device)
        step = r2.decode_step(logits, tokens, state, config, candidates=candidates)
        results.append((*step, tokens))
    assert_same(*results)


# ---- ties ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "columns",
    [(0, 1), (31, 32), (3, 2055), (17, 4200), (4095, 4096), (4000, 12000), (7, 8192, 14998)],
)
def test_tied_tokens(r2, device, columns, dtype):
    """The lowest id, however far apart; n ties have probability 1 / n exactly if n is 2^k."""
    dtype = supported(dtype, device)
    for background in (-1e4, -INF):
        logits = torch.full((1, 1, 15000), background, dtype=dtype, device=device)
        logits[..., list(columns)] = 0
        prediction, confidence = r2.token_confidence(logits)
        assert prediction.item() == columns[0]
        want = torch.tensor([[1 / len(columns)]], dtype=torch.float64)
        allowed = 0 if len(columns) == 2 else confidence_ulps(want, 15000, device)
        assert ulps(confidence.cpu(), want) <= allowed
        prediction, _ = r2.token_confidence(logits, exclude_id=columns[0])
        assert prediction.item() == columns[1]


def test_all_logits_equal(r2, device):
    for value in (0.0, -7.25, 1e4):
        logits = torch.full((1, 1, 8192), value, device=device)
        prediction, confidence = r2.token_confidence(logits)
        assert prediction.item() == 0 and confidence.item() == 1 / 8192


def test_negative_zero_ties_with_zero(r2, device):
    logits = torch.full((1, 1, 9000), -1e4, device=device)
    logits[..., 100], logits[..., 6000] = -0.0, 0.0
    prediction, confidence = r2.token_confidence(logits)
    assert prediction.item() == 100 and confidence.item() == 0.5


# ---- magnitudes ------------------------------------------------------------------------------

HUGE = [
    (torch.float16, 65504.0),
    (torch.bfloat16, 3e38),
    (torch.float32, 1e30),
    (torch.float32, 3e38),
    (torch.float64, 1e300),
    (torch.float64, 1e308),
    (torch.float32, 1e6),
    (torch.float32, 2.27e4),
    (torch.float32, 2.28e4),
]


@pytest.mark.parametrize("dtype, size", HUGE, ids=lambda value: str(value))
def test_huge_logits(r2, device, dtype, size):
    """No overflow: a huge winner is certain, equal giants share, hugely negative rows are rows."""
    if dtype not in DTYPES[device]:
        pytest.skip("float64 is for the CPU")
    vocab = 4500
    rows = torch.zeros(1, 6, vocab, dtype=dtype)
    rows[0, 0, 4321] = size
    rows[0, 1] = -size
    rows[0, 2, [7, 4400]] = size
    rows[0, 3] = -size
    rows[0, 3, 9] = size
    rows[0, 4] = -INF
    rows[0, 4, 4499] = -size
    rows[0, 5] = -size
    rows[0, 5, [5, 4444]] = 0
    prediction, confidence = r2.token_confidence(rows.to(device))
    assert prediction.tolist() == [[4321, 0, 7, 9, 4499, 5]]
    want = torch.tensor([1, 1 / vocab, 0.5, 1, 1, 0.5], dtype=torch.float64)
    assert (ulps(confidence[0].cpu(), want) <= confidence_ulps(want, vocab, device)).all()


def test_large_but_close_logits(r2, device):
    """Differences of 1 keep their softmax, below and above what float32 arithmetic takes."""
    for base in (2.2e4, -2.2e4, 1e6, -1e6, 2e6, -8e6):
        rows = torch.full((1, 1, 5000), base, device=device)
        rows[0, 0, 4999] = base + 1
        prediction, confidence = r2.token_confidence(rows)
        want = reference.token_confidence(rows.cpu())[1]
        assert prediction.item() == 4999
        assert (ulps(confidence.cpu(), want) <= confidence_ulps(want, 5000, device)).all()


# ---- rules at their limits -------------------------------------------------------------------


def test_window_longer_than_the_block(r2, device):
    config = DecodeConfig(15, threshold=1.0, spatial_threshold=0.0, token_cluster=None)
    logits = sure_logits([(1, 0.6), (2, 0.5), (3, 0.7)]).to(device)
    for window, count in ((3, 3), (4, 1), (2**31 - 1, 1)):
        for unmasked in (None, 2**31 - 1):
            options = config.replace(
                confidence_cluster_size=window, confidence_cluster_unmasked=unmasked
            )
            tokens, state = block(options, (1, 3), device)
            step = r2.decode_step(logits, tokens, state, options)
            assert (step.rule != Rule.NONE).sum() == count


def test_schedule_with_more_steps_than_cells(r2, device):
    """m < n: one cell a step, then none are left; steps past the end take all."""
    config = DecodeConfig(15, base="schedule", steps_per_block=5, **OFF)
    logits = sure_logits([(1, 0.6), (2, 0.5), (3, 0.7)]).to(device)
    tokens, state = block(config, (1, 3), device)
    counts = [r2.decode_step(logits, tokens, state, config).rule.count_nonzero() for _ in range(4)]
    assert counts == [1, 1, 1, 0]
    tokens, state = block(config, (1, 3), device)
    state.counters[:, Counter.BLOCK_STEP] = 5
    assert r2.decode_step(logits, tokens, state, config).rule.all()


def test_long_block(r2, device):
    """A decision is the oracle's on as many cells as CUDA takes, and on the CPU on more."""
    length = 1024 if runs_cuda(device) else 1500
    config = DecodeConfig(0, confidence_cluster_size=700, spatial_threshold=0.2)
    config = config.replace(quota=40, neighbour_radius=300, report_entropy=True)
    for base in BASE_RULES:
        config = config.replace(base=base, confidence_cluster_unmasked=600, steps_per_block=2)
        z = random_steps(11, (1, length, 23), 1, 0)[0]
        tokens, state = block(config, (1, length), device)
        seen = observe(r2, z.to(device), tokens, state, config, Call(), device)
        before, twin = tokens.cpu(), DecodeState(1, length)
        want = reference.decide(seen, before == 0, twin, config, z.dtype, tokens=before)
        got = r2.decode_step(z.to(device), tokens, state, config)
        assert_same(got, want, base)
        assert_same(state_tensors(state), state_tensors(twin), base)


def test_switched_off_stability_leaves_streaks(r2, device):
    config = DecodeConfig(15, temporal_steps=0)
    tokens, state = block(config, (1, 2), device)
    state.streak_count.fill_(3)
    state.streak_id.fill_(5)
    kept = clone(state)
    r2.decode_step(sure_logits([(1, 0.6), (2, 0.5)]).to(device), tokens, state, config)
    for name in STREAKS:
        assert torch.equal(getattr(state, name), getattr(kept, name))


# ---- the same bits anywhere ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_alone_or_in_a_batch(r2, device, dtype, temperature):
    """A row's result depends on that row (and its identity in the random numbers) alone."""
    options = {"token_cluster": "random", "temporal_steps": 2, "report_entropy": True}
    if temperature:
        options |= {"temperature": temperature, "top_k": 50, "top_p": 0.9}
    config = DecodeConfig(4, seed=7, **options)
    logits = [z.to(dtype).to(device) for z in random_steps(13, (5, 9, 9007), 3, 4)]

    def run(rows: list[int]):
        tokens, state = block(config, (len(rows), 9), device)
        state.counters[:, Counter.ROW_ID] = torch.tensor(rows)
        steps = [r2.decode_step(z[rows], tokens, state, config) for z in logits]
        return [*(t for step in steps for t in step), tokens, *state_tensors(state)]

    whole = run([0, 1, 2, 3, 4])
    for rows in ([2], [4, 1], [3, 3, 0]):
        assert_same(run(rows), [t[rows] for t in whole], f"rows {rows}")
    assert whole[2].any()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_number_of_threads(r2, threads, temperature):
    """CPU: 1, 2 or 3 threads give the same bits, for one long row and for many rows."""
    config = DecodeConfig(4, temperature=temperature)
    for shape in ((1, 1, 152064), (6, 32, 5003)):
        logits = random_steps(17, shape, 1, 4)[0]
        results = []
        for count in (1, 2, 3):
            threads(count)
            tokens, state = block(config, shape[:2], "cpu")
            step = r2.decode_step(logits, tokens, state, config)
            results.append((*step, tokens, *r2.token_confidence(logits)))
        assert_same(results[1], results[0])
        assert_same(results[2], results[0])


def test_repeatable(r2, device):
    """Twice the same call, twice the same bits; inputs are left alone."""
    config = DecodeConfig(4, temperature=0.7, token_cluster="random")
    logits = random_steps(23, (3, 16, 5003), 1, 4)[0].to(device)
    kept = logits.clone()
    results = []
    for _ in range(2):
        tokens, state = block(config, (3, 16), device)
        results.append((*r2.decode_step(logits, tokens, state, config), tokens))
    assert_same(*results)
    assert same_bits(logits, kept)


# ---- defaults of torch -----------------------------------------------------------------------


class TableModel:
    """Logits from the token and its place, by two tables; takes no part in the defaults."""

    def __init__(self, length: int, vocab: int):
        g = torch.Generator("cpu").manual_seed(5)
        options = {"generator": g, "dtype": torch.float32, "device": "cpu"}
        self.by_token = 2 * torch.randn(vocab, vocab, **options)
        self.by_place = 2 * torch.randn(length, vocab, **options)

    def __call__(self, ids):
        return SimpleNamespace(logits=self.by_token[ids] + self.by_place[: ids.shape[1]])


def tour(r2) -> list[torch.Tensor]:
    """What the public API makes of tensors whose dtype and device are given."""
    g = torch.Generator("cpu").manual_seed(3)
    logits = torch.randn(2, 8, 16, generator=g, dtype=torch.float32, device="cpu")
    masked = torch.ones(2, 8, dtype=torch.bool, device="cpu")
    made: list = []
    options = {"token_cluster": "random", "confidence_dtype": "logits", "report_entropy": True}
    config = r2.DecodeConfig(15, temperature=0.7, **options)
    for ops in (r2, reference):
        for z in (logits, logits.bfloat16()):
            tokens = torch.full((2, 8), 15, dtype=torch.int64, device="cpu")
            state = r2.DecodeState(2, 8, step_map=True)
            made += [ops.decode_step(z, tokens, state, config), tokens]
            made += [state_tensors(state.take([1])), state_tensors(state.reset((0,)))]
            both = r2.DecodeState.stack([state, state.take([0])])
            made += [state_tensors(both.put([1], state.take([1])))]
            rows = r2.RowParams(quota=torch.tensor([1, 2], dtype=torch.int64, device="cpu"))
            step = ops.select(z, tokens, state, config, rows=rows.take([1, 0]))
            made += [step]
        prediction, p = ops.token_confidence(logits, exclude_id=15)
        state = r2.DecodeState(2, 8)
        masks = {"was_masked": masked, "is_masked": masked}
        made += [prediction, p, ops.window_pool(p, masked, window=2, min_confidence=0.3)]
        made += [ops.positional_ambiguity(prediction, p, masked, min_confidence=0.2, mode="random")]
        made += [
            ops.update_stability_(state, prediction, p, **masks, steps=1, min_confidence=0.3),
            ops.row_stats(logits, prediction, temperature=0.5),
        ]
        leaf = logits.clone().requires_grad_()
        weight = torch.rand(2, 8, generator=g, dtype=torch.float32, device="cpu")
        loss = ops.sft_loss(leaf, prediction, weight, normalizer=3.0, entropy_weight=0.5)
        loss.backward()
        made += [loss.detach(), leaf.grad]
    made += [r2.vocab_statistics(logits).values]
    for mode, weighting in (("block", "elbo"), ("iid", "mean"), ("trajectory", "flat")):
        options = {"mode": mode, "weighting": weighting, "ratio": (0.3, 0.6), "seed": 1}
        options |= {"commit_step": prediction} if mode == "trajectory" else {}
        options |= {"mask_id": 15, "block_length": 4, "complementary": True}
        made += [r2.corrupt(prediction, masked, **options)]
    options = {"gen_length": 16, "block_length": 8, "stop_id": 3, "trace": True}
    model, prompt = TableModel(20, 16), prediction[:, :4]
    decoded = r2.generate(model, prompt, config=r2.DecodeConfig(15), **options)
    made += [decoded.sequences, list(vars(decoded.trace).values())]
    made += [r2.redundancy_score(decoded.trace, r2.DecodeConfig(15), stop_id=3, exclude_ids=[1])]
    shape = ModelConfig("llada", vocab_size=16, width=8, layers=1, heads=2, mlp_width=8)
    with torch.device("cpu"):
        model = Transformer(shape).float()
    made += [model.init_weights(3)(prompt).logits.detach()]
    task = get_task("ledger")
    sample = task.sample(0, 1)
    answer = task.tokenizer.encode(sample.answer)
    answer = torch.tensor([answer + [task.tokenizer.end_id] * (96 - len(answer))], device="cpu")
    hidden = torch.arange(96, device="cpu")[None] % 3 == 0
    ledger_posterior._compiled.cache_clear()
    made += [task.posterior([sample.prompt], answer, hidden)]
    return [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(
    "dtype, device",
    [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")],
    ids=str,
)
def test_defaults_of_torch_change_nothing(r2, dtype, device):
    """A tensor that is made without dtype or device would drift, or meet another device."""
    want = tour(r2)
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        got = tour(r2)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert_same(got, want)
    assert len(got) > 80 and all(tensor.device.type == "cpu" for tensor in got)


def test_every_factory_names_dtype_and_device():
    """Integers are int64 by themselves where a number of them is asked for."""
    package = Path(r2dllm_ext.__file__).parent
    of_floats = ["empty", "zeros", "ones", "full", "eye", "rand", "randn", "linspace", "tensor"]
    of_integers = ["arange", "randint", "randperm"]
    lacking = []
    for path in package.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if name.removeprefix("torch.") not in of_floats + of_integers or "." not in name:
                continue
            given = {keyword.arg for keyword in call.keywords}
            wanted = (
                {"device"} if name.removeprefix("torch.") in of_integers else {"device", "dtype"}
            )
            if None not in given and not wanted <= given:
                lacking.append(f"{path.name}: {ast.unparse(call)}")
    # A module's weights are those of torch's own modules: of the defaults. A probe has no dtype.
    allowed = ("torch.ones(width)", "torch.empty(0, device=", "digit_ids, ")
    assert [call for call in lacking if not any(text in call for text in allowed)] == []


# ---- CUDA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}])
def test_no_synchronisation_with_the_host(r2, cuda, draw):
    config = DecodeConfig(4, **draw)
    logits = random_steps(29, (3, 16, 5003), 1, 4)[0].to(cuda)
    tokens, state = block(config, (3, 16), cuda)
    cells = tokens == 4
    torch.cuda.set_sync_debug_mode("error")
    try:
        r2.decode_step(logits, tokens, state, config)
        r2.select(logits, tokens, state, config, candidates=cells)
        statistics = r2.vocab_statistics(logits, exclude_id=4)
        stacked = statistics._replace(values=torch.stack([statistics.values] * 2))
        r2.select(r2.merge_statistics(stacked), tokens, state, config.replace(temperature=0.0))
        prediction, confidence = r2.token_confidence(logits)
        r2.window_pool(confidence, cells, window=3, min_confidence=0.5)
        r2.positional_ambiguity(prediction, confidence, cells, min_confidence=0.5, mode="random")
        masks = {"was_masked": cells, "is_masked": cells}
        r2.update_stability_(state, prediction, confidence, **masks, steps=2, min_confidence=0.5)
        r2.row_stats(logits, prediction)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cuda_graph(r2, cuda, temperature):
    """Captured once, replayed for every step of a block: the same bits as calls."""
    config = DecodeConfig(4, temperature=temperature, token_cluster="random")
    steps = [z.to(cuda) for z in random_steps(31, (3, 16, 5003), 3, 4)]
    plain, twin = block(config, (3, 16), cuda)
    want = [(*r2.decode_step(z, plain, twin, config), plain.clone()) for z in steps]

    logits = steps[0].clone()
    tokens, state = block(config, (3, 16), cuda)
    graph = torch.cuda.CUDAGraph()
    r2.decode_step(logits, tokens.clone(), clone(state), config)  # warm-up
    with torch.cuda.graph(graph):
        step = r2.decode_step(logits, tokens, state, config)
    tokens.fill_(4)
    state.counters[:, Counter.STEP] = 0
    state.reset()
    for z, expected in zip(steps, want, strict=True):
        logits.copy_(z)
        graph.replay()
        assert_same((*step, tokens), expected)
    assert_same(state_tensors(state), state_tensors(twin))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_memory_does_not_grow_with_the_vocabulary(r2, cuda, temperature):
    """Beside the partial results of V-slices nothing of size V is allocated."""
    config = DecodeConfig(4, temperature=temperature)
    logits = torch.randn(8, 32, 100003, device=cuda)
    tokens, state = block(config, (8, 32), cuda)
    r2.decode_step(logits, tokens, state, config)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    r2.decode_step(logits, tokens, state, config)
    assert torch.cuda.max_memory_allocated() - before < logits.nbytes / 50


def test_offsets_beyond_32_bits(r2, cuda):
    """[1, 2, V] logits whose second row begins 2^31 + 5 elements after the first."""
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GB of device memory")
    vocab, far = 10007, 2**31 + 5
    memory = torch.empty(far + vocab, dtype=torch.bfloat16, device=cuda)
    near = torch.randn(2, vocab, dtype=torch.bfloat16, device=cuda)
    memory[:vocab], memory[far:] = near[0], near[1]
    logits = memory.as_strided((1, 2, vocab), (1, far, 1))
    assert_same(r2.token_confidence(logits), r2.token_confidence(near[None].clone()))


def test_streams_at_once(r2, cuda):
    config, shape = DecodeConfig.r2(4), (2, 32)
    steps = [z.to(cuda) for z in random_steps(41, (*shape, 30011), 8, 4)]
    blocks = [block(config, shape, cuda) for _ in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    results = []
    for logits, (tokens, state), stream in zip(steps, blocks, streams, strict=True):
        with torch.cuda.stream(stream):
            results.append(r2.decode_step(logits, tokens, state, config))
    torch.cuda.synchronize()
    for logits, (tokens, _), result in zip(steps, blocks, results, strict=True):
        alone, state = block(config, shape, cuda)
        assert_same((*result, tokens), (*r2.decode_step(logits, alone, state, config), alone))


def test_a_device_that_is_not_the_current_one(r2, cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    config, shape = DecodeConfig.r2(4), (2, 8)
    logits = random_steps(43, (*shape, 999), 1, 4)[0]
    results = []
    for device in ("cuda:0", "cuda:1"):
        tokens, state = block(config, shape, device)
        with torch.cuda.device(0):
            results.append((*r2.decode_step(logits.to(device), tokens, state, config), tokens))
    assert_same(*results)


def test_block_length_limit(r2, cuda):
    for length, fits in ((1024, True), (1025, False)):
        config = DecodeConfig.r2(4)
        tokens, state = block(config, (1, length), cuda)
        logits = torch.zeros(1, length, 8, device=cuda)
        if fits:
            assert r2.decode_step(logits, tokens, state, config).remaining.item() < length
        else:
            with pytest.raises(ValueError, match="L <= 1024 on CUDA, got L = 1025"):
                r2.decode_step(logits, tokens, state, config)
