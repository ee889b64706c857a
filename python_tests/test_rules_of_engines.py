# SPDX-License-Identifier: Apache-2.0
"""An engine's own rule is one configuration: each restated here in a few lines of torch.

The restatements follow what the engines do, in their precision; ties go to the lowest index, where
`topk` promises none. A block takes several steps, so that the masks are those that the rule leaves;
random logits with a planted peak, the mask id often on top, and cells that tie.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import spiked_logits
from torch import Tensor

from r2dllm_ext.config import Rule
from r2dllm_ext.integrations import ENGINE_RULES, engine_config
from r2dllm_ext.row_params import RowParams

MASK, VOCAB, BLOCKS, STEPS = 7, 211, 30, 6
SHAPES = ((1, 32), (3, 8), (4, 4))
INF = torch.inf


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


def planted(seed: int, shape: tuple[int, int], dtype: torch.dtype, *, ties: bool = True) -> Tensor:
    """[B, L, V]: every fourth cell or so predicts the mask id, and some cells have equal logits."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(VOCAB, shape, generator=g)
    target[torch.rand(shape, generator=g) < 0.25] = MASK
    sure = 1 - 10 ** (-4 * torch.rand(shape, generator=g))  # half of them above 0.99
    z = spiked_logits(g, target, sure, VOCAB)
    if ties:
        for cell in range(1, shape[1]):
            same = torch.rand(shape[0], generator=g) < 0.15
            z[same, cell] = z[same, cell - 1]
    return z.to(dtype)


def tokens_of(seed: int, shape: tuple[int, int]) -> Tensor:
    """[B, L]: most cells hold the mask id."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, shape, generator=g)
    tokens[torch.rand(shape, generator=g) < 0.85] = MASK
    return tokens


def top(z: Tensor) -> tuple[Tensor, Tensor]:
    """Argmax of logits [..., V] and its softmax probability, in their own dtype."""
    x0 = z.argmax(-1)
    return x0, z.softmax(-1).gather(-1, x0[..., None]).squeeze(-1)


def best(p: Tensor, count: int) -> Tensor:
    """[L] bool: the `count` greatest of p [L] that are not -inf; ties: lowest index."""
    order = p.argsort(descending=True, stable=True)[:count]
    chosen = torch.zeros_like(p, dtype=torch.bool)
    chosen[order] = True
    return chosen & (p > -INF)


def each(rule, *rows: Tensor) -> Tensor:
    """A rule of one row, for a batch."""
    return torch.stack([rule(*row) for row in zip(*rows, strict=True)])


def is_equal(r2, device, name, config, tokens, z, want, **arguments) -> None:
    """The tokens after one step of ours are `want`."""
    ours = tokens.clone().to(device)
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    r2.decode_step(z.to(device), ours, None, config, **there)
    assert torch.equal(ours.cpu(), want), f"{name}: got {ours.tolist()}, theirs {want.tolist()}"


def steps_of(tokens: Tensor, dtype: torch.dtype, seed: int, **options):
    """Logits of a few steps of a block."""
    for number in range(STEPS):
        yield planted(1000 * seed + number, tuple(tokens.shape), dtype, **options)


def blocks(seeds: int = BLOCKS):
    for seed in range(seeds):
        yield seed, SHAPES[seed % len(SHAPES)]


# ---- SGLang ----------------------------------------------------------------------------------


def low_confidence(p: Tensor, masked: Tensor, threshold: float) -> Tensor:
    """Above the threshold, else the best; p [L] float32, as the logits are there."""
    confidence = p.masked_fill(~masked, -INF)
    above = confidence > threshold
    return above if above.any() else best(confidence, 1)


@pytest.mark.parametrize("threshold", [0.95, 0.7, 0.3])
def test_sglang_low_confidence(r2, device, dtype, threshold):
    name = "sglang.LowConfidence"
    config, changed = engine_config(name, MASK, threshold=threshold), 0
    for seed, shape in blocks():
        tokens = tokens_of(seed, shape)
        for z in steps_of(tokens, dtype, seed):
            x0, p = top(z.float())
            masked = tokens == MASK
            chosen = each(lambda q, m: low_confidence(q, m, threshold), p, masked)
            want = torch.where(chosen, x0, tokens)
            is_equal(r2, device, name, config, tokens, z.float(), want)
            changed += int((want != tokens).sum())
            tokens = want
    assert changed > 100


@pytest.mark.parametrize("threshold, edit", [(0.5, 0.0), (0.8, 0.9), (0.3, 0.5)])
def test_sglang_joint_threshold(r2, device, dtype, threshold, edit):
    """Mask to token as above; token to token in the same step, outside the prompt."""
    name, edited = "sglang.JointThreshold", 0
    config = engine_config(name, None, threshold=threshold, edit_threshold=edit)
    for seed, shape in blocks():
        tokens = tokens_of(seed, shape)
        answer = tokens == MASK
        for z in steps_of(tokens, dtype, seed):
            z = z.float()
            x0, p = top(z)
            masked = answer & (tokens == MASK)
            decided = answer & ~masked
            chosen = each(lambda q, m: low_confidence(q, m, threshold), p, masked)
            edits = decided & (p > edit) & (x0 != tokens)
            want = torch.where((chosen & masked) | edits, x0, tokens)
            cells = {"candidates": masked, "editable": decided}
            is_equal(r2, device, name, config, tokens, z, want, **cells)
            edited += int(edits.sum())
            tokens = want
    assert edited > 50


# ---- diffusers -------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.95, 0.5, None])
@pytest.mark.parametrize("editing", [None, 0.4])
def test_diffusers_block_refinement(r2, device, dtype, threshold, editing):
    """Above the threshold if these reach the step's quota, else the quota's best."""
    name = "diffusers.BlockRefinementScheduler"
    config = engine_config(name, MASK, threshold=threshold, editing_threshold=editing)
    above = INF if threshold is None else threshold
    for seed, shape in blocks():
        tokens = tokens_of(seed, shape)
        prompt = tokens != MASK
        for number, z in enumerate(steps_of(tokens, dtype, seed)):
            share = (number + seed) % 4
            x0, p = top(z)
            p = z.float().softmax(-1).gather(-1, x0[..., None]).squeeze(-1)
            masked = tokens == MASK

            def chosen_of(q, m, share=share):
                q = q.masked_fill(~m, -INF)
                return q > above if (q > above).sum() >= share else best(q, share)

            chosen = each(chosen_of, p, masked)
            arguments = {"rows": RowParams(quota=torch.full((shape[0],), share).to(device))}
            if editing is not None:
                keeps = x0 == MASK  # theirs would write the mask id; ours leaves the cell
                arguments["editable"] = ~masked & ~prompt & ~keeps
                chosen |= arguments["editable"] & (p > editing) & (x0 != tokens)
            want = torch.where(chosen, x0, tokens)
            is_equal(r2, device, name, config, tokens, z, want, **arguments)
            tokens = want


@pytest.mark.parametrize("bound", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("name", ["diffusers.EntropyBoundScheduler", "eb_sampler"])
def test_entropy_bound(r2, device, dtype, bound, name):
    """The accepted set: entropies by size, as long as the sum before a cell is within the bound."""
    uniform = name.startswith("diffusers")  # a canvas without masks
    option = {"entropy_bound" if uniform else "gamma": bound}
    config = engine_config(name, None if uniform else MASK, **option)
    sizes = set()
    for seed, shape in blocks():
        z = planted(seed, shape, dtype, ties=False)
        if not uniform:
            z[..., MASK] = -INF
        tokens = tokens_of(seed, shape)
        cells = torch.ones_like(tokens, dtype=torch.bool) if uniform else tokens == MASK
        entropy = torch.distributions.Categorical(logits=z.double()).entropy()

        def accepted(h, m):
            order = h.masked_fill(~m, INF).argsort(stable=True)
            falls = h[order].cumsum(0) - h[order] <= bound
            return torch.zeros_like(m).scatter(0, order, falls) & m

        want = each(accepted, entropy, cells)
        step = r2.select(z.to(device), tokens.to(device), None, config, candidates=cells.to(device))
        assert torch.equal(step.rule.cpu() != Rule.NONE, want)
        sizes |= set(want.sum(1).tolist())
    assert max(sizes) > bound  # one at least, whatever the bound
    assert len(sizes) > 3 or bound == 0


# ---- dInfer, dllm-plugin ---------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.9, 0.6, 0.2])
@pytest.mark.parametrize("name", ["dinfer.ThresholdParallelDecoder", "dllm_plugin.batched_remask"])
def test_threshold_below_the_best(r2, device, dtype, threshold, name):
    """At least min(threshold, best - 1e-5), of the masked cells whose argmax is not the mask id."""
    config, skipped = engine_config(name, MASK, threshold=threshold), 0
    for seed, shape in blocks():
        tokens = tokens_of(seed, shape)
        for z in steps_of(tokens, dtype, seed, ties=False):
            x0, p = top(z.float())
            live = (tokens == MASK) & (x0 != MASK)

            def chosen_of(q, m):
                q = q.masked_fill(~m, -INF)
                return (q >= min(threshold, float(q.max()) - 1e-5)) & m

            want = torch.where(each(chosen_of, p, live), x0, tokens)
            is_equal(r2, device, name, config, tokens, z, want)
            skipped += int(((tokens == MASK) & (x0 == MASK)).sum())
            tokens = want
    assert skipped > 100


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.9])
def test_dllm_plugin_policy(r2, device, dtype, threshold):
    """Above the threshold if these are enough, else the best; float64."""
    name = "dllm_plugin.Llada2DefaultRemaskingPolicy"
    for seed, shape in blocks():
        tokens = tokens_of(seed, shape)
        for number, z in enumerate(steps_of(tokens, dtype, seed)):
            count = (number + seed) % 4
            options = {"commit_confidence_threshold": threshold, "num_transfer": count}
            x0, p = top(z.double())

            def chosen_of(q, m, count=count):
                q = q.masked_fill(~m, -INF)
                return q > threshold if (q > threshold).sum() >= count else best(q, count)

            want = torch.where(each(chosen_of, p, tokens == MASK), x0, tokens)
            is_equal(r2, device, name, engine_config(name, MASK, **options), tokens, z, want)
            tokens = want


# ---- Fast-dLLM -------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.9, 0.6, 0.2])
def test_fast_dllm_threshold(r2, device, dtype, threshold):
    """The best, and every other one that reaches the threshold; float64."""
    name = "fast_dllm.get_transfer_index.threshold"
    config = engine_config(name, MASK, threshold=threshold)
    for seed, shape in blocks():
        tokens = tokens_of(seed, shape)
        for z in steps_of(tokens, dtype, seed):
            x0, p = top(z.double())
            confidence = p.masked_fill(tokens != MASK, -INF)
            chosen = each(lambda q: best(q, 1) | (q >= threshold), confidence)
            want = torch.where(chosen, x0, tokens)
            is_equal(r2, device, name, config, tokens, z, want)
            tokens = want


def test_fast_dllm_quota(r2, device, dtype):
    """Each row's number of best cells."""
    name = "fast_dllm.get_transfer_index.quota"
    config = engine_config(name, MASK)
    for seed, shape in blocks():
        tokens = tokens_of(seed, shape)
        for number, z in enumerate(steps_of(tokens, dtype, seed)):
            counts = (torch.arange(shape[0]) + number + seed) % 4
            x0, p = top(z.double())
            confidence = p.masked_fill(tokens != MASK, -INF)
            chosen = each(lambda q, count: best(q, int(count)), confidence, counts)
            want = torch.where(chosen, x0, tokens)
            rows = RowParams(quota=counts.to(device))
            is_equal(r2, device, name, config, tokens, z, want, rows=rows)
            tokens = want


@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0])
def test_fast_dllm_dynamic(r2, device, dtype, factor):
    """The n best, n the first with p below 1 - factor / (n + 1), or all; one at least."""
    name, sizes = "fast_dllm.get_transfer_index_dynamic", set()
    config = engine_config(name, MASK, factor=factor)
    for seed, shape in blocks():
        tokens = tokens_of(seed, shape)
        for z in steps_of(tokens, dtype, seed):
            x0, p = top(z.double())
            confidence = p.masked_fill(tokens != MASK, -INF)

            def chosen_of(q):
                falling = q[q > -INF].sort(descending=True).values
                n = 0
                while n < len(falling):
                    least = -1.0 if n == 0 else 1 - factor / (n + 2)
                    if falling[n] < least:
                        break
                    n += 1
                # Their loop stands on the last cell when it ends, and counts one more there.
                return best(q, n + 1 if n == len(falling) - 1 else n)

            chosen = each(chosen_of, confidence)
            want = torch.where(chosen, x0, tokens)
            is_equal(r2, device, name, config, tokens, z, want)
            sizes |= set(chosen.sum(1).tolist())
            tokens = want
    assert len(sizes) > 3


# ---- LMDeploy --------------------------------------------------------------------------------


def sampled(z: Tensor, seed: int) -> Tensor:
    """Tokens that another sampler proposes: mostly the argmax."""
    g = torch.Generator().manual_seed(seed)
    flat = z.float().softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(flat, 1, generator=g).view(z.shape[:2])
    return torch.where(torch.rand(z.shape[:2], generator=g) < 0.5, z.argmax(-1), drawn)


@pytest.mark.parametrize(
    "name, option",
    [
        ("low_confidence_dynamic", 0.85),
        ("low_confidence_dynamic", 0.4),
        ("low_confidence_static", 1),
        ("low_confidence_static", 3),
        ("sequential", 1),
        ("sequential", 3),
    ],
)
def test_lmdeploy(r2, device, dtype, name, option):
    """Masks apart from the ids, scores of the sampled tokens in the dtype of the logits."""
    field = "confidence_threshold" if name.endswith("dynamic") else "tokens_per_step"
    config = engine_config(f"lmdeploy.{name}", None, **{field: option})

    def chosen_of(scores, masked):
        confidence = scores.masked_fill(~masked, -INF)
        if name == "low_confidence_dynamic":
            return (best(confidence, 1) | (confidence >= option)) & masked
        if name == "low_confidence_static":
            return best(confidence, option)
        first = int(masked.to(torch.uint8).argmax())
        near = torch.arange(len(masked))
        return masked & (near >= first) & (near < first + option)

    for seed, shape in blocks():
        tokens = tokens_of(seed, shape)
        masked = torch.arange(shape[1]).expand(shape) >= seed % 3  # the end of the block
        for number, z in enumerate(steps_of(tokens, dtype, seed)):
            ids = sampled(z, seed + number)
            scores = z.softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
            chosen = each(chosen_of, scores, masked)
            want = torch.where(chosen, ids, tokens)
            arguments = {"candidates": masked, "proposed": ids}
            is_equal(r2, device, f"lmdeploy.{name}", config, tokens, z, want, **arguments)
            tokens, masked = want, masked & ~chosen


# ---- the table -------------------------------------------------------------------------------


def test_every_rule_of_the_table_is_tested():
    """By a test of this file that names it."""
    source = Path(__file__).read_text()
    for name in ENGINE_RULES:
        assert f'"{name}"' in source or f'"{name.removeprefix("lmdeploy.")}"' in source, name


def test_options_of_an_engine():
    config = engine_config("diffusers.BlockRefinementScheduler", 3, editing_threshold=0.5)
    assert (config.threshold, config.edit_threshold, config.compare) == (0.95, 0.5, ">")
    assert config.temporal_steps == config.confidence_cluster_size == 0
    assert engine_config("sglang.LowConfidence", 3, temporal_steps=2).temporal_steps == 2
    with pytest.raises(ValueError, match="engine_config: rule takes .*, got 'sglang'"):
        engine_config("sglang", 3)
    with pytest.raises(TypeError, match="takes threshold, or fields of DecodeConfig, got 'gamma'"):
        engine_config("sglang.LowConfidence", 3, gamma=1.0)
    rule = "diffusers.BlockRefinementScheduler"
    with pytest.raises(
        TypeError, match="takes editing_threshold or edit_threshold, .*, got 'both'"
    ):
        engine_config(rule, 3, editing_threshold=0.5, edit_threshold=0.9)
