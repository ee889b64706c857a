# SPDX-License-Identifier: Apache-2.0
"""Between text and token ids: a task's words, a checkpoint's tokenizer, or plain ids."""

from __future__ import annotations

from typing import Protocol

from ..text_input import read_text, split_lines


class Codec(Protocol):
    """What the commands need of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str: ...


class PlainIds:
    """Token ids written as numbers."""

    def encode(self, text: str) -> list[int]:
        words = text.replace(",", " ").split()
        for word in words:
            if not word.isdecimal() or len(word) > 1000:  # of which `int` makes no number
                raise ValueError(f"--ids: a prompt takes token ids, got {word[:40]!r}")
        return [int(word) for word in words]

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        return " ".join(map(str, ids))


class Pretrained:
    """The tokenizer that a checkpoint brings, through transformers."""

    def __init__(self, name: str, *, chat: bool, trust_remote_code: bool) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(
                f"the tokenizer of {name!r} needs transformers: pip install 'r2dllm_ext[hub]' "
                "(or pass token ids with --ids)"
            ) from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no tokenizer to be had from {name!r} (pass token ids with --ids): {error}"
            ) from error
        self._chat = chat

    def encode(self, text: str) -> list[int]:
        if self._chat:
            text = self.chat_text([{"role": "user", "content": text}])
        # A chat template writes the tokens itself that the tokenizer would put in front.
        bos = self._tokenizer.bos_token
        templated = self._chat or bool(bos and text.startswith(bos))
        return self._tokenizer(text, add_special_tokens=not templated)["input_ids"]

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    @property
    def chat_template(self) -> str | None:
        return self._tokenizer.chat_template

    def chat_text(self, messages: list[dict[str, str]], *, answer_begun: bool = False) -> str:
        """Messages in the chat template; `answer_begun`: the last one is an answer to go on."""
        return self._tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not answer_begun,
            continue_final_message=answer_begun,
            tokenize=False,
        )


def pieces(codec: Codec, ids: list[int]) -> list[str]:
    """The text that each token adds; "" where a character is not complete yet."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = codec.decode(ids[:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            found.append("")
        else:
            found.append(text[len(before) :])
            before = text
    return found


def read_prompts(arguments: list[str], file: str | None) -> list[str]:
    """Prompts of the command line, then of a file; "-" stands for the lines of stdin."""
    prompts = []
    for argument in arguments:
        prompts += split_lines(read_text("-")) if argument == "-" else [argument]
    if file is not None:
        prompts += split_lines(read_text(file))
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("no prompt: give it as an argument, with --file F, or '-' for stdin")
    return prompts
