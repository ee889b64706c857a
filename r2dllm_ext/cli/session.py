# SPDX-License-Identifier: Apache-2.0
"""A model ready to answer prompts in text."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from ..config import DecodeConfig, Rule
from ..generation import Generation, NoProgressError, generate, left_padded
from ..models import load_model
from ..stop_ids import StopId, answer_length, stop_ids
from ..tasks import Task, Verdict, task_of
from ..trace import Trace
from . import options, text

_GEN_LENGTH = 256  # what the published evaluations of LLaDA and Dream decode


class UnfinishedError(RuntimeError):
    """The model can't finish the prompts `rows` of a batch; `answers` are those of the others."""

    def __init__(self, answers: list[Answer], error: NoProgressError) -> None:
        super().__init__(str(error))
        self.answers, self.rows = answers, error.rows


class Prompt(NamedTuple):
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Answer:
    """What became of one prompt."""

    prompt: Prompt
    token_ids: list[int]  # all G
    rules: list[Rule]  # why each was committed; NONE = filled up after the end
    length: int  # tokens up to the stop token, itself included
    text: str  # up to the stop token
    pieces: list[str]  # the same, token by token
    nfe: int  # forwards in which the row had something to decide
    verdict: Verdict | None  # None: no prompt of the model's task
    part: str = ""  # what the verdict numbers

    @property
    def tokens_per_forward(self) -> float:
        return self.length / max(1, self.nfe)

    def rule_counts(self) -> dict[str, int]:
        return {rule.name.lower(): self.rules.count(rule) for rule in list(Rule)[1:]}


def cost(answer: Answer) -> str:
    return f"NFE {answer.nfe}, {answer.length} tokens, {answer.tokens_per_forward:.1f} a forward"


def describe(answer: Answer) -> str:
    """The verdict in words; empty where there is none."""
    verdict = answer.verdict
    if verdict is None:
        return ""
    if verdict.wrong_step is None:
        return "correct"
    return f"wrong in {answer.part} {verdict.wrong_step + 1}: {verdict.reason}"


class Session:
    """Loads a model and its tokenizer, and decodes.

    Args:
        args: the options of `add_model_options`, and those of `add_decode_options` as far as given.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        # Before the weights: what can be wrong without them should be said without them.
        config = options.decode_config(args)
        self._args, self.name = args, args.model
        dtype = args.dtype and getattr(torch, args.dtype)
        self.model = load_model(args.model, device=options.device(args.device), dtype=dtype)
        self.task = task_of(self.model.config)  # None: its prompts are text of any kind
        self.config = config.replace(mask_id=self._mask_id())
        own_length = _GEN_LENGTH if self.task is None else self.task.answer_length
        self.gen_length = args.gen_length or own_length
        own_block = Task.block_length if self.task is None else self.task.block_length
        self.block_length, self.cache = args.block_length or own_block, args.cache
        is_dream = self.model.config.family == "dream"
        self.logits_shift = int(is_dream) if args.logits_shift is None else args.logits_shift
        self.stop_id = self._stop_id()

    @cached_property
    def codec(self) -> text.Codec:
        args = self._args
        if getattr(args, "ids", False):
            return text.PlainIds()
        if self.task is not None:
            return self.task.tokenizer
        return text.Pretrained(args.model, chat=args.chat, trust_remote_code=args.trust_remote_code)

    def read(self, texts: list[str], *, gen_length: int | None = None) -> list[Prompt]:
        """Tokenizes prompts; ValueError for what the model does not know or has no room for."""
        prompts = [Prompt(words, self.codec.encode(words)) for words in texts]
        for i in {i for prompt in prompts for i in prompt.ids}:
            self._check_id(i, "prompt")
        self._check_lengths(prompts, gen_length or self.gen_length)
        return prompts

    def decode(
        self, prompts: list[Prompt], config: DecodeConfig | None = None, *, progress: bool = False
    ) -> tuple[list[Answer], Trace]:
        """Decodes the prompts as one batch.

        Raises UnfinishedError if the model can't finish some of them.
        """
        try:
            generation = self.generate(prompts, config, progress=progress)
        except NoProgressError as error:
            trace = error.generation.trace
            assert trace is not None  # asked for
            rows = [row for row in range(len(prompts)) if row not in error.rows]
            raise UnfinishedError(self._answers(prompts, trace, rows), error) from error
        assert generation.trace is not None  # asked for
        return self._answers(prompts, generation.trace, range(len(prompts))), generation.trace

    def generate(
        self,
        prompts: list[Prompt],
        config: DecodeConfig | None = None,
        *,
        gen_length: int | None = None,
        progress: bool = False,
    ) -> Generation:
        """The same as ids, with a trace; raises what `r2dllm_ext.generate` does."""
        pad_id = self.model.config.pad_id or 0
        ids, attention_mask = left_padded([prompt.ids for prompt in prompts], pad_id)
        config = config or self.config
        return generate(
            self.model,
            ids,
            gen_length=gen_length or self.gen_length,
            block_length=self.block_length,
            config=config,
            edit=config.edit_threshold is not None,
            cache=self.cache,
            logits_shift=self.logits_shift,
            attention_mask=attention_mask,
            stop_id=self.stop_id,
            progress=progress,
            trace=True,
        )

    def _answers(self, prompts: list[Prompt], trace: Trace, rows: Iterable[int]) -> list[Answer]:
        return [self._answer(prompts[row], trace, row) for row in rows]

    def _answer(self, prompt: Prompt, trace: Trace, row: int) -> Answer:
        ids = trace.sequences[row, trace.prompt_length :].tolist()
        words, ended = answer_length(ids, stop_ids(self.stop_id, where="Session"))
        answer = self.codec.decode(ids[:words])
        return Answer(
            prompt=prompt,
            token_ids=ids,
            rules=[Rule(value) for value in trace.commit_rule[row].tolist()],
            length=words + ended,
            text=answer,
            pieces=text.pieces(self.codec, ids[:words]),
            nfe=int(trace.row_nfe()[row]),
            verdict=self._verdict(prompt.text, answer),
            part="" if self.task is None else self.task.part,
        )

    def _verdict(self, prompt: str, answer: str) -> Verdict | None:
        if self.task is None or self.codec is not self.task.tokenizer:
            return None
        try:
            return self.task.verify(prompt, answer)
        except (ImportError, ValueError):  # no data to judge by; its words, but not a prompt
            return None

    def _mask_id(self) -> int:
        mask_id = getattr(self._args, "mask_id", None)
        if mask_id is None:
            mask_id = self.model.mask_id
        if mask_id is None:
            raise ValueError(
                f"config.json of {self._args.model!r} names no mask_token_id: give --mask-id"
            )
        self._check_id(mask_id, "mask_id")
        return mask_id

    def _stop_id(self) -> StopId:
        given = getattr(self._args, "stop_id", None)  # [None] is the word none
        if given is None:
            return self.model.eos_id
        if None in given:
            if len(given) > 1:
                raise ValueError("--stop-id takes ids or none, got both")
            return None
        for i in given:
            self._check_id(i, "stop_id")
        return tuple(given)

    def _check_id(self, i: int, name: str) -> None:
        rows = self.model.config.embedding_size
        if not 0 <= i < rows:
            raise ValueError(f"{name}: token id {i}, the model takes 0..{rows - 1}")

    def _check_lengths(self, prompts: list[Prompt], gen_length: int) -> None:
        longest, positions = max(len(p.ids) for p in prompts), self.model.config.context_length
        if longest + gen_length > positions:
            raise ValueError(
                f"a prompt of {longest} tokens and {gen_length} to decode (--gen-length) are "
                f"more than the {positions} positions of the model"
            )
