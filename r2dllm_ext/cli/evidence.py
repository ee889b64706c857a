# SPDX-License-Identifier: Apache-2.0
"""`r2dllm evidence`: which of R2's rules a model supports, and at which thresholds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..evidence import ERRORS, Evidence, evidence
from . import options
from .session import Prompt, Session
from .text import read_prompts

_NOTES = """\
Decodes the prompts one token a step (or as --preset says) and asks of every masked cell at every
step: is its prediction the final token? Judged by the confidence alone, and with what a rule looks
at beside it. A rule whose structure saves no bits and adds no cells at the same error will not help
this model; where it does, the last line has confidences to start from. Answers of a bundled task
count where they are right, unless --all.
"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "evidence",
        usage="%(prog)s [PROMPT ...] [options]",
        help="what each rule's structure says about a model's predictions",
        description="What streaks, neighbours and runs say beyond the confidence.",
        epilog=_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_prompt_options(parser)
    parser.add_argument(
        "--samples",
        type=options.count,
        default=32,
        metavar="N",
        help="without prompts: training prompts of the model's task (default: %(default)s)",
    )
    parser.add_argument("--all", action="store_true", help="count wrong answers too")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"calibration curve ({', '.join(options.PICTURES)})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options.add_model_options(parser)
    options.add_decode_options(parser)
    parser.set_defaults(run=run, preset="vanilla")


def run(args: argparse.Namespace) -> None:
    if args.out is not None:
        options.check_picture(args.out)
        from .. import trace_plot  # noqa: F401  (its error names what to install)
    given = args.prompts or args.file
    texts = read_prompts(args.prompts, args.file) if given else []
    session = Session(args)
    if not given:
        if session.task is None or args.ids:
            raise ValueError("evidence needs PROMPTs: only models of a task have their own")
        texts = [session.task.sample(0, i).prompt for i in range(args.samples)]
    found, counted = _found(session, session.read(texts), args.batch_size, wrong_too=args.all)
    if args.out is not None:
        _calibration_figure(found).savefig(args.out)
    if args.json:
        table = found.calibration.tolist()
        judges = {name: judge._asdict() for name, judge in found.judges.items()}
        shown = {**found._asdict(), "judges": judges, "calibration": table}
        print(json.dumps({**shown, "errors": ERRORS, "answers": counted}))
        return
    _print(found, counted, len(texts))


def _found(
    session: Session, prompts: list[Prompt], batch: int, *, wrong_too: bool
) -> tuple[Evidence, int]:
    """The evidence, and how many answers it is from."""
    traces, rows = [], []
    for start in range(0, len(prompts), batch):
        answers, trace = session.decode(prompts[start : start + batch])
        traces.append(trace)
        kept = [a.verdict is None or a.verdict.correct or wrong_too for a in answers]
        rows.append([row for row, is_kept in enumerate(kept) if is_kept])
    return evidence(traces, rows=rows), sum(map(len, rows))


def _print(found: Evidence, counted: int, asked: int) -> None:
    from .display import Display

    levels = [f"at {100 * error:g} %" for error in ERRORS]
    lines = [["prior", f"{found.prior_bits:.3f}", *("" for _ in ERRORS)]]
    for name, judge in found.judges.items():
        shares = [f"{100 * share:.1f} %" for share in judge.committable]
        lines.append([name, f"{judge.bits:.3f}", *shares])
    title = f"{found.cells} masked cells of {counted} answers ({asked} prompts)"
    Display().table(title, ["judged by", "bits a cell", *levels], lines)
    print("columns 3 on: cells that can be committed with so many wrong among them")
    shown = ["none" if t is None else f"{t:.3f}" for t in found.thresholds]
    print(f"confidence that errs so often: {', '.join(shown)}")
    print(f"expected calibration error {found.calibration_error:.3f}")


def _calibration_figure(found: Evidence):
    from matplotlib.figure import Figure

    cells, confidence, stays = found.calibration
    there = cells > 0
    figure = Figure(figsize=(5, 5), layout="constrained")
    curve, counts = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    curve.plot([0, 1], [0, 1], color="#6b7280", linewidth=1)
    curve.plot(confidence[there], stays[there], marker="o", color="#3b82c4")
    curve.set_ylabel("share that is the final token")
    curve.set_title(f"expected calibration error {found.calibration_error:.3f}")
    counts.bar(confidence[there], cells[there], width=0.03, color="#8fb339")
    counts.set_yscale("log")
    counts.set_ylabel("cells")
    counts.set_xlabel("confidence")
    return figure
