# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share; those of `DecodeConfig` are read off its fields."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import PRESETS, DecodeConfig
from ..model_driver import CACHES

PICTURES = (".png", ".svg", ".pdf")
_DTYPES = ("float32", "bfloat16", "float16")
NUMBERS = {int: ("an integer", "N"), float: ("a number", "X"), str: ("a name", "NAME")}


def count(text: str) -> int:
    """An integer >= 1 of 64 bits."""
    if not re.fullmatch(r"0*[0-9]{1,19}", text) or not 1 <= int(text) < 2**63:
        bits = " of 64 bits" if re.fullmatch("[0-9]{19,}", text) else ""
        raise argparse.ArgumentTypeError(f"takes an integer >= 1{bits}, got {_shown(text)}")
    return int(text)


def reader(kind: type, *, optional: bool = False) -> Callable[[str], Any]:
    """Turns an argument into a `kind`; the word none into None where that is allowed.

    An integer has 64 bits: what is larger no tensor holds, and no loop over it ends.
    """

    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        takes = ("none or " if optional else "") + NUMBERS[kind][0]
        try:
            value = kind(text)
        except ValueError:
            message = f"takes {takes}, got {_shown(text)}"
            raise argparse.ArgumentTypeError(message) from None
        if kind is int and not -(2**63) <= value < 2**63:
            raise argparse.ArgumentTypeError(f"takes {takes} of 64 bits, got {_shown(text)}")
        return value

    return read


def _shown(text: str) -> str:
    return repr(text if len(text) <= 50 else f"{text[:40]}...")


def device(name: str) -> torch.device:
    """The device of that name; ValueError if there is none."""
    takes = f"--device takes cpu, cuda or cuda:N, got {name!r}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(takes) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(takes)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch sees no CUDA device")
    return device


def check_picture(path: Path) -> None:
    """That a picture can be written there: asked before what it shows is computed."""
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"--out takes a name in {', '.join(PICTURES)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"--out: there is no folder {str(path.parent)!r}")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Prompts, by place or from a file (`text.read_prompts`), and how many are a batch."""
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="a prompt; '-' reads stdin, one prompt a line"
    )
    parser.add_argument("--file", metavar="F", help="file of prompts, one a line; '-' is stdin")
    parser.add_argument(
        "--batch-size",
        type=count,
        default=8,
        metavar="B",
        help="prompts decoded together (default: %(default)s)",
    )


def add_model_options(parser: argparse.ArgumentParser, *, text: bool = True) -> None:
    """Which model, where and in which precision; `text`: also how it reads and writes text."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="ledger",
        metavar="DIR|HUB_ID",
        help="folder or hub id of a LLaDA or Dream checkpoint, or the name of a "
        "small model in this package (default: %(default)s)",
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    group.add_argument(
        "--dtype", choices=_DTYPES, help="precision of the weights (default: the checkpoint's)"
    )
    if text:
        group.add_argument(
            "--ids", action="store_true", help="prompts and answers are token ids, no tokenizer"
        )
        group.add_argument(
            "--chat", action="store_true", help="wrap each prompt in the tokenizer's chat template"
        )
        group.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="let transformers run tokenizer code that comes with the checkpoint (Dream)",
        )
    parser.add_argument(
        "--traceback", action="store_true", help="on an error, show where it came from"
    )


def add_decode_options(parser: argparse.ArgumentParser) -> None:
    """The loop: lengths, cache, stop token, and every field of `DecodeConfig`."""
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--gen-length",
        type=count,
        metavar="G",
        help="tokens to decode, a multiple of the block length (default: those of a bundled "
        "model's task, 256 otherwise)",
    )
    group.add_argument(
        "--block-length",
        type=count,
        metavar="L",
        help="(default: that of a bundled model's task, 32 otherwise)",
    )
    group.add_argument(
        "--cache",
        choices=CACHES,
        default="none",
        help="keys and values kept within a block: "
        "none, those before it, or those after it too (default: %(default)s)",
    )
    group.add_argument(
        "--logits-shift",
        type=int,
        choices=(0, 1),
        help="1 where row i - 1 of the logits predicts "
        "position i (default: 1 for Dream, 0 otherwise)",
    )
    group.add_argument(
        "--stop-id",
        type=reader(int, optional=True),
        action="append",
        default=argparse.SUPPRESS,
        metavar="ID",
        help="token that ends an answer, or none; given several times, any of them does (default: "
        "the model's end tokens)",
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        default="r2",
        help="vanilla: one token a step; fast_dllm: "
        "the threshold alone; r2: threshold and the three rules; budget, entropy: a bound on the "
        "expected errors or the entropy of a step (default: %(default)s)",
    )
    _add_config_fields(parser)


def decode_config(args: argparse.Namespace) -> DecodeConfig:
    """What the options ask for; mask id 0 if none was given."""
    fields = {name: vars(args)[name] for name in _field_names() if name in args}
    return PRESETS[args.preset](fields.pop("mask_id", 0), **fields)


def _field_names() -> list[str]:
    return [field.name for field in dataclasses.fields(DecodeConfig)]


def _add_config_fields(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "what a step may commit",
        "The fields of DecodeConfig. Defaults are those of preset r2; an option given wins over "
        "the preset.",
    )
    kinds, helps = typing.get_type_hints(DecodeConfig), _field_helps()
    for field in dataclasses.fields(DecodeConfig):
        default = "the model's" if field.default is dataclasses.MISSING else field.default
        kind, optional = _kind(kinds[field.name])
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            options = {"type": reader(kind, optional=optional), "metavar": NUMBERS[kind][1]}
        shown = "none" if default is None else default
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=f"{helps.get(field.name, '').rstrip('.')} (default: {shown})".replace(
                "%", "%%"
            ).strip(),
            **options,
        )


def _kind(hint: Any) -> tuple[type, bool]:
    """The type behind a hint, and whether None is one of its values."""
    if not isinstance(hint, types.UnionType):
        return hint, False
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0], True


def _field_helps() -> dict[str, str]:
    """What the docstring of `DecodeConfig` says about each field."""
    section = (inspect.getdoc(DecodeConfig) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
