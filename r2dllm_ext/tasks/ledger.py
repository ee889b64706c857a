# SPDX-License-Identifier: Apache-2.0
"""The ledger task: follow a value through a chain of operations, in words.

A prompt gives a start value and a few operations. The answer restates, for each operation, the
value, the operation and the new value in one of four paraphrases with optional filler words, then
the final value. Numbers are unpadded digits, so where a word stands depends on what came before.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import task
from .task import Task, Verdict
from .words import END, WordTokenizer

T = TypeVar("T")
OPERATIONS = 5
ANSWER_LENGTH = 96
HIGHEST_VALUE = 19
HIGHEST_OPERAND = 5
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
DIGITS = tuple("0123456789")
DIGIT_WEIGHT = 4.0  # a wrong digit is what most wrong answers have, and few cells are digits

_WORDS = (
    "add take plus minus to from with at start begin we have and so now it is which gives makes "
    "becomes the final value end answer well then okay clearly indeed thus"
)
_VERBS, _SIGNS, _PREPOSITIONS = ("add", "take"), ("plus", "minus"), ("to", "from")
_INTROS = ("start with", "begin at", "we have")
_OPENERS = ("well", "then", "okay", "now")
_ADVERBS = ("clearly", "indeed", "thus")
# k ordinal, f openers, g adverb, v value, n operand, w new value
_SENTENCES = (
    "{k} {f} {verb} {n} {prep} {v} , which {g} gives {w} .",
    "{k} {f} we have {v} and {verb} {n} , so {g} now it is {w} .",
    "{k} {f} {v} {sign} {n} {g} makes {w} .",
    "{k} {f} {verb} {n} , so {v} {g} becomes {w} .",
)
_FINALS = ("the final value is {w} .", "so we end at {w} .", "answer : {w} .")


@dataclass(frozen=True)
class Problem:
    """A start value and signed operands, `Problem(17, (3, -5))`: add 3, then take 5."""

    start: int
    operands: tuple[int, ...]

    @property
    def values(self) -> tuple[int, ...]:
        """The value before the first operation and after each of them."""
        values = [self.start]
        for operand in self.operands:
            values.append(values[-1] + operand)
        return tuple(values)

    @property
    def split(self) -> str:
        """`"test"` for one problem in 16, by its hash, `"train"` for all others.

        The split hangs on the problem alone, so no wording, seed or index can leak one across.
        """
        key = f"{self.start} {self.operands}".encode()
        return "test" if zlib.crc32(key) % 16 == 0 else "train"


@dataclass(frozen=True)
class Sample(task.Sample):
    """A prompt, one of its many right answers, and the problem behind them."""

    problem: Problem


class Tokenizer(WordTokenizer):
    """One id a word, one id a digit.

    Attributes:
        digit_ids: ids of "0" to "9".

    >>> tokenizer = Tokenizer()
    >>> tokenizer.decode(tokenizer.encode("first add 3 to 1 4 ."))
    'first add 3 to 1 4 .'
    """

    def __init__(self) -> None:
        super().__init__((".", ",", ":", *DIGITS, *ORDINALS, *_WORDS.split()))
        self.digit_ids = tuple(self.id_of(digit, 0) for digit in DIGITS)


def make_sample(
    seed: int,
    index: int,
    *,
    split: str = "train",
    operations: int = OPERATIONS,
    answer_length: int = ANSWER_LENGTH,
) -> Sample:
    """The `index`-th sample of a seed; the same on every machine and Python version.

    Args:
        split: "train" or "test"; their problems never overlap, see `Problem.split`.
        operations: 1 to 8, default 5.
        answer_length: token slots the answer has to fit into with an end token, default 96.

    Raises `ValueError` for another split or count, or if answers would hardly fit.

    >>> sample = make_sample(0, 0, split="test")
    >>> sample.problem
    Problem(start=14, operands=(-4, 4, -1, -2, 4))
    >>> verify(sample.problem, sample.answer).correct
    True
    """
    if split not in ("train", "test"):
        raise ValueError(f"make_sample: split is {split!r}, takes 'train' or 'test'")
    if not 1 <= operations <= len(ORDINALS):
        raise ValueError(f"make_sample: operations is {operations}, takes 1..{len(ORDINALS)}")
    if answer_length < 13 * operations + 8:
        raise ValueError(
            f"make_sample: answer_length is {answer_length}, takes at least "
            f"{13 * operations + 8} for {operations} operations"
        )
    rng = Random(f"ledger {split} {seed} {index}")
    problem = _draw_problem(rng, operations)
    while problem.split != split:
        problem = _draw_problem(rng, operations)
    prompt = _write_prompt(rng, problem)
    answer = _write_answer(rng, problem)
    while len(answer.split()) >= answer_length:
        answer = _write_answer(rng, problem)
    return Sample(prompt, answer, problem)


def parse_prompt(prompt: str) -> Problem:
    """The problem a prompt text states; `ValueError` if it is not a ledger prompt."""
    match = _PROMPT_PATTERN.fullmatch(" ".join(prompt.split()))
    steps = re.findall(r"(\w+) (\w+) (\d)", match["steps"]) if match else []
    if match is None or not steps or [step[0] for step in steps] != list(ORDINALS[: len(steps)]):
        raise ValueError(f"parse_prompt: not a ledger prompt: {prompt!r}")
    adding = (_VERBS[0], _SIGNS[0])
    operands = tuple(int(n) if op in adding else -int(n) for _, op, n in steps)
    return Problem(int(match["start"].replace(" ", "")), operands)


def verify(problem: Problem | str, answer: str) -> Verdict:
    """Replays `problem` (or a prompt text) against the text `answer`, every value checked.

    End tokens may follow the answer, nothing else. The first thing that is wrong is reported.

    >>> verify("start with 4 . first add 3 . answer :", "first 4 plus 3 makes 8 . answer : 7 .")
    Verdict(correct=False, wrong_step=0, reason='new value is 8, expected 7', right=0, parts=1)
    """
    if isinstance(problem, str):
        problem = parse_prompt(problem)
    words = answer.split()
    while words and words[-1] == END:
        words.pop()
    sentences = [s.strip() for s in re.findall(r"[^.]*\.|[^.]+$", " ".join(words))]
    values, steps = problem.values, len(problem.operands)
    for step, operand in enumerate(problem.operands):
        if step >= len(sentences):
            return Verdict(False, step, f"the answer ends before the {ORDINALS[step]} step")
        reason = _check_step(sentences[step], step, values[step], operand)
        if reason:
            return Verdict(False, step, reason)
    if len(sentences) != steps + 1:
        return Verdict(False, steps, f"{len(sentences)} sentences, expected {steps + 1}")
    match = _FINAL_PATTERN.fullmatch(sentences[steps])
    if match is None:
        return Verdict(False, steps, f"not a final sentence: {sentences[steps]!r}")
    final = _number(next(group for group in match.groups() if group is not None))
    if final != values[-1]:
        return Verdict(False, steps, f"final value is {final}, expected {values[-1]}")
    return Verdict(True, right=1)


def verify_record(record: dict[str, Any], answer: str) -> bool:
    """`verify` as a verifier of `r2dllm sft`: `record["prompt"]` is the text of a prompt."""
    return verify(record["prompt"], answer).correct


class Ledger(Task):
    """The task as the trainers and commands see it."""

    name, part = "ledger", "sentence"
    answer_length, prompt_length = ANSWER_LENGTH, 32
    tokenizer: Tokenizer

    def __init__(self) -> None:
        self.tokenizer = Tokenizer()

    def sample(self, seed: int, index: int, *, split: str = "train") -> Sample:
        return make_sample(seed, index, split=split)

    def verify(self, prompt: str, answer: str) -> Verdict:
        return verify(prompt, answer)

    def weights(self, answers: Tensor) -> Tensor:
        return 1 + (DIGIT_WEIGHT - 1) * self.serial(answers).float()

    def posterior(
        self, prompts: list[str], answers: Tensor, hidden: Tensor, *, strict: bool = True
    ) -> Tensor:
        from .ledger_posterior import posterior

        problems = [parse_prompt(prompt) for prompt in prompts]
        return posterior(problems, answers, hidden, self.tokenizer, strict=strict)

    def serial(self, answers: Tensor) -> Tensor:
        return torch.isin(answers, torch.tensor(self.tokenizer.digit_ids, device=answers.device))


def _pick(rng: Random, options: Sequence[T]) -> T:
    # Of all Random methods only random() is documented to give one sequence on every version.
    return options[int(rng.random() * len(options))]


def _draw_problem(rng: Random, operations: int) -> Problem:
    value = start = _pick(rng, range(HIGHEST_VALUE + 1))
    operands = []
    for _ in range(operations):
        low, high = -min(HIGHEST_OPERAND, value), min(HIGHEST_OPERAND, HIGHEST_VALUE - value)
        operands.append(_pick(rng, [n for n in range(low, high + 1) if n]))
        value += operands[-1]
    return Problem(start, tuple(operands))


def _digits(value: int) -> str:
    return " ".join(str(value))


def _number(digits: str) -> int | str:
    """Value of unpadded digits; a padded number stays text and so equals no value."""
    plain = digits.replace(" ", "")
    return int(plain) if plain == "0" or plain[0] != "0" else plain


def _write_prompt(rng: Random, problem: Problem) -> str:
    words = _pick(rng, (_VERBS, _SIGNS))
    stop = _pick(rng, (".", ","))
    steps = (
        f"{ordinal} {words[n < 0]} {abs(n)} {stop}"
        for ordinal, n in zip(ORDINALS, problem.operands, strict=False)
    )
    return f"{_pick(rng, _INTROS)} {_digits(problem.start)} . {' '.join(steps)} answer :"


def _write_answer(rng: Random, problem: Problem) -> str:
    values = problem.values
    sentences = []
    for step, operand in enumerate(problem.operands):
        sentence = _pick(rng, _SENTENCES).format(
            k=ORDINALS[step],
            f=" ".join(_pick(rng, _OPENERS) for _ in range(_pick(rng, (0, 0, 0, 1, 1, 2)))),
            g=_pick(rng, ("", "", *_ADVERBS)),
            v=_digits(values[step]),
            n=abs(operand),
            w=_digits(values[step + 1]),
            verb=_VERBS[operand < 0],
            sign=_SIGNS[operand < 0],
            prep=_PREPOSITIONS[operand < 0],
        )
        sentences.append(sentence)
    sentences.append(_pick(rng, _FINALS).format(w=_digits(values[-1])))
    return " ".join(" ".join(sentences).split())


def _pattern(sentence: str) -> re.Pattern[str]:
    number = r"\d(?: \d)*"
    parts = {
        "{k}": rf"(?P<k>{'|'.join(ORDINALS)})",
        "{v}": rf"(?P<v>{number})",
        "{n}": rf"(?P<n>{number})",
        "{w}": rf"(?P<w>{number})",
        "{verb}": rf"(?P<verb>{'|'.join(_VERBS)})",
        "{sign}": rf"(?P<sign>{'|'.join(_SIGNS)})",
        "{prep}": rf"(?P<prep>{'|'.join(_PREPOSITIONS)})",
        "{f} ": rf"(?:(?:{'|'.join(_OPENERS)}) ){{0,2}}",
        "{g} ": rf"(?:(?:{'|'.join(_ADVERBS)}) )?",
    }
    pieces = re.split(r"(\{[fg]\} |\{\w+\})", sentence)
    return re.compile("".join(parts.get(piece, re.escape(piece)) for piece in pieces))


_PROMPT_PATTERN = re.compile(
    rf"(?:{'|'.join(_INTROS)}) (?P<start>[1-9] \d|\d) \."
    rf"(?P<steps>(?: \w+ (?:{'|'.join(_VERBS + _SIGNS)}) [1-9] [.,])+) answer :"
)
_STEP_PATTERNS = tuple(map(_pattern, _SENTENCES))
_FINAL_PATTERN = re.compile("|".join(_pattern(s).pattern.replace("?P<w>", "") for s in _FINALS))


def _check_step(sentence: str, step: int, value: int, operand: int) -> str:
    """What is wrong with a sentence, or an empty string."""
    match = next(filter(None, (p.fullmatch(sentence) for p in _STEP_PATTERNS)), None)
    if match is None:
        return f"not a step sentence: {sentence!r}"
    found = match.groupdict()
    checks = (
        ("ordinal", found["k"], ORDINALS[step]),
        ("operation", found.get("verb"), _VERBS[operand < 0]),
        ("operation", found.get("sign"), _SIGNS[operand < 0]),
        ("preposition", found.get("prep"), _PREPOSITIONS[operand < 0]),
        ("operand", _number(found["n"]), abs(operand)),
        ("old value", _number(found["v"]), value),
        ("new value", _number(found["w"]), value + operand),
    )
    for name, got, want in checks:
        if got is not None and got != want:
            return f"{name} is {got}, expected {want}"
    return ""
