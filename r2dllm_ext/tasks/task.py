# SPDX-License-Identifier: Apache-2.0
"""What a task is: prompts, answers, a verifier, what its loss weighs, and a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .words import WordTokenizer


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of an answer.

    wrong_step: the first part (sentence, word) that is wrong, from 0; None where all are right.
    right, parts: how many parts are right, of how many that are judged one by one.
    """

    correct: bool
    wrong_step: int | None = None
    reason: str = ""
    right: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Sample:
    """A prompt and one right answer, as text, without end tokens."""

    prompt: str
    answer: str


class Task:
    """Base class of the tasks; a new one is a file with a subclass, and a line in `TASKS`.

    name: of the task and of its tuned model; its base model is `name`-base.
    part: what `Verdict.wrong_step` numbers.
    answer_length: token slots of an answer, a multiple of `block_length` and of 32.
    prompt_length: slots that every prompt of `sample` fits into, a multiple of 32 too.
    block_length: of its decodes. Blocks keep what hangs on each other in order; parts that do not
        are better off in one block, where none waits for another.
    """

    name: str
    part: str
    answer_length: int
    block_length: int = 32
    prompt_length: int
    tokenizer: WordTokenizer

    def sample(self, seed: int, index: int, *, split: str = "train") -> Sample:
        """The `index`-th sample of a seed, the same on every machine."""
        raise NotImplementedError

    def unseen(self, seed: int, number: int) -> list[str]:
        """The first prompts of a seed's test split; some tasks have those of seed 0 at hand."""
        return [self.sample(seed, i, split="test").prompt for i in range(number)]

    def verify(self, prompt: str, answer: str) -> Verdict:
        """Judges the text `answer`, end tokens allowed behind it; ValueError: not a prompt."""
        raise NotImplementedError

    def right_cells(self, prompt: str, answer: list[int]) -> list[bool]:
        """Cells of answer ids [A] that belong to parts which are right; all or none by default."""
        return [self.verify(prompt, self.tokenizer.decode(answer)).correct] * len(answer)

    def weights(self, answers: Tensor) -> Tensor:
        """Loss weights, float32, of answer ids [B, A]: more where an error is likely and fatal."""
        raise NotImplementedError

    def serial(self, answers: Tensor) -> Tensor:
        """Cells, bool, of answer ids [B, A] that decoding decides late and in order.

        A frontier mask hides them from some cell on, while most of the others are visible: what a
        decoder meets after the easy cells. None at all where a task has no such order.
        """
        raise NotImplementedError

    def posterior(
        self, prompts: list[str], answers: Tensor, hidden: Tensor, *, strict: bool = True
    ) -> Tensor | None:
        """Exact distribution [B, A, V] of each cell of answer ids given those not `hidden`.

        None where nobody can say: then a sampled answer is all there is to learn from. A row whose
        visible cells belong to no answer raises ValueError, or is NaN if not `strict`.
        """
        return None

    def encode(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Prompt ids, and answer ids filled up to `answer_length` with the end token."""
        answer = self.tokenizer.encode(sample.answer)
        if len(answer) > self.answer_length:
            raise ValueError(
                f"{self.name}: an answer of {len(answer)} tokens in {self.answer_length} slots"
            )
        fill = [self.tokenizer.end_id] * (self.answer_length - len(answer))
        return self.tokenizer.encode(sample.prompt), answer + fill
