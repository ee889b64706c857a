# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the ops: `python bench/run.py`. See README.md beside it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bars import OVERHEADS, SPEEDS, Bar, bar_table, cpu_bars, cuda_bars
from comparisons import (
    Disagreement,
    decode_step_case,
    overhead_case,
    rule_case,
    token_confidence_case,
)
from loss import CASES, LOSSES, SHARES, WIDTH, returned_bytes
from memory import peak_memory
from reading import fastest_read
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
from shapes import DTYPES, NAMED, TINY, Shape, parse_shape, spiked_block
from timing import Variant, cache_state, device_work, measure, summary

COLUMNS = ("ours", "authors", "vectorised", "compiled", "softmax", "triton", "flashinfer", "read")
RULES = ("window_pool", "positional_ambiguity", "update_stability")
OPS = ("decode_step", "token_confidence", *RULES, "overhead", *LOSSES)
FULL = tuple(f"{model}-{B}" for model in ("llada", "dream") for B in (1, 4, 32))
QUICK = ("llada-1", "llada-4")
MEMORY_SHAPE = NAMED["llada-8"]
LOSS_SHAPES = (NAMED["llada-8"], NAMED["dream-8"])  # 256 rows
LINEAR_SHAPE = {"cpu": NAMED["llada-64"], "cuda": NAMED["llada-256"]}  # 2048, 8192 rows


class Row(NamedTuple):
    """One line of the table."""

    op: str
    shape: Shape
    dtype: str
    timed: bool = True
    share: int | None = None  # percent of the rows that carry loss


def run_case(row: Row, args: Any) -> dict[str, Any]:
    """One record: checked first, then timed, then its memory measured."""
    if row.op in LOSSES:
        return run_loss(row, args)
    op, shape, dtype, timed, _ = row
    record = {"op": op, "shape": shape._asdict(), "dtype": dtype, "device": args.device}
    record |= check_and_time(op, shape, dtype, args, timed)
    if op == "decode_step" and args.memory != "off":  # the probe has logits of its own
        record["extra_peak_bytes"] = peak_memory(shape, dtype, args.device, args.threads)
    return record


@torch.inference_mode(False)
def run_loss(row: Row, args: Any) -> dict[str, Any]:
    """One record of forward and backward."""
    op, shape, dtype, _, share = row
    record = {"op": op, "shape": shape._asdict(), "dtype": dtype, "device": args.device}
    case = CASES[op](shape, DTYPES[dtype], share, args.device, _compiled(args))
    record |= {"checked": True, "share": share, "skipped": case.skipped, "errors": case.errors}
    if op == "linear_sft_loss":
        record["width"] = WIDTH[args.device]
    times = measure(case.variants, before=lambda: None, seconds=args.seconds, device=args.device)
    columns = {name: summary(samples) for name, samples in times.items()}
    ours = columns["ours"]["median_us"]
    record["columns"] = columns
    record["ratio"] = {name: _digits(c["median_us"] / ours) for name, c in columns.items()}
    if case.bytes is not None:
        record |= {"bytes": case.bytes, "gb_per_s": _digits(case.bytes / ours * 1e-3)}
    if args.memory != "off":
        del case
        peaks = peak_memory(shape, dtype, args.device, args.threads, op, share)
        if isinstance(peaks, dict):
            returned = returned_bytes(op, shape, DTYPES[dtype], args.device)
            peaks = {k: v - returned * (k != "error") for k, v in peaks.items()}
        record["extra_peak_bytes"] = peaks
    return record


def check_and_time(op: str, shape: Shape, dtype: str, args: Any, timed: bool) -> dict[str, Any]:
    before = lambda: None
    if op in RULES:
        case = rule_case(op, shape, args.device)
    else:
        block = spiked_block(shape, DTYPES[dtype], args.device)
        if op == "overhead":
            case = overhead_case(block)
        elif op == "token_confidence":
            case = token_confidence_case(block, args.cache)
        else:
            case = decode_step_case(block, _compiled(args) if timed else "memory only", args.cache)
    record = {"checked": True, "rules": case.rules, "bytes": case.bytes, "skipped": case.skipped}
    if not timed:
        return record
    variants = list(case.variants)
    if case.bytes is not None:
        before = cache_state(args.cache, block.logits)
        turns = [turn.logits for turn in block.turns(args.cache)]
        record["read_kernel"], read = fastest_read(*turns)
        variants.append(Variant("read", read, turns=len(turns)))
    if op == "decode_step" and args.device == "cuda":
        record["device_work"] = {variant.name: device_work(variant) for variant in variants}
    times = measure(variants, before=before, seconds=args.seconds, device=args.device)
    columns = {name: summary(samples) for name, samples in times.items()}
    ours = columns["ours"]["median_us"]
    ratio = {name: _digits(column["median_us"] / ours) for name, column in columns.items()}
    record |= {"columns": columns, "ratio": ratio}
    if case.bytes is not None:
        record["gb_per_s"] = _digits(case.bytes / ours * 1e-3)
        record["fraction_of_read"] = ratio["read"]
    return record


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _compiled(args: argparse.Namespace) -> bool | str:
    return True if args.compile else "--quick" if args.quick else "--no-compile"


def cases(args: argparse.Namespace) -> list[Row]:
    """In the order they run."""
    shapes = [parse_shape(text) for text in args.shape or (QUICK if args.quick else FULL)]
    dtypes = args.dtype or (["bf16"] if args.quick else ["bf16", "fp32"])
    found = []
    for op in args.op:
        if op in LOSSES:
            own = (LINEAR_SHAPE[args.device],) if op == "linear_sft_loss" else LOSS_SHAPES
            own = shapes if args.shape else own[:1] if args.quick else own
            shares = args.share or ([50] if args.quick else SHARES)
            found += [
                Row(op, shape, dtype, share=share)
                for shape in own
                for dtype in dtypes
                for share in shares
            ]
        elif op == "overhead":
            found.append(Row(op, TINY, "fp32"))
        elif op in RULES:
            pairs = dict.fromkeys((shape.B, shape.L) for shape in shapes)
            found += [Row(op, Shape(B, L, 0), "fp32") for B, L in pairs]
        else:
            found += [Row(op, shape, dtype) for shape in shapes for dtype in dtypes]
        if op == "decode_step" and not args.shape and not args.dtype and args.memory != "off":
            found.append(Row(op, MEMORY_SHAPE, "bf16", not args.quick))
    return found


# ---- the table -------------------------------------------------------------------------------


def step_table(records: list[dict[str, Any]]) -> str:
    """Without the columns that no record has."""
    there = [name for name in COLUMNS[1:-1] if any(name in r.get("columns", {}) for r in records)]
    header = [
        *("op", "B", "L", "V", "dtype", "ours", "IQR", "GB/s", "of read"),
        *(word for name in there for word in (name, "x")),
        *("read", "peak MiB", "authors MiB"),
    ]
    return table(header, [line(record, there) for record in records], left=1)


def line(record: dict[str, Any], others: list[str]) -> list[str]:
    columns, ratio = record.get("columns", {}), record.get("ratio", {})
    ours = columns.get("ours")
    cells = [record["op"], *(str(n or "-") for n in record["shape"].values()), record["dtype"]]
    cells += (
        [duration(ours["median_us"]), duration(ours["q3_us"] - ours["q1_us"])] if ours else "--"
    )
    for key, digits in (("gb_per_s", 1), ("fraction_of_read", 2)):
        cells.append(f"{record[key]:.{digits}f}" if key in record else "-")
    for name in (*others, "read"):
        there = name in columns
        cells.append(duration(columns[name]["median_us"]) if there else "-")
        if name != "read":
            cells.append(f"{ratio[name]:.3g}" if there else "-")
    peak = record.get("extra_peak_bytes")
    peak = peak if isinstance(peak, dict) else {}
    return cells + [mebibytes(peak.get("ours")), mebibytes(peak.get("authors"))]


LOSS_HEADER = (
    *("op", "rows", "V", "dtype", "with loss", "variant", "time", "IQR", "x"),
    *("error of loss", "of gradient", "peak MiB"),
)


def loss_lines(record: dict[str, Any]) -> Iterator[list[str]]:
    """One line per variant."""
    shape, peaks = record["shape"], record.get("extra_peak_bytes")
    peaks = peaks if isinstance(peaks, dict) else {}
    where = [record["op"], str(shape["B"] * shape["L"]), str(shape["V"]), record["dtype"]]
    for name, column in record["columns"].items():
        errors = record["errors"].get(name, {})
        yield [
            *where,
            f"{record['share']} %",
            name,
            duration(column["median_us"]),
            duration(column["q3_us"] - column["q1_us"]),
            f"{record['ratio'][name]:.3g}",
            *(f"{errors[of]:.1e}" if errors else "-" for of in ("loss", "gradient")),
            mebibytes(peaks.get(name)),
        ]


def report(records: list[dict[str, Any]], bars: list[Bar]) -> None:
    steps = [record for record in records if record["op"] not in LOSSES]
    if steps:
        print(step_table(steps))
    if len(steps) < len(records):
        print(table(LOSS_HEADER, (x for r in records if r not in steps for x in loss_lines(r)), 5))
    for record in records:
        if record["op"] == "overhead":
            median = {name: column["median_us"] for name, column in record["columns"].items()}
            small = duration(median["torch_add"])
            print(f"overhead: one small torch op (ones(4) + ones(4)) takes {small} here")
            for name, words in OVERHEADS.items():
                print(f"overhead: a call with {words} takes {duration(median[name])}")
    for reason in dict.fromkeys(
        f"{column} skipped: {why}"
        for r in records
        for column, why in r["skipped"].items()
        if "columns" in r
    ):
        print(reason)
    kernels = dict.fromkeys(r["read_kernel"] for r in records if "read_kernel" in r)
    if kernels:
        print(f"read: {', '.join(kernels)} over the same bytes")
    for record in records:
        if "device_work" in record:
            where = (
                f"{record['op']} {'x'.join(map(str, record['shape'].values()))} {record['dtype']}"
            )
            counts = ", ".join(
                f"{name} {work['launches']:g} / {work['host_syncs']:g}"
                for name, work in record["device_work"].items()
            )
            print(f"{where}: launches / host syncs a step: {counts}")
    peaks = [r["extra_peak_bytes"] for r in records if "extra_peak_bytes" in r]
    errors = [abs(peak["error"]) for peak in peaks if isinstance(peak, dict)]
    if errors:
        error = mebibytes(max(errors))
        print(f"peak memory: growth of the resident set; a known 1 MiB is off by {error} MiB")
    for reason in {peak for peak in peaks if isinstance(peak, str)}:
        print(f"peak memory not measured: {reason}")
    print(bar_table(bars))


def held_against(instruction_set: str, threads: int) -> str:
    """Which bars these were."""
    if instruction_set not in SPEEDS:
        return f"bars: none of speed, as nothing was recorded for {instruction_set}"
    return f"bars: those of {instruction_set}, recorded with 2 threads; this run had {threads}"


# ---- command line ----------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="run.py", description="Benchmarks of the ops.")
    parser.add_argument(
        "--op",
        action="append",
        choices=(*OPS, "all"),
        help="repeatable; default decode_step and overhead",
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NAME|B,L,V",
        help=f"repeatable; names: {', '.join(NAMED)}",
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable")
    parser.add_argument(
        "--share",
        action="append",
        type=int,
        choices=SHARES,
        help="percent of the rows that carry loss; repeatable",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument(
        "--cache",
        choices=("warm", "cold"),
        default="warm",
        help="a call finds the logits just read, or swept caches",
    )
    parser.add_argument(
        "--memory",
        choices=("auto", "on", "off"),
        default="auto",
        help="auto: all decode_step rows; if quick, llada-8 alone",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the torch.compile column; default: unless quick",
    )
    parser.add_argument("--seconds", type=float, help="per row; default 4, quick 1")
    parser.add_argument("--quick", action="store_true", help="few rows, under 30 s")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    args.op = list(OPS) if "all" in (args.op or ()) else args.op or ["decode_step", "overhead"]
    if args.seconds is None:
        args.seconds = 1.0 if args.quick else 4.0
    args.compile = not args.quick if args.compile is None else args.compile
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    use_threads(args.threads)
    check_seconds(args.seconds)
    args.threads = torch.get_num_threads()
    use_device(args.device)
    try:
        todo = cases(args)
    except ValueError as error:
        fail(str(error))
    machine = environment(args.device)
    used = machine["machine"]["instruction_set"]
    settings = {key: getattr(args, key) for key in ("threads", "cache", "seconds", "quick")}
    content = {"schema": 1, **machine, "settings": settings}

    began, records, bars = time.perf_counter(), [], []
    with torch.inference_mode():
        for i, row in enumerate(todo):
            where = "x".join(map(str, row.shape)) if row.op != "overhead" else "tiny"
            share = "" if row.share is None else f" {row.share} %"
            print(f"[{i + 1}/{len(todo)}] {row.op} {where} {row.dtype}{share}", flush=True)
            wanted = args.memory
            if wanted == "auto" and args.quick and row.timed and row.op not in LOSSES:
                wanted = "off"
            settings = argparse.Namespace(**{**vars(args), "memory": wanted})
            try:
                records.append(run_case(row, settings))
            except Disagreement as error:
                print(f"run.py: {error}")
                raise SystemExit(1) from None
            bars = (
                cuda_bars(records, args.cache) if args.device == "cuda" else cpu_bars(records, used)
            )
            # What there is, after each row: whatever ends the run, it is not lost.
            write_json(args.json, content | {"records": records, "bars": bars})
    print()
    report(records, bars)
    if args.device == "cpu":
        print(held_against(used, args.threads))
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
