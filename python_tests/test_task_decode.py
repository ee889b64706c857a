# SPDX-License-Identifier: Apache-2.0
"""bench/task_decode.py and curves.py: rows decode as alone, are judged, and know calibration."""

import json
import sys
from pathlib import Path

import pytest
import torch
from cases import OFF

from r2dllm_ext import DecodeConfig, generate
from r2dllm_ext.config import Rule
from r2dllm_ext.models import Transformer
from r2dllm_ext.tasks import get_task

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import curves  # noqa: E402
from decoders import DECODERS, config_of  # noqa: E402
from task_decode import Decoded, calibration_error, decode, prompt_ids  # noqa: E402
from train_base import Shape, model_config  # noqa: E402

LEDGER = get_task("ledger")
MASK = LEDGER.tokenizer.mask_id
PROMPTS = [LEDGER.sample(0, i).prompt for i in range(4)]


@pytest.fixture(scope="module")
def model():
    """Untrained; in float64, so that the shape of a batch can't tip a decision."""
    shape = Shape(width=32, layers=2, heads=2, mlp_width=32)
    return Transformer(model_config(shape, LEDGER)).init_weights(3, std=0.3).double().eval()


@pytest.mark.parametrize(
    ("preset", "block"), [*((name, None) for name in DECODERS), ("r2", 96), ("budget", 16)]
)
def test_rows_decode_as_generate_does_alone(r2, model, preset, block):
    config = config_of(preset, DECODERS[preset].own, MASK)
    if preset != "vanilla":
        config = config.replace(threshold=0.3, spatial_threshold=0.2, temporal_threshold=0.2)
        config = config.replace(error_budget=1.5, entropy_budget=3.0)
    out = decode(model, LEDGER, PROMPTS, config, block_length=block, batch=3)
    ids = prompt_ids(LEDGER, PROMPTS)
    P = ids.shape[1] - 96
    for row in range(len(PROMPTS)):
        alone = generate(
            model,
            ids[row : row + 1, :P],
            gen_length=96,
            block_length=block or 32,
            config=config,
            attention_mask=ids[row : row + 1, :P] != LEDGER.tokenizer.pad_id,
            trace=True,
        )
        assert torch.equal(out.tokens[row], alone.sequences[0, P:])
        assert out.nfe[row] == alone.nfe
        assert torch.equal(out.rule[row], alone.trace.commit_rule[0])
    if preset == "vanilla":
        assert out.nfe.tolist() == [96] * len(PROMPTS)
    if preset == "r2":
        assert out.nfe.unique().numel() > 1  # else nothing was tested
        assert out.rule.unique().numel() > 2


def test_a_row_that_can_not_be_finished_ends_the_decode(r2):
    """In one line, not never."""

    class Broken(torch.nn.Module):
        def forward(self, ids, *, attention_mask, logits_positions):
            logits = torch.zeros(*logits_positions.shape, len(LEDGER.tokenizer))
            logits[-1] = torch.nan
            return type("Output", (), {"logits": logits})()

    with pytest.raises(ValueError, match="a row commits nothing"):
        decode(Broken(), LEDGER, PROMPTS[:2], DecodeConfig.budget(MASK))


def test_verdict_of_right_and_wrong_answers(r2):
    samples = [LEDGER.sample(5, i, split="test") for i in range(4)]
    tokens = torch.tensor([LEDGER.encode(s)[1] for s in samples])
    tokens[0, 3] = LEDGER.tokenizer.pad_id
    rule = torch.full(tokens.shape, int(Rule.THRESHOLD), dtype=torch.uint8)
    rule[:, 0] = Rule.WINDOW
    nothing = torch.zeros(3, 15)
    out = Decoded(tokens, torch.tensor([10, 20, 30, 36]), rule, nothing, nothing)
    result = curves.judge(out, [s.prompt for s in samples], LEDGER)
    assert (result["right"], result["parts"], result["accuracy"]) == (3, 4, 0.75)
    assert result["nfe"]["mean"] == 24 and result["nfe"]["max"] == 36
    assert result["commit_share"]["WINDOW"] == pytest.approx(1 / 96, abs=1e-4)
    words = int((tokens != LEDGER.tokenizer.end_id).sum())
    assert result["tokens_per_forward"] == pytest.approx(words / 96, abs=1e-3)
    assert "calibration_error" not in result


def test_presets_lie_on_their_curves():
    for name, decoder in DECODERS.items():
        assert config_of(name, decoder.own, 2) == getattr(DecodeConfig, name)(2)
        assert decoder.own not in decoder.others and decoder.own in decoder.values
        for value in decoder.values:
            assert getattr(config_of(name, value, 2), decoder.parameter) == value
    assert OFF.items() <= vars(DecodeConfig.vanilla(2)).items()
    strict = config_of("r2", 0.9, 2)  # all its thresholds, not those of groups alone
    assert (strict.threshold, strict.spatial_threshold, strict.temporal_threshold) == (
        0.95,
        0.9,
        0.9,
    )
    few = curves.settings(["budget", "r2=0.7"], 100, 10)
    assert few[:2] == [("budget", 0.005, True, 100), ("r2", 0.7, False, 100)]
    assert {s.decoder for s in few[2:]} == {"budget"} and {s.prompts for s in few[2:]} == {10}
    assert curves.settings(["budget"], 100, 0) == few[:1]


def test_curves_run(r2, tmp_path, capsys):
    files = tmp_path / "c.json", tmp_path / "c.png"
    command = ["--task", "ledger", "--model", "ledger", "ledger-base", "--quick", "--threads", "1"]
    command += ["--decoders", "budget", "r2=0.7", "--curve-prompts", "0"]
    curves.main([*command, "--json", str(files[0]), "--plot", str(files[1])])
    shown = capsys.readouterr().out
    assert "ledger-base" in shown and "budget *" in shown and files[1].is_file()
    results = json.loads(files[0].read_text())["results"]
    assert [(r["model"], r["decoder"]) for r in results] == [
        (model, decoder) for model in ("ledger", "ledger-base") for decoder in ("r2", "budget")
    ]
    ours, base = results[1], results[3]
    assert ours["nfe"]["mean"] < base["nfe"]["mean"]


def test_a_block_length_divides_the_answer(capsys):
    assert curves.parse(["--task", "pronounce"]).block_length == 64
    assert curves.parse(["--task", "ledger", "--block-length", "96"]).block_length == 96
    for length in ("0", "64"):
        with pytest.raises(SystemExit):
            curves.parse(["--task", "ledger", "--block-length", length])
        assert f"takes a divisor of 96, got {length}" in capsys.readouterr().err


def test_curves_decode_in_the_blocks_asked_for(r2, monkeypatch):
    seen = []

    def watched(*arguments, block_length, **options):
        seen.append(block_length)
        return decode(*arguments, block_length=block_length, **options)

    monkeypatch.setattr(curves, "decode", watched)
    command = ["--task", "ledger", "--quick", "--prompts", "2", "--curve-prompts", "0"]
    curves.main([*command, "--decoders", "budget", "--block-length", "48"])
    assert seen == [48]


def test_models_are_told_apart():
    """Many a folder is called model."""
    assert curves.shown("ledger") == "ledger"
    assert curves.shown("a/stage-4/model") == "stage-4/model" != curves.shown("/a/stage-5/model")


class Knowing(torch.nn.Module):
    """Answers with the true distribution of the prompts."""

    def forward(self, ids, *, attention_mask, logits_positions):
        answers = ids[:, -96:]
        prompts = [LEDGER.tokenizer.decode(row, skip_special=True) for row in ids[:, :-96]]
        p = LEDGER.posterior(prompts, answers, answers == MASK, strict=False)
        rows = torch.arange(len(ids))[:, None]
        p = p[rows, logits_positions - (ids.shape[1] - 96)]
        return type("Output", (), {"logits": p.clamp(min=1e-9).log()})


def test_a_model_that_knows_is_right_and_calibrated(r2):
    config = DecodeConfig.vanilla(MASK)
    out = decode(Knowing(), LEDGER, PROMPTS[:2], config, calibrate=True)
    texts = [LEDGER.tokenizer.decode(row) for row in out.tokens.tolist()]
    assert all(LEDGER.verify(p, t).correct for p, t in zip(PROMPTS, texts, strict=False))
    assert out.exact[0].sum() > 200 and calibration_error(out.exact) < 1e-3
    assert calibration_error(out.calibration) > 0.02  # of styles the argmax always wins
