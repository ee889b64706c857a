# SPDX-License-Identifier: Apache-2.0
"""`batched_remask` and `R2RemaskingPolicy` are the plugin's own, and R2's rules in their place.

Against the interface as contracts/ restates it, and against the plugin's own files where
R2DLLM_ENGINE_SOURCES has a checkout.
"""

from __future__ import annotations

import doctest
import importlib
import itertools
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from contracts import HERE, checkout, integration
from test_rules_of_engines import MASK, VOCAB, planted, tokens_of
from torch import Tensor

import r2dllm_ext
from r2dllm_ext import DecodeConfig, DecodeState, decode_step, generate, load_model
from r2dllm_ext.tasks.ledger import Tokenizer, make_sample

LENGTH = 32  # of the plugin's drafts
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


class Engine(NamedTuple):
    ours: ModuleType
    remasking: ModuleType


@pytest.fixture(params=["contract", "checkout"])
def plugin(request):
    folders = {"dllm_plugin": HERE / "dllm_plugin"}
    if request.param == "checkout":
        root, name = checkout("dllm-plugin"), "dllm_plugin"
        if not (root / name).is_dir():
            name = "vllm_dllm_plugin"  # as it was called until 0c53db5
        folders = dict.fromkeys(("dllm_plugin", name), root / name)
    with integration("dllm_plugin", folders) as ours:
        yield Engine(ours, importlib.import_module("dllm_plugin.remasking"))


# ---- batched_remask --------------------------------------------------------------------------


def remasked(z: Tensor, draft: Tensor, threshold: float) -> Tensor:
    """The plugin's rule: as sure as the threshold, or as the best cell but for 1e-5."""
    p = z.float().softmax(-1).amax(-1)
    live = (draft == MASK) & (z.argmax(-1) != MASK)
    p = p.masked_fill(~live, -torch.inf)
    least = (p.amax(1, keepdim=True) - 1e-5).clamp(-1000, threshold)
    return torch.where((p >= least) & live, z.argmax(-1), draft)


def is_clear(z: Tensor, draft: Tensor, threshold: float) -> bool:
    """No two probabilities, and none and the threshold, differ in the last bits of float32 only."""
    p = z.double().softmax(-1).amax(-1)
    least = p.amax(1, keepdim=True) - 1e-5
    gaps = torch.cat([p, p - 1e-5, torch.full_like(least, threshold)], 1).sort(1).values.diff(dim=1)
    return bool(((gaps == 0) | (gaps > 1e-6) | (gaps < 1e-12)).all())


@DTYPES
def test_their_remask(plugin, dtype):
    """1,000 random steps: masks in the prompt, the mask id on top, ties."""
    compared = changed = tied = 0
    for seed in itertools.count():
        shape = ((1, 32), (3, 8), (4, 4), (5, 16))[seed % 4]
        threshold = (0.9, 0.6, 0.2)[seed % 3]
        # In every other logits no cell passes the threshold.
        z, draft = planted(seed, shape, dtype) / (1, 4)[seed // 3 % 2], tokens_of(seed, shape)
        if not is_clear(z, draft, threshold):
            continue
        before = draft.clone()
        got, done, count = plugin.ours.batched_remask(z, draft, MASK, threshold)
        want = remasked(z, draft, threshold)
        assert torch.equal(draft, before)
        assert torch.equal(got, want), f"step {seed}"
        assert torch.equal(done, (want != MASK).all(1)) and done.dtype == torch.bool
        assert torch.equal(count, (want != draft).sum(1)) and count.dtype == torch.int64
        compared += 1
        changed += int(count.sum())
        confidence = z.float().softmax(-1).amax(-1).where(want != draft, 0)
        tied += int(((count > 1) & (confidence.amax(1) < threshold)).sum())
        if compared == 1000:
            break
    assert seed < 1300
    assert changed > 1000 and tied > 10


def test_remask_by_other_rules_with_slots(plugin):
    """Each request has a row of one state, wherever it stands in the batch."""
    config = DecodeConfig.r2(5, spatial_threshold=0.3, temporal_threshold=0.1, temporal_steps=2)
    state, alone = DecodeState(6, LENGTH), [DecodeState(1, LENGTH) for _ in range(6)]
    drafts = torch.full((6, LENGTH), MASK)
    want, rules = drafts.clone(), set()
    for step in range(8):
        slots = torch.randperm(6, generator=torch.Generator().manual_seed(step))[: 3 + step % 3]
        z = planted(step // 4, (6, LENGTH), torch.float32)[slots]
        drafts[slots], _, _ = plugin.ours.batched_remask(
            z, drafts[slots], MASK, 0.95, config=config, state=state, slots=slots
        )
        own = config.replace(mask_id=MASK, threshold=0.95)
        for row, slot in enumerate(slots.tolist()):
            step_of_row = decode_step(z[row, None], want[slot, None], alone[slot], own)
            rules |= set(step_of_row.rule.flatten().tolist())
        assert torch.equal(drafts, want)
    assert {1, 2, 3, 5} <= rules


# ---- policy ----------------------------------------------------------------------------------


@DTYPES
def test_their_policy(plugin, dtype):
    """1,000 random steps with random options, through the plugin's own hand-over."""
    theirs, ours = plugin.remasking.Llada2DefaultRemaskingPolicy(), plugin.ours.R2RemaskingPolicy()
    compared = committed = forced = 0
    for seed in itertools.count():
        g = torch.Generator().manual_seed(seed)
        draw = lambda *options: options[int(torch.randint(len(options), (), generator=g))]  # noqa: E731,B023
        options = {
            "mask_token_id": MASK,
            "commit_confidence_threshold": draw(0.01, 0.3, 0.9, 1.0),
            "denoise_step_index": draw(0, 3, 50),
            "denoise_steps": draw(32, 12, 5),
        }
        if draw(True, False):
            options["num_transfer"] = draw(0, 1, 4, 40)
        z, draft = planted(seed, (1, LENGTH), dtype), tokens_of(seed, (1, LENGTH))
        if seed % 7 == 0:
            draft = draft.where(torch.rand(1, LENGTH, generator=g) < 0.1, 3)
        if not is_clear(z, draft, options["commit_confidence_threshold"]):
            continue
        call = {"input_draft": draft[0].tolist(), "remasking_config": options}
        hand_over = plugin.remasking.remask_after_block_forward
        want = hand_over(policy=theirs, logits=z[0].tolist(), **call)
        got = hand_over(policy=ours, logits=z[0], **call)
        assert got == want, f"step {seed}"
        compared += 1
        committed += len(want.committed_token_ids) > 0
        confidence = z[0].float().softmax(-1).amax(-1)[draft[0] == MASK]
        forced += bool((confidence <= options["commit_confidence_threshold"]).any())
        if compared == 1000:
            break
    assert seed < 1300
    assert committed > 50 and forced > 300


def test_their_defaults_and_lists(plugin):
    theirs, ours = plugin.remasking.Llada2DefaultRemaskingPolicy(), plugin.ours.R2RemaskingPolicy()
    z = planted(0, (1, LENGTH), torch.float32)[0] / 4
    for draft in ([1] * LENGTH, [5] * LENGTH, [5] * 20 + [1] * 12):
        call = {"input_draft": draft, "logits": z.tolist()}
        assert ours.apply(**call) == theirs.apply(**call)


def test_state_of_each_request(plugin):
    """Requests that take turns, one of which begins anew, are decided as if each were alone."""
    config = DecodeConfig.r2(MASK, temporal_threshold=0.3, temporal_steps=2)
    together = plugin.ours.R2RemaskingPolicy(config)
    names = ("a", "b", "c")
    drafts = {name: (MASK,) * LENGTH for name in names}
    alone = {name: (torch.full((1, LENGTH), MASK), DecodeState(1, LENGTH)) for name in names}
    blocks, rules = 0, set()
    for step in range(30):
        if step == 2:  # "a" is preempted: its block begins again
            drafts["a"], alone["a"] = (MASK,) * LENGTH, fresh()
        for name in names[step % 2 :]:
            z = planted(100 * step + ord(name), (1, LENGTH), torch.float32)
            options = {"request_id": name, "denoise_step_index": step}
            result = together.apply(input_draft=drafts[name], logits=z[0], remasking_config=options)
            tokens, state = alone[name]
            rules |= set(decode_step(z, tokens, state, config).rule.flatten().tolist())
            if (tokens != MASK).all():
                assert result.committed_token_ids == tuple(tokens[0].tolist())
                alone[name], blocks = fresh(), blocks + 1
            else:
                assert result.committed_token_ids == ()
            assert result.next_input_block == tuple(alone[name][0][0].tolist())
            drafts[name] = result.next_input_block
    assert blocks > 6 and {1, 3, 4, 5} <= rules
    for name in names:
        together.forget(name)
    assert together._blocks == {}


def fresh() -> tuple[Tensor, DecodeState]:
    return torch.full((1, LENGTH), MASK), DecodeState(1, LENGTH)


@pytest.fixture(scope="module")
def ledger():
    words = Tokenizer()
    prompt = words.encode(make_sample(seed=0, index=3, split="test").prompt)
    return SimpleNamespace(model=load_model("ledger").eval(), prompt=torch.tensor([prompt]))


def decoded(ledger, policy, options: dict, blocks: int) -> tuple[Tensor, int]:
    """The plugin's loop with the hand-over of drafts and committed tokens."""
    sequence, forwards = ledger.prompt, 0
    for _ in range(blocks):
        draft, index = (ledger.model.mask_id,) * LENGTH, 0
        while True:
            # Blocks to come are masks, as they are for `generate`.
            missing = ledger.prompt.shape[1] + blocks * LENGTH - sequence.shape[1] - LENGTH
            tail = torch.full((1, missing), ledger.model.mask_id)
            x = torch.cat([sequence, torch.tensor([draft]), tail], 1)
            logits = ledger.model(x).logits[0, sequence.shape[1] : sequence.shape[1] + LENGTH]
            forwards += 1
            given = {"denoise_step_index": index, **options}
            result = policy.apply(input_draft=draft, logits=logits, remasking_config=given)
            draft, index = result.next_input_block, index + 1
            if result.committed_token_ids:
                sequence = torch.cat([sequence, torch.tensor([result.committed_token_ids])], 1)
                break
    return sequence, forwards


@torch.no_grad()
def test_whole_decodes(plugin, ledger):
    options = {"mask_token_id": ledger.model.mask_id, "commit_confidence_threshold": 0.8}
    want = decoded(ledger, plugin.remasking.Llada2DefaultRemaskingPolicy(), options, 1)
    got = decoded(ledger, plugin.ours.R2RemaskingPolicy(), options, 1)
    assert torch.equal(got[0], want[0]) and got[1] == want[1]
    config = DecodeConfig.r2(ledger.model.mask_id)
    sequence, forwards = decoded(ledger, plugin.ours.R2RemaskingPolicy(config), {}, 2)
    out = generate(ledger.model, ledger.prompt, gen_length=2 * LENGTH, config=config)
    assert torch.equal(sequence, out.sequences) and forwards == out.nfe


def test_what_equals_a_number_is_none(plugin):
    """Also right after the number itself: what is kept of a call is kept by type."""
    z, draft = torch.zeros(1, 4, VOCAB), torch.full((1, 4), MASK)
    for config in (None, DecodeConfig.fast_dllm(MASK)):
        plugin.ours.batched_remask(z, draft, MASK, 1.0, config=config)
        with pytest.raises(TypeError, match="threshold takes a number.*, got True"):
            plugin.ours.batched_remask(z, draft, MASK, True, config=config)
    policy = plugin.ours.R2RemaskingPolicy()
    options = {"commit_confidence_threshold": 1.0}
    policy.apply(input_draft=[MASK] * 4, logits=z[0], remasking_config=options)
    options["commit_confidence_threshold"] = True
    with pytest.raises(TypeError, match="threshold takes a number.*, got True"):
        policy.apply(input_draft=[MASK] * 4, logits=z[0], remasking_config=options)


def test_an_error_costs_a_block_nothing_that_it_remembers(plugin):
    """The third step on end commits what stood for three, whatever was refused between them."""
    config = DecodeConfig.r2(MASK, threshold=1.0, quota=0, temporal_steps=3, temporal_threshold=0.1,
                             confidence_cluster_size=0, token_cluster=None)  # fmt: skip
    policy, draft = plugin.ours.R2RemaskingPolicy(config), [MASK] * 4
    logits = torch.zeros(4, VOCAB)
    logits[:, 5] = 4.0
    for _ in range(2):
        assert policy.apply(input_draft=draft, logits=logits).next_input_block == (MASK,) * 4
        with pytest.raises(TypeError, match="logits"):
            policy.apply(input_draft=draft, logits=logits.int())
    assert policy.apply(input_draft=draft, logits=logits).committed_token_ids == (5,) * 4


def test_options(plugin):
    """Of the plugin go before the config's; the others do not exist."""
    z = torch.zeros(4, VOCAB)
    z[:, 5] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    policy = plugin.ours.R2RemaskingPolicy(DecodeConfig.fast_dllm(MASK))
    for options, count in (
        ({}, 1),
        ({"num_transfer": 2}, 2),
        ({"num_transfer": 2, "grammar_extra_transfer": 1}, 3),
        ({"grammar_extra_transfer": 1}, 2),
        ({"commit_confidence_threshold": 0.03}, 2),
    ):
        result = policy.apply(input_draft=[MASK] * 4, logits=z, remasking_config=options)
        assert result.next_input_block.count(MASK) == 4 - count, options
    with pytest.raises(TypeError, match="remasking_config: options takes .*, got 'top_k'"):
        policy.apply(input_draft=[MASK], logits=z[:1], remasking_config={"top_k": 1})
    with pytest.raises(ValueError, match="denoise_steps takes an integer >= 1"):
        policy.apply(input_draft=[MASK], logits=z[:1], remasking_config={"denoise_steps": 0})
    with pytest.raises(TypeError, match=r"R2RemaskingPolicy.apply: logits takes \[L, V\]"):
        policy.apply(input_draft=[MASK])
    with pytest.raises(ValueError, match="decode_step: tokens takes shape"):
        policy.apply(input_draft=[MASK] * 3, logits=z)
    with pytest.raises(ValueError, match="config.mask_id takes a token id"):
        plugin.ours.R2RemaskingPolicy(DecodeConfig(None))
    with pytest.raises(ValueError, match="config.temperature takes 0"):
        plugin.ours.R2RemaskingPolicy(DecodeConfig(MASK, temperature=0.5))


def test_examples(plugin):
    names = {name: getattr(r2dllm_ext, name) for name in r2dllm_ext.__all__} | {"torch": torch}
    result = doctest.testmod(plugin.ours, extraglobs=names)
    assert result.failed == 0 and result.attempted >= 4
