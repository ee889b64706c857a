# SPDX-License-Identifier: Apache-2.0
"""What the project promises of its speed, held against measured records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harness import table
from shapes import NAMED, TINY, Shape

Bar = dict[str, Any]


def held(
    name: str, value: float | None, relation: str, least: float, aim: float | None = None
) -> Bar:
    """One promise; a `value` of None was not measured."""
    if value is None:
        passed = None
    else:
        passed = {">=": value >= least, "<=": value <= least, "<": value < least}[relation]
        value = round(value, 3)
    bar = {"bar": name, "value": value, "required": f"{relation} {least}", "aim": aim}
    return bar | {"passed": passed}


def find(
    records: list[dict[str, Any]], op: str, shape: Shape, dtype: str, share: int = 50
) -> dict[str, Any]:
    """The record of a row; empty if it is not there."""
    key = (op, shape._asdict(), dtype)
    matches = (r for r in records if (r["op"], r["shape"], r["dtype"]) == key)
    return next((r for r in matches if r.get("share", share) == share), {})


def ratio(record: dict[str, Any], other: str) -> float | None:
    """Times faster than `other`."""
    return record.get("ratio", {}).get(other)


def ours(record: dict[str, Any]) -> float | None:
    """Median microseconds."""
    return record.get("columns", {}).get("ours", {}).get("median_us")


def peak_mib(record: dict[str, Any]) -> float | None:
    return _over(_peaks(record).get("ours"), 2**20)


def _peaks(record: dict[str, Any]) -> dict[str, int]:
    peaks = record.get("extra_peak_bytes")
    return peaks if isinstance(peaks, dict) else {}


def _over(value: float | None, unit: float | None) -> float | None:
    return None if value is None or unit is None else value / unit


def cpu_bars(records: list[dict[str, Any]]) -> list[Bar]:
    """On 2 cores."""
    first = find(records, "decode_step", NAMED["llada-1"], "bf16")
    fourth = find(records, "decode_step", NAMED["llada-4"], "bf16")
    eighth = find(records, "decode_step", NAMED["llada-8"], "bf16")
    call = find(records, "overhead", TINY, "fp32")
    bars = [
        held("llada-1 bf16: times faster than the authors' way",
             ratio(first, "authors"), ">=", 60, 150),
        held("llada-1 bf16: times faster than softmax + max",
             ratio(first, "softmax"), ">=", 10, 20),
        held("llada-4 bf16: fraction of a read", fourth.get("fraction_of_read"), ">=", 0.25, 0.5),
        held("llada-8 bf16: extra peak memory, MiB", peak_mib(eighth), "<=", 4),
        held("overhead of a call, us", ours(call), "<", 30),
    ]  # fmt: skip
    for dtype in ("bf16", "fp32"):
        record = find(records, "sft_loss", NAMED["llada-8"], dtype)
        name = f"sft_loss 256 x 126464 {dtype}, half ignored: "
        bars += [
            held(name + "times faster than eager", ratio(record, "eager"), ">=", 6, 12),
            held(name + "extra peak memory, MiB", peak_mib(record), "<=", 1),
        ]  # fmt: skip
        record = find(records, "linear_sft_loss", NAMED["llada-64"], dtype)
        name = f"linear_sft_loss 2048 x 126464 {dtype}, half ignored: "
        bars += [
            held(name + f"times faster than {other}", ratio(record, other), ">=", 1, 1.6)
            for other in ("eager", "torch chunked")
        ]
        peaks = _peaks(record)
        share = _over(peaks.get("ours"), peaks.get("eager"))
        bars.append(held(name + "extra peak memory, of eager's", share, "<=", 0.1))
    return bars


def cuda_bars(records: list[dict[str, Any]], cache: str) -> list[Bar]:
    """On an H200."""
    step = {B * 32: find(records, "decode_step", NAMED[f"llada-{B}"], "bf16") for B in (1, 8, 64)}
    work = step[32].get("device_work", {}).get("ours", {})
    bars = [
        held("32 rows bf16: launches a step", work.get("launches"), "<=", 2),
        held("32 rows bf16: host synchronisations a step", work.get("host_syncs"), "<=", 0),
        held("32 rows bf16: times faster than the authors' way",
             ratio(step[32], "authors"), ">=", 200),
    ]  # fmt: skip
    if cache == "warm":
        bars.append(held("32 rows bf16, warm: us a step", ours(step[32]), "<=", 8, 6))
    else:
        bars += [
            held("256 rows bf16, cold: us a step", ours(step[256]), "<=", 22, 18),
            held("2048 rows bf16, cold: us a step", ours(step[2048]), "<=", 135, 128),
        ]
    loss = find(records, "sft_loss", NAMED["llada-64"], "bf16")
    name = "sft_loss 2048 x 126464 bf16, half ignored: fraction of a read and write"
    bars.append(held(name, ratio(loss, "read + write"), ">=", 0.85))
    linear = find(records, "linear_sft_loss", NAMED["llada-256"], "bf16")
    name = "linear_sft_loss 8192 x 126464 bf16, half ignored: times faster than "
    bars += [
        held(name + other, ratio(linear, other), ">=", 1.6)
        for other in ("liger", "torch chunked", "eager")
    ]
    return bars


def bar_table(bars: Iterable[Bar]) -> str:
    """Those that were measured; nothing if none was."""
    verdict = {True: "pass", False: "FAIL"}
    rows = [
        (b["bar"], f"{b['value']:g}", b["required"], str(b["aim"] or "-"), verdict[b["passed"]])
        for b in bars
        if b["passed"] is not None
    ]
    return "\n" + table(("bar", "value", "required", "aim", ""), rows) if rows else ""
