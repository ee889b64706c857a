# SPDX-License-Identifier: Apache-2.0
"""The command line, `r2dllm`: see and try the decoders of this package."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .._version import __version__

__all__ = ["main"]

_EXAMPLES = """\
examples:
  r2dllm demo
  r2dllm generate --file prompts.txt --preset budget --error-budget 0.2 --json
  r2dllm generate --model GSAI-ML/LLaDA-8B-Instruct --device cuda --chat 'Why is the sky blue?'
  r2dllm trace --preset fast_dllm --out fast.png
  r2dllm sft --out run --learning-rate 1e-4 --steps 200
"""


class UsageError(Exception):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `r2dllm` with the arguments `argv` (default: those of the process).

    Returns the exit status: 0; 2 after an error, which is one line on stderr; 130 when interrupted;
    1 when the reader of a pipe has gone. `--help` and `--version` raise SystemExit(0).

    >>> main(["demo", "--prompts", "none"])
    2
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser().parse_args(arguments)
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        if "--traceback" in arguments:
            raise
        print(f"r2dllm: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    from . import demo, generate, sft, trace

    parser = _Parser(
        prog="r2dllm",
        description="Decode with masked-diffusion language models: few forwards, native rules.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"r2dllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for command in (demo, generate, trace, sft):
        command.add_parser(commands)
    return parser


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
