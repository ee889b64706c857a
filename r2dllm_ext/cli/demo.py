# SPDX-License-Identifier: Apache-2.0
"""`r2dllm demo`: the same prompts by several decoders."""

from __future__ import annotations

import argparse
import time

from ..config import DecodeConfig
from . import options
from .session import Answer, Prompt, Session


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="decode a few unseen prompts with the bundled model",
        description="Decode a few prompts of its task that the model has not seen; show the "
        "answers, coloured by the rule that committed each token, and compare the decoders.",
    )
    parser.add_argument(
        "--prompts", type=options.count, default=4, metavar="N", help="(default: %(default)s)"
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
    options.add_model_options(parser, text=False)
    parser.set_defaults(
        run=run,
        gen_length=None,
        block_length=32,
        cache="none",
        logits_shift=None,
        preset="r2",
        chat=False,
        trust_remote_code=False,
    )


def run(args: argparse.Namespace) -> None:
    from .display import Display

    display = Display()
    session = Session(args)
    task = session.task
    if task is None:
        raise ValueError(f"demo takes a model of a bundled task, {args.model!r} is none")
    samples = [task.sample(args.sample_seed, i, split="test") for i in range(args.prompts)]
    prompts = session.read([sample.prompt for sample in samples])
    decoders = list(dict.fromkeys(args.decoders))
    shown = "r2" if "r2" in decoders else decoders[-1]
    session.decode(prompts[:1])  # warm-up, or the first decoder would pay for it
    rows = []
    for name in decoders:
        began = time.perf_counter()
        answers = _decode_each(session, prompts, name)
        rows.append(_row(name, answers, time.perf_counter() - began))
        if name == shown:
            for answer in answers:
                display.answer(answer, name=name)
    columns = ["decoder", "NFE", "accuracy", "tokens / forward", "seconds"]
    display.table(f"{len(prompts)} prompts, means per prompt", columns, rows)


def _decode_each(session: Session, prompts: list[Prompt], preset: str) -> list[Answer]:
    # One by one: a batch would need as many forwards as its slowest row.
    config = getattr(DecodeConfig, preset)(session.config.mask_id)
    return [session.decode([prompt], config)[0][0] for prompt in prompts]


def _row(name: str, answers: list[Answer], seconds: float) -> list[str]:
    n = len(answers)
    nfe = sum(answer.nfe for answer in answers)
    tokens = sum(answer.length for answer in answers)
    correct = sum(bool(answer.verdict and answer.verdict.correct) for answer in answers)
    return [
        name,
        f"{nfe / n:.1f}",
        f"{correct} of {n}",
        f"{tokens / nfe:.2f}",
        f"{seconds / n:.2f}",
    ]
