# SPDX-License-Identifier: Apache-2.0
"""Prompts from JSON lines, and the verifier that judges their answers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .artefacts import read_lines

Verifier = Callable[[dict[str, Any], str], bool | float]
"""Judges the text of an answer, given the JSON object of its prompt: right or not, or the share of
its parts that is right."""


class Prompt(NamedTuple):
    record: dict[str, Any]  # the JSON object: "prompt" or "prompt_ids", and what a verifier needs
    ids: list[int]


def read_prompts(path: Path, encode: Callable[[str], list[int]]) -> list[Prompt]:
    """Prompts of a file: a JSON object a line, with a text "prompt" or token ids "prompt_ids".

    Raises ValueError naming file and line: no JSON, no prompt in it, words that `encode` refuses,
    or no line at all.
    """
    records = read_lines(path)
    if not records:
        raise ValueError(f"{path}: there is no prompt in it")
    prompts = []
    for number, record in enumerate(records, start=1):
        try:
            prompts.append(Prompt(record, _ids(record, encode)))
        except ValueError as error:
            raise ValueError(f"{path}: prompt {number}: {error}") from error
    return prompts


def _ids(record: dict[str, Any], encode: Callable[[str], list[int]]) -> list[int]:
    text, ids = record.get("prompt"), record.get("prompt_ids")
    if ids is not None:
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"prompt_ids takes a list of integers >= 0, got {ids!r}")
        return ids
    if not isinstance(text, str):
        raise ValueError(f'takes a text "prompt" or a list "prompt_ids", got {record!r}')
    return list(encode(text))


def check_prompts(prompts: Sequence[Prompt], *, gen_length: int, config: Any) -> None:
    """That each prompt and its answer fit a model of this `ModelConfig`."""
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt.ids) + gen_length > config.context_length:
            raise ValueError(
                f"prompt {number}: {len(prompt.ids)} tokens and {gen_length} to decode are more "
                f"than the model's context of {config.context_length}"
            )
        high = max(prompt.ids, default=0)
        if high >= config.embedding_size:
            raise ValueError(
                f"prompt {number}: token id {high}, the model takes 0..{config.embedding_size - 1}"
            )


def load_verifier(name: str) -> Verifier:
    """The callable `module:function`."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"verifier takes module:function, got {name!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"verifier {name!r} can't be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"verifier {name!r} is no function but a {type(found).__name__}")
    return found
