# SPDX-License-Identifier: Apache-2.0
"""Select: of the answers that are right and whole, those whose decode was lean."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

from .._checks import choice, integer, make_plain, number
from ..redundancy import RedundancyScore

ORDERS = (*RedundancyScore._fields, "length", "nfe", "random")
FILTERS = ("correct", "parts", "none")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which answers are trained on.

    order: what is low in a good one: a field of `RedundancyScore`, "length" or "nfe"; "random" is
        the control.
    filter: "correct": those that the verifier accepted; "parts": those of which it found a part
        right, and only the right parts' tokens are learned (`Task.right_cells`); "none": all.
        Either way they are complete.
    quantile: share of the prompts' best answers that is kept, in (0, 1].
    seed: of order="random".
    """

    order: str = "total"
    filter: str = "correct"
    quantile: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self, choice, "order", choices=ORDERS)
        make_plain(self, choice, "filter", choices=FILTERS)
        make_plain(self, number, "quantile", low=0, high=1, open_low=True)
        make_plain(self, integer, "seed")

    def takes(self, record: dict[str, Any]) -> bool:
        """Whether an answer may be learned."""
        if not record["complete"]:
            return False
        if self.filter == "parts":
            return bool(record["right"])
        return self.filter == "none" or bool(record["correct"])


def select_rollouts(
    rollouts: Sequence[dict[str, Any]], selection: Selection
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The chosen records of `roll_out`, best first, and a report.

    Of each prompt the best answer, of these the best share. Ties go to the first. The report counts
    what was dropped, compares pool and choice, and gives the rank correlation of the order with
    length and forwards: a "redundancy" that is one of them in disguise shows there.

    Raises ValueError if nothing is left to choose from.
    """
    complete = [r for r in rollouts if r["complete"]]
    pool = [r for r in rollouts if selection.takes(r)]
    if not pool:
        judged = any(r["correct"] is not None for r in rollouts)
        no_verifier = selection.filter != "none" and not judged
        good = {"correct": " and 0 of these correct", "parts": " and 0 of these right in a part"}
        raise ValueError(
            f"nothing to train on: of {len(rollouts)} answers {len(complete)} are complete"
            + good.get(selection.filter, "")
            + (". There was no verifier: give one, or filter 'none'" if no_verifier else "")
        )
    keys = _keys(pool, selection)
    best: dict[int, int] = {}  # prompt -> place in the pool
    for place, record in enumerate(pool):
        prompt = record["prompt"]
        if prompt not in best or keys[place] < keys[best[prompt]]:
            best[prompt] = place
    places = sorted(best.values(), key=lambda place: (keys[place], place))
    places = places[: math.ceil(selection.quantile * len(places))]
    chosen = [pool[place] for place in places]
    report = {
        "answers": len(rollouts),
        "complete": len(complete),
        "pool": len(pool),
        "prompts": len(best),
        "selected": len(chosen),
        "pool_mean": _means(pool),
        "selected_mean": _means(chosen),
        "rank_correlation": {
            name: spearman(keys, _values(pool, name)) for name in ("length", "nfe", "nfe_per_token")
        },
    }
    return chosen, report


def _keys(pool: Sequence[dict[str, Any]], selection: Selection) -> list[float]:
    if selection.order == "random":
        return [
            Random(f"select {selection.seed} {r['prompt']} {r['sample']}").random() for r in pool
        ]
    return _values(pool, selection.order)


def _values(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [r["score"][name] if name in r["score"] else r[name] for r in records]


def _means(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = ("total", "stability", "window", "ambiguity", "length", "nfe")
    return {name: round(statistics.fmean(_values(records, name)), 4) for name in names}


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation, ties sharing their mean rank; None where a side is constant.

    >>> spearman([1, 2, 3, 4], [10, 20, 40, 30])
    0.8
    """
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return round(statistics.correlation(_ranks(x), _ranks(y)), 4)


def _ranks(values: Sequence[float]) -> list[float]:
    rank, below = {}, 0
    for value, count in sorted(Counter(values).items()):
        rank[value] = below + (count + 1) / 2
        below += count
    return [rank[value] for value in values]
