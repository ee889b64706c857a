# SPDX-License-Identifier: Apache-2.0
"""Evaluate: what decoding costs and how often it is right."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..config import Rule


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the records of `roll_out`: how many are correct and which share of their parts is right
    (None if nobody knows), forwards, tokens of the answers per forward, and which rule committed
    what share of them."""
    right = [r["right"] for r in records if r["right"] is not None]
    judged = [r["correct"] for r in records if r["correct"] is not None]
    nfe = [r["nfe"] for r in records]
    rules = {
        r.name.lower(): sum(x["rule_counts"][r.name.lower()] for x in records) for r in Rule if r
    }
    tokens = sum(rules.values())
    return {
        "answers": len(records),
        "correct": sum(judged) if judged else None,
        "accuracy": round(sum(judged) / len(judged), 4) if judged else None,
        "right": round(statistics.fmean(right), 4) if right else None,
        "complete": sum(r["complete"] for r in records),
        "nfe": round(statistics.fmean(nfe), 3),
        "nfe_p90": statistics.quantiles(nfe, n=10, method="inclusive")[8]
        if len(nfe) > 1
        else nfe[0],
        "length": round(statistics.fmean(r["length"] for r in records), 3),
        "tokens_per_forward": round(sum(r["length"] for r in records) / max(1, sum(nfe)), 3),
        "rule_share": {name: round(n / max(1, tokens), 4) for name, n in rules.items()},
    }
