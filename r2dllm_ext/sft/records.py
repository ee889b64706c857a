# SPDX-License-Identifier: Apache-2.0
"""Records of `roll_out` as they come back from a file, which may be damaged or of another run."""

from __future__ import annotations

from typing import Any

from .._checks import flag, integer, integers, number, refuse
from ..config import Rule
from ..redundancy import RedundancyScore

_WHERE = "record"


def check_record(
    record: dict[str, Any], gen_length: int, judged: bool, vocabulary: int | None
) -> None:
    """Raises TypeError or ValueError naming the field that `roll_out` would not have written.

    judged: there is a verifier. vocabulary: ids of the model, None = nobody knows.
    """
    if not isinstance(record.get("text"), str):
        refuse(TypeError, _WHERE, "text", "a text", record.get("text"))
    flag(_WHERE, "complete", record.get("complete"))
    right, correct = record.get("right"), record.get("correct")
    if judged:
        right = number(_WHERE, "right", right, 0, 1)
        if flag(_WHERE, "correct", correct) != (right == 1):
            takes = f"{str(right == 1).lower()} with right {right}"
            refuse(ValueError, _WHERE, "correct", takes, correct)
    elif right is not None or correct is not None:
        refuse(TypeError, _WHERE, "right and correct", "null without a verifier", (right, correct))
    integer(_WHERE, "length", record.get("length"), 0, gen_length)
    integer(_WHERE, "nfe", record.get("nfe"), 0)
    for name in RedundancyScore._fields:
        number(_WHERE, f"score.{name}", _object(record, "score").get(name), 0)
    for rule in list(Rule)[1:]:
        name = rule.name.lower()
        integer(_WHERE, f"rule_counts.{name}", _object(record, "rule_counts").get(name), 0)
    highest = None if vocabulary is None else vocabulary - 1
    for name, low, high in (("token_ids", 0, highest), ("commit_step", -1, None)):
        values = record.get(name)
        if not isinstance(values, list) or len(values) != gen_length:
            refuse(ValueError, _WHERE, name, f"a list of {gen_length}", values)
        integers(_WHERE, name, values, low, high)


def _object(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    if not isinstance(value, dict):
        refuse(TypeError, _WHERE, name, "an object", value)
    return value
