# SPDX-License-Identifier: Apache-2.0
"""Does training on lean decodes save forwards? `python bench/ledger_sft.py --out DIR`.

The bundled model decodes prompts of the ledger task by the threshold alone. Of the answers that
the verifier accepts, half are trained on. Five arms, the same number of examples, tokens and steps:

    base      not trained
    real      answers of the task's generator: what more training alone does
    random    a random half of its own right answers: what self-distillation alone does
    lean      the half of lowest redundancy (`redundancy_score`, total)
    certain   lean, with the entropy term at right predictions

Each arm but the base is trained once a seed, on prompts of that seed. The test prompts are the same
for all arms and seen by none; the models of an arm share them out, so an arm's interval holds the
spread over seeds too. Answers are judged by the task's verifier, every intermediate value of them.

Success, stated before any run: with the decoder r2, `lean` needs at least 20 % fewer forwards than
`base`, at an accuracy not below the base's 95 % interval (Wilson), and fewer than `random`, the
95 % interval of the paired difference lying below 0. Anything else is a null result, and is
published as one. `certain` is held to the same bar, as a second question.

Learning rate and entropy weight were chosen before that, on 192 other prompts of the training split
and one seed: of 1e-4, 3e-4 and 1e-3 the first costs the least accuracy; of 1 and 2 the second saves
more forwards.

A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ledger_decode import BLOCK_LENGTH, METHODS
from report import Z95, Parser, environment, fail, table, wilson, write_json
from torch import Tensor

from r2dllm_ext import corrupt, load_model, sft, token_confidence
from r2dllm_ext.config import DecodeConfig, Rule
from r2dllm_ext.models import Transformer
from r2dllm_ext.sft.artefacts import settle
from r2dllm_ext.sft.prompts import left_padded
from r2dllm_ext.tasks.ledger import ANSWER_LENGTH, Ledger, make_sample, verify_record

LEDGER = Ledger()
WORDS = LEDGER.tokenizer
ARMS = ("base", "real", "random", "lean", "certain")
DECODERS: dict[str, Callable[..., DecodeConfig]] = {
    **{name: method.preset for name, method in METHODS.items()},
    "budget_r2": lambda mask_id, **changes: DecodeConfig.r2(mask_id, base="budget", **changes),
}
JUDGED_BY = "r2"  # the decoder that success is stated for
CURVES = {"fast_dllm": (0.6, 0.75, 0.95), "r2": (0.6, 0.75, 0.95)}  # beside the preset's 0.9
BINS = 15
_SEED_OF_TESTS, _SEED_OF_POOLS, _SEED_OF_REAL = 1, 1000, 2000


# ---- data ------------------------------------------------------------------------------------


def prompts_of(seed: int, numbers: range | list[int], split: str) -> list[sft.Prompt]:
    texts = [make_sample(seed, i, split=split).prompt for i in numbers]
    return [sft.Prompt({"prompt": text}, WORDS.encode(text)) for text in texts]


def real_examples(seed: int, n: int) -> list[sft.Example]:
    samples = [make_sample(_SEED_OF_REAL + seed, i) for i in range(n)]
    return [sft.Example(*LEDGER.encode(sample)) for sample in samples]


def share(prompts: int, seed: int, seeds: int) -> list[int]:
    """Numbers of the test prompts that the models of a seed answer."""
    return list(range(prompts))[seed::seeds]


# ---- decoding and training -------------------------------------------------------------------


def decode(
    model: Transformer,
    prompts: list[sft.Prompt],
    config: DecodeConfig,
    folder: Path,
    args: argparse.Namespace,
    name: str,
) -> list[dict[str, Any]]:
    rollout = sft.Rollout(
        config,
        gen_length=ANSWER_LENGTH,
        block_length=BLOCK_LENGTH,
        cache=args.cache,
        stop_id=WORDS.end_id,
        batch_size=args.batch,
    )
    return sft.roll_out(
        model,
        prompts,
        rollout,
        folder,
        decode=WORDS.decode,
        pad_id=WORDS.pad_id,
        verifier=verify_record,
        progress=True,
        name=name,
    )


def training_of(arm: str, seed: int, args: argparse.Namespace) -> sft.Training:
    certainty = {"entropy_weight": 2.0, "entropy_temperature": 0.5} if arm == "certain" else {}
    return sft.Training(
        steps=args.steps,
        batch_size=16,
        learning_rate=args.learning_rate,
        warmup=min(20, args.steps // 4),
        autocast=args.autocast,
        seed=seed,
        **certainty,
    )


def trained(
    base: str,
    arm: str,
    seed: int,
    examples: list[sft.Example],
    folder: Path,
    args: argparse.Namespace,
) -> Transformer:
    """The model of an arm and a seed; trained now, unless it is there."""
    if not (folder / "model").is_dir():
        training = training_of(arm, seed, args)
        trainer = sft.Trainer(
            load_model(base),
            examples,
            training,
            mask_id=WORDS.mask_id,
            block_length=BLOCK_LENGTH,
            pad_id=WORDS.pad_id,
        )
        sft.train(trainer, folder / "train", save_every=50, progress=True)
        sft.export(load_model(base), trainer.trained_weights(), training, folder / "model")
    return load_model(folder / "model")


def pools(
    base: Transformer, seed: int, folder: Path, args: argparse.Namespace
) -> tuple[dict[str, list[sft.Example]], dict[str, Any]]:
    """What the arms of a seed are trained on, as many examples each, and what the choice did."""
    prompts = prompts_of(_SEED_OF_POOLS + seed, range(args.pool), "train")
    config = DecodeConfig.fast_dllm(WORDS.mask_id)
    records = decode(base, prompts, config, folder / "rollouts", args, f"seed {seed}: pool")
    examples, reports = {}, {}
    for arm, order in (("random", "random"), ("lean", "total")):
        selection = sft.Selection(order=order, quantile=args.quantile, seed=seed)
        chosen, reports[arm] = sft.select_rollouts(records, selection)
        examples[arm] = [
            sft.Example(prompts[r["prompt"]].ids, r["token_ids"], r["commit_step"]) for r in chosen
        ]
    examples["certain"] = examples["lean"]
    examples["real"] = real_examples(seed, len(examples["lean"]))
    return examples, reports


# ---- measuring -------------------------------------------------------------------------------


def calibration(model: Transformer, samples: int) -> tuple[Tensor, Tensor]:
    """Confidence and whether it is right, of the masked cells of held-out answers.

    Teacher forced, with half-masked blocks: the states of decoding, on text that is not its own.
    """
    encoded = [LEDGER.encode(make_sample(3, i, split="test")) for i in range(samples)]
    ids, real = left_padded([prompt + answer for prompt, answer in encoded], WORDS.pad_id)
    answers = torch.zeros_like(real)
    answers[:, -ANSWER_LENGTH:] = True
    views, targets, _ = corrupt(
        ids,
        answers,
        mask_id=WORDS.mask_id,
        block_length=BLOCK_LENGTH,
        mode="block",
        ratio=(0.0, 1.0),
        seed=0,
        complementary=True,
    )
    found = []
    for view, target in zip(views.split(1), targets.split(1), strict=True):
        for i in range(0, samples, 64):
            with torch.no_grad():
                logits = model(view[0, i : i + 64], attention_mask=real[i : i + 64]).logits
            learned = target[0, i : i + 64] != -100
            prediction, confidence = token_confidence(
                logits, candidates=learned, exclude_id=WORDS.mask_id
            )
            right = prediction == target[0, i : i + 64]
            found.append((confidence[learned], right[learned]))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def reliability(confidence: Tensor, right: Tensor) -> dict[str, Any]:
    """Expected calibration error, and by bin of confidence: cells, mean confidence, accuracy."""
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    bins = []
    for b in range(BINS):
        own = place == b
        if own.any():
            mean, accuracy = confidence[own].mean().item(), right[own].double().mean().item()
            bins.append([int(own.sum()), round(mean, 4), round(accuracy, 4)])
    error = sum(n * abs(mean - accuracy) for n, mean, accuracy in bins) / len(confidence)
    return {"cells": len(confidence), "ece": round(error, 4), "bins": bins}


def measured(by_seed: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Accuracy and forwards of an arm with a decoder."""
    records = [record for part in by_seed for record in part]
    right, n = sum(r["correct"] for r in records), len(records)
    return {
        **sft.summarise(records),
        "wilson95": [round(bound, 4) for bound in wilson(right, n)],
        "by_seed": [
            {"nfe": part["nfe"], "accuracy": part["accuracy"]}
            for part in map(sft.summarise, by_seed)
        ],
    }


def difference(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, Any]:
    """Mean paired difference over prompts and its 95 % interval (normal)."""
    values = [ours[key] - theirs[key] for key in sorted(ours)]
    mean, n = statistics.fmean(values), len(values)
    half = Z95 * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return {"mean": round(mean, 3), "interval95": [round(mean - half, 3), round(mean + half, 3)]}


def verdict(
    arm: str, results: dict[str, dict[str, Any]], nfe: dict[str, dict[int, float]]
) -> dict[str, Any]:
    """Whether an arm did what the docstring asks for."""
    base, own = results["base"], results[arm]
    saved = 1 - own["nfe"] / base["nfe"]
    against_random = difference(nfe[arm], nfe["random"])
    checks = {
        "saves_20_percent": saved >= 0.2,
        "accuracy_within_base_interval": own["accuracy"] >= base["wilson95"][0],
        "fewer_forwards_than_random": against_random["interval95"][1] < 0,
    }
    return {
        "arm": arm,
        "decoder": JUDGED_BY,
        "forwards_saved": round(saved, 4),
        "nfe_minus_random": against_random,
        **checks,
        "success": all(checks.values()),
    }


# ---- the run ---------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    base_name = args.model or "ledger"
    base = load_model(base_name)
    tests = prompts_of(_SEED_OF_TESTS, range(args.prompts), "test")
    # arm -> the model of each seed and the test prompts it answers; the base answers all of them.
    models: dict[str, list[tuple[Transformer, list[int]]]] = {arm: [] for arm in ARMS}
    models["base"].append((base, list(range(args.prompts))))
    selections = []
    for seed in range(args.seeds):
        folder = args.out / f"seed-{seed}"
        examples, reports = pools(base, seed, folder, args)
        selections.append(reports)
        for arm in ARMS[1:]:
            print(f"seed {seed}, {arm}: {len(examples[arm])} examples", flush=True)
            model = trained(base_name, arm, seed, examples[arm], folder / arm, args)
            models[arm].append((model, share(args.prompts, seed, args.seeds)))

    results: dict[str, dict[str, Any]] = {name: {} for name in DECODERS}
    nfe: dict[str, dict[int, float]] = {}
    for name, preset in DECODERS.items():
        for arm in ARMS:
            by_seed = []
            for seed, (model, numbers) in enumerate(models[arm]):
                where = args.out / "evaluation" / f"{arm}-{name}-{seed}"
                own = [tests[i] for i in numbers]
                by_seed.append(
                    decode(model, own, preset(WORDS.mask_id), where, args, f"{arm} {name}")
                )
            results[name][arm] = measured(by_seed)
            if name == JUDGED_BY:
                nfe[arm] = {
                    number: record["nfe"]
                    for (_, numbers), part in zip(models[arm], by_seed, strict=True)
                    for number, record in zip(numbers, part, strict=True)
                }
    return {
        "success": [verdict(arm, results[JUDGED_BY], nfe) for arm in ARMS[3:]],
        "results": results,
        "curves": curves(models, tests, args) if args.curve_prompts else {},
        "calibration": {
            arm: reliability(*calibrated(arm, models, args.calibration)) for arm in ARMS
        },
        "selection": selections,
    }


def calibrated(arm: str, models: dict[str, Any], samples: int) -> tuple[Tensor, Tensor]:
    parts = [calibration(model, samples) for model, _ in models[arm]]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def curves(
    models: dict[str, Any], tests: list[sft.Prompt], args: argparse.Namespace
) -> dict[str, Any]:
    """decoder -> arm -> [threshold, forwards, accuracy], of the first seed's models."""
    found: dict[str, Any] = {}
    for name, others in CURVES.items():
        for arm in ARMS:
            points = []
            for x in sorted((*others, METHODS[name].own)):
                config = DECODERS[name](WORDS.mask_id, threshold=x)
                where = args.out / "curves" / f"{arm}-{name}-{x}"
                records = decode(
                    models[arm][0][0],
                    tests[: args.curve_prompts],
                    config,
                    where,
                    args,
                    f"{arm} {name} {x:g}",
                )
                summary = sft.summarise(records)
                points.append([x, summary["nfe"], summary["accuracy"]])
            found.setdefault(name, {})[arm] = points
    return found


# ---- what is shown ---------------------------------------------------------------------------


def report(content: dict[str, Any]) -> str:
    rules = [rule.name.lower() for rule in Rule if rule]
    header = (
        "decoder",
        "arm",
        "n",
        "correct",
        "95 % interval",
        "NFE",
        "vs base",
        "p90",
        "tokens/NFE",
        *rules,
    )
    rows = []
    for name, arms in content["results"].items():
        for arm, r in arms.items():
            rows.append(
                (
                    name,
                    arm,
                    str(r["answers"]),
                    f"{r['accuracy']:.1%}",
                    "{:.1%} .. {:.1%}".format(*r["wilson95"]),
                    f"{r['nfe']:.2f}",
                    f"{r['nfe'] / arms['base']['nfe'] - 1:+.1%}",
                    f"{r['nfe_p90']:.0f}",
                    f"{r['tokens_per_forward']:.2f}",
                    *(f"{r['rule_share'][rule]:.1%}" for rule in rules),
                )
            )
    ece = ", ".join(f"{arm} {r['ece']:.3f}" for arm, r in content["calibration"].items())
    lines = [table(header, rows, left=2), f"expected calibration error: {ece}"]
    for v in content["success"]:
        low, high = v["nfe_minus_random"]["interval95"]
        lines.append(
            f"{v['arm']}: {'SUCCESS' if v['success'] else 'null result'} ({v['decoder']}: "
            f"{v['forwards_saved']:.1%} forwards saved, accuracy "
            f"{'within' if v['accuracy_within_base_interval'] else 'below'} the base's interval, "
            f"{low:+.2f} .. {high:+.2f} forwards against random)"
        )
    return "\n".join(lines)


def plot(content: dict[str, Any], path: Path) -> None:
    """NFE against accuracy over thresholds, share of each rule, calibration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from r2dllm_ext.rule_looks import RULE_COLORS

    colours = dict(zip(ARMS, ("#22262e", "#6d7a8f", "#e69a00", "#3b82c4", "#00a37a"), strict=True))
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for name, arms in content["curves"].items():
        for arm, points in arms.items():
            style = {"ls": "-" if name == JUDGED_BY else ":", "color": colours[arm], "marker": "o"}
            label = arm if name == JUDGED_BY else None
            left.plot(
                [p[1] for p in points], [100 * p[2] for p in points], ms=3, label=label, **style
            )
    others = ", ".join(name for name in content["curves"] if name != JUDGED_BY)
    left.set(
        xlabel="forwards per answer (mean)",
        ylabel="fully correct answers, %",
        title=f"over thresholds ({JUDGED_BY} solid, {others} dotted)",
    )
    below = [0.0] * len(ARMS)
    for rule in (rule for rule in Rule if rule):
        shares = [
            content["results"][JUDGED_BY][arm]["rule_share"][rule.name.lower()] for arm in ARMS
        ]
        middle.bar(ARMS, shares, bottom=below, color=RULE_COLORS[rule], label=rule.name.lower())
        below = [a + b for a, b in zip(below, shares, strict=True)]
    middle.set(ylabel="share of the tokens", title=f"committed by ({JUDGED_BY})")
    right.plot([0, 1], [0, 1], color="#bbbbbb", lw=1)
    for arm, r in content["calibration"].items():
        right.plot(
            [b[1] for b in r["bins"]],
            [b[2] for b in r["bins"]],
            marker="o",
            ms=3,
            color=colours[arm],
            label=f"{arm} (ECE {r['ece']:.3f})",
        )
    right.set(xlabel="confidence", ylabel="right", title="calibration on held-out answers")
    for axes in (left, middle, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"written: {path.name}")


# ---- command line ----------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="ledger_sft.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="for all that is written, results.json among it",
    )
    parser.add_argument("--model", metavar="DIR", help="checkpoint; default: the bundled model")
    parser.add_argument("--seeds", type=int, help="default 3, quick 1")
    parser.add_argument("--prompts", type=int, help="to test on; default 512, quick 32")
    parser.add_argument(
        "--pool", type=int, help="prompts rolled out a seed; default 1024, quick 96"
    )
    parser.add_argument(
        "--quantile", type=float, default=0.5, help="share of it that is trained on"
    )
    parser.add_argument("--steps", type=int, help="of training; default 240, quick 20")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--autocast", action="store_true", help="train in bfloat16")
    parser.add_argument(
        "--curve-prompts", type=int, help="for other thresholds; 0 = none; default 128, quick 0"
    )
    parser.add_argument("--calibration", type=int, default=256, help="held-out answers for it")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cache", choices=("none", "prefix", "dual"), default="dual")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--quick", action="store_true", help="under 5 minutes; proves nothing")
    args = parser.parse_args(arguments)
    defaults = {
        "seeds": (3, 1),
        "prompts": (512, 32),
        "pool": (1024, 96),
        "steps": (240, 20),
        "curve_prompts": (128, 0),
    }
    for name, (full, quick) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    least = {
        "seeds": 1,
        "prompts": 2,
        "pool": 2,
        "steps": 1,
        "curve_prompts": 0,
        "batch": 1,
        "calibration": 1,
        "threads": 1,
    }
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            fail(f"--{name.replace('_', '-')} takes an integer >= {low}, got {value}")
    if args.prompts < 2 * args.seeds or args.curve_prompts > args.prompts:
        fail("--prompts takes at least 2 a seed, and --curve-prompts")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    for package in ("tqdm", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            fail(f"needs {package}: pip install {package}")
    names = (
        "seeds",
        "prompts",
        "pool",
        "quantile",
        "steps",
        "learning_rate",
        "autocast",
        "curve_prompts",
        "calibration",
        "batch",
        "cache",
    )
    chosen = {name: getattr(args, name) for name in names}
    chosen["training"] = {arm: dataclasses.asdict(training_of(arm, 0, args)) for arm in ARMS[1:]}
    began, goes_on = time.perf_counter(), (args.out / "settings.json").exists()
    try:
        settle(args.out / "settings.json", chosen | {"model": Path(args.model or "ledger").name})
        content = run(args)
    except (FileNotFoundError, ImportError, ValueError) as error:
        fail(str(error))
    print(report(content))
    seconds = round(time.perf_counter() - began)
    print(f"{seconds} s")
    took = {"seconds": seconds, "went_on": goes_on}  # where an earlier run had stopped
    content = {"schema": 1, **environment("cpu"), **took, "settings": chosen, **content}
    write_json(args.out / "results.json", content)
    plot(content, args.out / "results.png")


if __name__ == "__main__":
    main()
