# SPDX-License-Identifier: Apache-2.0
"""What `experiment.py` says of its answers: means, intervals, areas, a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import SHARE_HEADER, Z95, calibration_line, share, share_cells, table


def measured(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of records with right, parts and nfe: the share of the parts that is right, forwards."""
    right, parts = sum(r["right"] for r in records), sum(r["parts"] for r in records)
    nfe = [r["nfe"] for r in records]
    return {
        "prompts": len(records),
        **share(right, parts),
        "nfe": round(statistics.fmean(nfe), 2),
        "tokens_per_forward": round(sum(r["length"] for r in records) / sum(nfe), 3),
    }


def area(curve: dict[Any, dict[str, Any]], y_max: float) -> float:
    """AUP, the area under accuracy (%) over tokens a forward, where little accuracy is lost.

    With the points in the order of tokens a forward, rho_1 y_1 + sum of (rho_i - rho_i-1) times the
    mean of y W(y) at both ends, W(y) = min(exp(-3 (1 - y / y_max)), 1); points more than 5 below
    the first are left out. `y_max` is the best accuracy of all that are compared, in %.
    """
    points = sorted((m["tokens_per_forward"], 100 * m["accuracy"]) for m in curve.values())
    points = [(rho, y) for rho, y in points if y >= points[0][1] - 5]
    weighed = [y * min(math.exp(-3 * (1 - y / y_max)), 1.0) for _, y in points]
    total = points[0][0] * points[0][1]
    for i in range(1, len(points)):
        total += (points[i][0] - points[i - 1][0]) * (weighed[i] + weighed[i - 1]) / 2
    return round(total, 1)


def difference(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, Any]:
    """Mean paired difference over prompts and its 95 % interval (normal)."""
    values = [ours[key] - theirs[key] for key in sorted(ours)]
    mean, n = statistics.fmean(values), len(values)
    half = Z95 * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return {"mean": round(mean, 3), "interval95": [round(mean - half, 3), round(mean + half, 3)]}


def compare(
    records: dict[str, list[dict[str, Any]]], results: dict[str, Any], decoder: str = "budget"
) -> dict[str, Any]:
    """Lean against random with a decoder at the chosen values, and whether the claim holds."""
    forwards = {arm: {r["number"]: r["nfe"] for r in found} for arm, found in records.items()}
    found = difference(forwards["lean"], forwards["random"])
    own, base = results["lean"][decoder], results["base"]["vanilla"]["curve"]
    right = own["curve"][own["chosen"]]["accuracy"]
    within = right >= next(iter(base.values()))["wilson95"][0]
    return {
        "decoder": decoder,
        "forwards": found,
        "within_base_interval": within,
        "holds": within and found["interval95"][1] < 0,
    }


def report(content: dict[str, Any]) -> str:
    results = content["results"]
    decoders = [name for name, one in results["base"].items() if isinstance(one, dict)]
    y_max = max(
        100 * m["accuracy"] for arm in results.values() for n in decoders
        for m in arm[n]["curve"].values()
    )  # fmt: skip
    rows = []
    for name in decoders:
        for arm, one in results.items():
            value = one[name]["chosen"]
            m = one[name]["curve"][value]
            rows.append(
                (
                    name,
                    arm,
                    f"{value:g}",
                    *share_cells(m),
                    f"{m['nfe']:.2f}",
                    f"{m['tokens_per_forward']:.2f}",
                    f"{area(one[name]['curve'], y_max):g}",
                )
            )
    header = ("decoder", "arm", "value", *SHARE_HEADER, "NFE", "tokens/NFE", "AUP")
    lines = [table(header, rows, left=2), f"AUP with y_max = {y_max:g}"]
    for arm, one in results.items():
        lines.append(f"{calibration_line(arm, one)}, {one['styles']} styles")
    for arm, one in results.items():
        for seed, rounds in enumerate(one["redundancy_with_length"]):
            shown = ", ".join("-" if r is None else f"{r:+.2f}" for r in rounds)
            lines.append(f"{arm} {seed}: rank correlation of redundancy with length {shown}")
    claim = content["lean_against_random"]
    low, high = claim["forwards"]["interval95"]
    lines.append(
        f"the choice of lean answers helps: {'yes' if claim['holds'] else 'not shown'} "
        f"({claim['decoder']}: {low:+.2f} .. {high:+.2f} forwards against random, right "
        f"{'within' if claim['within_base_interval'] else 'below'} the base's interval)"
    )
    return "\n".join(lines)


def plot(content: dict[str, Any], path: Path) -> None:
    """Accuracy over forwards: a panel a decoder, a line an arm, the chosen value marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = content["results"]
    decoders = [n for n, one in results["base"].items() if isinstance(one, dict) and n != "vanilla"]
    figure, (panels,) = pyplot.subplots(
        1, len(decoders), figsize=(4 * len(decoders), 4), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axes, name in zip(panels, decoders, strict=True):
        for arm, one in results.items():
            curve = sorted(one[name]["curve"].items(), key=lambda item: item[1]["nfe"])
            x = [m["nfe"] for _, m in curve]
            y = [100 * m["accuracy"] for _, m in curve]
            (line,) = axes.plot(x, y, marker="o", ms=3, lw=1.2, label=arm)
            chosen = one[name]["curve"][one[name]["chosen"]]
            axes.plot(chosen["nfe"], 100 * chosen["accuracy"], "*", ms=12, color=line.get_color())
            (patient,) = one["vanilla"]["curve"].values()
            axes.axhline(100 * patient["accuracy"], lw=0.6, ls=":", color=line.get_color())
        axes.set(title=name, xlabel="forwards per answer (mean)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right, % (dotted: one token a step)")
    panels[-1].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"written: {path.name}")
