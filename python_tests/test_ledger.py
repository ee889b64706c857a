# SPDX-License-Identifier: Apache-2.0
"""The ledger task and its model: generator, split, verifier, tokenizer, weights, accuracy."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from r2dllm_ext import DecodeConfig, generate, load_model
from r2dllm_ext.tasks import get_task, ledger
from r2dllm_ext.tasks.ledger import (
    HIGHEST_OPERAND,
    HIGHEST_VALUE,
    Problem,
    Tokenizer,
    make_sample,
    parse_prompt,
    verify,
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
    prompt, answer = get_task("ledger").encode(samples(1)[0])
    assert len(answer) == 96 and answer[-1] == tokenizer.end_id
    assert tokenizer.decode(torch.tensor(answer), skip_special=True) == samples(1)[0].answer
    with pytest.raises(ValueError, match="unknown word 'banana' at word 1"):
        tokenizer.encode("add banana")
    with pytest.raises(ValueError, match="unknown word '17' .*'1 7'"):
        tokenizer.encode("17")
    with pytest.raises(ValueError, match=f"id {len(tokenizer)} at place 0"):
        tokenizer.decode([len(tokenizer)])
    long = make_sample(0, 1, operations=8, answer_length=160)
    assert len(long.answer.split()) > 96
    with pytest.raises(ValueError, match="in 96 slots"):
        get_task("ledger").encode(long)


def test_digits_weigh_more_and_come_in_order():
    task, ids = get_task("ledger"), torch.tensor([Tokenizer().encode("add 3 to 1 4 .")])
    assert task.weights(ids).tolist() == [[1.0, 4.0, 1.0, 4.0, 4.0, 1.0]]
    assert task.serial(ids).tolist() == [[False, True, False, True, True, False]]
    sample = task.sample(0, 3, split="test")
    assert sample == make_sample(0, 3, split="test")
    assert task.verify(sample.prompt, sample.answer).right == 1


def test_the_tuned_model_takes_fewer_forwards():
    """With r2 19.0 instead of 39.2 in the demo (README)."""
    forwards = {}
    prompts = [torch.tensor([Tokenizer().encode(s.prompt)]) for s in samples(4, "test", seed=0)]
    for name in ("ledger", "ledger-base"):
        model = load_model(name)
        config = DecodeConfig.r2(model.mask_id)
        options = {"gen_length": ledger.ANSWER_LENGTH, "block_length": 32, "config": config}
        forwards[name] = sum(generate(model, p, **options).nfe for p in prompts)
    assert forwards["ledger"] < 0.8 * forwards["ledger-base"]


@pytest.mark.parametrize("name", ["ledger", "ledger-base"])
def test_bundled_models_answer_unseen_prompts(name):
    model, words, asked = load_model(name), Tokenizer(), samples(64, "test", seed=4)
    assert model.config.vocab_size == len(words) and model.dtype == torch.float32
    prompts = [torch.tensor(words.encode(sample.prompt)) for sample in asked]
    ids = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
    tokens, _, _ = generate(
        model,
        ids.clamp(min=words.pad_id),
        gen_length=ledger.ANSWER_LENGTH,
        block_length=32,
        config=DecodeConfig.budget(words.mask_id),
        attention_mask=ids >= 0,
    )
    texts = [words.decode(row) for row in tokens[:, ids.size(1) :].tolist()]
    right = sum(verify(s.problem, text).correct for s, text in zip(asked, texts, strict=True))
    # 97 % and more of 96 (bench/README.md); the bound is 3 standard errors of 64 below 95 %.
    assert right / len(asked) >= 0.86, texts[:3]
