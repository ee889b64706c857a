# SPDX-License-Identifier: Apache-2.0
"""Accuracy against forwards on the ledger task: `python bench/ledger_decode.py`.

Real decodes of a small trained model on unseen prompts, each answer judged by the task's verifier,
under one token a step, the confidence threshold, the rules of R2-dLLM, error and entropy budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import Parser, environment, fail, table, wilson, write_json
from torch import Tensor

from r2dllm_ext import generate, load_model
from r2dllm_ext.config import DecodeConfig, Rule
from r2dllm_ext.models import Transformer
from r2dllm_ext.tasks.ledger import ANSWER_LENGTH, Sample, Tokenizer, make_sample, verify

BLOCK_LENGTH = 32


class Method(NamedTuple):
    preset: Callable[..., DecodeConfig]
    parameter: str  # what its curve varies
    own: float  # the preset's value of it
    others: tuple[float, ...]


METHODS = {
    "vanilla": Method(DecodeConfig.vanilla, "steps_per_block", BLOCK_LENGTH, (16, 8, 4)),
    "fast_dllm": Method(DecodeConfig.fast_dllm, "threshold", 0.9, (0.5, 0.7, 0.8, 0.95, 0.99)),
    "r2": Method(DecodeConfig.r2, "threshold", 0.9, (0.5, 0.7, 0.8, 0.95, 0.99)),
    "budget": Method(DecodeConfig.budget, "error_budget", 0.005, (0.001, 0.02, 0.05, 0.1, 0.5)),
    "entropy": Method(DecodeConfig.entropy, "entropy_budget", 0.05, (0.01, 0.1, 0.25, 0.5, 1.0)),
}


# ---- decoding --------------------------------------------------------------------------------


class Answers(NamedTuple):
    """What a decode of n prompts gave."""

    tokens: Tensor  # [n, G] int64
    nfe: Tensor  # [n] int64, forwards that a decode of this prompt alone takes
    rule: Tensor  # [n, G] uint8


def decode(
    model: Any,
    prompts: Tensor,
    real: Tensor,
    config: DecodeConfig,
    *,
    gen_length: int,
    batch: int,
    cache: str = "none",
    stop_id: int | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Answers:
    """Decode `prompts` [n, P], padded on the left where `real` is False, a batch at a time.

    Batching saves time and changes no count: rows of a batch share a block but no decision, and a
    forward counts for a row only if the row had masked cells when it was made.
    """
    parts = []
    for i in range(0, len(prompts), batch):
        rows = slice(i, i + batch)
        _, _, trace = generate(
            model,
            prompts[rows],
            gen_length=gen_length,
            block_length=BLOCK_LENGTH,
            config=config,
            cache=cache,
            attention_mask=real[rows],
            stop_id=stop_id,
            trace=True,
        )
        nfe = trace.row_nfe()
        parts.append(Answers(trace.sequences[:, prompts.shape[1] :], nfe, trace.commit_rule))
        on_batch(len(nfe))
    return Answers(*map(torch.cat, zip(*parts, strict=True)))


def encode_prompts(samples: list[Sample], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Ids [n, P], padded on the left to whole blocks, and where they are real."""
    rows = [tokenizer.encode(sample.prompt) for sample in samples]
    P = -(-max(map(len, rows)) // BLOCK_LENGTH) * BLOCK_LENGTH
    ids = torch.tensor([[tokenizer.pad_id] * (P - len(row)) + row for row in rows])
    return ids, ids != tokenizer.pad_id


def judge(answers: Answers, samples: list[Sample], tokenizer: Tokenizer) -> dict[str, Any]:
    """Accuracy, forwards and commits of one setting."""
    texts = [tokenizer.decode(row) for row in answers.tokens.tolist()]
    verdicts = [verify(s.problem, text) for s, text in zip(samples, texts, strict=True)]
    right, n = sum(v.correct for v in verdicts), len(samples)
    nfe = answers.nfe.tolist()
    words = int((answers.tokens != tokenizer.end_id).sum())
    by_rule = Counter(answers.rule.flatten().tolist())
    decided = sum(count for code, count in by_rule.items() if code != Rule.NONE)
    low, median, high = statistics.quantiles(nfe, n=4, method="inclusive")
    return {
        "prompts": n,
        "correct": right,
        "accuracy": round(right / n, 4),
        "wilson95": [round(bound, 4) for bound in wilson(right, n)],
        "nfe": {
            "mean": round(statistics.fmean(nfe), 3),
            "sd": round(statistics.stdev(nfe), 3),
            "min": min(nfe),
            "q1": low,
            "median": median,
            "q3": high,
            "max": max(nfe),
        },
        "tokens_per_forward": round(decided / sum(nfe), 3),
        "words_per_forward": round(words / sum(nfe), 3),  # the filling end tokens left out
        "commit_share": {rule.name: round(by_rule[rule] / decided, 4) for rule in Rule if rule},
    }


# ---- the run ---------------------------------------------------------------------------------


def settings(curve: bool) -> list[tuple[str, float, bool]]:
    """(method, value of its parameter, is that the preset); presets first."""
    presets = [(name, method.own, True) for name, method in METHODS.items()]
    others = [(name, x, False) for name, method in METHODS.items() for x in method.others]
    return presets + others * curve


def run(model: Transformer, args: argparse.Namespace) -> list[dict[str, Any]]:
    from tqdm import tqdm

    tokenizer = Tokenizer()
    samples = [make_sample(args.seed, i, split="test") for i in range(args.prompts)]
    prompts, real = encode_prompts(samples, tokenizer)
    todo = settings(args.curve_prompts > 0)
    counts = [args.prompts if is_preset else args.curve_prompts for *_, is_preset in todo]
    results = []
    with tqdm(total=sum(counts), unit="prompt", mininterval=1) as bar:
        for (name, value, is_preset), n in zip(todo, counts, strict=True):
            method = METHODS[name]
            bar.set_description(f"{name} {method.parameter}={value:g}")
            config = method.preset(tokenizer.mask_id, **{method.parameter: value})
            began = time.perf_counter()
            answers = decode(
                model,
                prompts[:n],
                real[:n],
                config,
                gen_length=ANSWER_LENGTH,
                batch=args.batch,
                cache=args.cache,
                stop_id=tokenizer.end_id if args.stop else None,
                on_batch=bar.update,
            )
            result = {"method": name, "parameter": method.parameter, "value": value}
            result |= {"preset": is_preset, **judge(answers, samples[:n], tokenizer)}
            result["seconds"] = round(time.perf_counter() - began, 2)
            results.append(result | {"config": dataclasses.asdict(config)})
    order = list(METHODS)
    return sorted(results, key=lambda r: (order.index(r["method"]), r["value"]))


def report(results: list[dict[str, Any]]) -> str:
    rules = [rule.name for rule in Rule if rule]
    header = ("method", "parameter", "", "n", "correct", "95 % interval", "NFE", "sd")
    rows = [
        (
            r["method"] + " *" * r["preset"],
            f"{r['parameter']}={r['value']:g}",
            "",
            str(r["prompts"]),
            f"{r['accuracy']:.1%}",
            "{:.1%} .. {:.1%}".format(*r["wilson95"]),
            f"{r['nfe']['mean']:.2f}",
            f"{r['nfe']['sd']:.2f}",
            f"{r['tokens_per_forward']:.2f}",
            f"{r['words_per_forward']:.2f}",
            *(f"{r['commit_share'][rule]:.1%}" for rule in rules),
        )
        for r in results
    ]
    names = (*header, "tokens/NFE", "words/NFE", *map(str.lower, rules))
    return table(names, rows, left=2) + "\n* the preset's own value"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over forwards, a line for each method, its preset marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in METHODS:
        points = sorted((r for r in results if r["method"] == name), key=lambda r: r["nfe"]["mean"])
        x, y = [r["nfe"]["mean"] for r in points], [100 * r["accuracy"] for r in points]
        low = [100 * (r["accuracy"] - r["wilson95"][0]) for r in points]
        high = [100 * (r["wilson95"][1] - r["accuracy"]) for r in points]
        label = f"{name} ({METHODS[name].parameter})"
        bars = axes.errorbar(x, y, [low, high], marker="o", ms=4, lw=1.2, capsize=2, label=label)
        own = [i for i, r in enumerate(points) if r["preset"]]
        colour = bars.lines[0].get_color()
        axes.plot([x[i] for i in own], [y[i] for i in own], "*", ms=13, color=colour)
    axes.set(xlabel="forwards per answer (mean)", ylabel="fully correct answers, %", xscale="log")
    ticks = (4, 8, 16, 32, 64, 96)
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"written: {path.name}")


# ---- command line ----------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="ledger_decode.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="DIR", default="ledger",
                        help="checkpoint or bundled model; default: ledger")  # fmt: skip
    parser.add_argument("--prompts", type=int, help="for the presets; default 512, quick 16")
    parser.add_argument(
        "--curve-prompts", type=int, help="for other settings; 0 = no curve; default 128, quick 8"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cache", choices=("none", "prefix", "dual"), default="none")
    parser.add_argument("--stop", action="store_true", help="end a row at its end token")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--quick", action="store_true", help="16 prompts")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(arguments)
    if args.prompts is None:
        args.prompts = 16 if args.quick else 512
    if args.curve_prompts is None:
        args.curve_prompts = min(args.prompts, 8 if args.quick else 128)
    for name, least in (("prompts", 2), ("curve_prompts", 0), ("batch", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            fail(f"--{name.replace('_', '-')} takes an integer >= {least}, got {value}")
    if args.curve_prompts > args.prompts or args.curve_prompts == 1:
        fail(
            f"--curve-prompts takes 0 or 2 .. {args.prompts} (--prompts), got {args.curve_prompts}"
        )
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    for package in ("tqdm", *["matplotlib"] * (args.plot is not None)):
        if importlib.util.find_spec(package) is None:
            fail(f"needs {package}: pip install {package}")
    try:
        model = load_model(args.model)
    except (FileNotFoundError, ImportError, ValueError) as error:
        fail(str(error))
    began = time.perf_counter()
    results = run(model, args)
    print(report(results))
    print(f"{time.perf_counter() - began:.0f} s")
    names = ("prompts", "curve_prompts", "seed", "batch", "cache", "stop", "quick")
    chosen = {name: getattr(args, name) for name in names}
    chosen |= {"split": "test", "gen_length": ANSWER_LENGTH, "block_length": BLOCK_LENGTH}
    content = {"schema": 1, **environment("cpu"), "settings": chosen, "results": results}
    write_json(args.json, content)
    if args.plot is not None:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
