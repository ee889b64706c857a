# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C before `main` runs: of no use to a library, but the command line imports torch first.

Imported before everything else. Where the process is `r2dllm` or `python -m r2dllm_ext`, Ctrl-C
ends it with the status that `main` gives it, without a traceback of half an import. `main` puts
Python's own handler back. Where the package is a library nothing happens.
"""

import os
import signal
import sys

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def _is_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # so it is while the package that is run is imported
        return "r2dllm_ext" in sys.orig_argv or "-mr2dllm_ext" in sys.orig_argv
    return bool(sys.argv) and os.path.basename(sys.argv[0]) == "r2dllm"


def _leave(*_: object) -> None:
    os._exit(INTERRUPTED)


def interrupt_quietly() -> None:
    """From here on Ctrl-C ends the process, unless whoever started it has it ignored."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def interrupt_as_usual() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


interrupt_quietly()
