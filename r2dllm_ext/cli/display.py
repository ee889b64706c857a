# SPDX-License-Identifier: Apache-2.0
"""Answers on a terminal: coloured by rule, or with a line of marks where there are no colours."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NoReturn

from ..config import Rule
from ..rule_looks import RULE_COLORS, RULE_LOOKS
from .session import Answer, cost, describe

try:
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise ImportError("this command needs rich: pip install 'r2dllm_ext[cli]'") from error


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """`main` knows what to do; rich would leave with status 1."""
        raise BrokenPipeError


class Display:
    """Writes to stdout; colours only where the terminal has them and NO_COLOR is not set."""

    def __init__(self) -> None:
        # An empty variable is an unset one; to rich an empty FORCE_COLOR forbids colours.
        environment = {name: value for name, value in os.environ.items() if value}
        self._console = _Console(highlight=False, _environ=environment)
        colours = None if self._console.no_color else self._console.color_system
        few = {rule: look.ansi for rule, look in RULE_LOOKS.items()}
        rich = colours in ("256", "truecolor")
        self._colours = (RULE_COLORS if rich else few) if colours else {}
        self._fresh = True

    def answer(self, answer: Answer, *, name: str = "") -> None:
        """Prompt, answer and what it cost; in front of the first, what the colours mean."""
        if self._fresh:
            self._legend()
            self._fresh = False
        self._console.print()
        self._print(Text(f"> {answer.prompt.text}", style="dim"))
        tokens = list(zip(answer.pieces, answer.rules, strict=False))
        if self._colours:
            coloured = ((piece, self._colours.get(rule, "")) for piece, rule in tokens)
            self._print(Text.assemble(*coloured))
        else:
            for line in marked_lines(tokens, self._console.width):
                self._console.out(line, highlight=False)
        self._print(self._cost(answer, name))

    def table(
        self, title: str, columns: list[str], rows: Iterable[list[str]], *, names: int = 1
    ) -> None:
        """Names in the first columns, numbers in the others."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for place, column in enumerate(columns):
            table.add_column(column, justify="left" if place < names else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._console.print()
        self._print(Text(title, style="bold"))
        self._console.print(table)

    def _legend(self) -> None:
        """What the colours or marks mean."""
        for rule, look in RULE_LOOKS.items():
            name = f"{'' if self._colours else look.mark + ' '}{rule.name.lower():<10}"
            self._print(Text.assemble((name, self._colours.get(rule, "")), (look.meaning, "dim")))

    def _cost(self, answer: Answer, name: str) -> Text:
        line = Text(f"{name + ': ' if name else ''}{cost(answer)}", style="dim")
        if answer.verdict is not None:
            style = "bold green" if answer.verdict.correct else "bold red"
            line.append(", ")
            line.append(describe(answer), style=style)
        return line

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=not self._console.is_terminal)


def marked_lines(tokens: Iterable[tuple[str, Rule]], width: int) -> list[str]:
    """Lines of text, each followed by one that marks, where a token begins, its rule."""
    rows = [("", "")]
    for piece, rule in tokens:
        for place, part in enumerate(piece.split("\n")):
            text, marks = rows[-1]
            wraps = not place and text and cell_len(text + part) > width
            if place or wraps:
                rows.append(("", ""))
                text, marks = rows[-1]
            if wraps:
                part = part.lstrip(" ")
            if part.strip():
                begin = cell_len(text) + len(part) - len(part.lstrip(" "))
                marks = marks.ljust(begin) + (RULE_LOOKS[rule].mark if rule else " ")
            rows[-1] = (text + part, marks)
    return [line.rstrip() for text, marks in rows for line in ((text, marks) if marks else (text,))]
