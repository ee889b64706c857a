# SPDX-License-Identifier: Apache-2.0
"""Accuracy against forwards: `python bench/curves.py --task T`.

Decodes prompts of a task that no training has seen with its bundled model, or others, by every
decoder, at the preset's own value of its parameter and at others. The task's verifier counts the
parts (answers, words) that are right. A forward counts for a prompt if a decode of it alone would
make it. One token a step also gives the expected calibration error over all states of its decodes:
an argmax style is chosen more surely than its probability says, so that part of it is no fault;
where the task knows the true distribution, the error against that too.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from decoders import DECODERS, config_of
from report import (
    SHARE_HEADER,
    Parser,
    calibration_line,
    environment,
    fail,
    share,
    share_cells,
    table,
    use_threads,
    write_json,
)
from task_decode import Decoded, calibration_error, decode

from r2dllm_ext import load_model
from r2dllm_ext.config import Rule
from r2dllm_ext.tasks import TASKS, Task, get_task, pronounce


class Setting(NamedTuple):
    decoder: str
    value: float
    own: bool  # the preset's own value
    prompts: int


def settings(chosen: list[str], prompts: int, curve_prompts: int) -> list[Setting]:
    """Of `NAME`, a decoder with its curve, and `NAME=VALUE`; the presets' own values first."""
    own, others = [], []
    for text in chosen:
        name, given, number = text.partition("=")
        if name not in DECODERS:
            fail(f"--decoders takes {', '.join(DECODERS)}, each alone or as NAME=VALUE, got {text}")
        decoder = DECODERS[name]
        try:
            value = float(number) if given else decoder.own
            config_of(name, value, 0)
        except ValueError as error:
            fail(f"--decoders {text}: {error}")
        own.append(Setting(name, value, value == decoder.own, prompts))
        if not given and curve_prompts:
            others += [Setting(name, other, False, curve_prompts) for other in decoder.others]
    return own + others


def judge(out: Decoded, prompts: list[str], task: Task) -> dict[str, Any]:
    """Accuracy, forwards and commits of one setting."""
    texts = [task.tokenizer.decode(row) for row in out.tokens.tolist()]
    verdicts = [task.verify(p, t) for p, t in zip(prompts, texts, strict=True)]
    right, parts = sum(v.right for v in verdicts), sum(v.parts for v in verdicts)
    nfe, by_rule = out.nfe.tolist(), Counter(out.rule.flatten().tolist())
    low, median, high = statistics.quantiles(nfe, n=4, method="inclusive")
    result = {
        "prompts": len(prompts),
        **share(right, parts),
        "nfe": {
            "mean": round(statistics.fmean(nfe), 3),
            "sd": round(statistics.stdev(nfe), 3),
            "min": min(nfe),
            "q1": low,
            "median": median,
            "q3": high,
            "max": max(nfe),
        },
        # The end tokens that fill an answer up are left out.
        "tokens_per_forward": round(
            int((out.tokens != task.tokenizer.end_id).sum()) / sum(nfe), 3
        ),
        "commit_share": {
            rule.name: round(by_rule[rule] / out.rule.numel(), 4) for rule in Rule if rule
        },
    }  # fmt: skip
    if out.calibration.any():
        result["calibration_error"] = round(calibration_error(out.calibration), 4)
        result["calibration"] = [[round(x, 2) for x in row] for row in out.calibration.tolist()]
    if out.exact.any():
        result["exact_calibration_error"] = round(calibration_error(out.exact), 4)
    if isinstance(task, pronounce.Pronounce):
        pairs = [pronounce.phoneme_errors(p, t) for p, t in zip(prompts, texts, strict=True)]
        errors, total = (sum(column) for column in zip(*pairs, strict=True))
        result["phoneme_error_rate"] = round(errors / total, 4)
    return result


def shown(model: str) -> str:
    """A bundled model's name, or a folder's last two parts: many a folder is called model."""
    return "/".join(Path(model).parts[-2:])


def run(
    args: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """By model, decoder and value; `keep` is called with what there is, whenever it has grown."""
    task = get_task(args.task)
    prompts = [task.sample(args.seed, i, split=args.split).prompt for i in range(args.prompts)]
    results: list[dict[str, Any]] = []
    order = list(DECODERS)
    for name in args.model:
        own_results: list[dict[str, Any]] = []
        try:
            model = load_model(name, dtype=torch.float32)
        except (FileNotFoundError, ImportError, ValueError) as error:
            fail(str(error))
        for decoder, value, own, n in args.settings:
            began = time.perf_counter()
            out = decode(
                model,
                task,
                prompts[:n],
                config_of(decoder, value, task.tokenizer.mask_id),
                block_length=args.block_length,
                batch=args.batch,
                calibrate=decoder == "vanilla",
            )
            result = {"model": shown(name), "decoder": decoder, "value": value, "own": own}
            result |= judge(out, prompts[:n], task)
            own_results.append(result | {"seconds": round(time.perf_counter() - began, 1)})
            own_results.sort(key=lambda r: (order.index(r["decoder"]), r["value"]))
            keep(results + own_results)
            print(
                f"{name} {decoder}={value:g}: {result['accuracy']:.1%} of {result['parts']} at "
                f"{result['nfe']['mean']:.1f} forwards",
                flush=True,
            )
        results += own_results
    return results


def report(results: list[dict[str, Any]]) -> str:
    rules = [rule.name for rule in Rule if any(r["commit_share"].get(rule.name) for r in results)]
    rates = any("phoneme_error_rate" in r for r in results)
    header = ("model", "decoder", "value", *SHARE_HEADER, "NFE", "sd", "tokens/NFE")
    rows = [
        (
            r["model"],
            r["decoder"] + " *" * r["own"],
            f"{r['value']:g}",
            *share_cells(r),
            f"{r['nfe']['mean']:.2f}",
            f"{r['nfe']['sd']:.2f}",
            f"{r['tokens_per_forward']:.2f}",
            *([f"{r['phoneme_error_rate']:.1%}"] if rates else []),
            *(f"{r['commit_share'][rule]:.1%}" for rule in rules),
        )
        for r in results
    ]
    names = (*header, *["phoneme errors"] * rates, *map(str.lower, rules))
    lines = [table(names, rows, left=2), "* the preset's own value"]
    lines += [calibration_line(r["model"], r) for r in results if "calibration_error" in r]
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over forwards: a panel a model, a line a decoder, the preset's value marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(r["model"] for r in results))
    figure, (panels,) = pyplot.subplots(
        1, len(models), figsize=(6 * len(models), 4.5), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axes, model in zip(panels, models, strict=True):
        for name, decoder in DECODERS.items():
            points = [r for r in results if (r["model"], r["decoder"]) == (model, name)]
            if not points:
                continue
            points.sort(key=lambda r: r["nfe"]["mean"])
            x, y = [r["nfe"]["mean"] for r in points], [100 * r["accuracy"] for r in points]
            low = [100 * (r["accuracy"] - r["wilson95"][0]) for r in points]
            high = [100 * (r["wilson95"][1] - r["accuracy"]) for r in points]
            label = f"{name} ({decoder.parameter})"
            bars = axes.errorbar(
                x, y, [low, high], marker="o", ms=4, lw=1.2, capsize=2, label=label
            )
            own = [i for i, r in enumerate(points) if r["own"]]
            colour = bars.lines[0].get_color()
            axes.plot([x[i] for i in own], [y[i] for i in own], "*", ms=13, color=colour)
        axes.set(title=model, xlabel="forwards per answer (mean)", xscale="log")
        ticks = (4, 8, 16, 32, 64, 96)
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right, %")
    panels[-1].legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"written: {path.name}")


# ---- command line ----------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="curves.py", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--model", nargs="+", metavar="DIR",
                        help="checkpoints or bundled models; default: the task's name")  # fmt: skip
    parser.add_argument("--decoders", nargs="+", default=list(DECODERS), metavar="NAME[=VALUE]",
                        help="default: all, each with its curve")  # fmt: skip
    parser.add_argument("--prompts", type=int, help="of own and given values; default 512, quick 8")
    parser.add_argument(
        "--curve-prompts", type=int, help="of other values; 0 = no curve; default 128, quick 4"
    )
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--block-length", type=int, help="default: the task's own")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(arguments)
    if args.prompts is None:
        args.prompts = 8 if args.quick else 512
    if args.curve_prompts is None:
        args.curve_prompts = min(args.prompts, 4 if args.quick else 128)
    for name, least in (("prompts", 2), ("curve_prompts", 0), ("batch", 1)):
        value = getattr(args, name)
        if value < least:
            fail(f"--{name.replace('_', '-')} takes an integer >= {least}, got {value}")
    if args.curve_prompts > args.prompts or args.curve_prompts == 1:
        fail(
            f"--curve-prompts takes 0 or 2 .. {args.prompts} (--prompts), got {args.curve_prompts}"
        )
    length, task = args.block_length, get_task(args.task)
    if length is None:
        args.block_length = task.block_length
    elif length < 1 or task.answer_length % length:
        fail(f"--block-length takes a divisor of {task.answer_length}, got {length}")
    args.model = args.model or [args.task]
    args.settings = settings(args.decoders, args.prompts, args.curve_prompts)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    use_threads(args.threads)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        fail("--plot needs matplotlib: pip install matplotlib")
    names = ("task", "prompts", "curve_prompts", "split", "seed", "batch", "block_length")
    chosen = {name: getattr(args, name) for name in names}
    content = {"schema": 1, **environment("cpu"), "settings": chosen}
    began = time.perf_counter()
    results = run(args, lambda results: write_json(args.json, content | {"results": results}))
    print(report(results))
    print(f"{time.perf_counter() - began:.0f} s")
    if args.plot is not None:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
