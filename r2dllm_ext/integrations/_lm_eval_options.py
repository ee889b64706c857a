# SPDX-License-Identifier: Apache-2.0
"""The arguments of the harness's model `r2dllm`: those of `r2dllm generate`, by the same parser."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from .._checks import refuse
from ..cli import options

WHERE = "lm_eval: model r2dllm"
# The harness wraps prompts by itself (--apply_chat_template) and shows tracebacks as it likes.
_NOT_HERE = ("help", "model", "chat", "traceback")
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


@contextmanager
def as_arguments(of: str = "") -> Iterator[None]:
    """Errors that name an option name the model's argument instead; `of` goes before them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = _FLAG.sub(lambda flag: flag[1].replace("-", "_"), str(error))
        raise type(error)(f"{WHERE}: {of}{text}") from error


def session_options(pretrained: Any, arguments: Mapping[str, Any]) -> argparse.Namespace:
    """What `cli.session.Session` takes, from arguments as the harness has parsed them.

    Args:
        pretrained: model, as `--model` of `r2dllm generate`.
        arguments: its other options, with underscores. Several `stop_id` are a list.

    Raises:
        ValueError: an argument that there is not, or a value that it does not take; names it.

    >>> args = session_options("ledger-base", {"preset": "budget", "last_free": False})
    >>> args.model, args.preset, args.last_free, args.cache
    ('ledger-base', 'budget', False, 'none')
    """
    if not isinstance(pretrained, (str, int)) or isinstance(pretrained, bool):
        takes = "a folder, a hub id or the name of a bundled model"
        refuse(ValueError, WHERE, "pretrained", takes, pretrained)
    parser = _Parser(add_help=False, allow_abbrev=False)
    options.add_model_options(parser)
    options.add_decode_options(parser)
    known = {action.dest: action for action in parser._actions if action.dest not in _NOT_HERE}
    words = [f"--model={pretrained}"]
    for name, value in arguments.items():
        if name not in known:
            takes = f"pretrained, answers, batch_size, {', '.join(sorted(known))}"
            refuse(ValueError, WHERE, "an argument", f"one of {takes}", name)
        flag = known[name].option_strings[0]
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if known[name].nargs != 0:
                words.append(f"{flag}={_as_typed(item)}")
            elif not isinstance(item, bool):
                refuse(ValueError, WHERE, name, "True or False", item)
            elif item:
                words.append(flag)
            elif isinstance(known[name], argparse.BooleanOptionalAction):
                words.append(f"--no-{flag[2:]}")
    with as_arguments():
        return parser.parse_args(words)


def _as_typed(value: Any) -> str:
    """The harness reads -11 as -11.0."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def batch_rows(batch_size: Any) -> int:
    """`--batch_size` of the harness, which hands it over as text."""
    try:
        return options.count(str(batch_size))
    except argparse.ArgumentTypeError:
        return refuse(ValueError, WHERE, "batch_size", "an integer >= 1", batch_size)
