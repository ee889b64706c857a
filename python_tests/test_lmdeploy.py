# SPDX-License-Identifier: Apache-2.0
"""`R2UnmaskingProcessor` is LMDeploy's, strategy by strategy; `patch` puts it into its engine.

LMDeploy's rules are restated for machines without it in test_rules_of_engines.py.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from test_rules_of_engines import VOCAB, planted, sampled
from torch import Tensor

from r2dllm_ext import DecodeConfig, Rule, decode_step, load_model
from r2dllm_ext.tasks.ledger import Tokenizer, make_sample

pytest.importorskip("lmdeploy", reason="LMDeploy is not installed")

from lmdeploy.pytorch import consts  # noqa: E402
from lmdeploy.pytorch.config import DLLMConfig, UnmaskingStrategy  # noqa: E402
from lmdeploy.pytorch.strategies.dllm.unmasking import UnmaskingProcessor  # noqa: E402

from r2dllm_ext.integrations import lmdeploy as ours  # noqa: E402

STRATEGIES = ("low_confidence_dynamic", "low_confidence_static", "sequential")


def config_of(strategy: str, length: int, steps: int = 8, threshold: float = 0.85) -> DLLMConfig:
    return DLLMConfig(
        block_length=length,
        unmasking_strategy=UnmaskingStrategy.from_str(strategy),
        denoising_steps=steps,
        confidence_threshold=threshold,
    )


def masks(seed: int, shape: tuple[int, int], strategy: str) -> Tensor:
    """[B, L] of masked, unmasked and cached cells; some rows decided as a whole."""
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(shape, generator=g) < 0.4).to(torch.uint8)
    if strategy == "sequential":  # what it leaves: the masked cells are the end of a block
        mask = mask.sort(1, descending=True).values
    mask[torch.rand(shape[0], generator=g) < 0.2] = consts.DLLM_UNMASKED
    mask[torch.rand(shape[0], generator=g) < 0.1] = consts.DLLM_CACHED
    return mask


def is_clear(z: Tensor, ids: Tensor, masked: Tensor, threshold: float) -> bool:
    """No two scores of masked cells of a row are one: topk promises no order of ties. And none is
    the threshold but for the last bits."""
    p = z.softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    rounding = 1e-6 if z.dtype == torch.float32 else 0.01
    if bool(((p.double() - threshold).abs()[masked] < rounding).any()):
        return False
    for row, is_masked in zip(p.double(), masked, strict=True):
        if bool((row[is_masked].sort().values.diff() < rounding * row.max()).any()):
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_their_strategies(strategy, dtype):
    """1,000 random steps: masked cells anywhere, drawn tokens, blocks that are done."""
    compared = committed = cached = 0
    for seed in itertools.count():
        length = (4, 8)[seed % 2] if dtype == torch.bfloat16 else (4, 32, 8)[seed % 3]
        shape = (1 + seed % 4, length)
        dllm_config = config_of(strategy, length, 1 + seed % 9, (0.85, 0.4)[seed % 2])
        z = planted(seed, shape, dtype, ties=False)
        mask = masks(seed, shape, strategy)
        masked = mask == consts.DLLM_MASKED
        proposed, ids = sampled(z, seed), torch.randint(VOCAB, shape)
        if strategy != "sequential" and not is_clear(
            z, proposed, masked, dllm_config.confidence_threshold
        ):
            continue
        flat = z.flatten(0, 1), ids.flatten(), proposed.flatten()
        got = ours.R2UnmaskingProcessor(dllm_config)(*flat, mask.flatten())
        want = UnmaskingProcessor(dllm_config)(*flat, mask.flatten().clone())
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype, f"step {seed}"
        compared += 1
        committed += int((masked.flatten() & (got[0] == consts.DLLM_UNMASKED)).sum())
        cached += int((got[0] == consts.DLLM_CACHED).sum())
        if compared == 1000:
            break
    assert committed > 1000 and cached > 500


def test_ties_go_to_the_lowest_cell():
    """Where LMDeploy's topk promises no order."""
    z = torch.zeros(4, VOCAB)
    ids = torch.arange(4)
    mask = torch.zeros(4, dtype=torch.uint8)
    got, _ = ours.R2UnmaskingProcessor(config_of("low_confidence_static", 4, 2))(z, ids, ids, mask)
    assert got.tolist() == [1, 1, 0, 0]


def test_token_zero_and_no_denoising_steps():
    """Masks lie apart from the ids: any id may be committed. One token a step is the default."""
    dllm_config = config_of("low_confidence_static", 4)
    dllm_config.denoising_steps = None
    z = torch.zeros(4, VOCAB)
    z[2, 0] = 9.0
    ids = torch.zeros(4, dtype=torch.int64)
    mask = torch.zeros(4, dtype=torch.uint8)
    got, tokens = ours.R2UnmaskingProcessor(dllm_config)(z, ids, ids, mask)
    assert got.tolist() == [0, 0, 1, 0] and tokens[2] == 0


def test_rules_of_r2():
    """Windows and runs commit what LMDeploy's threshold leaves."""
    rules = set()
    for seed in range(30):
        windows = {"confidence_cluster_size": (0, 3)[seed % 2], "spatial_threshold": 0.3}
        config = DecodeConfig.r2(None, temporal_steps=0, **windows)
        processor = ours.R2UnmaskingProcessor(config_of(STRATEGIES[0], 8), config)
        z, mask = planted(seed, (3, 8), torch.float32), masks(seed, (3, 8), "")
        ids, proposed = torch.randint(VOCAB, (3, 8)), z.argmax(-1)
        flat = z.flatten(0, 1), ids.flatten(), proposed.flatten(), mask.flatten()
        new_mask, tokens = processor(*flat)
        want, masked = torch.where(mask == 0, proposed, ids), mask == 0
        step = decode_step(z, want, None, config, candidates=masked, proposed=proposed)
        assert torch.equal(tokens.view(3, 8), want)
        is_new = (new_mask.view(3, 8) == consts.DLLM_UNMASKED) & masked
        assert torch.equal(is_new, step.rule != Rule.NONE)
        rules |= set(step.rule.flatten().tolist())
    assert {Rule.WINDOW, Rule.AMBIGUITY} <= rules


# ---- in the engine ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    """LMDeploy's own modules of a step; what serves requests has to be installed, too."""
    names = ("model_agent", "step_inputs")
    where = "lmdeploy.pytorch.strategies.dllm"
    return SimpleNamespace(**{name: pytest.importorskip(f"{where}.{name}") for name in names})


@pytest.fixture(scope="module")
def ledger():
    words = Tokenizer()
    prompts = [words.encode(make_sample(seed=0, index=i, split="test").prompt) for i in range(40)]
    length = max(map(len, prompts), key=[len(prompt) for prompt in prompts].count)
    prompts = [prompt for prompt in prompts if len(prompt) == length]
    return SimpleNamespace(model=load_model("ledger").eval(), prompt=torch.tensor(prompts[:3]))


@torch.no_grad()
def decoded(engine, ledger, dllm_config: DLLMConfig, blocks: int = 2) -> tuple[Tensor, int]:
    """The steps of LMDeploy's model agent: its strategy, its sampling of nothing but the argmax,
    its change from one step to the next."""
    mask_id, length = ledger.model.mask_id, dllm_config.block_length
    strategy = engine.model_agent.DLLMModelAgentStrategy(dllm_config, mask_id)
    x, forwards = ledger.prompt, 0
    rows = x.shape[0]
    for block in range(blocks):
        ids = torch.full((rows * length,), mask_id)
        mask = torch.zeros(rows * length, dtype=torch.uint8)
        while True:
            missing = (blocks - block - 1) * length
            tail = torch.full((rows, missing), mask_id)
            start = x.shape[1]
            logits = ledger.model(torch.cat([x, ids.view(rows, -1), tail], 1)).logits
            logits = logits[:, start : start + length].flatten(0, 1)
            logits[:, mask_id] = -1e4  # theirs would commit it
            forwards += 1
            inputs = SimpleNamespace(
                input_ids=ids[None], seq_length=torch.full((rows,), length, dtype=torch.int64)
            )
            extra = engine.model_agent.DLLMExtraInputs(dllm_mask=mask)
            tokens, extra = strategy.post_sampling(inputs, logits, logits.argmax(-1), extra)
            if (extra.dllm_mask == consts.DLLM_CACHED).all():
                break
            ids, mask, _ = engine.step_inputs._update_dllm(
                tokens, extra.dllm_mask, inputs.seq_length, length, mask_id
            )
            if (extra.dllm_mask != consts.DLLM_MASKED).all():
                x = torch.cat([x, tokens.view(rows, -1)], 1)
                break
    return x, forwards


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_their_decode(engine, ledger, strategy):
    dllm_config = config_of(strategy, 16, 8, 0.9)
    want = decoded(engine, ledger, dllm_config)
    undo = ours.patch()
    try:
        built = engine.model_agent.DLLMModelAgentStrategy(dllm_config, 0).unmasking_processor
        assert type(built) is ours.R2UnmaskingProcessor
        got = decoded(engine, ledger, dllm_config)
    finally:
        undo()
    assert engine.model_agent.UnmaskingProcessor is UnmaskingProcessor
    assert torch.equal(got[0], want[0]) and got[1] == want[1]


def test_decode_by_the_rules_of_r2(engine, ledger):
    dllm_config = config_of(STRATEGIES[0], 16, 8, 0.9)
    _, theirs = decoded(engine, ledger, dllm_config)
    undo = ours.patch(DecodeConfig.r2(ledger.model.mask_id, temporal_steps=0))
    try:
        _, forwards = decoded(engine, ledger, dllm_config)
    finally:
        undo()
    assert forwards < theirs


def test_errors(engine):
    with pytest.raises(
        TypeError, match="R2UnmaskingProcessor: config takes a DecodeConfig or None"
    ):
        ours.patch(0.9)
    for changes, field in (
        ({}, "temporal_steps takes 0 or None, got 3"),
        ({"temporal_steps": 0, "base": "schedule"}, "base takes no 'schedule'"),
        ({"temporal_steps": 0, "token_cluster": "random"}, "token_cluster takes no 'random'"),
        ({"temporal_steps": 0, "temperature": 0.5}, "temperature takes 0"),
        ({"temporal_steps": 0, "edit_threshold": 0.5}, "edit_threshold takes None"),
    ):
        with pytest.raises(ValueError, match=f"config.{field}"):
            ours.patch(DecodeConfig.r2(None, **changes))
    assert engine.model_agent.UnmaskingProcessor is UnmaskingProcessor
    with pytest.raises(ValueError, match="DecodeConfig: threshold takes"):
        ours.R2UnmaskingProcessor(config_of(STRATEGIES[0], 4, threshold=1.5))
