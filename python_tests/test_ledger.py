# SPDX-License-Identifier: Apache-2.0
"""The ledger task and its model: generator, split, verifier, tokenizer, training, accuracy."""

import builtins
import dataclasses
import json

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from r2dllm_ext import DecodeConfig, generate, ledger
from r2dllm_ext.ledger import Problem, Tokenizer, encode_sample, make_sample, parse_prompt, verify
from r2dllm_ext.ledger.task import HIGHEST_OPERAND, HIGHEST_VALUE
from r2dllm_ext.ledger.train import (
    TrainConfig,
    Trainer,
    collate,
    export,
    learning_rate,
    main,
    mask_answers,
    run,
)
from r2dllm_ext.models import load_model

TINY = TrainConfig(
    steps=6, batch_size=4, width=16, layers=1, heads=2, mlp_width=16, warmup=2, compile=False
)
RIGHT = (
    "first 4 plus 3 makes 7 . second okay take 5 from 7 , which thus gives 2 . "
    "third then well we have 2 and add 9 , so now it is 1 1 . so we end at 1 1 ."
)
PROBLEM = Problem(4, (3, -5, 9))


def samples(n, split="train", seed=0, **options):
    return [make_sample(seed, i, split=split, **options) for i in range(n)]


def test_generator_is_fixed_by_seed_and_index():
    assert samples(20) == samples(20)
    assert make_sample(0, 7) == samples(20)[7]
    assert samples(20, seed=1) != samples(20)
    # Pinned: the shipped weights and log belong to exactly this text.
    first = make_sample(0, 0)
    assert first.problem == Problem(2, (-2, 2, -2, 4, 4))
    assert first.answer.startswith("first well we have 2 and take 2 , so now it is 0 . second now")


def test_problems_stay_in_range_and_answers_fit():
    tokenizer = Tokenizer()
    for sample in samples(300) + samples(50, operations=3, answer_length=64):
        problem = sample.problem
        assert all(0 <= value <= HIGHEST_VALUE for value in problem.values)
        assert all(1 <= abs(n) <= HIGHEST_OPERAND for n in problem.operands)
        assert len(tokenizer.encode(sample.answer)) < 96
    lengths = {len(sample.prompt.split()) for sample in samples(50)}
    assert len(lengths) > 1, "prompts vary in length"


def test_train_and_test_problems_never_meet():
    train = {sample.problem for sample in samples(2000)}
    test = {s.problem for seed in (0, 1) for s in samples(300, "test", seed)}
    assert not train & test
    assert {p.split for p in train} == {"train"} and {p.split for p in test} == {"test"}


def test_answers_paraphrase():
    heads = {" ".join(s.answer.split(" . ")[0].split()) for s in samples(200)}
    assert len(heads) > 150
    for form in ("which", "we have", "makes", "becomes"):
        assert any(form in head for head in heads)


@pytest.mark.parametrize("operations", [1, 3, 5, 8])
def test_verifier_accepts_generated_answers(operations):
    for sample in samples(200, operations=operations, answer_length=13 * operations + 40):
        assert verify(sample.problem, sample.answer).correct
        assert parse_prompt(sample.prompt) == sample.problem
        assert verify(sample.prompt, sample.answer + " <end> <end>").correct


@pytest.mark.parametrize(
    ("old", "new", "step", "reason"),
    [
        ("first 4", "first 5", 0, "old value is 5, expected 4"),
        ("plus 3", "plus 2", 0, "operand is 2, expected 3"),
        ("plus 3", "minus 3", 0, "operation is minus, expected plus"),
        ("makes 7", "makes 8", 0, "new value is 8, expected 7"),
        ("makes 7", "makes 0 7", 0, "new value is 07, expected 7"),
        ("makes 7", "makes", 0, "not a step sentence"),
        ("second", "third", 1, "ordinal is third, expected second"),
        ("take 5", "add 5", 1, "operation is add, expected take"),
        ("from 7", "to 7", 1, "preposition is to, expected from"),
        ("gives 2", "gives 3", 1, "new value is 3, expected 2"),
        ("second okay", "second <mask>", 1, "not a step sentence"),
        ("have 2", "have 1 2", 2, "old value is 12, expected 2"),
        ("is 1 1 .", "is 1 1", 2, "not a step sentence"),
        ("end at 1 1", "end at 1 2", 3, "final value is 12, expected 11"),
        ("so we end at", "so we take", 3, "not a final sentence"),
        (" so we end at 1 1 .", "", 3, "3 sentences, expected 4"),
        ("end at 1 1 .", "end at 1 1 . answer : 1 1 .", 3, "5 sentences, expected 4"),
        ("end at 1 1 .", "end at 1 1 . <end> 7", 3, "5 sentences, expected 4"),
        (RIGHT[RIGHT.index("third") :], "", 2, "ends before the third step"),
        (RIGHT, "", 0, "ends before the first step"),
    ],
)
def test_verifier_finds_the_first_wrong_thing(old, new, step, reason):
    assert verify(PROBLEM, RIGHT).correct
    assert RIGHT.count(old) == 1
    verdict = verify(PROBLEM, RIGHT.replace(old, new))
    assert not verdict.correct and verdict.wrong_step == step
    assert reason in verdict.reason


def test_every_single_digit_matters():
    for sample in samples(20):
        words = sample.answer.split()
        for place, word in enumerate(words):
            if word.isdigit():
                words[place] = str((int(word) + 1) % 10)
                assert not verify(sample.problem, " ".join(words)).correct
                words[place] = word


def test_generator_refuses_bad_arguments():
    with pytest.raises(ValueError, match="split is 'dev'"):
        make_sample(0, 0, split="dev")
    with pytest.raises(ValueError, match=r"operations is 9, takes 1\.\.8"):
        make_sample(0, 0, operations=9)
    with pytest.raises(ValueError, match="answer_length is 64, takes at least 73"):
        make_sample(0, 0, answer_length=64)
    prompt = samples(1)[0].prompt
    for bad in (
        "hello",
        prompt.replace("second", "third"),
        prompt + " .",
        prompt.replace("2", "x"),
    ):
        with pytest.raises(ValueError, match="not a ledger prompt: "):
            parse_prompt(bad)


def test_tokenizer_round_trip_and_errors():
    tokenizer = Tokenizer()
    assert 45 <= len(tokenizer) <= 64 and len(set(tokenizer.vocabulary)) == len(tokenizer)
    for sample in samples(50):
        for text in (sample.prompt, sample.answer):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt, answer = encode_sample(samples(1)[0], tokenizer)
    assert len(answer) == 96 and answer[-1] == tokenizer.end_id
    assert tokenizer.decode(torch.tensor(answer), skip_special=True) == samples(1)[0].answer
    with pytest.raises(ValueError, match="unknown word 'banana' at word 1"):
        tokenizer.encode("add banana")
    with pytest.raises(ValueError, match="unknown word '17' .*'1 7'"):
        tokenizer.encode("17")
    with pytest.raises(ValueError, match=f"id {len(tokenizer)} at place 0"):
        tokenizer.decode([len(tokenizer)])
    with pytest.raises(ValueError, match="in 8 slots"):
        encode_sample(samples(1)[0], tokenizer, 8)


def test_masks_follow_their_modes():
    tokenizer, generator = Tokenizer(), torch.Generator().manual_seed(0)
    ids, P = collate(samples(200), tokenizer, 96)
    answers = ids[:, P:]
    assert P % 32 == 0 and ids.shape[1] == P + 96
    blocks = torch.arange(96) // 32

    iid = dataclasses.replace(TINY, iid_share=1.0, frontier_share=0.0)
    hidden, learned = mask_answers(answers, tokenizer.digit_ids, iid, generator)
    assert torch.equal(hidden, learned)
    assert hidden.float().mean().item() == pytest.approx(0.5, abs=0.06)

    for share in (0.0, 1.0):
        block = dataclasses.replace(TINY, iid_share=0.0, frontier_share=share)
        hidden, learned = mask_answers(answers, tokenizer.digit_ids, block, generator)
        active = (hidden & ~learned).any(1)
        for row in range(200):
            touched = blocks[learned[row]].unique()
            assert len(touched) <= 1, "one active block"
            if len(touched):
                assert hidden[row, blocks > touched[0]].all()
                assert not hidden[row, blocks < touched[0]].any()
        assert active.any()


def test_digits_far_behind_the_front_are_hidden_but_not_learned():
    tokenizer = Tokenizer()
    ids, P = collate(samples(100), tokenizer, 96)
    every = dataclasses.replace(TINY, iid_share=0.0, frontier_share=1.0)
    few = dataclasses.replace(every, frontier_digits=2)
    (hidden, learned), (same, fewer) = (
        mask_answers(ids[:, P:], tokenizer.digit_ids, c, torch.Generator().manual_seed(0))
        for c in (every, few)
    )
    assert torch.equal(hidden, same), "a visible digit further on would give the value away"
    digit = torch.isin(ids[:, P:], torch.tensor(tokenizer.digit_ids))
    assert torch.equal(fewer & ~digit, learned & ~digit)
    wanted = learned & digit & ((learned & digit).cumsum(1) <= 2)
    assert torch.equal(fewer & digit, wanted)


def test_a_run_may_begin_with_the_weights_of_another(tmp_path):
    first = Trainer(TINY)
    run(first, tmp_path, stop=3, eval_samples=2, progress=False)
    config = dataclasses.replace(TINY, seed=1, frontier_digits=3)
    second = Trainer.begin_from(tmp_path / "checkpoint.pt", config)
    assert torch.equal(weights_of(first), weights_of(second)) and second.step == 0
    second.train_step()
    second.save(tmp_path / "checkpoint.pt")
    assert Trainer.resume(tmp_path / "checkpoint.pt").config == second.config
    export(second, tmp_path / "model")
    told = json.loads((tmp_path / "model" / "train_config.json").read_text())
    assert told["init"]["seed"] == 0 and told["init"]["step"] == 3 and told["step"] == 1


def test_schedule_warms_up_and_ends_at_zero():
    rates = [learning_rate(TINY, step) for step in range(TINY.steps + 1)]
    assert rates[0] == TINY.learning_rate / 2 and max(rates) == TINY.learning_rate
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def weights_of(trainer):
    return flat(trainer.model)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_what_is_exported_is_the_average_of_the_weights(tmp_path):
    trainer = Trainer(dataclasses.replace(TINY, ema_decay=0.75))
    seen = []
    for _ in range(3):
        trainer.train_step()
        seen.append(weights_of(trainer).clone())
    export(trainer, tmp_path)
    average = 0.75 * (0.75 * seen[0] + 0.25 * seen[1]) + 0.25 * seen[2]
    assert torch.allclose(flat(load_model(tmp_path)), average, atol=1e-7)
    assert not torch.allclose(average, seen[2], atol=1e-4)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    options = {"eval_every": 3, "eval_samples": 2, "log_every": 1, "progress": False}
    whole = Trainer(TINY)
    start = weights_of(whole).clone()
    run(whole, tmp_path / "whole", **options)
    run(Trainer(TINY), tmp_path / "parts", stop=3, **options)
    log = tmp_path / "parts" / "train_log.jsonl"
    # As if it had died between a log line and the next checkpoint.
    log.write_text(log.read_text() + '{"step": 4, "loss": 9, "lr": 0, "seconds": 9}\n')
    torch.manual_seed(123)
    resumed = Trainer.resume(tmp_path / "parts" / "checkpoint.pt")
    run(resumed, tmp_path / "parts", **options)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert torch.equal(flat(resumed.average), flat(whole.average))
    assert not torch.equal(weights_of(whole), start)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / name / "train_log.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == list(range(1, 7))
    assert [line["step"] for line in logs[0] if "accuracy" in line][-1] == 6


def test_exported_folder_loads_like_any_checkpoint(tmp_path):
    trainer = Trainer(TINY)
    export(trainer, tmp_path)
    model = load_model(tmp_path)
    assert model.config == trainer.model.config
    assert (model.mask_id, model.eos_id) == (trainer.tokenizer.mask_id, trainer.tokenizer.end_id)
    assert all(map(torch.equal, model.parameters(), trainer.model.parameters()))
    vocabulary = json.loads((tmp_path / "vocabulary.json").read_text())["vocabulary"]
    assert vocabulary == list(trainer.tokenizer.vocabulary)


def test_missing_tqdm_is_explained(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    with pytest.raises(ImportError, match=r"pip install .r2dllm_ext\[cli\]"):
        threads = str(torch.get_num_threads())
        main(["--out", str(tmp_path), "--no-compile", "--stop", "0", "--threads", threads])


def test_bundled_model_answers_unseen_prompts():
    model, words, asked = ledger.load(), Tokenizer(), samples(64, "test", seed=4)
    assert model.config.vocab_size == len(words)
    prompts = [torch.tensor(words.encode(sample.prompt)) for sample in asked]
    ids = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
    tokens, _, _ = generate(
        model,
        ids.clamp(min=words.pad_id),
        gen_length=ledger.ANSWER_LENGTH,
        block_length=32,
        config=DecodeConfig.vanilla(words.mask_id),
        cache="dual",
        attention_mask=ids >= 0,
    )
    texts = [words.decode(row) for row in tokens[:, ids.size(1) :].tolist()]
    right = sum(verify(s.problem, text).correct for s, text in zip(asked, texts, strict=True))
    # 90.6 % of 512 (bench/results/ledger_decode.json); the bound is 3 standard errors of 64 below.
    assert right / len(asked) >= 0.79, texts[:3]
