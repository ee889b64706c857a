# SPDX-License-Identifier: Apache-2.0
"""Accuracy against forwards of a task's models: `python bench/curves.py --task T --model M ...`.

Decodes the task's unseen prompts with each model and rule, has the verifier count the parts that
are right, and prints one line a setting: parts right with a 95 % interval, mean forwards. With
pronounce the phoneme error rate too. `vanilla` also gives the expected calibration error over all
states of its decodes: an argmax style is chosen more surely than its probability says, so that
part of it is no fault; where the task knows the true distribution, the error against that too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from ledger_decode import decode as engine_decode
from report import environment, wilson, write_json
from task_decode import Rule, calibration_error, decode

from r2dllm_ext.config import DecodeConfig
from r2dllm_ext.models import load_model
from r2dllm_ext.tasks import TASKS, Task, get_task, pronounce

RULES = (
    "vanilla", "threshold=0.95", "threshold=0.9", "threshold=0.8", "budget=0.001", "budget=0.005",
    "budget=0.02", "budget=0.05", "r2=0.9",
)  # fmt: skip


def measure(model, task: Task, prompts: list[str], rule: str, batch: int) -> dict:
    name, _, value = rule.partition("=")
    if name == "r2":
        ids = [task.tokenizer.encode(prompt) for prompt in prompts]
        long = max(map(len, ids))
        table = torch.tensor([[task.tokenizer.pad_id] * (long - len(row)) + row for row in ids])
        config = DecodeConfig.r2(task.tokenizer.mask_id, threshold=float(value))
        real = table != task.tokenizer.pad_id
        out = engine_decode(model, table, real, config, gen_length=task.answer_length, batch=batch)
        tokens, nfe, calibration, exact = out.tokens, out.nfe, None, None
    else:
        out = decode(
            model, task, prompts, Rule(name, float(value or 0)), batch=batch,
            calibrate=name == "vanilla",
        )  # fmt: skip
        tokens, nfe, calibration, exact = out.tokens, out.nfe, out.calibration, out.exact
    texts = [task.tokenizer.decode(row) for row in tokens.tolist()]
    verdicts = [task.verify(p, t) for p, t in zip(prompts, texts, strict=True)]
    right, parts = sum(v.right for v in verdicts), sum(v.parts for v in verdicts)
    result = {
        "rule": rule, "prompts": len(prompts), "right": right, "parts": parts,
        "accuracy": round(right / parts, 4),
        "wilson95": [round(bound, 4) for bound in wilson(right, parts)],
        "nfe": round(float(nfe.double().mean()), 2),
    }  # fmt: skip
    if calibration is not None and name == "vanilla":
        result["calibration_error"] = round(calibration_error(calibration), 4)
        if exact.any():
            result["exact_calibration_error"] = round(calibration_error(exact), 4)
        result["calibration"] = [[round(x, 2) for x in row] for row in calibration.tolist()]
    if isinstance(task, pronounce.Pronounce):
        pairs = [pronounce.phoneme_errors(p, t) for p, t in zip(prompts, texts, strict=True)]
        errors, total = (sum(column) for column in zip(*pairs, strict=True))
        result["phoneme_error_rate"] = round(errors / total, 4)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--model", nargs="+", required=True, help="bundled names or folders")
    parser.add_argument("--rules", nargs="+", default=RULES, metavar="NAME=VALUE")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    task = get_task(args.task)
    prompts = [task.sample(args.seed, i, split=args.split).prompt for i in range(args.prompts)]
    results = []
    for name in args.model:
        model = load_model(name, dtype=torch.float32)
        for rule in args.rules:
            began = time.perf_counter()
            result = {"model": Path(name).name, **measure(model, task, prompts, rule, args.batch)}
            result["seconds"] = round(time.perf_counter() - began, 1)
            results.append(result)
            short = {k: v for k, v in result.items() if k != "calibration"}
            print(json.dumps(short), flush=True)
    settings = {"task": args.task, "split": args.split, "seed": args.seed}
    write_json(args.json, {"schema": 1, **environment("cpu"), "settings": settings,
                           "results": results})  # fmt: skip


if __name__ == "__main__":
    main()
