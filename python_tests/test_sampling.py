# SPDX-License-Identifier: Apache-2.0
"""Drawing tokens at temperature > 0.

Exact where it can be: the counter gives a cell's uniform number, and its token is the inverse of
the cumulative distribution in float64 there, unless the number lies within 1e-6 of a step.
Statistical on top: chi-square with a false-alarm rate of 1e-6 a test, and fixed seeds.
"""

import pytest
import torch
from cases import DTYPES, OFF, assert_same, mass_error, roundings, sure_logits

from r2dllm_ext import reference
from r2dllm_ext.config import DecodeConfig, Rule
from r2dllm_ext.philox import Draw
from r2dllm_ext.state import Counter, DecodeState

FALSE_ALARM = 1e-6
# Of the total mass, around a step of the cumulative distribution: both masses may be off by 16
# roundings (kMassError of csrc/tests; on CUDA 7, and 3 of each of the 3 nats that a term is below).
BAND = roundings(2 * 16)
TRUNCATIONS = [(None, None), (20, None), (None, 0.8), (50, 0.9)]


def draw(ops, logits, config, *, rows=None, seeds=None, steps=1, device="cpu"):
    """`steps` draws of every cell: tokens, confidences [steps, B, L], on the CPU.

    base="first" and no other rule: the tokens of the cells stay mask, so all of them draw again.
    """
    config = config.replace(base="first", **OFF)
    shape = logits.shape[:2]
    state = DecodeState(*shape, device=device)
    if rows is not None:
        state.counters[:, Counter.ROW_ID] = torch.as_tensor(rows)
    if seeds is not None:
        state.counters[:, Counter.ROW_SEED] = torch.as_tensor(seeds)
    tokens = torch.full(shape, config.mask_id, device=device)
    made = [ops.select(logits.to(device), tokens, state, config) for _ in range(steps)]
    return tuple(torch.stack([step[i] for step in made]).cpu() for i in (0, 1))


def p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square of counts against expectations; bins that expect fewer than 5 are merged."""
    small = expected < 5
    o = torch.cat([observed[~small], observed[small].sum()[None]]).double()
    e = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = e > 0
    assert not o[~keep].any(), "a token of no mass was drawn"
    statistic = ((o[keep] - e[keep]) ** 2 / e[keep]).sum()
    return torch.special.gammaincc((keep.sum() - 1) / 2.0, (statistic / 2).float()).item()


def test_p_value():
    """The statistic itself: 5% quantile of 2 degrees of freedom, and a loaded die is caught."""
    e = torch.full((3,), 100.0, dtype=torch.float64)
    o = e + torch.tensor([17.3, -17.3, 0.0]).double()
    assert p_value(o, e) == pytest.approx(0.05, abs=2e-3)
    assert p_value(torch.tensor([160.0, 70.0, 70.0]), e) < FALSE_ALARM


@pytest.mark.parametrize("top_k, top_p", TRUNCATIONS)
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_distribution(r2, device, temperature, top_k, top_p):
    """40,960 draws of one row of 301 logits."""
    g = torch.Generator().manual_seed(31)
    row = torch.randn(301, generator=g) * 2
    config = DecodeConfig(300, temperature=temperature, top_k=top_k, top_p=top_p, seed=5)
    tokens, _ = draw(r2, row.expand(64, 32, 301), config, steps=20, device=device)
    weights = reference.token_weights(without_mask(row, config), temperature, top_k, top_p)
    observed = tokens.flatten().bincount(minlength=301)
    expected = weights / weights.sum() * tokens.numel()
    assert (expected > 5).sum() > 10
    assert not observed[weights == 0].any()
    assert p_value(observed, expected) > FALSE_ALARM


def without_mask(row: torch.Tensor, config: DecodeConfig) -> torch.Tensor:
    row = row.double().clone()
    if config.mask_prediction == "ban":
        row[config.mask_id] = -torch.inf
    return row


@pytest.mark.parametrize("top_k, top_p", TRUNCATIONS)
@pytest.mark.parametrize("dtype", DTYPES["cpu"], ids=str)
@pytest.mark.parametrize("mask", ["ban", "allow"])
def test_token_of_a_uniform_number(r2, device, dtype, top_k, top_p, mask):
    """9,001 tokens in three slices; every draw is the oracle's, but for a narrow band."""
    if dtype not in DTYPES[device]:
        pytest.skip("float64 is for the CPU")
    g = torch.Generator().manual_seed(37)
    logits = (torch.randn(4, 16, 9001, generator=g, dtype=torch.float64) * 3).to(dtype)
    logits[0, 0, ::2] = -torch.inf
    logits[0, 1] = 0.0
    seed, rows = -(2**62) + 12345, [3, 2**33 + 1, 7, 0]
    config = DecodeConfig(
        4097, temperature=0.9, top_k=top_k, top_p=top_p, seed=seed, mask_prediction=mask
    )
    tokens, confidence = draw(r2, logits, config, rows=rows, steps=2, device=device)
    banded = 0
    for s, b, i in torch.cartesian_prod(*map(torch.arange, tokens.shape)).tolist():
        z = without_mask(logits[b, i], config)
        weights = reference.token_weights(z, 0.9, top_k, top_p)
        u = reference.uniform(seed, rows[b], s, i, Draw.TOKEN)
        got, want = int(tokens[s, b, i]), reference.draw_token(weights, u)
        if got != want:
            mass = weights.cumsum(0) / weights.sum()
            assert weights[got] > 0, f"token {got} is outside the support"
            step = mass[min(got, want)].item()
            assert abs(step - u) < BAND, f"cell {s, b, i}: drew {got}, expected {want}"
            banded += 1
        p = z.softmax(-1)
        error = mass_error(p.max(), 9001, device).item() + roundings(1)
        assert confidence[s, b, i].item() == pytest.approx(p[got].item(), rel=error), "untempered"
    assert banded <= 2  # of 128: the steps are about 1e-4 apart


def test_border_of_the_support_in_float64(r2):
    """Logits that differ in float64 alone are no ties."""
    top = 3.0 + torch.arange(4, dtype=torch.float64) * 2.0**-40
    logits = torch.full((16, 32, 5001), -20.0, dtype=torch.float64)
    logits[..., [40, 4100, 7, 300]] = top
    for count, kept in ((1, [300]), (2, [7, 300]), (3, [7, 300, 4100])):
        config = DecodeConfig(0, temperature=1.0, top_k=count)
        assert draw(r2, logits, config)[0].unique().tolist() == kept
    tokens, _ = draw(r2, logits, DecodeConfig(0, temperature=1.0, top_p=0.4))
    assert tokens.unique().tolist() == [7, 300]


@pytest.mark.parametrize(
    "top_k, top_p, kept", [(1, None, 1), (3, None, 4), (None, 0.3, 1), (4, 0.9, 4)]
)
def test_support_across_slices(r2, device, top_k, top_p, kept):
    """Ties at the border are kept wherever they lie; nothing else is ever drawn."""
    logits = torch.full((32, 32, 9001), -20.0)
    logits[..., [8000, 5, 4500, 300]] = torch.tensor([3.0, 2.0, 2.0, 2.0])
    logits[..., 8999] = 1.0
    config = DecodeConfig(0, temperature=1.0, top_k=top_k, top_p=top_p)
    tokens, _ = draw(r2, logits, config, device=device)
    assert tokens.unique().tolist() == sorted([8000, 5, 300, 4500][:kept])


def test_temperature_near_zero_and_large(r2, device):
    """Towards the argmax (ties are shared), and towards uniform."""
    logits = torch.randn(8, 32, 5003, generator=torch.Generator().manual_seed(41)) * 2
    best = logits[..., 1:].argmax(-1) + 1
    for tiny in (1e-4, 1e-30, 5e-324):
        tokens, _ = draw(r2, logits, DecodeConfig(0, temperature=tiny), device=device)
        assert torch.equal(tokens[0], best)
    tied = torch.zeros(8, 32, 3)
    tied[..., 0] = -1.0
    tokens, _ = draw(r2, tied, DecodeConfig(0, temperature=1e-30), device=device)
    assert tokens.unique().tolist() == [1, 2]
    config = DecodeConfig(0, temperature=1e30)
    tokens, _ = draw(r2, logits[:1, :1].expand(64, 32, 5003), config, steps=20, device=device)
    observed = tokens.flatten().bincount(minlength=5003)[1:]
    assert p_value(observed, torch.full((5002,), 40960 / 5002).double()) > FALSE_ALARM


def test_numbers_depend_on_seed_row_step_and_position(r2, device):
    """Change one, and the draws change; they do not depend on the batch around a row."""
    logits = torch.zeros(1, 32, 997)
    config = DecodeConfig(0, temperature=1.0, seed=1)
    base, _ = draw(r2, logits, config, steps=2, device=device)
    assert (base[0] != base[1]).float().mean() > 0.9  # step
    assert base[0].unique().numel() > 25  # position
    other, _ = draw(r2, logits, config.replace(seed=2), device=device)
    high, _ = draw(r2, logits, config.replace(seed=1 + 2**32), device=device)
    row, _ = draw(r2, logits, config, rows=[1], device=device)
    for changed in (other, high, row):
        assert (changed[0] != base[0]).float().mean() > 0.9
    batch, _ = draw(r2, logits.expand(3, 32, 997), config, rows=[5, 0, 1], device=device)
    assert torch.equal(batch[0, 1], base[0, 0]) and torch.equal(batch[0, 2], row[0, 0])


def test_a_row_may_have_its_own_seed(implementation):
    """The state's seed is added to the config's, modulo 2^64, for tokens and for runs."""
    ops, device = implementation
    config = DecodeConfig(0, temperature=1.0, seed=-1)
    logits = torch.zeros(1, 32, 97).expand(3, 32, 97)
    mixed, _ = draw(ops, logits, config, rows=[0, 0, 0], seeds=[1, 6, 2**62], device=device)
    for b, seed in enumerate([0, 5, 2**62 - 1]):
        alone, _ = draw(ops, logits[:1], config.replace(seed=seed), device=device)
        assert torch.equal(mixed[0, b], alone[0, 0])
    config = DecodeConfig(15, token_cluster="random", temporal_steps=0, threshold=1.0)
    config = config.replace(confidence_cluster_size=0)
    one = sure_logits([(4, 0.98), *[(3, 0.9)] * 5]).to(device)

    def run_cell(seed, row_seed):
        state = DecodeState(1, 6, device=device)
        state.counters[:, Counter.ROW_SEED] = row_seed
        tokens = torch.full((1, 6), 15, device=device)
        return ops.decode_step(one, tokens, state, config.replace(seed=seed)).rule.tolist()

    found = [run_cell(7, row_seed) for row_seed in range(8)]
    assert found == [run_cell(7 + row_seed, 0) for row_seed in range(8)]
    assert len({str(rule) for rule in found}) > 1


def test_steps_go_on_across_blocks(r2, device):
    """`reset` keeps counting steps, so that a new block draws fresh numbers."""
    config = DecodeConfig(0, temperature=1.0, base="first", **OFF)
    logits = torch.zeros(1, 32, 997, device=device)
    tokens = torch.zeros(1, 32, dtype=torch.int64, device=device)
    state = DecodeState(1, 32, device=device)
    first = r2.select(logits, tokens, state, config).prediction
    state.reset()
    second = r2.select(logits, tokens, state, config).prediction
    assert state.counters.tolist() == [[0, 2, 1, 32, 0]]
    assert (first != second).float().mean() > 0.9


def test_who_sees_the_draw(implementation):
    """Base and window rule commit the draw and its own probability; run and streak the argmax."""
    ops, device = implementation
    config = DecodeConfig(0, temperature=3.0, threshold=1.0, seed=3, spatial_threshold=0.3)
    config = config.replace(confidence_cluster_size=2, confidence_cluster_unmasked=None)
    config = config.replace(token_cluster="mid", temporal_steps=1, temporal_threshold=0.4)
    g = torch.Generator().manual_seed(43)
    logits = torch.randn(64, 12, 29, generator=g)
    logits[:, :6, 7], logits[:, 6:, 9] = 4.0, 3.6
    top, p = (t.cpu() for t in ops.token_confidence(logits.to(device), exclude_id=0))
    drawn, q = (t[0] for t in draw(ops, logits, config, device=device))
    tokens = torch.zeros(64, 12, dtype=torch.int64, device=device)
    step = ops.decode_step(logits.to(device), tokens, DecodeState(64, 12, device=device), config)
    rule, prediction, confidence = step.rule.cpu(), step.prediction.cpu(), step.confidence.cpu()
    by_top = (rule == Rule.AMBIGUITY) | (rule == Rule.STABILITY)
    assert torch.equal(prediction, torch.where(by_top, top, drawn))
    assert torch.equal(confidence, torch.where(by_top, p.float(), q))
    for code in (Rule.FORCED, Rule.WINDOW, Rule.AMBIGUITY, Rule.STABILITY):
        cells = rule == code
        assert (drawn[cells] != top[cells]).any(), code


def test_random_cell_of_a_run(r2, device):
    """token_cluster="random": cell floor(u * length), and every cell of a run is as likely."""
    config = DecodeConfig(15, seed=11, token_cluster="random", temporal_steps=0, threshold=1.0)
    config = config.replace(confidence_cluster_size=0)
    one = sure_logits([(4, 0.98), *[(3, 0.9)] * 5])  # the first cell is the row's best
    logits = one.expand(2000, 6, 16).to(device)
    tokens = torch.full((2000, 6), 15, device=device)
    step = r2.decode_step(logits, tokens, DecodeState(2000, 6, device=device), config)
    rows, cells = (step.rule.cpu() == Rule.AMBIGUITY).nonzero(as_tuple=True)
    assert rows.tolist() == list(range(2000))
    want = [1 + int(reference.uniform(11, b, 0, 1, Draw.RUN) * 5) for b in range(2000)]
    assert cells.tolist() == want
    assert p_value(cells.bincount(minlength=6)[1:], torch.full((5,), 400.0).double()) > FALSE_ALARM


def test_temperature_zero_takes_no_numbers(r2, device):
    """Seed, row and step do not matter then."""
    logits = torch.randn(2, 8, 301, generator=torch.Generator().manual_seed(47))
    config = DecodeConfig(0, seed=1)
    assert_same(
        draw(r2, logits, config, device=device),
        draw(r2, logits, config.replace(seed=2), rows=[8, 9], device=device),
    )
