# SPDX-License-Identifier: Apache-2.0
"""What the project promises of its speed, held against measured records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from report import table
from shapes import NAMED, TINY, Shape

Bar = dict[str, Any]


def held(
    name: str,
    value: float | None,
    relation: str,
    least: float,
    *,
    aim: float | None = None,
    recorded: float | None = None,
) -> Bar:
    """One promise, what is hoped for and what was recorded; a `value` of None was not measured."""
    if value is None:
        passed = None
    else:
        passed = {">=": value >= least, "<=": value <= least, "<": value < least}[relation]
        value = round(value, 3)
    bar = {"bar": name, "value": value, "required": f"{relation} {least:g}"}
    return bar | {"aim": aim, "recorded": recorded, "passed": passed}


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


def _peaks(record: dict[str, Any]) -> dict[str, int]:
    peaks = record.get("extra_peak_bytes")
    return peaks if isinstance(peaks, dict) else {}


def _over(value: float | None, unit: float | None) -> float | None:
    return None if value is None or unit is None else value / unit


class Speed(NamedTuple):
    """Times faster, or a fraction of a read: what is required, and what was recorded."""

    least: float
    recorded: float


# What was recorded on 2 cores, by instruction set, and what is required: the distance is what the
# authors' way and eager torch vary from run to run. Keys: (op, rows of the batch, dtype, against).
_STEP, _LOSS, _LINEAR = "decode_step", "sft_loss", "linear_sft_loss"
SPEEDS: dict[str, dict[tuple[str, int, str, str], Speed]] = {
    "avx512": {  # bench/results/*_avx512.json
        (_STEP, 1, "bf16", "authors"): Speed(60, 64.37),
        (_STEP, 1, "bf16", "softmax"): Speed(10, 13.8),
        (_STEP, 1, "bf16", "read"): Speed(0.25, 0.3709),
        (_STEP, 4, "bf16", "authors"): Speed(95, 127),
        (_STEP, 4, "bf16", "softmax"): Speed(20, 29.43),
        (_STEP, 4, "bf16", "read"): Speed(0.25, 0.4258),
        (_LOSS, 8, "bf16", "eager"): Speed(6, 12.64),
        (_LOSS, 8, "fp32", "eager"): Speed(6, 12.71),
        (_LINEAR, 64, "bf16", "eager"): Speed(1, 1.708),
        (_LINEAR, 64, "fp32", "eager"): Speed(1, 1.906),
        (_LINEAR, 64, "bf16", "torch chunked"): Speed(1, 16.7),
        (_LINEAR, 64, "fp32", "torch chunked"): Speed(1, 4.934),
    },
    # bench/results/*_avx2.json, a Xeon held to AVX2. An EPYC without AVX-512 reaches a third of it,
    # bound by arithmetic: what is required leaves it room.
    "avx2": {
        (_STEP, 1, "bf16", "authors"): Speed(16, 85.71),
        (_STEP, 1, "bf16", "softmax"): Speed(3.4, 8.6),
        (_STEP, 1, "bf16", "read"): Speed(0.1, 0.3193),
        (_STEP, 4, "bf16", "authors"): Speed(31, 118.5),
        (_STEP, 4, "bf16", "softmax"): Speed(7, 27.46),
        (_STEP, 4, "bf16", "read"): Speed(0.18, 0.3296),
        (_LOSS, 8, "bf16", "eager"): Speed(2.7, 10.13),
        (_LOSS, 8, "fp32", "eager"): Speed(2.7, 9.034),
    },
}


# Columns of the overhead's record beside "ours", and what they are.
OVERHEADS = {"release": "the release's options", "dream": "Dream's options"}


def cpu_bars(records: list[dict[str, Any]], instruction_set: str) -> list[Bar]:
    """Speeds against those of the instruction set (none where nothing was recorded for it), then
    what holds on every processor: memory and the cost of a call."""
    bars = []
    for (op, rows, dtype, other), speed in SPEEDS.get(instruction_set, {}).items():
        shape = NAMED[f"llada-{rows}"]
        value = ratio(find(records, op, shape, dtype), other)
        what = "fraction of a read" if other == "read" else f"times faster than {other}"
        name = f"{_name(op, shape, dtype)}: {what}"
        bars.append(held(name, value, ">=", speed.least, recorded=speed.recorded))
    for op, rows, dtype in ((_STEP, 8, "bf16"), (_LOSS, 8, "bf16"), (_LOSS, 8, "fp32")):
        shape, most = NAMED[f"llada-{rows}"], 4 if op == _STEP else 1
        peak = _over(_peaks(find(records, op, shape, dtype)).get("ours"), 2**20)
        bars.append(held(f"{_name(op, shape, dtype)}: extra peak memory, MiB", peak, "<=", most))
    for dtype in ("bf16", "fp32"):
        shape = NAMED["llada-64"]
        peaks = _peaks(find(records, _LINEAR, shape, dtype))
        share = _over(peaks.get("ours"), peaks.get("eager"))
        name = f"{_name(_LINEAR, shape, dtype)}: extra peak memory, of eager's"
        bars.append(held(name, share, "<=", 0.1))
    # A slow machine pays more for any operation: then six small ones of torch's are the measure.
    call = find(records, "overhead", TINY, "fp32")
    small = call.get("columns", {}).get("torch_add", {}).get("median_us", 0)
    bars.append(held("overhead of a call, us", ours(call), "<=", max(20.0, round(6 * small, 1))))
    for name, words in OVERHEADS.items():
        share = _over(call.get("columns", {}).get(name, {}).get("median_us"), ours(call))
        bars.append(held(f"overhead of a call with {words}, of the default's", share, "<=", 1.1))
    return bars


def _name(op: str, shape: Shape, dtype: str) -> str:
    rows = f"{shape.B} x {shape.L}" if op == _STEP else f"{shape.B * shape.L}"
    return f"{op} {rows} x {shape.V} {dtype}" + ", half ignored" * (op != _STEP)


def cuda_bars(records: list[dict[str, Any]], cache: str) -> list[Bar]:
    """On an H200."""
    step = {B * 32: find(records, "decode_step", NAMED[f"llada-{B}"], "bf16") for B in (1, 8, 64)}
    work = step[32].get("device_work", {}).get("ours", {})
    bars = [
        held("32 rows bf16: launches a step", work.get("launches"), "<=", 2),
        held("32 rows bf16: host synchronisations a step", work.get("host_syncs"), "<=", 0),
        held(
            "32 rows bf16: times faster than the authors' way",
            ratio(step[32], "authors"),
            ">=",
            200,
        ),
    ]
    if cache == "warm":
        bars.append(held("32 rows bf16, warm: us a step", ours(step[32]), "<=", 8, aim=6))
    else:
        bars += [
            held("256 rows bf16, cold: us a step", ours(step[256]), "<=", 22, aim=18),
            held("2048 rows bf16, cold: us a step", ours(step[2048]), "<=", 135, aim=128),
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


# Steps of engines, rows of the batch: times faster that ours has to be in the engine's loop.
ENGINES = {
    ("fast_dllm get_transfer_index", 1): 200,
    ("diffusers LLaDA2Pipeline", 1): 10,
    ("diffusers LLaDA2Pipeline", 8): 10,
    ("sglang LowConfidence", 8): 5,
    ("sglang JointThreshold", 8): 5,
}


def engine_bars(records: list[dict[str, Any]]) -> list[Bar]:
    """Of the vocabulary that is named in them; others are no measure."""
    bars = []
    for (step, rows), least in ENGINES.items():
        matches = [r for r in records if r["op"] == step and r["shape"]["B"] == rows]
        value = next((ratio(r, "theirs") for r in matches if r["shape"]["V"] == 126464), None)
        bars.append(held(f"{step}, B = {rows}: times faster", value, ">=", least))
    return bars


def bar_table(bars: Iterable[Bar]) -> str:
    """Those that were measured; nothing if none was."""
    verdict = {True: "pass", False: "FAIL"}
    rows = [
        (
            b["bar"],
            f"{b['value']:g}",
            b["required"],
            *(f"{b[key]:g}" if b[key] else "-" for key in ("recorded", "aim")),
            verdict[b["passed"]],
        )
        for b in bars
        if b["passed"] is not None
    ]
    header = ("bar", "value", "required", "recorded", "aim", "")
    return "\n" + table(header, rows) if rows else ""
