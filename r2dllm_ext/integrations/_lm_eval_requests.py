# SPDX-License-Identifier: Apache-2.0
"""Requests of the harness as prompts of a session, and what makes one another than before."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .._checks import integer, refuse
from ..cli.session import Prompt, Session
from ..config import DecodeConfig
from ._lm_eval_options import as_arguments

# What backends of the harness call it, in its own order of precedence.
_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_WHERE = "generation_kwargs"  # of a task, or --gen_kwargs
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class Request(NamedTuple):
    """A prompt, and how it is to be answered."""

    key: str  # differs wherever the answer may
    task: str
    arguments: tuple[str, dict[str, Any]]  # as the harness gave them
    prompt: Prompt
    until: list[str]  # texts of which the first ends the answer
    most: int  # tokens of the answer
    config: DecodeConfig


def settings_of(session: Session, gen_length: int | None) -> dict[str, Any]:
    """What all answers of a session depend on beside their requests; no batch size, no device."""
    return {
        "weights": _fingerprint(session.model),
        "dtype": str(session.model.dtype),
        "gen_length": gen_length,
        "block_length": session.block_length,
        "cache": session.cache,
        "logits_shift": session.logits_shift,
        "stop_id": session.stop_id,
        **dataclasses.asdict(session.config),
    }


def read_requests(
    session: Session,
    instances: Sequence[Any],
    settings: Mapping[str, Any],
    gen_length: int | None,
) -> list[Request]:
    """`instances` of the harness's `generate_until`, in their order.

    Args:
        gen_length: tokens of every answer; None: as many as its task asks for (`max_gen_toks`),
            and the session's length where it asks for none.

    Raises:
        ValueError: a prompt or an option of a task that there is no way to take; names the task.
    """
    found: list[Request] = []
    times: Counter[str] = Counter()
    for instance in instances:
        context, options = instance.args
        with as_arguments(f"task {instance.task_name}, document {instance.doc_id}: "):
            given = dict(options)
            until = given.pop("until", None) or []
            until = [t for t in ([until] if isinstance(until, str) else until) if t]
            asked = [given.pop(name) for name in _MOST if given.get(name) is not None]
            most = gen_length or integer(_WHERE, _MOST[0], (asked or [session.gen_length])[0], 1)
            config = _config(session.config, given)
            (prompt,) = session.read([context], gen_length=whole_blocks(session, most))
        parts = [settings, prompt.ids, until, most, dataclasses.asdict(config)]
        base = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        # The same request again, as `repeats` of a task are, is another sample.
        key, times[base] = f"{base}-{times[base]}", times[base] + 1
        task = str(instance.task_name)
        found.append(Request(key, task, instance.args, prompt, until, most, config))
    return found


def whole_blocks(session: Session, tokens: int) -> int:
    return -(-tokens // session.block_length) * session.block_length


def _config(config: DecodeConfig, options: dict[str, Any]) -> DecodeConfig:
    """A task that draws (`do_sample`) says how; otherwise the model's arguments do."""
    sampling = {name: options.pop(name) for name in _SAMPLING if name in options}
    draws = options.pop("do_sample", None)
    if options:
        known = ", ".join(("until", _MOST[0], "do_sample", *_SAMPLING))
        refuse(ValueError, _WHERE, "an option", f"one of {known}", next(iter(options)))
    if draws is None:
        draws = bool(sampling.get("temperature"))
    if not draws:
        return config
    off = {"top_k": (0, -1), "min_p": (0,)}  # as the harness's other models take them
    given = {
        name: None if value in off.get(name, ()) else value for name, value in sampling.items()
    }
    return config.replace(**{"temperature": 1.0, **given})


def _fingerprint(model: torch.nn.Module) -> str:
    """Of some numbers of each weight: a folder that was trained on has another."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        values = weight.detach().flatten()
        sample = values[:: max(1, len(values) // 64)].float().cpu()
        digest.update(f"{name} {list(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
