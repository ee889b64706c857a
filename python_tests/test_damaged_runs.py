# SPDX-License-Identifier: Apache-2.0
"""Folders of a fine-tuning run that are damaged, of another run, or on a full disk: one line, the
step before where there is one, and nothing lost."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from sft_cases import MASK, ROLLOUT, WORDS, L, examples, prompts, tiny, trainer

from r2dllm_ext import load_model, sft
from r2dllm_ext.models import save_model


def test_a_log_that_lost_lines_is_refused(tmp_path):
    one = trainer()
    sft.train(one, tmp_path, save_every=3)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="has 0 whole lines, but step-6 was reached"):
        sft.train(trainer(), tmp_path, save_every=3)


def _truncate(folder):
    (weights,) = folder.glob("*.distcp")
    weights.write_bytes(weights.read_bytes()[:-2000])


def _poison(folder, poison=lambda one: one.model.norm.weight.data.fill_(torch.nan)):
    shutil.rmtree(folder)
    one = trainer(ema_decay=0.5)
    for _ in range(4):
        one.update()
    one._non_finite = lambda: ""  # as a version that did not look would have done
    poison(one)
    one.save(folder)


def _poison_moments(folder):
    _poison(
        folder, lambda one: one.optimizer.state[one.model.norm.weight]["exp_avg"].fill_(torch.inf)
    )


def _poison_average(folder):
    _poison(folder, lambda one: one.average[3].fill_(torch.nan))


DAMAGES = {
    "weights cut short": _truncate,
    "no weights": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "no metadata": lambda folder: (folder / ".metadata").unlink(),
    "metadata cut short": lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04"),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
    "not finite": _poison,
    "moments not finite": _poison_moments,
    "average not finite": _poison_average,
    "of another step": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.with_name("step-2"), folder),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_damaged_checkpoints_the_step_before_is_taken(tmp_path, damage, capfd):
    whole = trainer(ema_decay=0.5)
    entries = [whole.update() for _ in range(2)]
    whole.save(tmp_path / "step-2")
    entries += [whole.update() for _ in range(2)]
    whole.save(tmp_path / "step-4")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    entries += [whole.update() for _ in range(2)]
    DAMAGES[damage](tmp_path / "step-4")
    one = trainer(ema_decay=0.5)
    with pytest.warns(UserWarning, match="step-4 is no whole checkpoint: .*; the one before"):
        sft.train(one, tmp_path, save_every=2)
    assert [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()] == entries
    for name, weight in whole.trained_weights().items():
        assert torch.equal(one.trained_weights()[name], weight)
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_checkpoint_alone_is_one_line(tmp_path, capfd):
    one = trainer()
    entries = [one.update() for _ in range(2)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    one.save(tmp_path / "step-2")
    _truncate(tmp_path / "step-2")
    with pytest.raises(ValueError, match="step-2 is no whole checkpoint: .*; delete .* to train"):
        sft.train(trainer(), tmp_path)
    assert capfd.readouterr().err == ""


def test_weights_that_are_not_finite_are_no_checkpoint_and_no_model(tmp_path):
    one = trainer()
    name, weight = next(iter(one.trained_weights().items()))
    with torch.no_grad():
        one.model.norm.weight[3] = torch.inf
    with pytest.raises(ValueError, match="after step 0 model.norm.weight is not finite"):
        one.save(tmp_path / "step-1")
    large = {name: torch.full_like(weight, 1e30)}  # finite, but not in float16
    with pytest.raises(ValueError, match=f"export: {name} is not finite in torch.float16"):
        sft.export(tiny().half(), large, one.training, tmp_path / "model")
    assert not any(tmp_path.iterdir())


OTHERS = {
    "fewer layers": ({}, {"model": 1}, "it holds model.model.blocks.1.* which is not trained here"),
    "more layers": ({}, {"model": 3}, "Missing key .*blocks.2"),
    "no average": ({"ema_decay": 0.5}, {}, r"it holds average.0 \(one of 21\)"),
    "an average": ({}, {"ema_decay": 0.5}, "Missing key .*average.0"),
    "fewer steps": ({}, {"steps": 1}, "takes at most step-1, the last, got step-2"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_other_settings_is_one_line(tmp_path, other):
    before, now, message = OTHERS[other]
    one = trainer(**before)
    entries = [one.update() for _ in range(2)]
    one.save(tmp_path / "step-2")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    model = tiny(layers=now["model"]) if "model" in now else tiny()
    with pytest.raises(ValueError, match=message):
        sft.train(trainer(**now | {"model": model}), tmp_path)
    assert (tmp_path / "step-2").is_dir()


@pytest.mark.parametrize("last", ['{"step": 4, "lo', "", '{"step": 3}', "[4]", "4"])
def test_where_the_log_lost_lines_the_step_before_is_taken(tmp_path, last):
    whole = trainer()
    entries = [whole.update() for _ in range(2)]
    whole.save(tmp_path / "step-2")
    entries += [whole.update() for _ in range(2)]
    whole.save(tmp_path / "step-4")
    lines = [json.dumps(entry) for entry in entries[:3]]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, last]))
    with pytest.warns(UserWarning, match="log.jsonl has 3 whole lines, but step-4 was reached"):
        sft.train(trainer(), tmp_path)
    entries += [whole.update() for _ in range(2)]
    assert [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()] == entries


# ---- records of answers ----------------------------------------------------------------------

FIELDS = {
    "text": [None, 3],
    "complete": [None, "yes"],
    "right": [None, "x", 1.5, 0.5],
    "correct": [None, 1, False],
    "length": [None, -1, 17, "x", 2.5],
    "nfe": [None, -1],
    "score": [None, [], {}, {"total": "x"}, {"total": math.nan}],
    "rule_counts": [None, {}, {"window": -1}],
    "token_ids": [None, [1], [999] * 16, [1.5] * 16, "a" * 16],
    "commit_step": [None, [1], ["a"] * 16, [-2] * 16],
}


def test_a_damaged_record_is_one_line(tmp_path):
    judge = {"decode": WORDS.decode, "verifier": lambda record, text: True}

    def rolled():
        return sft.roll_out(tiny(), prompts(2), ROLLOUT, tmp_path, **judge)

    whole, file = rolled(), tmp_path / "000000.jsonl"
    kept = file.read_text()
    for field, values in FIELDS.items():
        for value in (..., *values):
            other = {key: x for key, x in whole[1].items() if key != field}
            if isinstance(value, dict) and value:
                other[field] = whole[1][field] | value
            elif value is not ...:
                other[field] = value
            file.write_text("".join(json.dumps(x) + "\n" for x in (whole[0], other)))
            said = "correct" if (field, value) == ("right", 0.5) else field  # the two disagree
            message = f"000000.jsonl: line 2: record: {said}.* takes .*; delete the file"
            with pytest.raises(ValueError, match=message):
                rolled()
    file.write_text(kept)
    assert rolled() == whole
    with pytest.raises(ValueError, match="record: right and correct takes null without a verifier"):
        sft.roll_out(tiny(), prompts(2), ROLLOUT, tmp_path, decode=WORDS.decode)


# ---- models ----------------------------------------------------------------------------------


def run(folder, checkpoint, **changes):
    recipe = sft.Recipe(
        model=str(checkpoint),
        rollout=ROLLOUT,
        selection=sft.Selection(filter="none"),
        training=sft.Training(steps=2, batch_size=2),
        decoders={"fast_dllm": ROLLOUT.config},
    )
    options = {"decode": WORDS.decode, "evaluate_on": prompts(2), "progress": False} | changes
    return sft.run(recipe, prompts(2), folder, **options)


def _spoil(folder):
    model = load_model(folder)
    model.norm.weight.data[3] = torch.nan
    save_model(model, folder)


SPOILT = {
    "cut short": lambda made: (made / "model.safetensors").write_bytes(b"\0" * 20),
    "no weights": lambda made: (made / "model.safetensors").unlink(),
    "no config": lambda made: (made / "config.json").unlink(),
    "empty config": lambda made: (made / "config.json").write_text(""),
    "an empty folder": lambda made: (shutil.rmtree(made), made.mkdir()),
    "a file": lambda made: (shutil.rmtree(made), made.write_text("")),
    "not finite": _spoil,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A model to begin with and a run that is finished."""
    folder = tmp_path_factory.mktemp("finished")
    save_model(tiny(), folder / "checkpoint")
    run(folder / "run", folder / "checkpoint")
    return folder


@pytest.mark.parametrize("made", ["model", "round-1/model"])
@pytest.mark.parametrize("damage", SPOILT)
def test_a_damaged_model_of_a_run_is_one_line_and_made_anew(finished, tmp_path, made, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)
    before = load_model(folder / made).state_dict()
    SPOILT[damage](folder / made)
    with pytest.raises(ValueError, match=f"{made}.*; delete ") as caught:
        run(folder, finished / "checkpoint")
    assert "\n" not in str(caught.value)
    sft.artefacts.remove_folder(folder / made)
    assert run(folder, finished / "checkpoint") == run(finished / "run", finished / "checkpoint")
    for name, weight in load_model(folder / made).state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("given", [False, True])
def test_weights_that_are_not_finite_are_no_model_to_begin_with(tmp_path, given):
    """Also those that no prompt meets: they would end in a model that is none."""
    model = tiny()
    model.embed.weight.data[1] = torch.inf
    save_model(model, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="checkpoint: embed.weight is not finite in torch.float32"):
        run(tmp_path / "run", tmp_path / "checkpoint", model=model if given else None)
    model.embed.weight.data[1] = 1e30  # finite, but not in the precision of decoding
    save_model(model, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="embed.weight is not finite in torch.float16"):
        run(tmp_path / "run", tmp_path / "checkpoint", dtype=torch.float16)
    assert not (tmp_path / "run").exists()


def test_other_files_beside_the_answers_are_not_counted(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)
    summary = run(folder, finished / "checkpoint")
    (folder / "evaluation" / "base-fast_dllm" / "notes.jsonl").write_text('{"a": 1}\n')
    assert run(folder, finished / "checkpoint") == summary


@pytest.mark.parametrize("content", ["null", "[]", "3", "", '{"model'])
def test_a_damaged_recipe_is_one_line(finished, tmp_path, content):
    folder = tmp_path / "run"
    shutil.copytree(finished / "run", folder)
    (folder / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match="recipe.json is not whole: .*; delete it"):
        run(folder, finished / "checkpoint")


# ---- full disks ------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1_000, 60_000])
def test_a_full_disk_names_the_file_and_loses_nothing(tmp_path, size):
    whole = trainer()
    sft.train(whole, tmp_path / "whole", save_every=2)
    first = trainer()
    first.update(), first.update()
    folder = tmp_path / "train"
    sft.train(trainer(steps=2), folder)
    with files_of_at_most(size), pytest.raises(OSError, match=f"{folder}/(step-4|log)"):
        sft.train(trainer(), folder, save_every=2)
    assert (folder / "step-2").is_dir() and not (folder / "step-4").exists()
    with files_of_at_most(size), pytest.raises(OSError, match="model.part/model.safetensors"):
        sft.export(tiny(), whole.trained_weights(), whole.training, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    sft.train(trainer(), folder, save_every=2)
    kept, expected = (x / "log.jsonl" for x in (folder, tmp_path / "whole"))
    assert len(kept.read_text().splitlines()) == len(expected.read_text().splitlines()) == 6


# ---- settings --------------------------------------------------------------------------------


def test_settings_of_numpy_are_those_of_the_file(tmp_path):
    """Integers are integers whoever made them; recipe.json holds them as Python's."""
    rollout = sft.Rollout(
        ROLLOUT.config, gen_length=np.int64(16), block_length=torch.tensor(8), stop_id=np.int32(3)
    )
    recipe = sft.Recipe(
        model="ledger",
        rollout=rollout,
        selection=sft.Selection(quantile=np.float32(0.5), seed=np.int64(3)),
        training=sft.Training(steps=np.int64(2), learning_rate=np.float32(0.5), ratio=[0, 1]),
        decoders={},
        rounds=sft.Rounds(number=np.int16(2), blend=np.float32(0.5)),
    )
    plain = sft.Recipe(
        model="ledger",
        rollout=sft.Rollout(ROLLOUT.config, gen_length=16, block_length=8, stop_id=3),
        selection=sft.Selection(quantile=0.5, seed=3),
        training=sft.Training(steps=2, learning_rate=0.5, ratio=(0, 1)),
        decoders={},
        rounds=sft.Rounds(number=2, blend=0.5),
    )
    for one in (recipe, plain):
        sft.artefacts.settle(tmp_path / "recipe.json", dataclasses.asdict(one))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: sft.Training(ratio=0.5), "Training: ratio takes "),
        (lambda: sft.Training(ratio="ab"), "Training: ratio takes "),
        (lambda: sft.Training(ratio=(0, "b")), "Training: ratio takes a number"),
        (lambda: sft.Training(seed="x"), "Training: seed takes an integer"),
        (lambda: sft.Training(autocast=1), "Training: autocast takes a bool"),
        (lambda: sft.Training(complementary="no"), "Training: complementary takes a bool"),
        (lambda: sft.Rollout(None, gen_length=16), "Rollout: config takes a DecodeConfig"),
        (lambda: sft.Rollout(ROLLOUT.config, 16, logits_shift="1"), "Rollout: logits_shift takes"),
        (lambda: sft.Rollout(ROLLOUT.config, 16, 8, cache=1), "Rollout: cache takes one of"),
        (lambda: sft.Selection(seed=1.5), "Selection: seed takes an integer"),
        (lambda: trainer(micro_batch_size=1.5), "Trainer: micro_batch_size takes an integer"),
        (lambda: trainer(parallel=3), "Trainer: parallel takes one of"),
        (lambda: sft.train(trainer(), None, save_every="2"), "train: save_every takes an integer"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(build, message):
    with pytest.raises(TypeError, match=message):
        build()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask_id": 56}, r"mask_id takes an integer in \[0, 55\], got 56"),
        ({"pad_id": -1}, r"pad_id takes an integer in \[0, 55\], got -1"),
        ({"logits_shift": 2}, r"logits_shift takes an integer in \[0, 1\], got 2"),
        ({"block_length": 0}, "block_length takes an integer >= 1, got 0"),
    ],
)
def test_a_trainer_checks_what_it_masks_with(change, message):
    options = {"mask_id": MASK, "block_length": L} | change
    with pytest.raises(ValueError, match=f"Trainer: {message}"):
        sft.Trainer(tiny(), examples(), sft.Training(), **options)
