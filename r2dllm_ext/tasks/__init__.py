# SPDX-License-Identifier: Apache-2.0
"""Tasks that a small model can learn, each with a generator, a verifier and a tokenizer."""

from __future__ import annotations

from .ledger import Ledger
from .pronounce import Pronounce
from .task import Sample, Task, Verdict

TASKS: dict[str, type[Task]] = {"ledger": Ledger, "pronounce": Pronounce}

__all__ = ["TASKS", "Ledger", "Pronounce", "Sample", "Task", "Verdict", "get_task"]


def get_task(name: str) -> Task:
    """A task by its name; `ValueError` names those that there are.

    >>> get_task("ledger").answer_length
    96
    """
    if name not in TASKS:
        raise ValueError(f"get_task: name is {name!r}, takes one of {', '.join(TASKS)}")
    return TASKS[name]()
