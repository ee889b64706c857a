# SPDX-License-Identifier: Apache-2.0
"""`r2dllm demo`: the same prompts by several models and decoders."""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

from ..tasks import Task
from . import options
from .session import Answer, Prompt, Session

MODELS = ("ledger-base", "ledger", "pronounce")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="decode a few unseen prompts with the bundled models",
        description="Decode a few prompts of their tasks that the models have not seen; show "
        "answers, coloured by the rule that committed each token, and compare models and decoders.",
    )
    parser.add_argument(
        "--prompts",
        type=options.count,
        default=4,
        metavar="N",
        help="of each task (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=options.reader(int),
        default=0,
        dest="sample_seed",
        metavar="N",
        help="which prompts are drawn (default: %(default)s)",
    )
    parser.add_argument(
        "--decoders",
        nargs="+",
        choices=options.PRESETS,
        default=list(options.PRESETS),
        metavar="NAME",
        help=f"of {', '.join(options.PRESETS)} (default: all)",
    )
    parser.add_argument(
        "--show",
        choices=options.PRESETS,
        default="r2",
        metavar="NAME",
        help="decoder whose first answer is shown (default: %(default)s)",
    )
    options.add_model_options(parser, text=False)
    parser.set_defaults(
        run=run,
        model=None,
        gen_length=None,
        block_length=None,
        cache="none",
        logits_shift=None,
        preset="r2",
        chat=False,
        trust_remote_code=False,
    )


def run(args: argparse.Namespace) -> None:
    from .display import Display

    display, rows = Display(), []
    decoders = list(dict.fromkeys(args.decoders))
    shown = args.show if args.show in decoders else decoders[-1]
    sessions = [_session(args, name) for name in ([args.model] if args.model else MODELS)]
    last = {_task(session).name: session for session in sessions}
    for session in sessions:
        task = _task(session)
        prompts = session.read(task.unseen(args.sample_seed, args.prompts))
        session.decode(prompts[:1])  # warm-up, or the first decoder would pay for it
        for name in decoders:
            began = time.perf_counter()
            answers = _decode_each(session, prompts, name)
            rows.append(_row(session, name, answers, time.perf_counter() - began))
            if name == shown and session is last[task.name]:
                display.answer(answers[0], name=f"{session.name}, {name}")
    columns = ["model", "decoder", "NFE", "right", "tokens / forward", "seconds"]
    display.table(f"{args.prompts} prompts of each task, means per prompt", columns, rows, names=2)


def _session(args: argparse.Namespace, name: str) -> Session:
    own = copy.copy(args)
    own.model = name
    return Session(own)


def _task(session: Session) -> Task:
    if session.task is None:
        raise ValueError(f"demo takes a model of a bundled task, {session.name!r} is none")
    return session.task


def _decode_each(session: Session, prompts: list[Prompt], preset: str) -> list[Answer]:
    # One by one: a batch would need as many forwards as its slowest row.
    config = options.PRESETS[preset](session.config.mask_id)
    return [session.decode([prompt], config)[0][0] for prompt in prompts]


def _row(session: Session, name: str, answers: list[Answer], seconds: float) -> list[str]:
    n, nfe = len(answers), sum(answer.nfe for answer in answers)
    tokens = sum(answer.length for answer in answers)
    verdicts = [answer.verdict for answer in answers if answer.verdict is not None]
    right, parts = sum(v.right for v in verdicts), sum(v.parts for v in verdicts)
    of = f"{parts} {_task(session).part}s" if parts > n else str(parts)
    return [
        Path(session.name).name,
        name,
        f"{nfe / n:.1f}",
        f"{right} of {of}" if verdicts else "",
        f"{tokens / nfe:.2f}",
        f"{seconds / n:.2f}",
    ]
