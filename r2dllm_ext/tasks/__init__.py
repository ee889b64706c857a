# SPDX-License-Identifier: Apache-2.0
"""Tasks that a small model can learn, each with a generator, a verifier and a tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .ledger import Ledger
from .pronounce import Pronounce
from .task import Sample, Task, Verdict

if TYPE_CHECKING:
    from ..models import ModelConfig

TASKS: dict[str, type[Task]] = {"ledger": Ledger, "pronounce": Pronounce}

__all__ = ["TASKS", "Ledger", "Pronounce", "Sample", "Task", "Verdict", "get_task", "task_of"]


def get_task(name: str) -> Task:
    """A task by its name; `ValueError` names those that there are.

    >>> get_task("ledger").answer_length
    96
    """
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"get_task: name is {name!r}, takes one of {', '.join(TASKS)}")
    return TASKS[name]()


def task_of(config: ModelConfig) -> Task | None:
    """The task whose vocabulary a model has, as the bundled models have; None: that of none."""
    for task in (get_task(name) for name in TASKS):
        words = task.tokenizer
        ids = (words.mask_id, words.end_id, words.pad_id)
        if (config.vocab_size, (config.mask_id, config.eos_id, config.pad_id)) == (len(words), ids):
            return task
    return None
