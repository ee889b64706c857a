# SPDX-License-Identifier: Apache-2.0
"""Engines' own steps against ours in their loops: `python bench/engines.py`. See README.md."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from bars import bar_table, engine_bars
from comparisons import Disagreement
from engine_cases import STEPS, engine_case, missing
from memory import peak_memory
from report import (
    Parser,
    check_seconds,
    duration,
    environment,
    fail,
    mebibytes,
    table,
    use_device,
    use_threads,
    write_json,
)
from shapes import DTYPES, Shape, parse_shape
from timing import measure, summary


def run_step(name: str, shape: Shape, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One record: the same tokens first, then times, then memory."""
    case = engine_case(name, shape, DTYPES[dtype], args.device)
    record = {"op": name, "shape": shape._asdict(), "dtype": dtype, "device": args.device}
    record |= {"checked": True, "forwards": case.forwards, "bytes": case.bytes}
    record |= {"engine": {"name": STEPS[name].engine, "version": case.source}}
    nothing = lambda: None
    times = measure(case.variants, before=nothing, seconds=args.seconds, device=args.device)
    columns = {way: summary(samples) for way, samples in times.items()}
    quotient = columns["theirs"]["median_us"] / columns["ours"]["median_us"]
    record |= {"columns": columns, "ratio": {"theirs": float(f"{quotient:.4g}")}}
    del case
    if args.memory:
        peaks = peak_memory(shape, dtype, args.device, args.threads, name)
        record["extra_peak_bytes"] = peaks
    return record


def engine_table(records: list[dict[str, Any]]) -> str:
    header = (
        *("step", "version", "B", "L", "V", "dtype", "steps", "ours", "IQR", "theirs", "IQR", "x"),
        *("peak MiB", "theirs MiB"),
    )
    return table(header, map(_line, records))


def _line(record: dict[str, Any]) -> list[str]:
    cells = [record["op"], record["engine"]["version"], *map(str, record["shape"].values())]
    cells += [record["dtype"], str(record["forwards"])]
    for way in ("ours", "theirs"):
        column = record["columns"][way]
        cells += [duration(column["median_us"]), duration(column["q3_us"] - column["q1_us"])]
    peaks = record.get("extra_peak_bytes")
    peaks = peaks if isinstance(peaks, dict) else {}
    cells.append(f"{record['ratio']['theirs']:.1f}")
    return [*cells, *(mebibytes(peaks.get(way)) for way in ("ours", "theirs"))]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="engines.py", description="Engines' own steps against ours.")
    parser.add_argument("--step", action="append", choices=STEPS, help="repeatable; default all")
    parser.add_argument("--shape", action="append", metavar="NAME|B,L,V", help="repeatable")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=4.0, help="per row")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    use_threads(args.threads)
    check_seconds(args.seconds)
    try:
        args.shape = [parse_shape(text) for text in args.shape or ()]
    except ValueError as error:
        fail(str(error))
    args.threads = torch.get_num_threads()
    use_device(args.device)
    return args


@torch.inference_mode()
def measured(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Records, and the steps that are left out with the reason."""
    records, skipped = [], {}
    for name in args.step or STEPS:
        if reason := missing(name):
            skipped[name] = reason
            continue
        step = STEPS[name]
        for shape in args.shape or step.shapes:
            for dtype in args.dtype or step.dtypes:
                print(f"{name} {'x'.join(map(str, shape))} {dtype}", flush=True)
                records.append(run_step(name, shape, dtype, args))
    return records, skipped


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    machine = environment(args.device)
    try:
        records, skipped = measured(args)
    except Disagreement as error:
        print(f"engines.py: {error}")
        raise SystemExit(1) from None
    bars = engine_bars(records)
    print()
    if records:
        print(engine_table(records))
    for name, reason in skipped.items():
        print(f"{name} skipped: {reason}")
    peaks = [record.get("extra_peak_bytes") for record in records]
    for reason in {peak for peak in peaks if isinstance(peak, str)}:
        print(f"peak memory not measured: {reason}")
    print(bar_table(bars))
    settings = {"threads": args.threads, "seconds": args.seconds}
    content = {"schema": 1, **machine, "settings": settings, "skipped": skipped}
    write_json(args.json, content | {"records": records, "bars": bars})


if __name__ == "__main__":
    main()
