# SPDX-License-Identifier: Apache-2.0
"""Redundancy-aware fine-tuning: roll out with a trace, score, select, train, evaluate.

`run` is the whole recipe (`r2dllm sft` on the command line); its parts work alone: `roll_out`,
`select_rollouts`, `Trainer` and `train`, `summarise`.
"""

from .evaluation import summarise
from .exporting import export
from .objective import Batch, Example, Objective, make_batch
from .pipeline import Recipe, run
from .prompts import Prompt, load_verifier, read_prompts
from .ranks import current_ranks, process_group
from .rollout import Rollout, roll_out
from .rounds import Rounds
from .selection import Selection, select_rollouts
from .training import Trainer, Training, train

__all__ = [
    "Batch",
    "Example",
    "Objective",
    "Prompt",
    "Recipe",
    "Rollout",
    "Rounds",
    "Selection",
    "Trainer",
    "Training",
    "current_ranks",
    "export",
    "load_verifier",
    "make_batch",
    "process_group",
    "read_prompts",
    "roll_out",
    "run",
    "select_rollouts",
    "summarise",
    "train",
]
