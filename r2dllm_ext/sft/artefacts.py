# SPDX-License-Identifier: Apache-2.0
"""Files of a run: written whole or not at all, and named by whoever can't read them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..text_input import read_text, split_lines


def write_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, also after a crash of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with naming(part), open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that says of no file what is wrong (of a full disk, say) names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def read_json(path: Path) -> Any:
    try:
        return _parsed(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not whole: {error}; delete it to have it made anew") from error


def read_lines(path: Path, *, hint: str = "") -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; ValueError names the line that is none."""
    records = []
    for number, line in enumerate(split_lines(read_text(path)), start=1):
        if not line.strip():
            continue
        try:
            record = _parsed(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}{hint}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}: line {number} takes a JSON object, got {line.strip()}{hint}")
        records.append(record)
    return records


def _parsed(text: str) -> Any:
    """ValueError also for JSON that is nested too deep for Python's parser."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def settle(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a run, or checks that they are those that it was begun with."""
    settings = json.loads(json.dumps(settings))  # as they will be read: tuples are lists
    if not path.exists():
        write_json(path, settings)
        return
    before = read_json(path)
    if not isinstance(before, dict):
        raise ValueError(
            f"{path} is not whole: it takes a JSON object, got {type(before).__name__}; delete it "
            "to have it made anew"
        )
    if found := differences(before, settings):
        raise ValueError(
            f"{path}: this run was begun with other settings: {'; '.join(found)}. Take them, "
            "or another folder"
        )


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, in words, by the names of the fields."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        inner = (differences(before.get(k), now.get(k), f"{name}.{k}".lstrip(".")) for k in keys)
        return [difference for found in inner for difference in found]
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]


def settle_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """The same for a file of JSON lines."""
    if not path.exists():
        write_lines(path, records)
        return
    found = read_lines(path, hint="; delete it to have it made anew")
    # As text: a number that is NaN does not equal itself.
    before, now = ([json.dumps(record) for record in group] for group in (found, records))
    if before != now:
        pairs = enumerate(zip(before, now, strict=False), start=1)
        line = next((n for n, (a, b) in pairs if a != b), min(len(before), len(now)) + 1)
        raise ValueError(
            f"{path}: this run was begun with other prompts (line {line} is the first). Take them, "
            "or another folder"
        )


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a folder that is there whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    remove_folder(part)
    write(part)
    os.replace(part, folder)


def is_made(folder: Path) -> bool:
    """Whether a folder is there; ValueError if something else has its name."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} takes a folder, there is a file; delete it")
    return folder.is_dir()


def remove_folder(folder: Path) -> None:
    """Removes a folder, if it is there, so that a half-removed one is not taken for whole; also a
    file that has its name."""
    if folder.is_file():
        folder.unlink()
    elif folder.exists():
        doomed = folder.with_name(folder.name + ".part")
        if doomed != folder and not doomed.exists():
            os.replace(folder, doomed)
            folder = doomed
        shutil.rmtree(folder)
