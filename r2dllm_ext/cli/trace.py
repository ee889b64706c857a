# SPDX-License-Identifier: Apache-2.0
"""`r2dllm trace`: a picture of one decode."""

from __future__ import annotations

import argparse
import textwrap
import warnings
from pathlib import Path

from . import options
from .session import Answer, Session, describe

_FORMATS = (".png", ".svg", ".pdf")


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
        help=f"{', '.join(_FORMATS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--dpi", type=options.count, default=150, help="dots per inch (default: %(default)s)"
    )
    options.add_model_options(parser)
    options.add_decode_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.out.suffix.lower() not in _FORMATS:
        raise ValueError(f"--out takes a name in {', '.join(_FORMATS)}, got {str(args.out)!r}")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out: there is no folder {str(args.out.parent)!r}")
    from ..trace_plot import plot_trace, require_matplotlib

    require_matplotlib()
    session = Session(args)
    prompt = args.prompt
    if prompt is None:
        if session.task is None or args.ids:
            raise ValueError("trace needs a PROMPT: only models of a task have their own")
        prompt = session.task.sample(0, args.sample, split="test").prompt
    (answer,), trace = session.decode(session.read([prompt]))
    facts = _facts(answer, args.preset)
    labels = [session.codec.decode([i]) for i in answer.token_ids]
    title = "\n".join(textwrap.shorten(line, 120, placeholder=" ...") for line in (facts, prompt))
    figure = plot_trace(trace, labels=labels, config=session.config, title=title)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it
        figure.savefig(args.out, dpi=args.dpi)
    print(f"{args.out}: {facts}")


def _facts(answer: Answer, preset: str) -> str:
    facts = [
        f"{preset}: NFE {answer.nfe}",
        f"{answer.length} tokens",
        f"{answer.tokens_per_forward:.1f} a forward",
        describe(answer),
    ]
    return ", ".join(filter(None, facts))
