# SPDX-License-Identifier: Apache-2.0
"""Requests of the harness in batches, decoded; where an answer ends."""

from __future__ import annotations

import bisect
import hashlib
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from ..cli.session import Session
from ..cli.text import Codec
from ..generation import NoProgressError
from ..stop_ids import answer_length, stop_ids
from ._lm_eval_options import WHERE
from ._lm_eval_requests import Request, whole_blocks


def batches(
    session: Session, requests: Sequence[Request], batch_size: int
) -> Iterator[list[Request]]:
    """Of one length and config; the longest prompts first, as memory fails there first."""

    def kind(request: Request) -> tuple[int, str]:
        return whole_blocks(session, request.most), repr(request.config)

    ordered = sorted(requests, key=lambda request: (kind(request), -len(request.prompt.ids)))
    for _, group in groupby(ordered, key=kind):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def decode(session: Session, batch: Sequence[Request]) -> list[dict[str, Any]]:
    """An answer to each request, as the file of answers keeps it.

    One that the model can't finish (`NoProgressError` of `generate`) is empty, and there is a
    warning.
    """
    config = batch[0].config
    if config.temperature > 0:
        # Or the first rows of all batches would draw alike, those of `repeats` too.
        keys = " ".join(request.key for request in batch).encode()
        config = config.replace(seed=int.from_bytes(hashlib.sha256(keys).digest()[:7], "big"))
    prompts = [request.prompt for request in batch]
    unfinished: Sequence[int] = ()
    start = time.perf_counter()
    try:
        length = whole_blocks(session, batch[0].most)
        generation = session.generate(prompts, config, gen_length=length)
    except NoProgressError as error:
        generation, unfinished = error.generation, error.rows
        warnings.warn(f"{WHERE}: {len(unfinished)} empty answers: {error}", stacklevel=2)
    seconds = (time.perf_counter() - start) / len(batch)
    trace = generation.trace
    assert trace is not None  # a session asks for it
    nfe = trace.row_nfe().tolist()
    # Where no token ends the decode early, an answer still ends at the model's own.
    stops = stop_ids(
        session.model.eos_id if session.stop_id is None else session.stop_id, where=WHERE
    )
    answers = []
    for row, request in enumerate(batch):
        ids = trace.sequences[row, trace.prompt_length :][: request.most].tolist()
        words, ended = answer_length(ids, stops)
        text, tokens, stopped = cut(session.codec, ids[:words], request.until)
        answers.append(
            {
                "key": request.key,
                "task": request.task,
                "text": "" if row in unfinished else text,
                "tokens": tokens if stopped else words + ended,
                "nfe": nfe[row],
                "seconds": seconds,
                "finished": row not in unfinished,
            }
        )
    return answers


def cut(codec: Codec, ids: list[int], until: Sequence[str]) -> tuple[str, int, bool]:
    """The text of `ids` before the first of the texts `until`; tokens it took; was there one?

    `until` may be special tokens as the codec writes them; what is left has none.

    >>> cut(ledger.Tokenizer(), ledger.Tokenizer().encode("answer : 1 4 . answer : 2"), [" ."])
    ('answer : 1 4', 5, True)
    """

    whole = codec.decode(ids)
    found = [(whole.find(stop), len(stop)) for stop in until if stop in whole]
    if not found:
        return codec.decode(ids, skip_special=True), len(ids), False

    def length(count: int) -> int:
        return len(codec.decode(ids[:count]))

    (place, size), counts = min(found), range(len(ids))
    kept = bisect.bisect_right(counts, place, key=length) - 1  # tokens wholly before the stop
    tokens = bisect.bisect_left(counts, place + size, key=length)
    text = codec.decode(ids[:kept], skip_special=True)
    return text + whole[length(kept) : place], tokens, True
