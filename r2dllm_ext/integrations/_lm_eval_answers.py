# SPDX-License-Identifier: Apache-2.0
"""Answers of an evaluation, as JSON lines that a killed one goes on from; what they cost."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..sft.artefacts import differences, read_lines

_FIELDS = {"key", "task", "text", "tokens", "nfe", "seconds", "finished"}


class AnswersFile:
    """JSON lines: first the settings of all answers, then an answer a line.

    An answer's line is written when its batch is done; one that a kill left half written is
    dropped. The file is for one process at a time.

    Args:
        path: None keeps answers in memory alone.
        settings: whatever an answer depends on beside its request.

    Raises:
        ValueError: the file is of other settings (names those that differ), of something else,
            damaged, or in use.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self._settings = json.loads(json.dumps(settings))  # as they will be read: tuples are lists
        with self.open():
            pass

    @contextmanager
    def open(self) -> Iterator[Answers]:
        """The answers that are there, to add to."""
        if self.path is None:
            yield Answers({}, None)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.path}: another process writes its answers here") from None
            yield Answers(self._read(file), file)

    def _read(self, file: BinaryIO) -> dict[str, dict[str, Any]]:
        assert self.path is not None  # opened
        file.seek(0)
        data = file.read()
        if not data:
            file.write(json.dumps({"settings": self._settings}).encode() + b"\n")
            return {}
        no_answers = f"{self.path} is no file of answers: name another one, or delete it"
        if not data.startswith(b'{"settings": {') or b"\n" not in data:
            raise ValueError(no_answers)
        file.truncate(data.rfind(b"\n") + 1)
        lines = read_lines(self.path, hint="; delete it to have all answers made anew")
        before = lines[0]["settings"]
        if not all(_FIELDS <= line.keys() for line in lines[1:]):
            raise ValueError(no_answers)
        changed = differences(before, self._settings)
        if changed:
            raise ValueError(
                f"{self.path}: its answers are of other settings: {'; '.join(changed)}. Take "
                "them, or another file"
            )
        return {line["key"]: line for line in lines[1:]}


class Answers:
    """Answers by key; `add` keeps more, in the file where there is one."""

    def __init__(self, found: dict[str, dict[str, Any]], file: BinaryIO | None) -> None:
        self.found, self._file = found, file

    def add(self, answers: Iterable[dict[str, Any]]) -> None:
        lines = []
        for answer in answers:
            self.found[answer["key"]] = answer
            lines.append(json.dumps(answer) + "\n")
        if self._file is not None:
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())


def summary(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What some answers cost.

    Returns:
        Of a task, and of "all" where there are several: answers, unfinished (the model had no
        finite logits: they count nowhere else), forwards (of an answer, as if decoded alone),
        tokens (of an answer, up to where it ends), tokens_per_forward, tokens_per_second (with the
        batches as they were), seconds (of decoding).

    >>> answer = {"task": "a", "finished": True, "nfe": 4, "tokens": 8, "seconds": 2.0}
    >>> summary([answer, answer])["a"]["tokens_per_forward"]
    2.0
    """
    tasks = sorted({answer["task"] for answer in answers})
    found = {task: _costs([a for a in answers if a["task"] == task]) for task in tasks}
    return found if len(tasks) < 2 else {**found, "all": _costs(answers)}


def _costs(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    finished = [answer for answer in answers if answer["finished"]]
    nfe, tokens, seconds = (sum(a[name] for a in finished) for name in ("nfe", "tokens", "seconds"))
    count = max(1, len(finished))
    return {
        "answers": len(answers),
        "unfinished": len(answers) - len(finished),
        "forwards": round(nfe / count, 3),
        "tokens": round(tokens / count, 3),
        "tokens_per_forward": round(tokens / max(1, nfe), 3),
        "tokens_per_second": round(tokens / seconds, 3) if seconds else None,
        "seconds": round(seconds, 3),
    }
