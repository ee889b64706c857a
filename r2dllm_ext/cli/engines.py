# SPDX-License-Identifier: Apache-2.0
"""`r2dllm engines`: which engines are installed here, and how they decode with this package."""

from __future__ import annotations

import argparse

from ..integrations._lines import USES, status


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "engines",
        help="which engines are installed here, and what to type in them",
        description="For each engine: the version that is installed here, whether it is one that "
        "was tested, and the two lines that make it decode with this package. Nothing is imported.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    for engine, use in USES.items():
        print(f"{use.name}: {status(engine)}", *use.lines, sep="\n    ")
