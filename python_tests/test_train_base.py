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
from train_base import Batch, Plan, Shape, Stage, Trainer, collate, draw, hide, reveal  # noqa: E402

LEDGER = get_task("ledger")
SHAPE = Shape(width=16, layers=1, heads=2, mlp_width=16)
TINY = Stage("a", seed=0, steps=6, batch_size=4, learning_rate=1e-3, warmup=2, own_share=0.4)
QUICK = argparse.Namespace(eval_every=3, eval_samples=2, save_every=2, log_every=1)


def stage(**changes):
    return dataclasses.replace(TINY, **changes)


def trainer(settings=TINY):
    return Trainer(LEDGER, SHAPE, settings, compiled=False)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_masks_follow_their_modes():
    blocks = torch.arange(96) // 32
    iid = draw(LEDGER, stage(batch_size=200, iid_share=1.0, own_share=0.0), 0)
    assert iid.ids.shape == (200, 32 + 96) and torch.equal(iid.hidden, iid.learned)
    assert iid.hidden.float().mean().item() == pytest.approx(0.5, abs=0.06)
    for share in ({"own_share": 0.0}, {"frontier_share": 1.0}, {"own_share": 1.0}):
        batch = draw(LEDGER, stage(batch_size=200, iid_share=0.0, **share), 0)
        assert batch.own.all() == (share == {"own_share": 1.0})
        for hidden, learned in zip(batch.hidden, batch.learned, strict=True):
            touched = blocks[learned].unique()
            assert len(touched) <= 1, "one active block"
            if len(touched):
                assert hidden[blocks > touched[0]].all()
                assert not hidden[blocks < touched[0]].any()
        assert (batch.hidden & ~batch.learned).any()


def test_digits_far_behind_the_front_are_hidden_but_not_learned():
    every = stage(batch_size=100, iid_share=0.0, frontier_share=1.0, own_share=0.0)
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


class Surest(torch.nn.Module):
    """Surer of a cell the further right it stands; reads no target."""

    def forward(self, ids, *, attention_mask, logits_positions):
        first, last = logits_positions
        logits = torch.zeros(len(ids), last - first, 64)
        logits[..., 5] = torch.arange(last - first) / 10
        return argparse.Namespace(logits=logits)


def test_own_rows_show_what_the_model_is_surest_of():
    ids = collate([LEDGER.encode(LEDGER.sample(0, i)) for i in range(50)], LEDGER)
    learned = torch.zeros(50, 96, dtype=torch.bool)
    learned[:, 32:64] = True
    hidden = learned.clone()
    hidden[:, 64:] = True
    own = torch.arange(50) % 2 == 0
    shown = reveal(Surest(), Batch(ids, hidden, learned, own), LEDGER, torch.Generator())
    assert torch.equal(shown.hidden[~own], hidden[~own])
    left = shown.learned[own].sum(1)
    assert left.min() >= 1 and left.min() < 8 and left.max() > 24  # never none: one is left
    for row, n in zip(shown.learned[own], left, strict=True):
        assert row[32 : 32 + n].all() and row.sum() == n
    assert shown.hidden[:, 64:].all()
    visible = hide(shown.ids, shown.hidden, LEDGER)[:, 32:]
    assert torch.equal(visible == LEDGER.tokenizer.mask_id, shown.hidden)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    before, after = (torch.linalg.svdvals(m) for m in (matrices, orthogonalized(matrices)))
    assert before.max() > 4 and 0.4 < after.min() and after.max() < 1.3
    # The two matrices do not touch each other.
    assert torch.allclose(orthogonalized(matrices[:1])[0], orthogonalized(matrices)[0], atol=1e-4)


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
        flat(model).float(), average, rtol=1e-3, atol=1e-6
    )
    assert not torch.allclose(average, seen[2], atol=1e-4)
    assert json.loads((tmp_path / "training.json").read_text()) == [{"name": "a"}]
    vocabulary = json.loads((tmp_path / "vocabulary.json").read_text())["vocabulary"]
    assert vocabulary == list(LEDGER.tokenizer.vocabulary)


class Killed(Exception):
    pass


def test_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = trainer()
    train_base.run(whole, tmp_path / "whole", QUICK)
    cut = trainer()
    step = cut.train_step
    cut.train_step = lambda: step() if cut.step < 5 else (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        train_base.run(cut, tmp_path / "parts", QUICK)
    torch.manual_seed(123)
    resumed = trainer()
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
    assert abs(float(run._loss_of(ids, targets, weight))) < 1e-5
    monkeypatch.setattr(train_base, "_answer_logits", lambda *_: know * 0)
    assert float(run._loss_of(ids, targets, weight)) > 1
    monkeypatch.undo()
    words = Trainer(get_task("pronounce"), SHAPE, run.stage, compiled=False)
    with pytest.raises(ValueError, match="pronounce has no exact distribution"):
        words.batch(0)


@pytest.mark.parametrize("name", TASKS)
def test_a_trained_model_is_known_by_its_vocabulary(name):
    config = train_base.model_config(SHAPE, get_task(name))
    assert task_of(config).name == name
    assert task_of(dataclasses.replace(config, mask_id=None)) is None
