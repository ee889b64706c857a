# SPDX-License-Identifier: Apache-2.0
"""The command line, `r2dllm`: see and try the decoders of this package."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from .._command import INTERRUPTED, interrupt_as_usual
from .._version import __version__

__all__ = ["main"]

_EXAMPLES = """\
examples:
  r2dllm demo
  r2dllm generate --file prompts.txt --preset budget --error-budget 0.02 --json
  r2dllm generate --model GSAI-ML/LLaDA-8B-Instruct --device cuda --chat 'Why is the sky blue?'
  r2dllm trace --preset fast_dllm --out fast.png
  r2dllm evidence --samples 64 --out calibration.png
  r2dllm sft --out run --learning-rate 1e-4 --steps 200
  r2dllm engines

exit status: 0; 2 after an error, which is one line on stderr; 130 when interrupted (Ctrl-C); 141
when the reader of a pipe has gone, as if SIGPIPE had ended it.
"""


_PIPE_CLOSED = 141
# What C++ appends to a message of torch.
_FRAMES = re.compile(r"\n\s*(?:Exception raised from|frame #\d+:|C\+\+ CapturedTraceback)")


class UsageError(Exception):
    """The command line itself is wrong."""


# Errors that say by themselves what is wrong; of any other the line says that it is one.
_EXPECTED = (UsageError, OSError, ValueError, TypeError, ImportError, RuntimeError, MemoryError)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `r2dllm` with the arguments `argv` (default: those of the process).

    Returns the exit status: 0; 2 after an error, which is one line on stderr; 130 when interrupted;
    141 (128 + SIGPIPE) when the reader of a pipe has gone. `--help` and `--version` raise
    SystemExit(0). With `--traceback` an error is raised.

    What is wrong is said on stderr or nowhere: where stderr is closed, the status alone tells.

    >>> main(["demo", "--prompts", "none"])
    2
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    with _stderr():
        try:
            interrupt_as_usual()
            _run(arguments)
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            return _PIPE_CLOSED
        except Exception as error:
            if "--traceback" in arguments:
                raise
            with contextlib.suppress(OSError):  # a full disk behind stderr, say
                print(f"r2dllm: error: {_one_line(error)}", file=sys.stderr)
            return 2
        finally:
            _settle_stdout()
    return 0


def _run(arguments: list[str]) -> None:
    if sys.stdout is None or sys.stdout.closed:
        raise UsageError("stdout is closed, and the answers go there (or > /dev/null)")
    try:
        args = _parser().parse_args(arguments)
        args.run(args)
    finally:
        sys.stdout.flush()  # also after --help, which leaves by SystemExit


@contextlib.contextmanager
def _stderr() -> Iterator[None]:
    """Somewhere to write where stderr is closed: `print` would take stdout for it, bars fail.

    Warnings are a line each, as errors are.
    """

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        with contextlib.suppress(OSError):
            print(f"r2dllm: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = show  # type: ignore[assignment]  # the rest is where it was
        if sys.stderr is None:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def _settle_stdout() -> None:
    """What stdout can't take goes nowhere, or the interpreter would fail on it again at exit."""
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    from . import demo, engines, evidence, generate, sft, trace

    parser = _Parser(
        prog="r2dllm",
        description="Decode with masked-diffusion language models: few forwards, native rules.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"r2dllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for command in (demo, generate, trace, evidence, sft, engines):
        command.add_parser(commands)
    return parser


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = " ".join(_FRAMES.split(str(error))[0].split())
    if isinstance(error, _EXPECTED):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (not foreseen: --traceback shows where)"
