# SPDX-License-Identifier: Apache-2.0
"""bench/train_base.py: masks, the model's own half-decoded blocks, average, stages, resumption."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from r2dllm_ext.models import load_model
from r2dllm_ext.tasks import TASKS, get_task, task_of

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import train_base  # noqa: E402
from muon import Muon, orthogonalized  # noqa: E402
from own_decodes import OwnDecodes  # noqa: E402
from train_base import Plan, Shape, Stage, Trainer, draw  # noqa: E402

LEDGER = get_task("ledger")
SHAPE = Shape(width=16, layers=1, heads=2, mlp_width=16)
TINY = Stage("a", seed=0, steps=6, batch_size=4, learning_rate=1e-3, warmup=2)
QUICK = argparse.Namespace(eval_every=3, eval_samples=2, save_every=2, log_every=1)


def stage(**changes):
    return dataclasses.replace(TINY, **changes)


def trainer(settings=TINY):
    return Trainer(LEDGER, SHAPE, settings, compiled=False)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_masks_follow_their_modes():
    blocks = torch.arange(96) // 32
    iid = draw(LEDGER, stage(batch_size=200, iid_share=1.0), 0)
    assert iid.ids.shape == (200, 32 + 96) and torch.equal(iid.hidden, iid.learned)
    assert iid.hidden.float().mean().item() == pytest.approx(0.5, abs=0.06)
    for share in (0.0, 1.0):
        batch = draw(LEDGER, stage(batch_size=200, iid_share=0.0, frontier_share=share), 0)
        for hidden, learned in zip(batch.hidden, batch.learned, strict=True):
            touched = blocks[learned].unique()
            assert len(touched) <= 1, "one active block"
            if len(touched):
                assert hidden[blocks > touched[0]].all()
                assert not hidden[blocks < touched[0]].any()
        assert (batch.hidden & ~batch.learned).any()


def test_digits_far_behind_the_front_are_hidden_but_not_learned():
    every = stage(batch_size=100, iid_share=0.0, frontier_share=1.0)
    whole, few = (
        draw(LEDGER, s, 0) for s in (every, dataclasses.replace(every, frontier_digits=2))
    )
    assert torch.equal(whole.hidden, few.hidden), "a digit further on would give the value away"
    digit = LEDGER.serial(whole.ids[:, -96:])
    wanted = whole.learned & (~digit | ((whole.learned & digit).cumsum(1) <= 2))
    # cumsum counts from the front: the first two digits behind it, and all the words
    assert torch.equal(few.learned & digit, wanted & digit)
    assert torch.equal(few.learned & ~digit, whole.learned & ~digit)


def test_blocks_behind_the_end_can_be_left_out():
    def ended(share):
        batch = draw(LEDGER, stage(batch_size=200, iid_share=0.0, ended_share=share), 0)
        last = batch.hidden & ~batch.learned
        third = ~last.any(1)  # nothing hidden behind the active block: it is the third
        return int((third & (batch.ids[:, 32 + 63] == LEDGER.tokenizer.end_id)).sum())

    assert ended(1.0) > 10 and ended(0.0) == 0


# ---- rows that the model decodes ---------------------------------------------------------------


def knowing(decodes):
    """What a model that knows the truth says of the states: confidence, prediction, the truth."""
    hidden, _ = decodes.masks()
    answers = decodes.answers().masked_fill(hidden, LEDGER.tokenizer.end_id)
    exact = LEDGER.posterior(decodes.prompts, answers, hidden, strict=False)
    return (*exact.max(-1), exact)


def test_a_model_that_knows_the_truth_decodes_right_answers():
    decodes = OwnDecodes(LEDGER, 6, 3, 32)
    finished = []
    for _ in range(140):
        before, prompts = decodes.answers().clone(), list(decodes.prompts)
        hidden, active = decodes.masks()
        assert active.any(1).all() and not (active & ~hidden).any()
        assert decodes.advance(*knowing(decodes)) == 0
        for row in range(6):
            if decodes.prompts[row] != prompts[row]:
                finished.append((prompts[row], before[row]))
            else:
                kept = ~hidden[row]
                assert torch.equal(decodes.answers()[row][kept], before[row][kept])
    assert len(finished) > 6 and decodes.drawn == 6 + len(finished)
    for prompt, answer in finished:
        # All but what the last commits of the last block added is there.
        hidden = answer == LEDGER.tokenizer.mask_id
        answer = answer.masked_fill(hidden, LEDGER.tokenizer.end_id)[None]
        assert not LEDGER.posterior([prompt], answer, hidden[None], strict=False).isnan().any()


def test_a_wrong_token_is_not_committed():
    decodes = OwnDecodes(LEDGER, 6, 4, 32)
    for _ in range(40):
        _, _, exact = knowing(decodes)
        sure = torch.rand(6, 96, generator=torch.Generator().manual_seed(1))
        wrong = exact.argmin(-1)  # of probability 0
        assert decodes.advance(sure, wrong, exact) == 6
        assert not knowing(decodes)[2].isnan().any()


def test_a_row_without_an_answer_begins_anew():
    decodes = OwnDecodes(LEDGER, 3, 5, 32)
    decodes.answers()[0, :2] = LEDGER.tokenizer.encode("1")[0]
    confidence, prediction, exact = knowing(decodes)
    assert exact[0].isnan().any() and not exact[1:].isnan().any()
    prompt = decodes.prompts[0]
    decodes.advance(confidence, prediction, exact)
    assert decodes.prompts[0] != prompt and decodes.masks()[0][0].all()


OWN = stage(exact=True, own_decodes=3, front_weight=2.0)


def test_own_decodes_are_learned_on_and_go_on():
    run = trainer(OWN)
    ids, targets, weight = run.batch(0)
    assert ids.shape == (4 + 3, 128) and targets.shape[:2] == weight.shape == (7, 96)
    assert torch.equal(ids[4:], run.decodes.ids)
    assert torch.equal(weight[4:] > 0, run.decodes.masks()[1])
    before = run.decodes.ids.clone()
    run.train_step()
    assert not torch.equal(run.decodes.ids, before)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    before, after = (torch.linalg.svdvals(m) for m in (matrices, orthogonalized(matrices)))
    assert before.max() > 4 and 0.4 < after.min() and after.max() < 1.3
    # The two matrices do not touch each other.
    # In float64 what a batch adds up in another order is 1e-12, whatever the five steps make of it.
    matrices = matrices.double()
    assert torch.allclose(orthogonalized(matrices[:1])[0], orthogonalized(matrices)[0], atol=1e-9)


def test_muon_descends_and_decays():
    weight = torch.nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.eye(4)
    optimizer.step()
    step = 0.1 * 0.2 * 4**0.5
    off = torch.full((4, 4), 2.0 * 0.95)
    assert torch.allclose(weight.detach(), off - step * orthogonalized(torch.eye(4)[None])[0])


def test_what_is_exported_is_the_average_of_the_weights_in_16_bits(tmp_path):
    run = trainer(stage(ema_decay=0.75))
    seen = []
    for _ in range(3):
        run.train_step()
        seen.append(flat(run.model).clone())
    train_base.export(run, tmp_path, [{"name": "a"}])
    average = 0.75 * (0.75 * seen[0] + 0.25 * seen[1]) + 0.25 * seen[2]
    model = load_model(tmp_path)
    assert model.dtype == torch.float16 and model.config == run.model.config
    assert torch.equal(flat(model), average.half()) or torch.allclose(
        flat(model).float(),
        average,
        rtol=2.0**-10,
        atol=2.0**-24,  # a place of float16
    )
    assert not torch.allclose(average, seen[2], atol=1e-4)
    assert json.loads((tmp_path / "training.json").read_text()) == [{"name": "a"}]
    vocabulary = json.loads((tmp_path / "vocabulary.json").read_text())["vocabulary"]
    assert vocabulary == list(LEDGER.tokenizer.vocabulary)


class Killed(Exception):
    pass


@pytest.mark.parametrize("settings", [TINY, OWN], ids=["texts", "own decodes"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, settings):
    whole = trainer(settings)
    train_base.run(whole, tmp_path / "whole", QUICK)
    cut = trainer(settings)
    step = cut.train_step
    cut.train_step = lambda: step() if cut.step < 5 else (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        train_base.run(cut, tmp_path / "parts", QUICK)
    torch.manual_seed(123)
    resumed = trainer(settings)
    resumed.load(tmp_path / "parts" / "checkpoint.pt")
    assert resumed.step == 4  # the log has 5 lines
    train_base.run(resumed, tmp_path / "parts", QUICK)
    assert torch.equal(flat(resumed.model), flat(whole.model))
    assert torch.equal(flat(resumed.average), flat(whole.average))
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0] if "right" in line] == [3, 6]
    with pytest.raises(ValueError, match="was trained as"):
        trainer(stage(seed=1)).load(tmp_path / "parts" / "checkpoint.pt")


def test_stages_follow_each_other_and_are_not_repeated(tmp_path, monkeypatch):
    stages = (TINY, stage(name="b", seed=1, steps=1, learning_rate=1e-9, warmup=0))
    monkeypatch.setitem(train_base.PLANS, "ledger", Plan(SHAPE, stages))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    options = ["--no-compile", "--eval-samples", "1", "--task", "ledger", "--out"]
    train_base.main([*options, str(tmp_path / "x")])
    first, second = (load_model(tmp_path / "x" / f"stage-{n}" / "model") for n in "ab")
    # The second stage is one step of 1e-9, of Muon 10 times that: below a place of float16.
    assert torch.allclose(flat(first).float(), flat(second).float(), atol=1e-5)
    told = json.loads((tmp_path / "x" / "stage-b" / "model" / "training.json").read_text())
    assert [one.get("name") for one in told] == [None, "a", "b"]
    log = tmp_path / "x" / "stage-a" / "log.jsonl"
    before = log.stat().st_mtime_ns
    train_base.main([*options, str(tmp_path / "x")])
    assert log.stat().st_mtime_ns == before
    train_base.main([*options, str(tmp_path / "y"), "--from-stage", "b", "--init",
                     str(tmp_path / "x" / "stage-a" / "model")])  # fmt: skip
    again = load_model(tmp_path / "y" / "stage-b" / "model")
    assert torch.equal(flat(again), flat(second))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--from-stage", "1"], "--from-stage and --init go together"),
        (["--from-stage", "9", "--init", "x"], "--from-stage takes one of 1, 2"),
    ],
)
def test_command_line_errors(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    with pytest.raises(SystemExit):
        train_base.main(["--task", "ledger", "--out", str(tmp_path), *options])
    assert words in capsys.readouterr().err


def test_an_exact_stage_learns_what_the_task_knows(monkeypatch):
    run = trainer(stage(batch_size=16, exact=True, behind_weight=0.5, iid_share=0.5))
    ids, targets, weight = run.batch(0)
    hidden = ids[:, -96:] == LEDGER.tokenizer.mask_id
    assert targets.shape == (16, 96, len(LEDGER.tokenizer)) and not weight[~hidden].any()
    assert (weight[hidden] >= 0.5 - 1e-4).all() and weight.max() > 3.9  # digits weigh 4
    know = (targets + 1e-9).log()
    monkeypatch.setattr(train_base, "_answer_logits", lambda *_: know)
    assert abs(float(run._loss_of(ids, targets, weight)[0])) < 1e-5
    monkeypatch.setattr(train_base, "_answer_logits", lambda *_: know * 0)
    assert float(run._loss_of(ids, targets, weight)[0]) > 1
    monkeypatch.undo()
    words = Trainer(get_task("pronounce"), SHAPE, run.stage, compiled=False)
    with pytest.raises(ValueError, match="pronounce has no exact distribution"):
        words.batch(0)


@pytest.mark.parametrize("name", TASKS)
def test_a_trained_model_is_known_by_its_vocabulary(name):
    config = train_base.model_config(SHAPE, get_task(name))
    assert task_of(config).name == name
    assert task_of(dataclasses.replace(config, mask_id=None)) is None
