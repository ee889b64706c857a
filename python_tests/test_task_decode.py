# SPDX-License-Identifier: Apache-2.0
"""bench/task_decode.py: it decodes as the engine does, and knows its own calibration."""

import sys
from pathlib import Path

import pytest
import torch

from r2dllm_ext import DecodeConfig, generate
from r2dllm_ext.models import Transformer
from r2dllm_ext.tasks import get_task

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from task_decode import Rule, _prompt_ids, calibration_error, decode, taken  # noqa: E402
from train_base import Shape, model_config  # noqa: E402

LEDGER = get_task("ledger")
PROMPTS = [LEDGER.sample(0, i).prompt for i in range(3)]


@pytest.fixture(scope="module")
def model():
    shape = Shape(width=32, layers=2, heads=2, mlp_width=32)
    return Transformer(model_config(shape, LEDGER)).init_weights(3, std=0.3).double().eval()


@pytest.mark.parametrize(
    ("rule", "config"),
    [
        (Rule(), DecodeConfig.vanilla(2)),
        (Rule("threshold", 0.2), DecodeConfig.fast_dllm(2, threshold=0.2)),
    ],
)
def test_it_decodes_as_the_engine_does(r2, model, rule, config):
    out = decode(model, LEDGER, PROMPTS, rule, batch=2)
    ids = _prompt_ids(LEDGER, PROMPTS)
    P = ids.shape[1] - 96
    real = ids[:, :P] != LEDGER.tokenizer.pad_id
    for row in range(3):
        alone = generate(
            model, ids[row : row + 1, :P], gen_length=96, block_length=32, config=config,
            attention_mask=real[row : row + 1],
        )  # fmt: skip
        assert torch.equal(out.tokens[row], alone.sequences[0, P:])
        assert out.nfe[row] == alone.nfe
        assert out.step[row].min() == 1 and out.step[row].max() == alone.nfe


def test_the_last_cell_is_free():
    p = torch.tensor([[0.9, 0.5, 0.96, 0.3]])
    every = torch.ones_like(p, dtype=torch.bool)
    for budget, cells in ((0.0, 1), (0.04, 2), (0.14, 3), (0.64, 4)):
        chosen = taken(p, p, every, Rule("budget", budget + 1e-6))
        assert chosen.sum() == cells and chosen[0, 2]
    assert taken(p, p, every, Rule("threshold", 0.95)).tolist() == [[False, False, True, False]]
    with pytest.raises(ValueError, match="rule is 'x'"):
        taken(p, p, every, Rule("x"))


class Knowing(torch.nn.Module):
    """Answers with the true distribution of the prompts."""

    def forward(self, ids, *, attention_mask, logits_positions):
        answers = ids[:, -96:]
        prompts = [LEDGER.tokenizer.decode(row, skip_special=True) for row in ids[:, :-96]]
        p = LEDGER.posterior(prompts, answers, answers == 2, strict=False)
        rows = torch.arange(len(ids))[:, None]
        p = p[rows, logits_positions - (ids.shape[1] - 96)]
        return type("Output", (), {"logits": p.clamp(min=1e-9).log()})


def test_a_model_that_knows_is_right_and_calibrated():
    out = decode(Knowing(), LEDGER, PROMPTS[:2], Rule(), calibrate=True)
    texts = [LEDGER.tokenizer.decode(row) for row in out.tokens.tolist()]
    assert all(LEDGER.verify(p, t).correct for p, t in zip(PROMPTS, texts, strict=False))
    assert out.exact[0].sum() > 200 and calibration_error(out.exact) < 1e-3
    assert calibration_error(out.calibration) > 0.02  # of styles the argmax always wins
