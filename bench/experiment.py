# SPDX-License-Identifier: Apache-2.0
"""Does training on lean decodes save forwards? `python bench/experiment.py --task T --out DIR`.

The task's base model goes through the rounds of `r2dllm sft`, and is compared with what it was:

    base      not trained
    random    a random one of its own right answers to a prompt: self-distillation alone
    lean      of its right answers to a prompt the one of fewest forwards, of these the leanest
    certain   lean, with a small entropy term at right predictions

Arms of a seed have prompts, rollouts of the first round, numbers of texts and of steps in common.
Every decoder has one parameter. It is chosen on prompts of the training split: the value of fewest
forwards at which no more than one point of what is right one token a step is lost. The test prompts
are seen by none, and shared out among an arm's seeds, so that its interval holds their spread too.

"The choice of lean answers helps" is claimed if, with the decoder `budget`, lean takes fewer
forwards than random, the 95 % interval of the paired difference lying below 0, and is right no less
often than the lower end of the base's 95 % interval.

All that is computed is kept in DIR; a killed run goes on where it was. It takes half a day on two
cores; `--quick` shows in minutes that everything runs, and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from decoders import DECODERS, config_of
from experiment_report import compare, measured, plot, report
from report import Parser, environment, write_json
from task_decode import BINS, calibration_error, decode

from r2dllm_ext import load_model, sft
from r2dllm_ext.config import DecodeConfig
from r2dllm_ext.models import Transformer
from r2dllm_ext.sft.artefacts import settle
from r2dllm_ext.sft.selection import spearman
from r2dllm_ext.tasks import TASKS, Task, get_task

ARMS = ("base", "random", "lean", "certain")
_SEED_OF_TESTS, _SEED_OF_CHOICE, _SEED_OF_POOLS = 1, 900, 1000


# ---- models ----------------------------------------------------------------------------------


def recipe_of(arm: str, seed: int, task: Task, args: argparse.Namespace) -> sft.Recipe:
    words = task.tokenizer
    return sft.Recipe(
        model=args.model,
        rollout=sft.Rollout(
            DecodeConfig.budget(words.mask_id, temperature=1.5, min_p=0.05, seed=seed),
            gen_length=task.answer_length,
            block_length=task.block_length,
            stop_id=words.end_id,
            samples=4,
            greedy_first=True,
            batch_size=64,
            autocast=args.autocast,
        ),
        selection=sft.Selection(
            "random" if arm == "random" else "nfe", filter="parts", quantile=0.8, seed=seed
        ),
        training=sft.Training(
            steps=args.steps,
            batch_size=32,
            learning_rate=3e-4,
            warmup=min(20, args.steps // 4),
            trajectory_share=0.35,
            iid_share=0.2,
            frontier_share=0.15,
            near=6,
            ema_decay=0.99,
            autocast=args.autocast,
            entropy_weight=0.1 if arm == "certain" else 0.0,
            seed=seed,
        ),
        decoders={},
        # All arms are to go through all rounds: 128 answers know a share to 2 points.
        rounds=sft.Rounds(
            args.rounds, hard_share=0.1, validation=args.validation, tolerance=0.05, blend=0.7
        ),
        verifier=verifier_of(task),
        task=task.name,
    )


def verifier_of(task: Task) -> str:
    return f"r2dllm_ext.tasks.{task.name}:verify_record"


def prompts_of(task: Task, seed: int, n: int, split: str) -> list[sft.Prompt]:
    texts = [task.sample(seed, i, split=split).prompt for i in range(n)]
    return [sft.Prompt({"prompt": text}, task.tokenizer.encode(text)) for text in texts]


def model_of(arm: str, seed: int, task: Task, args: argparse.Namespace) -> Transformer:
    """The fine-tuned model of an arm and a seed; made now, unless it is there."""
    folder = args.out / f"seed-{seed}" / arm
    prompts = prompts_of(task, _SEED_OF_POOLS + seed, args.pool + args.validation, "train")
    for part in ("validation", "round-1/rollouts", "round-1/hard"):
        made = sorted(p for p in folder.parent.glob(f"*/{part}") if p != folder / part)
        if made and not (folder / part).exists():
            shutil.copytree(made[0], folder / part)
    sft.run(
        recipe_of(arm, seed, task, args),
        prompts,
        folder,
        decode=task.tokenizer.decode,
        verifier=sft.load_verifier(verifier_of(task)),
        task=task,
    )
    return load_model(folder / "model", dtype=torch.float32)


# ---- measuring -------------------------------------------------------------------------------


class Evaluator(NamedTuple):
    """Decodes prompts with any decoder, once: what is in the folder is not decoded again."""

    task: Task
    out: Path
    batch: int
    autocast: bool

    def records(
        self, model: Transformer, prompts: Sequence[sft.Prompt], name: str, value: float, label: str
    ) -> list[dict[str, Any]]:
        words = self.task.tokenizer
        rollout = sft.Rollout(
            config_of(name, value, words.mask_id),
            gen_length=self.task.answer_length,
            block_length=self.task.block_length,
            batch_size=self.batch,
            autocast=self.autocast,
        )
        found = sft.roll_out(
            model,
            prompts,
            rollout,
            self.out / f"{label}-{name}-{value:g}",
            decode=words.decode,
            pad_id=words.pad_id,
            progress=True,
            name=f"{label} {name} {value:g}",
        )
        for record in found:
            verdict = self.task.verify(prompts[record["prompt"]].record["prompt"], record["text"])
            tokens = sum(token != words.end_id for token in record["token_ids"])
            record |= {"right": verdict.right, "parts": verdict.parts, "length": tokens}
        return found


def chosen_value(curve: dict[float, dict[str, Any]], patient: float) -> float:
    """The value of fewest forwards that loses at most one point; else that which loses least."""
    good = [v for v, m in curve.items() if m["accuracy"] >= patient - 0.01]
    if good:
        return min(good, key=lambda v: curve[v]["nfe"])
    return max(curve, key=lambda v: curve[v]["accuracy"])


def judged(found: dict[tuple[str, str, float], list[dict[str, Any]]]) -> dict[str, Any]:
    """By decoder: both curves, and the chosen value."""
    results: dict[str, Any] = {name: {"choice": {}, "curve": {}} for name in DECODERS}
    for (which, name, value), records in found.items():
        results[name][which][value] = measured(records)
    patient = results["vanilla"]["choice"][1]["accuracy"]
    for both in results.values():
        both["chosen"] = chosen_value(both["choice"], patient)
    return results


def styles(records: Sequence[dict[str, Any]], task: Task) -> int:
    """Distinct answers, serial tokens (which the prompt decides) left out."""
    answers = torch.tensor([record["token_ids"] for record in records])
    kept = ~task.serial(answers)
    return len({tuple(a[k].tolist()) for a, k in zip(answers, kept, strict=True)})


def correlations(folder: Path) -> list[float | None]:
    """By round, of the ranks of right answers' redundancy and length: is the one the other in
    disguise? None where all are alike."""
    found = []
    for number in range(1, 1 + len(list(folder.glob("round-*/rollouts")))):
        files = sorted((folder / f"round-{number}/rollouts").glob("*.jsonl"))
        records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        right = [r for r in records if r["complete"] and r["correct"]]
        found.append(spearman([r["score"]["total"] for r in right], [r["length"] for r in right]))
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    task = get_task(args.task)
    tests = prompts_of(task, _SEED_OF_TESTS, args.prompts, "test")
    choice = prompts_of(task, _SEED_OF_CHOICE, args.choice, "train")
    evaluator = Evaluator(task, args.out / "evaluation", args.batch, args.autocast)
    results: dict[str, Any] = {}
    records: dict[str, list[dict[str, Any]]] = {}  # of the decoder that the claim is about
    for arm in ARMS:
        seeds = 1 if arm == "base" else args.seeds
        found: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
        of_rounds: list[list[float | None]] = []
        tables = torch.zeros(2, 3, BINS, dtype=torch.float64)
        for seed in range(seeds):
            model = load_model(args.model, dtype=torch.float32)
            if arm != "base":
                model = model_of(arm, seed, task, args)
                of_rounds.append(correlations(args.out / f"seed-{seed}" / arm))
            for which, prompts in (("curve", tests), ("choice", choice)):
                numbers = range(len(prompts))[seed::seeds]
                own = [prompts[i] for i in numbers]
                label = f"{which}-{arm}-{seed}"
                for name, decoder in DECODERS.items():
                    for value in decoder.values:
                        for r in evaluator.records(model, own, name, value, label):
                            r["number"] = numbers[r["prompt"]]
                            found[which, name, value].append(r)
            texts = [prompt.record["prompt"] for prompt in choice[seed::seeds]]
            patient = DecodeConfig.vanilla(task.tokenizer.mask_id)
            out = decode(model, task, texts, patient, calibrate=True)
            tables += torch.stack((out.calibration, out.exact))
        results[arm] = judged(found)
        records[arm] = found["curve", "budget", results[arm]["budget"]["chosen"]]
        results[arm]["redundancy_with_length"] = of_rounds
        results[arm]["styles"] = styles(found["curve", "vanilla", 1], task)
        results[arm]["calibration_error"] = round(calibration_error(tables[0]), 4)
        if tables[1].any():
            results[arm]["exact_calibration_error"] = round(calibration_error(tables[1]), 4)
    return {"results": results, "lean_against_random": compare(records, results)}


# ---- command line ----------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="experiment.py", description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--model", help="default: the task's base model")
    parser.add_argument("--seeds", type=int, help="default 3, quick 1")
    parser.add_argument("--rounds", type=int, help="default 3, quick 1")
    parser.add_argument(
        "--pool", type=int, help="prompts rolled out a seed; default 3840, quick 24"
    )
    parser.add_argument("--validation", type=int, help="more prompts; default 128, quick 0")
    parser.add_argument("--steps", type=int, help="of training a round; default 400, quick 4")
    parser.add_argument("--prompts", type=int, help="to test on; default 512, quick 8")
    parser.add_argument("--choice", type=int, help="to choose on; default 256, quick 8")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--autocast", action="store_true", help="train and decode in bfloat16")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("--quick", action="store_true", help="minutes; proves nothing")
    args = parser.parse_args(arguments)
    defaults = {"seeds": (3, 1), "rounds": (3, 1), "pool": (3840, 24), "validation": (128, 0),
                "steps": (400, 4), "prompts": (512, 8), "choice": (256, 8)}  # fmt: skip
    for name, pair in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, pair[args.quick])
    least = {"validation": 0, "prompts": args.seeds, "choice": args.seeds}
    for name in (*defaults, "batch", *["threads"] * (args.threads is not None)):
        if getattr(args, name) < least.get(name, 1):
            parser.error(
                f"--{name} takes an integer >= {least.get(name, 1)}, got {getattr(args, name)}"
            )
    args.model = args.model or f"{args.task}-base"
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = ("task", "model", "seeds", "rounds", "pool", "validation", "steps", "prompts", "choice")
    settings = {name: getattr(args, name) for name in names} | {"autocast": args.autocast}
    args.out.mkdir(parents=True, exist_ok=True)
    settle(args.out / "settings.json", settings)
    content = {"schema": 1, **environment("cpu"), "settings": settings, **run(args)}
    print(report(content))
    write_json(args.out / "results.json", content)
    plot(content, args.out / "results.png")


if __name__ == "__main__":
    main()
