# SPDX-License-Identifier: Apache-2.0
"""`r2dllm generate`: answers to prompts."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

from . import options
from .session import Answer, Session, UnfinishedError
from .text import read_prompts

_NOTES = """\
The ledger model follows a value through five operations, digits one by one:
  r2dllm generate 'begin at 1 7 . first add 2 . second take 5 . third add 3 . fourth add 1 .
                   fifth take 4 . answer :'
--json prints one object a prompt: prompt, prompt_ids, text, token_ids, length (tokens up to the
stop token), nfe, rule (why each token was committed), rule_counts, correct (null where the ledger
verifier has no say), config.
"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "generate",
        usage="%(prog)s [PROMPT ...] [options]",
        help="answer prompts with a checkpoint or the bundled model",
        description="Answer prompts and show which rule committed each token.",
        epilog=_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_prompt_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, one object a prompt")
    parser.add_argument("--progress", action="store_true", help="show a bar on stderr (tqdm)")
    options.add_model_options(parser)
    options.add_decode_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    texts = read_prompts(args.prompts, args.file)
    show = _print_json if args.json else _display()
    session = Session(args)
    prompts = session.read(texts)
    unfinished, reason = [], ""
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        try:
            answers, _ = session.decode(batch, progress=args.progress)
        except UnfinishedError as error:
            unfinished += [str(start + row + 1) for row in error.rows]
            answers, reason = error.answers, reason or str(error)
        for answer in answers:
            show(answer, session)
    if unfinished:
        raise RuntimeError(f"no answer to prompt {', '.join(unfinished)}: {reason}")


def as_json(answer: Answer, session: Session) -> dict[str, Any]:
    """What `--json` prints about a prompt."""
    return {
        "prompt": answer.prompt.text,
        "prompt_ids": answer.prompt.ids,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "length": answer.length,
        "nfe": answer.nfe,
        "rule": [rule.name.lower() for rule in answer.rules],
        "rule_counts": answer.rule_counts(),
        "correct": None if answer.verdict is None else answer.verdict.correct,
        "config": dataclasses.asdict(session.config),
    }


def _print_json(answer: Answer, session: Session) -> None:
    print(json.dumps(as_json(answer, session)), flush=True)


def _display() -> Callable[[Answer, Session], None]:
    from .display import Display  # only here: --json does without rich

    display = Display()
    return lambda answer, session: display.answer(answer)
