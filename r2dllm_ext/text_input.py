# SPDX-License-Identifier: Apache-2.0
"""Text that comes in from files and stdin: UTF-8 in all places, lines as other tools count them."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32's begins alike


def read_text(path: Path | str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; "-" is stdin.

    Line ends are kept as they are. Raises ValueError naming the file if it is something else, and
    OSError if it can't be read.
    """
    return _stdin() if path == "-" else _decoded(Path(path).read_bytes(), str(path))


def split_lines(text: str) -> list[str]:
    r"""Lines of `text`, which \n and \r\n end.

    `str.splitlines` also ends them at form feeds, U+0085, U+2028 and others, which stand in the
    midst of JSON strings and of prompts.

    >>> split_lines("one\r\ntwo\u2028still two\n")
    ['one', 'two\u2028still two']
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def _stdin() -> str:
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("stdin is closed: there is no text to be read from '-'")
    raw = getattr(sys.stdin, "buffer", None)  # the locale's encoding has no say
    return _checked(sys.stdin.read(), "stdin") if raw is None else _decoded(raw.read(), "stdin")


def _decoded(data: bytes, name: str) -> str:
    try:
        return _checked(data.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        guess = "it looks like UTF-16" if data.startswith(_UTF16) else str(error)
        raise ValueError(f"{name} is not UTF-8 text: {guess}") from error


def _checked(text: str, name: str) -> str:
    if "\0" in text:  # ASCII in UTF-16 without a mark is UTF-8, to the letter
        raise ValueError(f"{name} is not UTF-8 text: it has NUL characters (UTF-16?)")
    return text.removeprefix("\ufeff")
