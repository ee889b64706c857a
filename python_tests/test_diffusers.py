# SPDX-License-Identifier: Apache-2.0
"""`integrations.diffusers`: steps and whole pipelines of diffusers' own scheduler, and ours."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from test_rules_of_engines import MASK, planted, tokens_of

from r2dllm_ext import DecodeConfig
from r2dllm_ext.models import ModelConfig, Transformer

pytest.importorskip("diffusers", reason="needs diffusers 0.42")
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline  # noqa: E402

from r2dllm_ext.integrations.diffusers import R2BlockRefinementScheduler  # noqa: E402


def schedulers(steps: int, length: int, **options):
    both = BlockRefinementScheduler(**options), R2BlockRefinementScheduler(**options)
    for scheduler in both:
        scheduler.set_timesteps(steps, block_length=length)
    return both


# ---- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("editing", [None, 0.4, 0.0])
@pytest.mark.parametrize("threshold", [0.95, 0.5, 1.5])
def test_steps(dtype, editing, threshold):
    """112 steps each, 1,008 of a dtype: quotas, prompt masks, predictions of the mask id."""
    committed = edited = 0
    for seed in range(28):
        shape = ((1, 32), (3, 8), (4, 4))[seed % 3]
        theirs, ours = schedulers((1, 3, 40)[seed % 3], shape[1])
        x = tokens_of(seed, shape)
        prompt = torch.arange(shape[1]) < seed % 3 if seed % 2 else None
        for number in range(4):
            z = planted(4 * seed + number, shape, dtype, ties=False)
            call = {"mask_token_id": MASK, "threshold": threshold, "prompt_mask": prompt}
            call["editing_threshold"] = editing
            want = theirs.step(z, number, x, **call)
            got = ours.step(z, number, x, **call)
            for name in ("prev_sample", "transfer_index", "editing_transfer_index"):
                assert torch.equal(want[name], got[name]), (seed, number, name)
            masked = x == MASK
            assert torch.equal(want.sampled_tokens[masked], got.sampled_tokens[masked])
            probs = want.sampled_probs[masked], got.sampled_probs[masked]
            # 168 roundings: torch adds 211 terms up in lanes.
            torch.testing.assert_close(*probs, rtol=1e-5, atol=0)
            assert got.pred_logits is z
            committed += int(want.transfer_index.sum())
            edited += int(want.editing_transfer_index.sum())
            x = want.prev_sample
    assert committed > 300 and (edited > 50) == bool(editing)


def test_options_of_the_constructor_are_defaults_of_a_call():
    options = {"threshold": 0.4, "editing_threshold": 0.3}
    theirs, ours = schedulers(4, 8, **options)
    x, z = tokens_of(1, (2, 8)), planted(1, (2, 8), torch.float32, ties=False)
    want = theirs.step(z, torch.tensor(1), x, mask_token_id=MASK)
    got = ours.step(z, torch.tensor(1), x, mask_token_id=MASK)
    assert torch.equal(want.prev_sample, got.prev_sample)
    first, *rest = ours.step(z, 1, x, mask_token_id=MASK, return_dict=False)
    assert torch.equal(first, want.prev_sample) and len(rest) == 5


def test_draws():
    """Committed draws follow their distribution, the generator makes them again."""
    z = torch.zeros(1, 4000, 5)
    z[..., 1], z[..., 2] = 1.0, 0.5
    x = torch.full((1, 4000), 4)
    theirs, ours = schedulers(1, 4000)
    call = {"mask_token_id": 4, "temperature": 0.5, "top_k": 3, "threshold": 0.0}

    def drawn(scheduler, seed, **options):
        g = torch.Generator().manual_seed(seed)
        return scheduler.step(z, 0, x, **(call | options), generator=g)

    one, other = drawn(ours, 1), drawn(ours, 2)
    assert torch.equal(one.prev_sample, drawn(ours, 1).prev_sample)
    assert not torch.equal(one.prev_sample, other.prev_sample)
    counts = [
        drawn(s, 1).prev_sample.flatten().bincount(minlength=5) / 4000 for s in (theirs, ours)
    ]
    # The difference of two shares of 4,000 draws has a deviation of at most 0.0112.
    torch.testing.assert_close(*counts, rtol=0, atol=0.04)
    probs = [
        {t: drawn(s, 1).sampled_probs[drawn(s, 1).sampled_tokens == t][0] for t in (1, 2)}
        for s in (theirs, ours)
    ]
    for token in (1, 2):
        torch.testing.assert_close(probs[0][token], probs[1][token])
    greedy = {"sampling_method": "greedy"}
    assert torch.equal(*(drawn(s, 1, **greedy).prev_sample for s in (theirs, ours)))


def test_what_a_step_refuses():
    ours = R2BlockRefinementScheduler()
    x, z = tokens_of(1, (2, 8)), planted(1, (2, 8), torch.float32)
    with pytest.raises(ValueError, match="timestep takes a step after set_timesteps"):
        ours.step(z, 0, x, mask_token_id=MASK)
    ours.set_timesteps(4, block_length=8)
    with pytest.raises(ValueError, match="mask_token_id takes a token id, got None"):
        ours.step(z, 0, x)
    with pytest.raises(ValueError, match="tokens takes shape"):
        ours.step(z, 0, x[:, :4], mask_token_id=MASK)


# ---- config ----------------------------------------------------------------------------------


def test_config_is_kept_saved_and_loaded(tmp_path):
    theirs = BlockRefinementScheduler(block_length=16, threshold=0.6)
    same = R2BlockRefinementScheduler.from_config(theirs.config)
    assert (same.config.block_length, same.config.threshold, same.config.config) == (16, 0.6, None)
    rules = DecodeConfig.r2(None, temporal_steps=2)
    ours = R2BlockRefinementScheduler.from_config(theirs.config, config=rules)
    assert ours.config.block_length == 16 and ours.config.config["temporal_steps"] == 2
    ours.save_config(tmp_path)
    assert json.loads((tmp_path / ours.config_name).read_text())["config"]["token_cluster"]
    again = R2BlockRefinementScheduler.from_pretrained(tmp_path)
    assert again.config.config == ours.config.config and again.config.block_length == 16
    back = BlockRefinementScheduler.from_config(ours.config)
    assert back.config.threshold == 0.6


def test_what_a_config_refuses():
    for config in ({"threshold": 0.8}, DecodeConfig.r2(None, threshold=0.8)):
        with pytest.raises(ValueError, match="config.threshold takes its default .* call: thresh"):
            R2BlockRefinementScheduler(config=config)
    with pytest.raises(ValueError, match="config.mask_id takes its default"):
        R2BlockRefinementScheduler(config=DecodeConfig.r2(3))
    with pytest.raises(TypeError, match="or fields of DecodeConfig, got 'gamma'"):
        R2BlockRefinementScheduler(config={"gamma": 1})
    with pytest.raises(ValueError, match="temporal_steps takes"):
        R2BlockRefinementScheduler(config={"temporal_steps": -1})


def test_another_version_is_one_error(monkeypatch):
    from r2dllm_ext.integrations import _versions

    monkeypatch.setattr(_versions.metadata, "version", lambda package: "0.43.0")
    with pytest.raises(ImportError, match="tested with diffusers 0.42.1, but diffusers 0.43.0 is"):
        _versions.require("diffusers")


# ---- whole pipelines -------------------------------------------------------------------------


class Small(torch.nn.Module):
    """A transformer under the pipeline's convention; it counts its calls."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = ModelConfig("llada", 40, width=32, layers=2, heads=4, mlp_width=48, max_length=128)
        self.body, self.calls = Transformer(config), 0
        for weight in self.body.parameters():
            if weight.dim() == 2:
                weight.data.normal_(std=0.3)

    def forward(self, ids, attention_mask, position_ids):
        self.calls += 1
        assert torch.equal(position_ids[0], torch.arange(ids.shape[1]))
        logits = 4 * self.body(ids, attention_mask=attention_mask).logits
        logits[..., 39] -= 3  # the mask, predicted now and then
        return SimpleNamespace(logits=logits)


def decode(scheduler, seed: int, **options):
    """Tokens and forwards of `LLaDA2Pipeline`, and tokens edited."""
    model, edited = Small(seed), []
    pipe = LLaDA2Pipeline(model=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def look(pipe, step, timestep, given):
        edited.append(int(given["editing_transfer_index"].sum()))
        return {}

    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(38, (1 + seed % 3, 5 + seed % 7), generator=g)
    output = pipe(
        input_ids=prompt,
        gen_length=32,
        block_length=8,
        mask_token_id=39,
        output_type="seq",
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["editing_transfer_index"],
        **({"num_inference_steps": 8} | options),
    )
    return output.sequences, model.calls, sum(edited)


OPTIONS = [
    {},  # threshold 0.7, editing 0.5
    {"threshold": 0.9, "editing_threshold": None},
    {"threshold": 0.5, "editing_threshold": 0.6, "num_inference_steps": 3},
    {"threshold": 1.5, "editing_threshold": 0.3, "num_inference_steps": 32},
    {"eos_token_id": 7, "minimal_topk": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pipelines(options):
    edited = 0
    for seed in range(8):
        theirs = BlockRefinementScheduler(block_length=8)
        ours = R2BlockRefinementScheduler.from_config(theirs.config)
        want, got = decode(theirs, seed, **options), decode(ours, seed, **options)
        assert torch.equal(want[0], got[0]) and want[1:] == got[1:], seed
        edited += want[2]
    assert (edited > 20) == (options.get("editing_threshold", 0.5) is not None)


def test_pipelines_with_rules():
    """The rules of R2 beside theirs: fewer forwards, a state that starts anew with each block."""
    options = {"threshold": 0.9, "editing_threshold": None, "num_inference_steps": 8}
    rules = DecodeConfig.r2(None, temporal_steps=2, temporal_threshold=0.5)
    forwards = [0, 0]
    for seed in range(8):
        theirs = BlockRefinementScheduler(block_length=8)
        ours = R2BlockRefinementScheduler.from_config(theirs.config, config=rules)
        forwards[0] += decode(theirs, seed, **options)[1]
        tokens, calls, _ = decode(ours, seed, **options)
        assert torch.equal(decode(ours, seed, **options)[0], tokens)
        forwards[1] += calls
    assert forwards[1] < forwards[0]
