# SPDX-License-Identifier: Apache-2.0
"""`r2dllm trace`: a picture of one decode."""

from __future__ import annotations

import argparse
import textwrap
import warnings
from pathlib import Path

from . import options
from .session import Session, cost, describe


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "trace",
        usage="%(prog)s [PROMPT] [options]",
        help="draw one decode as a picture",
        description="Decode one prompt and draw position by step: which rule committed each token, "
        "and the redundancies: stalled predictions, confident windows, runs of equal predictions.",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="(default: see --sample)")
    parser.add_argument(
        "--sample",
        type=options.reader(int),
        default=0,
        metavar="N",
        help="without PROMPT: number of an unseen prompt of its task (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("trace.png"),
        metavar="FILE",
        help=f"{', '.join(options.PICTURES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--dpi", type=options.count, default=150, help="dots per inch (default: %(default)s)"
    )
    options.add_model_options(parser)
    options.add_decode_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    options.check_picture(args.out)
    from ..trace_plot import plot_trace

    session = Session(args)
    prompt = args.prompt
    if prompt is None:
        if session.task is None or args.ids:
            raise ValueError("trace needs a PROMPT: only models of a task have their own")
        prompt = session.task.sample(0, args.sample, split="test").prompt
    (answer,), trace = session.decode(session.read([prompt]))
    facts = ", ".join(filter(None, (f"{args.preset}: {cost(answer)}", describe(answer))))
    labels = [session.codec.decode([i]) for i in answer.token_ids]
    title = "\n".join(textwrap.shorten(line, 120, placeholder=" ...") for line in (facts, prompt))
    figure = plot_trace(trace, labels=labels, config=session.config, title=title)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
        figure.savefig(args.out, dpi=args.dpi)
    print(f"{args.out}: {facts}")
