# SPDX-License-Identifier: Apache-2.0
"""`integrations.fast_dllm`: their functions and loops, ours in their place, R2's release too.

Against their loops restated (`fast_dllm_oracle.py`) and, with R2DLLM_ENGINE_SOURCES=DIR, against
the checkouts DIR/Fast-dLLM and DIR/R2-dLLM themselves.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fast_dllm_oracle as oracle
import pytest
import torch
from golden import RECORDED, SHIPPED, RecordedModel, read
from test_rules_of_engines import MASK, planted, tokens_of

from r2dllm_ext import DecodeConfig
from r2dllm_ext import generate as our_generate
from r2dllm_ext.integrations import fast_dllm
from r2dllm_ext.models import ModelConfig, Transformer

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from engine_cases import their_generate  # noqa: E402

WILD, SHARP = 0.3, 4.0
LOOPS = ("generate", "generate_with_prefix_cache", "generate_with_dual_cache")
CACHES = ("none", "prefix", "dual")


@pytest.fixture
def unpatched():
    """Everything that a test patches in the oracle is put back."""
    before = dict(vars(oracle))
    yield oracle
    vars(oracle).update(before)


# ---- the functions ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["threshold", "quota", "dynamic"])
def test_calls(dtype, name, device):
    """1,000 steps each: whole sequences of which a part is open, masks in the prompt among it."""
    changed = 0
    for seed in range(250):
        shape = ((1, 40), (3, 16), (2, 7))[seed % 3]
        x = tokens_of(seed, shape)
        for number in range(4):
            z = planted(4 * seed + number, shape, dtype)
            masked = x == MASK
            masked[:, shape[1] - 3 :] = False  # a later block
            given = (z, 0.0, "low_confidence", masked, x)
            there = [g.to(device) if isinstance(g, torch.Tensor) else g for g in given]
            if name == "dynamic":
                factor = (1, 0.5, 2.0)[seed % 3]
                want = oracle.get_transfer_index_dynamic(*given, None, factor)
                got = fast_dllm.get_transfer_index_dynamic(*there, None, factor)
            else:
                quota, threshold = (torch.arange(shape[0]) + number) % 4, None
                if name == "threshold":
                    quota, threshold = None, (0.9, 0.5, 1.5)[seed % 3]
                want = oracle.get_transfer_index(*given, quota, threshold)
                quota = quota if quota is None else quota[:, None].to(device)
                got = fast_dllm.get_transfer_index(*there, quota, threshold)
            assert all(torch.equal(a, b.cpu()) for a, b in zip(want, got, strict=True)), seed
            changed += int(got[1].sum())
            x = torch.where(want[1], want[0], x)
    assert changed > 1000


def test_confidence_as_r2s_release_returns_it():
    z, x = planted(0, (2, 8), torch.float32), tokens_of(0, (2, 8))
    given = (z, 0.0, "low_confidence", x == MASK, x)
    for last in ((None, 0.9), (torch.tensor([1, 2]), None)):
        *_, got = fast_dllm.get_transfer_index(*given, *last, return_confidence=True)
        want = oracle._scored(*given)[1]
        assert got.dtype == torch.float64 and torch.equal(got == -torch.inf, want == -torch.inf)
        # The oracle is float64; ours is within 12 roundings (kTermError, a sum of exact terms).
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_draws_follow_torchs_seed_and_the_distribution():
    z = torch.zeros(1, 4000, 3)
    z[..., 1] = 1.0
    x = torch.zeros(1, 4000, dtype=torch.int64)
    given = (z, 0.5, "low_confidence", x == 0, x, None, 0.9)
    torch.manual_seed(3)
    first, again = fast_dllm.get_transfer_index(*given)[0], fast_dllm.get_transfer_index(*given)[0]
    torch.manual_seed(3)
    assert torch.equal(fast_dllm.get_transfer_index(*given)[0], first)
    assert not torch.equal(first, again)
    want = torch.tensor([0.0, 2.0, 0.0]).softmax(0)  # of logits / 0.5
    # A share of 4,000 draws has a deviation of at most 0.0079.
    assert torch.allclose(first.flatten().bincount() / 4000, want, atol=0.03)


def test_rows_that_are_not_open_are_not_read():
    z, x = planted(0, (1, 40), torch.float32), tokens_of(0, (1, 40))
    open_cells = x == MASK
    open_cells[:, :20] = False
    given = ("low_confidence", open_cells, x, None, 0.9)
    want = fast_dllm.get_transfer_index(z, 0.0, *given)
    z[~open_cells] = torch.nan
    got = fast_dllm.get_transfer_index(z, 0.0, *given)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_what_a_call_refuses():
    z, x = planted(0, (1, 8), torch.float32), tokens_of(0, (1, 8))
    with pytest.raises(NotImplementedError, match="remasking takes 'low_confidence', got 'random'"):
        fast_dllm.get_transfer_index(z, 0.0, "random", x == MASK, x, None, 0.9)
    with pytest.raises(ValueError, match="num_transfer_tokens takes a tensor"):
        fast_dllm.get_transfer_index(z, 0.0, "low_confidence", x == MASK, x, None)
    fast_dllm.get_transfer_index(z, 1.0, "low_confidence", x == MASK, x, None, 1.0)
    for temperature, threshold in ((True, 1.0), (1.0, True)):  # which are equal, and no numbers
        with pytest.raises(TypeError, match="takes a .*number.*, got True"):
            fast_dllm.get_transfer_index(
                z, temperature, "low_confidence", x == MASK, x, None, threshold
            )
    with pytest.raises(ValueError, match="factor takes a finite number > 0, got 0"):
        fast_dllm.get_transfer_index_dynamic(z, 0.0, "low_confidence", x == MASK, x, None, 0)


# ---- the loops -------------------------------------------------------------------------------


class Sharp:
    """A small transformer, sharp enough that thresholds pass."""

    device = torch.device("cpu")

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        torch.manual_seed(seed)
        config = ModelConfig("llada", 40, width=32, layers=2, heads=4, mlp_width=48, max_length=96)
        self.model, self.dtype = Transformer(config).eval(), dtype
        for weight in self.model.parameters():
            if weight.dim() == 2:  # attention that tells places apart
                weight.data.normal_(std=WILD)

    def __call__(self, ids, **options):
        output = self.model(ids, **options)
        logits = (SHARP * output.logits).to(self.dtype)
        logits[..., 39] = -1e4  # the mask: predicted for ever, a decode would have no end
        return SimpleNamespace(logits=logits, past_key_values=output.past_key_values)


OPTIONS = [{"threshold": 0.9}, {"threshold": 0.5}, {"factor": 1.0}, {"steps": 6}, {"steps": 24}]


def decodes(loop, seeds, options, dtype=torch.float32, rows=(1, 2)):
    for seed in seeds:
        model = Sharp(seed, dtype)
        for count in rows:
            g = torch.Generator().manual_seed(seed)
            prompt = torch.randint(39, (count, 5), generator=g)
            yield loop(model, prompt, gen_length=24, block_length=8, mask_id=39, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LOOPS)
def test_loops(name, options, dtype, unpatched):
    """Same tokens, same number of forwards; undone, it is theirs again."""
    options = {"steps": 24} | options
    theirs = unpatched.get_transfer_index
    want = list(decodes(getattr(unpatched, name), range(3), options, dtype))
    undo = fast_dllm.patch(unpatched)
    assert unpatched.get_transfer_index is fast_dllm.get_transfer_index
    got = list(decodes(getattr(unpatched, name), range(3), options, dtype))
    for (tokens, nfe), (our_tokens, our_nfe) in zip(want, got, strict=True):
        assert torch.equal(tokens, our_tokens) and nfe == our_nfe
    undo()
    assert unpatched.get_transfer_index is theirs
    assert len({nfe for _, nfe in want}) > 1 or "threshold" not in options


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("name", "cache"), list(zip(LOOPS, CACHES, strict=True)))
def test_loops_with_rules(name, cache, options, unpatched):
    """The call's options and the rules that were added, in one configuration of `generate`."""
    options, rules = {"steps": 24} | options, {"temporal_steps": 2, "confidence_cluster_size": 3}
    theirs = list(decodes(getattr(unpatched, name), range(3), options))
    fast_dllm.patch(unpatched, **rules)
    got = list(decodes(getattr(unpatched, name), range(3), options))
    fields = {"temporal_steps": 2, "token_cluster": None, "mask_prediction": "allow"}
    if "factor" in options:
        fields |= {"base": "factor", "factor": options["factor"]}
    elif "threshold" in options:
        fields |= {"threshold": options["threshold"]}
    else:
        fields |= {"base": "schedule", "steps_per_block": options["steps"] // 3}
    config = DecodeConfig(39, **fields)

    def ours(model, prompt, *, gen_length, block_length, **_):
        lengths = {"gen_length": gen_length, "block_length": block_length}
        return our_generate(model, prompt, **lengths, config=config, cache=cache)

    for (tokens, nfe), generation in zip(got, decodes(ours, range(3), options), strict=True):
        assert torch.equal(tokens, generation.sequences) and nfe == generation.nfe
    assert sum(nfe for _, nfe in got) <= sum(nfe for _, nfe in theirs)


# ---- R2's release ----------------------------------------------------------------------------


def release_loop(
    model,
    prompt,
    steps=128,
    gen_length=128,
    block_length=128,
    temperature=0.0,
    remasking="low_confidence",
    mask_id=126336,
    threshold=None,
    factor=None,
    confidence_cluster_size=None,
    spatial_threshold=None,
    confidence_cluster_unmasked=None,
    token_cluster=None,
    temporal_steps=None,
    temporal_threshold=None,
    temporal_eval="ave",
    record_decode=False,
    decode_events_dir="decode_events_window",
):
    """The signature of R2-dLLM's loop with the dual cache."""
    raise AssertionError("not patched")


@pytest.fixture
def release():
    module = ModuleType("release")
    module.get_transfer_index = oracle.get_transfer_index
    module.generate_with_dual_cache = release_loop
    return module


@pytest.mark.parametrize("name", ["all", "edge", "factor", "maskpred", "mix", "schedule", "single"])
def test_the_release_at_its_own_options(name, release):
    """Recorded decodes of the authors' loop, called as they call it."""
    fast_dllm.patch(release)
    folder = RECORDED if RECORDED.exists() else SHIPPED
    count = 0
    for trace in read(folder / f"llada_{name}.npz"):
        m = trace.meta
        if m["engine"] != "llada_dual":
            continue
        model = RecordedModel(trace)
        tokens, nfe = release.generate_with_dual_cache(
            model,
            torch.from_numpy(trace.arrays["prompt"]).long(),
            steps=m["steps"],
            gen_length=m["gen_length"],
            block_length=m["block_length"],
            mask_id=m["mask_id"],
            threshold=m["threshold"],
            factor=m["factor"],
            confidence_cluster_size=m["window"],
            spatial_threshold=m["spatial_threshold"],
            token_cluster=m["token_cluster"],
            confidence_cluster_unmasked=m["max_unmasked"],
            temporal_steps=m["temporal_steps"],
            temporal_threshold=m["temporal_threshold"],
            temporal_eval=m["temporal_eval"],
        )
        assert torch.equal(tokens, torch.from_numpy(trace.arrays["output"]).long()), trace.name
        assert nfe == model.step == trace.steps, trace.name
        count += 1
    assert count


def test_what_patch_refuses(release):
    with pytest.raises(TypeError, match="module takes one with get_transfer_index, got 'json'"):
        fast_dllm.patch(sys.modules["json"])
    with pytest.raises(TypeError, match="rules takes what is no argument of .*, got 'token_clu"):
        fast_dllm.patch(release, token_cluster="mid")
    fork = ModuleType("fork")
    fork.get_transfer_index = lambda logits, x, alg_temp: None
    with pytest.raises(TypeError, match="arguments that are known, got 'alg_temp'"):
        fast_dllm.patch(fork)
    fork = copy.copy(oracle.__dict__)
    module = ModuleType("fork")
    vars(module).update(fork)
    module.generate = lambda model, prompt, skip_layer_k: None
    fast_dllm.patch(module)()  # a loop that is not replaced may take what it likes
    with pytest.raises(TypeError, match="module.generate takes arg.* known, got 'skip_layer_k'"):
        fast_dllm.patch(module, temporal_steps=3)
    assert module.get_transfer_index is oracle.get_transfer_index  # nothing was done
    with pytest.raises(TypeError, match="rules takes what is no argument of generate, got 'base'"):
        fast_dllm.patch(oracle, base="entropy")


def test_what_a_replaced_loop_refuses(release):
    fast_dllm.patch(release)
    prompt = torch.zeros(1, 4, dtype=torch.int64)
    call = {"gen_length": 16, "block_length": 8, "mask_id": 39}
    loop = release.generate_with_dual_cache
    with pytest.raises(ValueError, match="record_decode takes False while it is patched"):
        loop(Sharp(0, torch.float32), prompt, record_decode=True, threshold=0.9, **call)
    with pytest.raises(ValueError, match="steps takes a multiple of 2 blocks, got 5"):
        loop(Sharp(0, torch.float32), prompt, steps=5, **call)
    with pytest.raises(ValueError, match="gen_length takes a multiple of block_length .32., got 1"):
        loop(Sharp(0, torch.float32), prompt, **(call | {"block_length": 32}))
    with pytest.raises(NotImplementedError, match="remasking takes 'low_confidence'"):
        loop(Sharp(0, torch.float32), prompt, remasking="random", threshold=0.9, **call)


# ---- their code itself -----------------------------------------------------------------------


@pytest.fixture
def checkout(request) -> ModuleType:
    module = their_generate(request.param)
    if module is None:
        pytest.skip(f"needs R2DLLM_ENGINE_SOURCES=DIR with the checkout DIR/{request.param}")
    return module


@pytest.mark.parametrize("checkout", ["Fast-dLLM", "R2-dLLM"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOOPS)
def test_their_loops(checkout, name, dtype):
    """Tokens and forwards of the real loops, patched and not."""
    release = hasattr(checkout, "get_transfer_index_dynamic")
    choices = [{"threshold": 0.9}, {"threshold": 0.5}, {}] + [{"factor": 1.0}] * release
    if release and name == LOOPS[2]:
        spatial = {"confidence_cluster_size": 3, "spatial_threshold": 0.7}
        temporal = {"temporal_steps": 2, "temporal_threshold": 0.5}
        choices += [{"threshold": 0.9, "token_cluster": "confidence", **spatial, **temporal}]
    for options in choices:
        options = {"steps": 24, **options}
        rows = (1, 2) if release and "factor" not in options else (1,)  # what theirs can take
        want = list(decodes(getattr(checkout, name), range(4), options, dtype, rows))
        undo = fast_dllm.patch(checkout)
        got = list(decodes(getattr(checkout, name), range(4), options, dtype, rows))
        undo()
        for (tokens, nfe), (our_tokens, our_nfe) in zip(want, got, strict=True):
            assert torch.equal(tokens, our_tokens) and nfe == our_nfe, options


@pytest.mark.parametrize("checkout", ["Fast-dLLM", "R2-dLLM"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_their_functions(checkout, dtype):
    """1,000 steps each of the real functions; no ties: their `topk` orders them anyhow."""
    close = 0
    for seed in range(1000 + 50):
        shape = ((1, 40), (3, 16), (2, 7))[seed % 3]
        x = tokens_of(seed, shape)
        x[:, 0] = MASK  # a row without a mask is an error in theirs
        given = (planted(seed, shape, dtype, ties=False), 0.0, "low_confidence", x == MASK, x)
        falling = oracle._scored(*given)[1].sort(dim=1).values
        if (falling.diff(dim=1) < 1e-7).logical_and(falling[:, :-1] > 0).any():
            close += 1  # one float32 number: theirs are float64
            continue
        calls = [("get_transfer_index", (None, (0.9, 0.5)[seed % 2]))]
        calls += [("get_transfer_index", (torch.ones(shape[0], dtype=torch.int64), None))]
        if hasattr(checkout, "get_transfer_index_dynamic"):
            calls += [("get_transfer_index_dynamic", (None, (1.0, 0.5)[seed % 2]))]
        for name, last in calls:
            want = getattr(checkout, name)(*given, *last)
            got = getattr(fast_dllm, name)(*given, *last)
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)), (seed, name)
    assert close <= 50
