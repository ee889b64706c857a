# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning pipeline: its parts, a whole run, a killed one, several processes, bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import roundings
from sft_cases import MASK, ROLLOUT, VOCAB, WORDS, L, examples, prompts, tiny, trainer

from r2dllm_ext import DecodeConfig, generate, load_model, sft
from r2dllm_ext.cli import main
from r2dllm_ext.models import save_model
from r2dllm_ext.sft.artefacts import read_lines
from r2dllm_ext.sft.rounds import choose
from r2dllm_ext.sft.rounds import examples as chosen_examples
from r2dllm_ext.sft.selection import spearman
from r2dllm_ext.sft.training import example_order, saved_steps
from r2dllm_ext.tasks.ledger import Ledger


def gradients(one: sft.Trainer) -> dict[str, torch.Tensor]:
    """By names of the model's weights, whole."""
    one.gradients()
    found = {}
    for name, weight in one.objective.named_parameters():
        gradient = weight.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name.removeprefix("module.").removeprefix("model.")] = gradient.detach().clone()
    return found


def assert_gradients_close(found: dict, expected: dict) -> None:
    """Sums over at most 4 * 19 cells, each of two layers' sums of 32, in another order: about 200
    roundings, which add up to 14 (their root) of the largest gradient, 0.75; 1e-6 is 22 of that."""
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


# ---- select ----------------------------------------------------------------------------------


def rollout_of(prompt, sample, total, *, correct=True, right=None, complete=True, length=10, nfe=5):
    if right is None:
        right = None if correct is None else float(correct)
    score = {
        "total": total,
        "stability": total,
        "window": 0.0,
        "ambiguity": 0.0,
        "nfe_per_token": nfe / length,
        "rule_count": 0.0,
    }
    return {
        "prompt": prompt,
        "sample": sample,
        "score": score,
        "right": right,
        "correct": correct,
        "complete": complete,
        "length": length,
        "nfe": nfe,
    }


POOL = [
    rollout_of(0, 0, 3.0),
    rollout_of(0, 1, 1.0, nfe=8),
    rollout_of(1, 0, 0.1, correct=False, right=0.5),
    rollout_of(1, 1, 2.0, length=4),
    rollout_of(2, 0, 0.2, complete=False),
    rollout_of(3, 0, 1.5),
    rollout_of(4, 0, 1.0),
    rollout_of(5, 0, 4.0),
]


@pytest.mark.parametrize(
    "options, chosen",
    [
        ({}, [(0, 1), (4, 0), (3, 0)]),  # 5 prompts are left, half of them rounded up
        ({"quantile": 0.2}, [(0, 1)]),
        ({"quantile": 1.0}, [(0, 1), (4, 0), (3, 0), (1, 1), (5, 0)]),
        ({"filter": "none", "quantile": 0.2}, [(1, 0)]),
        ({"filter": "parts", "quantile": 0.4}, [(1, 0), (0, 1)]),
        ({"order": "length", "quantile": 0.2}, [(1, 1)]),
        ({"order": "nfe", "quantile": 1.0}, [(0, 0), (1, 1), (3, 0), (4, 0), (5, 0)]),
    ],
)
def test_selection(options, chosen):
    records, report = sft.select_rollouts(POOL, sft.Selection(**options))
    assert [(r["prompt"], r["sample"]) for r in records] == chosen
    assert report["selected"] == len(chosen) and report["answers"] == 8


def test_random_selection_hangs_on_seed_and_answer_alone():
    def chosen(pool, seed):
        records, _ = sft.select_rollouts(pool, sft.Selection(order="random", seed=seed))
        return {(r["prompt"], r["sample"]) for r in records}

    assert chosen(POOL, 0) == chosen(POOL[::-1], 0)
    assert len({frozenset(chosen(POOL, seed)) for seed in range(8)}) > 1


@pytest.mark.parametrize(
    "pool, options, message",
    [
        ([], {}, "nothing to train on: of 0 answers 0 are complete"),
        ([rollout_of(0, 0, 1.0, correct=False)], {}, "1 are complete and 0 of these correct"),
        ([rollout_of(0, 0, 1.0, correct=False)], {"filter": "parts"}, "0 of these right in a part"),
        ([rollout_of(0, 0, 1.0, correct=None)], {}, "There was no verifier"),
        (
            [rollout_of(0, 0, 1.0, complete=False)],
            {"filter": "none"},
            "of 1 answers 0 are complete",
        ),
    ],
)
def test_empty_pool(pool, options, message):
    with pytest.raises(ValueError, match=message):
        sft.select_rollouts(pool, sft.Selection(**options))


def test_rank_correlation_with_ties():
    assert spearman([1, 2, 2, 3], [1, 5, 5, 9]) == 1
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487)  # ranks 1.5 1.5 3 4
    assert spearman([1, 1], [1, 2]) is None


# ---- batches and loss ------------------------------------------------------------------------


SHARES = ("trajectory", "iid", "frontier")


def masking_of(mode: str = "block", **changes):
    shares = {f"{name}_share": float(name == mode) for name in SHARES}
    return sft.Training(**{**shares, **changes}).masking(MASK, L)


@pytest.mark.parametrize("mode", ["block", "iid"])
@pytest.mark.parametrize("shift", [0, 1])
def test_batch(shift, mode):
    data = examples(4)
    data = [example._replace(commit_step=None) for example in data]
    batch = sft.make_batch(
        data, range(4), 7, masking_of(mode, ratio=(0.5, 0.5)), logits_shift=shift, pad_id=0
    )
    assert batch.ids.shape == (8, 5 + 16) and batch.keys.shape == batch.ids.shape
    place = batch.rows + shift
    assert (batch.ids.flatten()[place] == MASK).all() and (batch.weights == 1).all()
    # Pairs of views complement each other: in one block, or all over.
    by_view = [place[place // 21 == view] % 21 for view in range(8)]
    for b, example in enumerate(data):
        cells = sorted(by_view[b].tolist() + by_view[b + 4].tolist())
        start = 5 + L * (cells[0] != 5)
        assert cells == list(range(5, 21) if mode == "iid" else range(start, start + L))
        for view in (b, b + 4):
            learned = batch.targets[place // 21 == view].tolist()
            assert learned == [example.answer_ids[i - 5] for i in by_view[view].tolist()]
            assert batch.ids[view, :5].tolist()[5 - len(example.prompt_ids) :] == example.prompt_ids
            assert batch.keys[view].tolist() == [
                i >= 5 - len(example.prompt_ids) for i in range(21)
            ]


def test_modes_have_their_shares():
    masking = sft.Training(
        trajectory_share=0.3, iid_share=0.25, frontier_share=0.15
    ).masking(MASK, L)  # fmt: skip
    for step in range(5):
        modes = masking.modes(torch.arange(400), step)
        for mode, share in zip((*SHARES, "block"), (0.3, 0.25, 0.15, 0.3), strict=True):
            assert abs(modes.count(mode) - 400 * share) <= 4
            for i in range(0, 400, 20):  # in any few of them
                assert abs(modes[i : i + 20].count(mode) - 20 * share) <= 2
    assert modes != masking.modes(torch.arange(400), 5)


def test_states_of_a_decode_have_no_complement_and_far_tokens_weigh_less():
    data = [example._replace(commit_step=list(range(16))) for example in examples(4)]
    masking = masking_of("trajectory", ratio=(0.7, 0.7), near=3, far_weight=0.25)
    batch = sft.make_batch(data, range(4), 0, masking, logits_shift=0, pad_id=0)
    assert len(batch.ids) == 4
    for view in range(4):
        own = batch.rows // 21 == view
        cells = batch.rows[own] % 21 - 5
        # Of a block of 8 the last 6, in the order of their commits.
        assert cells.tolist() == list(range(2, 8) if cells[0] < 8 else range(10, 16))
        assert batch.weights[own].tolist() == [1.0] * 3 + [0.25] * 3


def test_what_a_decode_never_reached_is_hidden_and_not_learned():
    steps = [0, 1, 2, 3, 4, 5, 6, 7, *[-1] * 8]
    data = [example._replace(commit_step=steps) for example in examples(4)]
    for mode in ("block", "iid", "trajectory"):
        batch = sft.make_batch(data, range(4), 1, masking_of(mode), logits_shift=0, pad_id=0)
        assert (batch.ids[:, -8:] == MASK).all() and (batch.rows % 21 < 13).all()


def test_weights_and_serial_tokens_of_a_task():
    weights, serial = [float(i) for i in range(16)], [i % 2 == 0 for i in range(16)]
    data = [e._replace(token_weights=weights, serial=serial) for e in examples(4)]
    data = [example._replace(commit_step=None) for example in data]
    for mode in ("block", "frontier"):
        batch = sft.make_batch(data, range(4), 3, masking_of(mode), logits_shift=0, pad_id=0)
        assert batch.weights.tolist() == (batch.rows % 21 - 5).float().tolist()
    # Serial cells are hidden from one on, in the active block.
    for view in range(len(batch.ids)):
        cells = set((batch.rows[batch.rows // 21 == view] % 21 - 5).tolist())
        for start in (0, 8):
            block = [i in cells for i in range(start, start + 8, 2)]
            assert block == sorted(block)
    for mode, name in (("trajectory", "commit_step"), ("frontier", "serial")):
        with pytest.raises(ValueError, match=f"mode '{mode}' takes examples with {name}"):
            without = [e._replace(**{name: None}) for e in examples(2)]
            sft.make_batch(without, range(2), 0, masking_of(mode), logits_shift=0, pad_id=0)


@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (2, 0, 1)])
def test_rows_of_a_flat_batch_are_clamped_within_their_own_sequence(lengths):
    """With a shift the first token of a sequence learns from its own row, as it does alone."""
    answers = [e.answer_ids for e in examples(len(lengths))]
    data = [sft.Example([7] * n, a) for n, a in zip(lengths, answers, strict=True)]
    masking = sft.Training(iid_share=1.0, ratio=(1.0, 1.0), complementary=False).masking(MASK, L)
    options = {"logits_shift": 1, "pad_id": 0}
    batch = sft.make_batch(data, range(len(data)), 0, masking, **options)
    width = batch.ids.shape[1]
    for place, (n, example) in enumerate(zip(lengths, data, strict=True)):
        own = batch.rows[batch.rows // width == place] % width
        first = width - 16 - n  # behind the padding
        assert own.tolist() == [max(first, first + n + i - 1) for i in range(16)]
        alone = sft.make_batch([example], [place], 0, masking, **options)
        assert (own - first).tolist() == alone.rows.tolist()


ANSWER = [5] * 16
OF_OTHER_TOKENS = [
    (
        {"commit_step": [0] * 8},
        "commit_step takes 16 values, one for each token of the answer, got 8",
    ),
    ({"commit_step": [0] * 18}, "commit_step takes 16 values, .*, got 18"),
    ({"token_weights": [2.0] * 3}, "token_weights takes 16 values, .*, got 3"),
    ({"serial": []}, "serial takes 16 values, .*, got 0"),
    ({"answer_ids": ANSWER[:8]}, r"answer_ids takes .* as many as examples\[0\] \(16\), got 8"),
    ({"answer_ids": []}, "answer_ids takes one token or more, .*, got 0"),
]


@pytest.mark.parametrize("count, places", [(0, 0), (2, 1), (2, 3)])
def test_each_example_has_a_place(count, places):
    data = [sft.Example([3], ANSWER)] * count
    with pytest.raises(ValueError, match=rf"make_batch: places takes one for each .* \({count}\)"):
        sft.make_batch(data, range(places), 0, masking_of("block"), logits_shift=0, pad_id=0)


@pytest.mark.parametrize("change, message", OF_OTHER_TOKENS)
def test_what_an_example_says_is_of_its_own_tokens(change, message):
    """A list that is too short would be taken for the last ones, one too long reach the prompt."""
    data = [sft.Example([3, 4], ANSWER), sft.Example([3, 4], ANSWER)._replace(**change)]
    with pytest.raises(ValueError, match=rf"make_batch: examples\[1\].{message}"):
        sft.make_batch(data, range(2), 0, masking_of("block"), logits_shift=0, pad_id=0)
    with pytest.raises(ValueError, match=rf"Trainer: examples\[1\].{message}"):
        trainer(tiny("dream"), data)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"prompt_ids": [5, 56]}, ValueError, r"prompt_ids takes an integer in \[0, 55\], got 56"),
        ({"answer_ids": [-1] * 16}, ValueError, "answer_ids takes an integer in .*, got -1"),
        ({"answer_ids": [1.5] * 16}, TypeError, "answer_ids takes an integer in .*, got 1.5"),
        ({"prompt_ids": [5] * 60}, ValueError, r"takes .* has positions \(64\), got 76"),
        ({"token_weights": [math.nan] * 16}, ValueError, "token_weights takes .*, got nan"),
        ({"token_weights": [-1] * 16}, ValueError, "token_weights takes .* >= 0, got -1"),
        ({"prompt_ids": torch.tensor([5])}, TypeError, "prompt_ids takes a list, got tensor"),
    ],
)
def test_examples_that_the_model_can_not_learn_are_named(change, error, message):
    data = [sft.Example([3, 4], ANSWER), sft.Example([3, 4], ANSWER)._replace(**change)]
    with pytest.raises(error, match=rf"Trainer: examples\[1\].*{message}"):
        trainer(data=data)


def test_batches_do_not_hang_on_default_dtype_and_device():
    data, masking = examples(4), sft.Training(iid_share=0.3).masking(MASK, L)
    options = {"logits_shift": 1, "pad_id": 0}
    places = range(1000, 1004)
    plain = sft.make_batch(data, places, 5, masking, **options), example_order(5, 0, 9, 3)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        changed = sft.make_batch(data, places, 5, masking, **options), example_order(5, 0, 9, 3)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert changed[1] == plain[1]
    for ours, theirs in zip(changed[0], plain[0], strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_loss_is_that_of_all_logits():
    model, data = tiny(), examples(3)
    masking = sft.Training().masking(MASK, L)
    batch = sft.make_batch(data, range(3), 0, masking, logits_shift=1, pad_id=0)
    logits = model(batch.ids, attention_mask=batch.keys).logits
    wanted = F.cross_entropy(logits.flatten(0, 1)[batch.rows], batch.targets)
    # Both are means of row losses over a vocabulary of 56.
    error = roundings(2 * VOCAB + len(batch.targets))
    assert sft.Objective(model)(batch).item() == pytest.approx(wanted.item(), rel=error)
    # A row left of a masked cell predicts it; padding in front changes nothing.
    assert (batch.ids.flatten()[batch.rows + 1] == MASK).all()
    alone = sft.make_batch(data[:1], [0], 0, masking, logits_shift=1, pad_id=0)
    assert alone.keys is None and len(alone.ids[0]) == 19
    padded = sft.Objective(model)(
        alone._replace(
            ids=F.pad(alone.ids, (2, 0)),
            keys=F.pad(torch.ones_like(alone.ids, dtype=torch.bool), (2, 0)),
            rows=alone.rows + 2 * (alone.rows // 19 + 1),
        )
    )
    # The rotation by other entries of its tables: float32 angles of up to 20 radians, 2^-20 off.
    assert padded.item() == pytest.approx(sft.Objective(model)(alone).item(), rel=1e-4)


def test_the_average_of_the_weights_is_the_result():
    one, plain = trainer(ema_decay=0.8), trainer()
    kept = [{n: w.clone() for n, w in plain.trained_weights().items()}]
    for _ in range(6):
        one.update()
        plain.update()
        kept.append({n: w.clone() for n, w in plain.trained_weights().items()})
    found = one.trained_weights()
    for name, weight in kept[-1].items():
        average = kept[1][name]
        for step in range(1, 6):
            decay = min(0.8, step / (step + 1))
            average = average * decay + kept[step + 1][name] * (1 - decay)
        error = roundings(3 * 6) * max(kept[step][name].abs().max().item() for step in range(1, 7))
        torch.testing.assert_close(found[name], average, rtol=0, atol=error)
        assert torch.equal(dict(one.model.named_parameters())[name], weight)  # trains on as before


def test_every_example_is_met_once_before_any_is_met_again():
    order = example_order(5, 0, 15, 3)
    assert [sorted(order[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert order == list(itertools.chain(*(example_order(5, i, 3, 3) for i in range(0, 15, 3))))
    assert order != example_order(5, 0, 15, 4)


@pytest.mark.parametrize(
    "field, value",
    [
        ("steps", 0),
        ("batch_size", True),
        ("learning_rate", 0),
        ("near", -1),
        ("far_weight", -0.5),
        ("ema_decay", 1.5),
        ("frontier_share", -0.1),
        ("ratio", (0.6, 0.4)),
        ("ratio", (0.5,)),
        ("weighting", "mean"),
        ("entropy_weight", -1),
        ("entropy_gate", "wrong"),
        ("weight_decay", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", "1e-3"),
        ("entropy_weight", math.inf),
        ("lora_alpha", math.inf),
        ("clip_norm", math.nan),
        ("iid_share", 1.5),
    ],
)
def test_training_is_validated_when_it_is_built(field, value):
    of_another_kind = (field, value) in (("batch_size", True), ("learning_rate", "1e-3"))
    error = TypeError if of_another_kind else ValueError
    with pytest.raises(error, match=f"Training: {field} takes "):
        sft.Training(**{field: value})


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulated_gradients_are_those_of_the_batch(micro):
    whole, parts = gradients(trainer()), gradients(trainer(micro_batch_size=micro))
    assert whole.keys() == parts.keys()
    assert_gradients_close(parts, whole)
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())


def test_training_teaches_an_answer_and_saves_forwards():
    data = examples(1)
    model = tiny()
    options = {"gen_length": 16, "block_length": L, "config": DecodeConfig.fast_dllm(MASK)}
    prompt = torch.tensor([data[0].prompt_ids])
    before = generate(model, prompt, **options)
    one = trainer(model, data, steps=150, iid_share=0.0, entropy_weight=0.5)
    losses = [one.update()["loss"] for _ in range(150)]
    after = generate(model.eval(), prompt, **options)
    assert max(losses[-10:]) < losses[0] / 4  # a direction: how far depends on the machine
    assert after.sequences[0, len(data[0].prompt_ids) :].tolist() == data[0].answer_ids
    assert after.nfe < before.nfe


def test_training_goes_on_from_a_checkpoint(tmp_path):
    whole, first, second = trainer(), trainer(), trainer()
    entries = [whole.update() for _ in range(6)]
    assert [first.update() for _ in range(3)] == entries[:3]
    first.save(tmp_path / "step-3")
    assert saved_steps(tmp_path)[0] == 3
    second.load(tmp_path / "step-3", 3)
    assert [second.update() for _ in range(3)] == entries[3:]
    for name, weight in whole.trained_weights().items():
        assert torch.equal(second.trained_weights()[name], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters(tmp_path, dtype):
    pytest.importorskip("peft")
    base = tiny().to(dtype)
    save_model(base, tmp_path / "base")
    one = trainer(load_model(tmp_path / "base"), lora_rank=4)
    for _ in range(3):
        one.update()
    weights = one.trained_weights()
    assert weights and all("lora_" in name for name in weights)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    sft.export(load_model(tmp_path / "base"), weights, one.training, tmp_path / "merged")
    merged, ids = load_model(tmp_path / "merged"), torch.arange(3, 20)[None]
    with torch.no_grad():
        got, adapted, old = (m(ids).logits.float() for m in (merged, one.model.eval(), base))
    rounded = 1e-3 if dtype == torch.float32 else 0.2  # merged weights are rounded once more
    assert (got - adapted).norm() < rounded * (adapted - old).norm()
    assert (adapted - old).abs().max() > 0.3


class Breaks:
    """A model that says NaN about sequences that begin with a token."""

    def __init__(self, first: int) -> None:
        self.model, self.first = tiny(), first

    def __call__(self, ids, **options):
        output = self.model(ids, **options)
        logits = output.logits.masked_fill((ids[:, 0] == self.first)[:, None, None], torch.nan)
        return output._replace(logits=logits)


@pytest.mark.parametrize(
    "verdict, right",
    [(True, 1.0), (0, 0.0), (0.25, 0.25), (np.float32(0.25), 0.25), (torch.tensor(True), 1.0)],
)
def test_a_verifier_says_which_share_is_right(tmp_path, verdict, right):
    judge = {"decode": WORDS.decode, "verifier": lambda record, text: verdict}
    (record,) = sft.roll_out(tiny(), [sft.Prompt({}, [5])], ROLLOUT, tmp_path, **judge)
    assert (record["right"], record["correct"]) == (right, right == 1)
    assert sft.summarise([record] * 2)["right"] == right


@pytest.mark.parametrize("verdict", [1.5, -0.1, float("nan"), None, "yes", torch.ones(2)])
def test_a_share_is_between_0_and_1(tmp_path, verdict):
    judge = {"decode": WORDS.decode, "verifier": lambda record, text: verdict}
    with pytest.raises(ValueError, match=r"prompt 1 .* takes a bool or a share in \[0, 1\]"):
        sft.roll_out(tiny(), [sft.Prompt({}, [5])], ROLLOUT, tmp_path, **judge)


def test_folders_are_paths_or_their_names(tmp_path):
    recipe = sft.Recipe(tmp_path, ROLLOUT, sft.Selection(), sft.Training(), {})
    assert recipe.model == str(tmp_path)
    sft.roll_out(tiny(), [sft.Prompt({}, [5])], ROLLOUT, str(tmp_path), decode=WORDS.decode)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_round_may_lose_the_tolerance_itself():
    """Of 100 answers two: 0.05 - 0.03 is more than 0.02 in floating point."""
    rounds = sft.Rounds(validation=100, tolerance=0.02)
    for right in range(2, 101):
        assert rounds.keeps(right / 100, (right - 2) / 100)
        assert right == 2 or not rounds.keeps(right / 100, (right - 3) / 100)
    assert rounds.keeps(None, None)


class HalfRight(Ledger):
    def right_cells(self, prompt, answer):
        assert prompt == "given"
        return [i < 8 for i in range(len(answer))]


@pytest.mark.parametrize("filter_, weigh", [("parts", 8), ("none", 16)])
def test_a_run_learns_and_validates_by_parts(tmp_path, monkeypatch, filter_, weigh):
    learned = []

    class Seen(sft.Trainer):
        def __init__(self, model, examples, *args, **options):
            learned.extend(sum(w > 0 for w in e.token_weights) for e in examples)
            super().__init__(model, examples, *args, **options)

    monkeypatch.setattr("r2dllm_ext.sft.pipeline.Trainer", Seen)
    save_model(tiny(), tmp_path / "checkpoint")
    recipe = sft.Recipe(
        model=str(tmp_path / "checkpoint"),
        rollout=ROLLOUT,
        selection=sft.Selection(filter=filter_),
        training=sft.Training(steps=1, batch_size=1),
        decoders={},
        rounds=sft.Rounds(validation=1),
    )
    judge = {"decode": WORDS.decode, "verifier": lambda record, text: 0.5, "task": HalfRight()}
    given = [sft.Prompt({"prompt": "given"}, [5])] * 2
    summary = sft.run(recipe, given, tmp_path / "out", progress=False, **judge)
    assert learned == [weigh]
    assert summary["validation"] == summary["rounds"][0]["attempts"][0]["right"] == 0.5


def test_of_an_answer_the_right_parts_alone_are_learned():
    task = HalfRight()
    record = {"prompt": 0, "token_ids": list(range(3, 19)), "commit_step": [0] * 16}
    prompt = sft.Prompt({"prompt": "given"}, [5])
    (every,) = chosen_examples([record], [prompt], task)
    (few,) = chosen_examples([record], [prompt], task, right_alone=True)
    assert few.token_weights == every.token_weights[:8] + [0.0] * 8
    assert all(every.token_weights)


def test_an_answer_that_can_not_be_finished_costs_the_others_nothing(tmp_path):
    given = [sft.Prompt({}, [i, 5, 6]) for i in range(10, 15)]
    judge = {"decode": WORDS.decode, "verifier": lambda record, text: True}
    whole = sft.roll_out(tiny(), given, ROLLOUT, tmp_path / "whole", **judge)
    with pytest.warns(UserWarning, match="1 of 2 answers: .*no progress at step 1, row 1"):
        found = sft.roll_out(Breaks(11), given, ROLLOUT, tmp_path / "broken", **judge)
    assert found[0] == whole[0] and found[2:] == whole[2:]
    assert not found[1]["complete"] and not found[1]["correct"] and whole[1]["correct"]
    selected, _ = sft.select_rollouts(found, sft.Selection(quantile=1.0))
    assert sorted(record["prompt"] for record in selected) == [0, 2, 3, 4]


@pytest.mark.parametrize(
    "empty", [{"RANK": ""}, {"RANK": " "}, {"RANK": "0", "WORLD_SIZE": ""}, {"LOCAL_RANK": " "}]
)
def test_empty_environment_variables_are_unset(monkeypatch, empty):
    for name, value in ({"WORLD_SIZE": "1"} | empty).items():
        monkeypatch.setenv(name, value)
    with sft.process_group(torch.device("cpu")) as device:
        assert device == torch.device("cpu") and not dist.is_initialized()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"RANK": "x"}, "variable RANK takes an integer >= 0, got 'x'"),
        ({"WORLD_SIZE": "-1"}, "variable WORLD_SIZE takes an integer >= 0, got '-1'"),
        ({"LOCAL_RANK": "0.5"}, "variable LOCAL_RANK takes an integer >= 0, got '0.5'"),
        ({"MASTER_ADDR": " "}, "variable MASTER_ADDR takes what torchrun sets, got none"),
        ({"MASTER_PORT": ""}, "variable MASTER_PORT takes what torchrun sets, got none"),
    ],
)
def test_environment_variables_of_torchrun_are_named(monkeypatch, change, message):
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in (launched | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), sft.process_group(torch.device("cpu")):
        pass


# ---- several processes -----------------------------------------------------------------------


def _worker(rank: int, folder: str) -> None:
    """Gradients of both kinds of parallelism, and a checkpoint that one process wrote."""
    torch.set_num_threads(1)
    path = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    for parallel in ("ddp", "fsdp"):
        one = trainer(parallel=parallel, micro_batch_size=1, ema_decay=0.5)
        found = gradients(one)
        one.load(path / "step-2", 2)
        entries = [one.update() for _ in range(2)]
        one.save(path / parallel / "step-4")
        weights = one.trained_weights()
        if rank == 0:
            torch.save((found, entries, weights), path / f"{parallel}.pt")
    answers = sft.roll_out(tiny(), prompts(), ROLLOUT, path / "rollouts", decode=WORDS.decode)
    assert len(answers) == 5
    with pytest.raises(ValueError, match="batch_size takes a multiple of the 2 processes, got 3"):
        trainer(batch_size=3)
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    reference = trainer(ema_decay=0.5)
    expected = gradients(reference)
    for _ in range(2):
        reference.update()
    reference.save(tmp_path / "step-2")
    entries = [reference.update() for _ in range(2)]
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    for parallel in ("ddp", "fsdp"):
        found, logged, weights = torch.load(tmp_path / f"{parallel}.pt")
        assert found.keys() == expected.keys()
        assert_gradients_close(found, expected)
        # A direction: Adam divides a gradient by its own size, so where it is nothing but roundings
        # (of the gradients above) it moves a weight by as much as any, and no bound follows from
        # them. An update moves a weight by up to the learning rate, 1e-2, and there are four: what
        # differs is a hundredth of one, and the loss, next to 1, by no more than that.
        for ours, theirs in zip(entries, logged, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4)
        for name, weight in reference.trained_weights().items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)
        alone = trainer(ema_decay=0.5)
        alone.load(tmp_path / parallel / "step-4", 4)
        for name, weight in alone.trained_weights().items():
            assert torch.equal(weight, weights[name])
    mine = sft.roll_out(tiny(), prompts(), ROLLOUT, tmp_path / "alone", decode=WORDS.decode)
    assert mine == [r for f in sorted((tmp_path / "rollouts").glob("*")) for r in read_lines(f)]


# ---- a whole run -----------------------------------------------------------------------------

VERIFIER = """
import os, signal
def check(record, answer):
    if os.environ.get("KILL_AT") == str(record["prompt_ids"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return record["good"]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A checkpoint, prompts and a verifier that knows some of them as good."""
    folder = tmp_path_factory.mktemp("sft")
    save_model(tiny(), folder / "checkpoint")
    lines = [{"prompt_ids": e.prompt_ids, "good": i % 4 > 0} for i, e in enumerate(examples(8))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "prompts.jsonl").write_text(text)
    (folder / "few.jsonl").write_text("".join(text.splitlines(keepends=True)[:3]))
    (folder / "judge_for_test.py").write_text(VERIFIER)
    return folder


@pytest.fixture
def arguments(place, monkeypatch):
    """The command of a run into a folder; changes win."""
    monkeypatch.syspath_prepend(str(place))

    def command(out: Path, **changes) -> list[str]:
        options = {
            "model": place / "checkpoint",
            "out": out,
            "prompts": place / "prompts.jsonl",
            "eval_prompts": place / "few.jsonl",
            "verifier": "judge_for_test:check",
            "gen_length": 16,
            "block_length": L,
            "rollout_batch": 2,
            "steps": 30,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "save_every": 2,
            "stop_id": "none",
            "threshold": 0.5,
            "samples": 2,
            "temperature": 0.7,
        }
        words = ["sft", "--ids"]
        for name, value in (options | changes).items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return words

    return command


def files(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items())}


def test_run_and_killed_run(place, arguments, tmp_path, capsys):
    """Killed by SIGKILL while rolling out and while training: the same files in the end."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(arguments(whole)) == 0
    assert "the fine-tuned model" in capsys.readouterr().out
    expected = files(whole)
    assert [name for name in expected if name.startswith("round-1/rollouts/")] == [
        f"round-1/rollouts/{n:06}.jsonl" for n in range(8)
    ]
    selection = json.loads(expected["round-1/selection.json"])
    assert selection["answers"] == 16 and selection["pool"] == 12 and selection["selected"] == 3
    assert len(expected["round-1/selected.jsonl"].splitlines()) == 3
    log = [json.loads(line) for line in expected["round-1/train/log.jsonl"].splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 31))
    losses = [entry["loss"] for entry in log]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert load_model(whole / "model").mask_id == MASK
    evaluation = json.loads(expected["evaluation.json"])["evaluation"]
    assert set(evaluation) == {"fast_dllm", "r2"} and evaluation["r2"]["tuned"]["answers"] == 3
    assert not any(".part" in name or "step-" in name for name in expected)

    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(place), *sys.path]))
    command = [sys.executable, "-m", "r2dllm_ext", *arguments(killed)]
    third = json.dumps(examples(8)[2].prompt_ids)
    done = subprocess.run(command, env=environment | {"KILL_AT": third}, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert sorted(p.name for p in (killed / "round-1" / "rollouts").iterdir()) == [
        "000000.jsonl",
        "000001.jsonl",
    ]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while not saved_steps(killed / "round-1" / "train") and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (killed / "model").exists()
    assert main(arguments(killed)) == 0
    assert files(killed) == expected

    before = {p: p.stat().st_mtime_ns for p in (whole / "round-1" / "rollouts").iterdir()}
    weights = (whole / "model" / "model.safetensors").stat().st_mtime_ns
    assert main(arguments(whole)) == 0  # finished: nothing is computed again
    assert before == {p: p.stat().st_mtime_ns for p in (whole / "round-1" / "rollouts").iterdir()}
    assert weights == (whole / "model" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()

    changed = {"steps": 31}, {"quantile": 0.4}, {"prompts": place / "few.jsonl"}
    for change, word in zip(
        changed,
        ("training.steps was 30, is 31", "selection.quantile was 0.5", "other prompts (line 4"),
        strict=True,
    ):
        assert main(arguments(whole, **change)) == 2
        assert word in capsys.readouterr().err
    damaged = whole / "round-1" / "rollouts" / "000003.jsonl"
    damaged.write_bytes(expected["round-1/rollouts/000003.jsonl"][:-30])
    assert main(arguments(whole)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "000003.jsonl: line 2 is not JSON" in error and "delete the file" in error
    damaged.unlink()
    assert main(arguments(whole)) == 0
    assert files(whole) == expected


def test_rounds(place, arguments, tmp_path, capsys):
    """Each round rolls out prompts of its own with the model of the last one; the same files after
    a kill between rounds; an average of the weights is the result."""
    out, options = tmp_path / "out", {"rounds": 2, "ema_decay": 0.9, "steps": 6, "quantile": 1.0}
    options |= {"hard_share": 0.3, "trajectory_share": 0.3}
    command = [*arguments(out, **options), "--greedy-first"]
    assert main(command) == 0
    assert "round 2: 3 of 8 answers selected" in capsys.readouterr().out
    expected = files(out)
    assert files(out / "model") == files(out / "round-2" / "model")
    assert files(out / "round-1" / "model") != files(out / "round-2" / "model")
    # Of eight prompts, half a round; what the verifier never takes stays out, hard or not.
    for number in (1, 2):
        chosen = read_lines(out / f"round-{number}" / "selected.jsonl")
        assert sorted(record["prompt"] for record in chosen) == [1, 2, 3]
        assert [r["prompt"] for r in read_lines(out / f"round-{number}" / "hard" / "000000.jsonl")]
    shutil.rmtree(out / "round-2")
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "evaluation")
    assert main(command) == 0 and files(out) == expected
    # The second round learns from its own answers and those of the one before, from its weights.
    first, second = (
        sft.roll_out(
            load_model(source), sft.read_prompts(place / "prompts.jsonl", list)[4:], ROLLOUT,
            tmp_path / name, decode=WORDS.decode,
        )
        for name, source in (("a", place / "checkpoint"), ("b", out / "round-1" / "model"))
    )  # fmt: skip
    greedy = [r for r in rollouts(out / "round-2") if r["sample"] == 0]
    wanted = [r["token_ids"] for r in second]
    assert [r["token_ids"] for r in greedy] == wanted != [r["token_ids"] for r in first]


def test_blend_of_first_and_last_weights(place, arguments, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(out, steps=4, blend=0.25)) == 0
    first, last, blend = (
        load_model(folder).state_dict()
        for folder in (place / "checkpoint", out / "round-1" / "model", out / "model")
    )
    for name, weight in blend.items():
        torch.testing.assert_close(weight, 0.75 * first[name] + 0.25 * last[name])
    assert any(not torch.equal(blend[name], last[name]) for name in blend)


@pytest.mark.parametrize("replay", [0, 1, 2])
def test_replay_is_of_the_last_rounds(arguments, tmp_path, monkeypatch, replay):
    learned = []

    class Spy(sft.Trainer):
        def __init__(self, model, examples, *args, **options) -> None:
            learned.append(len(examples))
            super().__init__(model, examples, *args, **options)

    monkeypatch.setattr("r2dllm_ext.sft.pipeline.Trainer", Spy)
    out = tmp_path / "out"
    assert main(arguments(out, rounds=3, replay=replay, steps=1, quantile=1.0, samples=1)) == 0
    own = [len(read_lines(out / f"round-{n}" / "selected.jsonl")) for n in (1, 2, 3)]
    assert own == [1, 2, 3]
    assert learned == [sum(own[max(0, i - replay) : i + 1]) for i in range(3)]


def test_hard_prompts_are_a_share_and_right(tmp_path):
    """Of 30 prompts 12 are solved; of the others every second one is, one token a step."""
    calls = []

    def decoded(model, prompts, rollout, folder, name=""):
        calls.append((folder.name, len(prompts), rollout.config, rollout.samples))
        patient = folder.name == "hard"
        return [
            rollout_of(i, 0, 1.0, correct=i % 2 == 0 if patient else i < 12)
            for i in range(len(prompts))
        ]

    selection, rounds = sft.Selection(quantile=1.0), sft.Rounds(hard_share=0.25)
    chosen, report = choose(None, prompts(30), ROLLOUT, selection, rounds, tmp_path, decoded)
    assert [(name, n) for name, n, *_ in calls] == [("rollouts", 30), ("hard", 18)]
    assert calls[1][2:] == (DecodeConfig.vanilla(MASK), 1)
    # 4 of 16 are hard ones: prompts 12, 14, 16, 18, by their numbers in the round.
    assert [r["prompt"] for r in chosen] == [*range(12), 12, 14, 16, 18]
    assert (report["selected"], report["hard"]) == (12, 4)


def rollouts(folder: Path) -> list[dict]:
    return [r for file in sorted((folder / "rollouts").glob("*")) for r in read_lines(file)]


@pytest.mark.parametrize("worse_until", [1, 2, 3, 9])
def test_a_round_that_costs_answers_is_not_kept(
    place, arguments, tmp_path, monkeypatch, worse_until, capsys
):
    """Once more with care, and if that is no better, the round before was the last."""
    calls = itertools.count()
    truth = iter([0.9, *[0.5] * 9]) if worse_until == 9 else None
    shares = {1: [0.9, 0.89, 0.9], 2: [0.9, 0.5, 0.88, 0.9], 3: [0.9, 0.9, 0.5, 0.5]}

    def right(*args, **options):
        return next(truth) if truth else shares[worse_until][next(calls)]

    monkeypatch.setattr("r2dllm_ext.sft.pipeline._share_right", right)
    out = tmp_path / "out"
    status = main(arguments(out, rounds=2, validation=2, steps=4))
    if worse_until == 9:
        assert status == 2 and not (out / "model").exists()
        assert "50.0% of the validation's answers are right after" in capsys.readouterr().err
        return
    assert status == 0
    attempts = {
        1: [["round-1/model"], ["round-2/model"]],
        2: [["round-1/model", "round-1/model-again"], ["round-2/model"]],
        3: [["round-1/model"], ["round-2/model", "round-2/model-again"]],
    }[worse_until]
    summary = json.loads((out / "evaluation.json").read_text())
    found = [[one["model"] for one in r["attempts"]] for r in summary["rounds"]]
    assert found == attempts
    last = attempts[-1][-1] if worse_until < 3 else "round-1/model"
    assert files(out / "model") == files(out / last)


def test_care_halves_the_rate_and_keeps_more_plain_masks():
    training = sft.Training(
        learning_rate=4e-4, trajectory_share=0.5, iid_share=0.2, frontier_share=0.1
    ).cautious()
    assert training.learning_rate == 2e-4
    shares = training.trajectory_share, training.iid_share, training.frontier_share
    assert shares == pytest.approx((0.4, 0.4, 0.2))
    alone = sft.Training(iid_share=0.0).cautious()
    assert (alone.iid_share, alone.trajectory_share) == (0.0, 0.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": "no/such/file.jsonl"}, "no/such/file.jsonl: No such file"),
        ({"prompts": ""}, "there is no prompt in it"),
        ({"prompts": '{"prompt_ids": [1]}\n{"prompt_ids": [1'}, "line 2 is not JSON"),
        ({"prompts": "[1]"}, "line 1 takes a JSON object"),
        ({"prompts": '{"text": "hello"}'}, 'prompt 1: takes a text "prompt" or a list'),
        ({"prompts": '{"prompt_ids": [1, "a"]}'}, "prompt 1: prompt_ids takes a list of integers"),
        ({"prompts": json.dumps({"prompt_ids": [3] * 60})}, "more than the model's context of 64"),
        ({"prompts": '{"prompt_ids": [9999]}'}, "token id 9999, the model takes 0.."),
        ({"verifier": "judge"}, "verifier takes module:function, got 'judge'"),
        ({"verifier": "no_such_module:check"}, "can't be imported"),
        ({"verifier": "os:sep"}, "is no function but a str"),
        ({"verifier": "json:loads"}, "the verifier failed on prompt 1"),
        ({"verifier": "none", "filter": "correct"}, "There was no verifier"),
        ({"stop_id": MASK}, "stop_id takes an id that is not config.mask_id"),
        ({"temperature": 0}, "all samples of a prompt are the same"),
        ({"quantile": 0}, "Selection: quantile takes a number in (0, 1], got 0"),
        ({"order": "best"}, "Selection: order takes one of"),
        ({"steps": 0}, "Training: steps takes an integer >= 1, got 0"),
        ({"rounds": 0}, "Rounds: number takes an integer >= 1, got 0"),
        ({"rounds": 9}, "8 prompts are too few: 9 rounds take one each"),
        ({"rounds": 2, "validation": 7}, "8 prompts are too few: 2 rounds take one each"),
        ({"blend": 0}, "Rounds: blend takes a number in (0, 1], got 0"),
        ({"hard_share": 1}, "Rounds: hard_share takes a number in [0, 1), got 1"),
        ({"validation": 2, "verifier": "none"}, "validation and hard_share take a verifier"),
        ({"frontier_share": 0.5}, "mode 'frontier' takes examples with serial"),
        ({"iid_share": 0.7, "trajectory_share": 0.7}, "frontier_share takes at most 1, got 1.4"),
        ({"iid_share": 2}, "Training: iid_share takes a number in [0, 1], got 2"),
        ({"learning_rate": "1e30"}, "try a lower learning_rate"),
        ({"learning_rate": "inf"}, "Training: learning_rate takes a finite number > 0, got inf"),
        ({"steps": "9" * 30}, "--steps: takes an integer of 64 bits"),
        ({"gen_length": 12}, "takes a multiple of block_length"),
    ],
)
def test_errors_are_one_line(arguments, tmp_path, capsys, change, message):
    if "\n" in (text := str(change.get("prompts", "no/"))) or "/" not in text:
        (tmp_path / "given.jsonl").write_text(change["prompts"])
        change = {"prompts": tmp_path / "given.jsonl"}
    assert main(arguments(tmp_path / "out", **change)) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("r2dllm: error: ") and message in error


def test_no_mask_id(arguments, tmp_path, capsys):
    save_model(tiny(mask_id=None), tmp_path / "checkpoint")
    assert main(arguments(tmp_path / "out", model=tmp_path / "checkpoint")) == 2
    assert "names no mask_token_id: give --mask-id" in capsys.readouterr().err


def test_ledger_needs_no_prompts(tmp_path, capsys):
    """With the ledger's vocabulary, prompts and verifier are the task's own."""
    save_model(tiny(max_length=512), tmp_path / "checkpoint")
    command = [
        "sft",
        "--model",
        str(tmp_path / "checkpoint"),
        "--out",
        str(tmp_path / "out"),
        "--draw",
        "2",
        "--eval-draw",
        "2",
        "--gen-length",
        "32",
    ]
    assert main(command) == 2  # a random model is never right
    assert "nothing to train on: of 2 answers" in capsys.readouterr().err
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["verifier"] == "r2dllm_ext.tasks.ledger:verify_record"
    assert recipe["selection"]["filter"] == "parts"
    record = json.loads((tmp_path / "out" / "prompts.jsonl").read_text().splitlines()[0])
    assert WORDS.encode(record["prompt"]) == record["prompt_ids"]


def test_rollouts_in_bfloat16(tmp_path):
    seen = []

    class Recording:
        device = torch.device("cpu")
        model = tiny()

        def __call__(self, ids, **options):
            output = self.model(ids, **options)
            seen.append(output.logits.dtype)
            return output

    for autocast in (False, True):
        rollout = dataclasses.replace(ROLLOUT, autocast=autocast)
        given = [sft.Prompt({}, [5, 6])]
        sft.roll_out(Recording(), given, rollout, tmp_path / str(autocast), decode=WORDS.decode)
        assert set(seen) == {torch.bfloat16 if autocast else torch.float32}
        seen.clear()
    with torch.autocast("cpu", torch.bfloat16):  # the caller's own stays
        rollout = dataclasses.replace(ROLLOUT, autocast=False)
        sft.roll_out(Recording(), given, rollout, tmp_path / "own", decode=WORDS.decode)
    assert set(seen) == {torch.bfloat16}


def test_greedy_first_is_a_flag():
    with pytest.raises(TypeError, match="Rollout: greedy_first takes "):
        sft.Rollout(DecodeConfig.fast_dllm(MASK), gen_length=16, block_length=L, greedy_first="no")
