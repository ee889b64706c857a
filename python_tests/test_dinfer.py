# SPDX-License-Identifier: Apache-2.0
"""`R2Decoder` is dInfer's threshold decoder, and R2's rules in its loop, rows dropped or not.

Against the interface as contracts/ restates it, and against dInfer's own files where
R2DLLM_ENGINE_SOURCES has a checkout.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from contracts import HERE, checkout, integration
from test_rules_of_engines import MASK, VOCAB, planted, tokens_of
from torch import Tensor

from r2dllm_ext import DecodeConfig, DecodeState, decode_step, generate, load_model
from r2dllm_ext.integrations import engine_config
from r2dllm_ext.tasks.ledger import Tokenizer, make_sample

OWN = "dinfer.ThresholdParallelDecoder"
SHAPES = ((1, 32), (3, 8), (4, 4), (5, 16))


class Engine(NamedTuple):
    ours: ModuleType
    strategy: ModuleType
    loop: ModuleType  # its BlockWiseDiffusionLLM


@pytest.fixture(params=["contract", "checkout"])
def dinfer(request, monkeypatch):
    folder = HERE / "dinfer"
    if request.param == "checkout":
        folder = checkout("dInfer") / "python" / "dinfer"
        # It compiles its rule when it is imported; and asks for a function that it never calls.
        monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda function: function)
        name = "transformers.models.layoutlmv2.modeling_layoutlmv2"
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(relative_position_bucket=None))
        for parent in ("transformers", "transformers.models", "transformers.models.layoutlmv2"):
            monkeypatch.setitem(sys.modules, parent, SimpleNamespace())
    with integration("dinfer", {"dinfer": folder, "dinfer.decoding": folder / "decoding"}) as ours:
        loaded = importlib.import_module
        yield Engine(
            ours,
            loaded("dinfer.decoding.parallel_strategy"),
            loaded("dinfer.decoding.generate_uniform"),
        )


def own(dinfer, mask_id: int, threshold: float, **options):
    config = engine_config(OWN, mask_id, threshold=threshold)
    return dinfer.ours.R2Decoder(config, near_ties=True, **options)


# ---- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_their_rule(dinfer, dtype):
    """1,000 random steps: masks in the prompt, the mask id on top, ties, thresholds of a step."""
    compared = changed = skipped = tied = 0
    for seed in itertools.count():
        shape = SHAPES[seed % len(SHAPES)]
        threshold, of_step = (0.9, 0.6, 0.2)[seed % 3], (None, 0.95, 1.0)[seed % 5 % 3]
        x = torch.cat([torch.full((shape[0], 3), MASK), tokens_of(seed, shape)], 1)
        z = planted(seed, shape, dtype) / (1, 4)[seed // 3 % 2]  # 4: no cell passes
        p, least, is_clear = threshold_rule(z, x[:, 3:], threshold if of_step is None else of_step)
        if not is_clear:
            continue
        theirs = dinfer.strategy.ThresholdParallelDecoder(0.0, threshold, mask_id=MASK)
        decoder = own(dinfer, MASK, threshold)
        want, got = x.clone(), x.clone()
        theirs.decode(z, 3, x.shape[1], want, of_step)
        decoder.block_init(got[:, 3:], 0)
        decoder.decode(z, 3, x.shape[1], got, of_step)
        assert torch.equal(got, want), f"step {seed}"
        compared += 1
        changed += int((want != x).sum())
        skipped += int(((z.argmax(-1) == MASK) & (x[:, 3:] == MASK)).sum())
        tied += int((((p >= least) & (p < threshold)).sum(1) > 1).sum())
        if compared == 1000:
            break
    assert seed < 1050
    assert changed > 1000 and skipped > 1000 and tied > 20


def threshold_rule(z: Tensor, tokens: Tensor, threshold: float) -> tuple[Tensor, Tensor, bool]:
    """Exact probabilities of the live cells, their least of a row, and whether no cell is so close
    to it that the last bits of a float32 softmax, theirs or ours, decide."""
    p = z.double().softmax(-1).amax(-1)
    p[(tokens != MASK) | (z.argmax(-1) == MASK)] = -torch.inf
    least = (p.amax(1, keepdim=True) - 1e-5).clamp(max=threshold)
    return p, least, bool(((p - least).abs() > 1e-6).all())


def test_near_ties_are_a_choice(dinfer):
    """Without them the lowest of the best cells commits alone, as in `generate`."""
    z = torch.zeros(1, 3, VOCAB)
    z[0, :, 5] = 2.0
    for near_ties, count in ((True, 3), (False, 1)):
        decoder = dinfer.ours.R2Decoder(engine_config(OWN, MASK), near_ties=near_ties)
        x = torch.full((1, 3), MASK)
        decoder.block_init(x, 0)
        decoder.decode(z, 0, 3, x)
        assert int((x == 5).sum()) == count


def test_rows_that_are_dropped(dinfer):
    """Rows leave as they finish, and each is decided as if it were alone, block after block."""
    rows, length, blocks = 5, 8, 3
    config = DecodeConfig.r2(MASK, temporal_threshold=0.3, temporal_steps=2, temperature=0.5)
    decoder = dinfer.ours.R2Decoder(config)
    alone = [DecodeState(rows, length).take([row]) for row in range(rows)]
    sizes = set()
    for block_id in range(blocks):
        x = tokens_of(block_id, (rows, length))
        x[block_id] = 0  # nothing to decode: gone before the first step
        want = x.clone()
        decoder.block_init(x, block_id)
        kept, step = torch.arange(rows), 0
        while len(kept := kept[(x[kept] == MASK).any(1)]):
            sizes.add(len(kept))
            live = x[kept]
            for _ in range(2):  # unrolled: a row may have finished in the first of them
                z = planted(100 * block_id + step, (rows, length), torch.float32)
                decoder.decode(z[kept], 0, length, live)
                for row in kept.tolist():
                    decode_step(z[row, None], want[row, None], alone[row], config)
                step += 1
            x[kept] = live
            assert torch.equal(x, want)
        for state in alone:
            state.reset()
    assert len(sizes) >= 3


# ---- whole decodes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ledger():
    model, words = load_model("ledger"), Tokenizer()
    model.eval()
    prompts = [words.encode(make_sample(seed=0, index=i, split="test").prompt) for i in range(40)]
    length = max(map(len, prompts), key=[len(prompt) for prompt in prompts].count)
    prompts = [prompt for prompt in prompts if len(prompt) == length]
    return SimpleNamespace(model=model, prompt=torch.tensor(prompts[:3]), end_id=words.end_id)


def blocks_of(x, block_length):
    """dInfer's iterator over a TokenArray, from the end of the prompt on."""
    for start in range(x.prompt.shape[1], x.data.shape[1], block_length):
        location = SimpleNamespace(start=start, end=start + block_length)
        yield location, x[:, start : start + block_length]


def decoded(dinfer, ledger, decoder, rows: int):
    factory = SimpleNamespace(create=blocks_of)
    llm = dinfer.loop.BlockWiseDiffusionLLM(ledger.model, decoder, factory, early_stop=False)
    sequences = llm.generate(ledger.prompt[:rows], gen_length=32, block_length=16)
    if rows == 1:  # dInfer takes the end tokens out then
        sequences = sequences[sequences != ledger.end_id]
    return sequences, llm.num_forwards


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("threshold", [0.9, 0.5])
def test_their_decode(dinfer, ledger, rows, threshold):
    ids = {"mask_id": ledger.model.mask_id, "eos_id": ledger.end_id}
    theirs = dinfer.strategy.ThresholdParallelDecoder(0.0, threshold, **ids)
    decoder = own(dinfer, ids["mask_id"], threshold, eos_id=ids["eos_id"])
    want, want_forwards = decoded(dinfer, ledger, theirs, rows)
    got, forwards = decoded(dinfer, ledger, decoder, rows)
    assert torch.equal(got, want)
    assert forwards == want_forwards


@pytest.mark.parametrize("preset", ["r2", "budget"])
def test_other_rules_are_those_of_generate(dinfer, ledger, preset):
    config = getattr(DecodeConfig, preset)(ledger.model.mask_id)
    decoder = dinfer.ours.R2Decoder(config, eos_id=ledger.end_id)
    got, _ = decoded(dinfer, ledger, decoder, 3)
    out = generate(ledger.model, ledger.prompt, gen_length=32, block_length=16, config=config)
    assert torch.equal(got, out.sequences)


# ---- errors ----------------------------------------------------------------------------------


def test_errors(dinfer):
    decoder_of = dinfer.ours.R2Decoder
    with pytest.raises(TypeError, match="R2Decoder: config takes a DecodeConfig, got float"):
        decoder_of(0.9)
    with pytest.raises(ValueError, match="config.mask_id takes the mask token of the model"):
        decoder_of(DecodeConfig(None))
    with pytest.raises(ValueError, match="config.mask_prediction takes 'skip' with near_ties"):
        decoder_of(DecodeConfig(MASK), near_ties=True)
    config = engine_config(OWN, MASK, threshold=None)
    with pytest.raises(ValueError, match="config.threshold takes a number with near_ties"):
        decoder_of(config, near_ties=True)
    decoder, z = decoder_of(DecodeConfig(MASK)), torch.zeros(2, 4, VOCAB)
    x = torch.full((2, 4), MASK)
    with pytest.raises(ValueError, match="R2Decoder.decode: x takes the 0 rows of the last call"):
        decoder.decode(z, 0, 4, x)
    decoder.block_init(x, 0)
    message = "x takes the 2 rows of the last call, or the 2 unfinished, got '1 rows'"
    with pytest.raises(ValueError, match=message):
        decoder.decode(z[:1], 0, 4, x[:1])
