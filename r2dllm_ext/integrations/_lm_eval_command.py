# SPDX-License-Identifier: Apache-2.0
"""The harness's command line, which knows the model `r2dllm` then."""

from __future__ import annotations

import sys

from .._command import INTERRUPTED


def register() -> None:
    """Make `r2dllm` a name of `--model` where it is none yet."""
    import lm_eval.models  # noqa: F401  (the harness's own: it fills an empty registry alone)
    from lm_eval.api.registry import MODEL_REGISTRY, register_model

    # By the module's own name, which is not __main__: there is one class of this name.
    from r2dllm_ext.integrations.lm_eval import R2DLLM

    if "r2dllm" not in MODEL_REGISTRY:
        register_model("r2dllm")(R2DLLM)


def main() -> int:
    """The harness's command line with the model `r2dllm`; returns the exit status.

    An error is one line on stderr and status 2 (with `--traceback` it is raised), Ctrl-C 130.
    """
    from lm_eval.__main__ import cli_evaluate

    shown = "--traceback" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--traceback"]
    register()
    try:
        cli_evaluate()
    except KeyboardInterrupt:
        return INTERRUPTED
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        if shown:
            raise
        print(f"r2dllm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
