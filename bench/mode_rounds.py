# SPDX-License-Identifier: Apache-2.0
r"""Rounds of mode selection: `python bench/mode_rounds.py --task T --model M --out DIR`.

A round decodes training prompts that were not met before, several times each, with a strict
budget; keeps what the verifier accepts, per prompt the decode of fewest forwards; trains on that
from the weights the round began with; and averages the weights. The next round's actor is that
average. Nothing here sees a test prompt. Every round has a folder: texts.jsonl, log.jsonl, model.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from task_decode import Rule, decode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_base import BLOCK_LENGTH, Batch, Schedule, _answer_logits, collate, hide

from r2dllm_ext.models import Transformer, load_model, save_model
from r2dllm_ext.sft.training import learning_rate
from r2dllm_ext.tasks import TASKS, Task, get_task

# (temperature, budget) of a prompt's decodes; a drawn style is one that the argmax never shows.
SAMPLES = ((0.0, 0.005), (0.7, 0.005), (0.7, 0.02))


@dataclass(frozen=True)
class Mix:
    """Masks of a round: shares of texts; the rest are half-masked blocks and their complements.

    trajectory rows are states of the decode itself, from a forward of the active block on; cells
    committed more than `near` forwards later weigh `far_weight`: they cannot be known yet.
    """

    trajectory: float = 0.35
    iid: float = 0.2
    frontier: float = 0.15
    near: int = 6
    far_weight: float = 0.3


def roll_out(
    model: Transformer, task: Task, seed: int, first: int, number: int, path: Path, batch: int
) -> list[dict]:
    """Verified decodes of `number` training prompts, from the file if it is there."""
    if path.is_file():
        return [json.loads(line) for line in path.read_text().splitlines()]
    prompts = [task.sample(seed, first + i).prompt for i in range(number)]
    records, counts = [], []
    for temperature, budget in SAMPLES:
        generator = torch.Generator().manual_seed(seed + int(1e6 * budget) + first)
        out = decode(
            model, task, prompts, Rule("budget", budget), batch=batch,
            temperature=temperature, generator=generator,
        )  # fmt: skip
        texts = [task.tokenizer.decode(row) for row in out.tokens.tolist()]
        verdicts = [task.verify(p, t) for p, t in zip(prompts, texts, strict=True)]
        counts.append((sum(v.correct for v in verdicts), float(out.nfe.float().mean())))
        print("rollout", temperature, budget, counts[-1], flush=True)
        for i, verdict in enumerate(verdicts):
            if verdict.correct:
                records.append({
                    "prompt": prompts[i], "nfe": int(out.nfe[i]), "tokens": out.tokens[i].tolist(),
                    "step": out.step[i].tolist(), "temperature": temperature, "budget": budget,
                })  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records))
    part.replace(path)
    return records


def leanest(records: list[dict], task: Task, share: float) -> list[dict]:
    """Per prompt the decode of fewest forwards, then fewest tokens; of these the leanest share."""
    end = task.tokenizer.end_id
    best: dict[str, tuple] = {}
    for record in records:
        key = (record["nfe"], sum(t != end for t in record["tokens"]))
        if record["prompt"] not in best or key < best[record["prompt"]][0]:
            best[record["prompt"]] = (key, record)
    chosen = sorted(best.values(), key=lambda one: one[0])
    return [record for _, record in chosen[: round(share * len(chosen))]]


def make_batch(
    records: list[dict], task: Task, mix: Mix, generator: torch.Generator
) -> tuple[Batch, torch.Tensor]:
    """Masks of some decodes, and weights of the learned cells beside the task's own.

    The first rows are states of the decode itself, then come iid and frontier rows; the others are
    taken twice, with complementary halves of their block hidden.
    """
    n = len(records)
    many = [round(n * share) for share in (mix.trajectory, mix.iid, mix.frontier)]
    kind = torch.repeat_interleave(torch.arange(4), torch.tensor([*many, n - sum(many)]))
    ids = collate([(task.tokenizer.encode(r["prompt"]), r["tokens"]) for r in records], task)
    step = torch.tensor([r["step"] for r in records])
    uniform = torch.rand(n, 3, generator=generator)
    ratio, front = uniform[:, :1], uniform[:, 1:2]
    noise = torch.rand(step.shape, generator=generator)
    # Blocks are drawn by the forwards that they took: those of end tokens alone take one.
    by_block = step.view(n, -1, BLOCK_LENGTH)
    forwards = (by_block.amax(2) - by_block.amin(2) + 1).float()
    start = torch.multinomial(forwards, 1, generator=generator) * BLOCK_LENGTH
    cell = torch.arange(step.shape[1])
    active = (cell >= start) & (cell < start + BLOCK_LENGTH)
    low = step.masked_fill(~active, 32767).amin(1, keepdim=True)
    high = step.masked_fill(~active, -1).amax(1, keepdim=True)
    at = low + (uniform[:, 2:3] * (high - low + 1)).long()
    serial = task.serial(ids[:, -step.shape[1] :])
    behind_front = serial & (cell >= start + front * BLOCK_LENGTH)
    masks = torch.stack(
        (
            active & (step >= at),
            noise < ratio,
            active & (behind_front | (~serial & (noise < ratio**2))),
            active & (noise < ratio),
        )
    )
    learned = masks[kind, torch.arange(n)]
    hidden = learned | ((kind != 1)[:, None] & (cell >= start + BLOCK_LENGTH))
    far = (kind == 0)[:, None] & (step >= at + mix.near)
    weight = torch.where(far, mix.far_weight, 1.0)
    twice = kind == 3
    other = (active & (noise >= ratio))[twice]
    behind = (cell >= start + BLOCK_LENGTH)[twice]
    ids, learned, hidden, weight = (
        torch.cat((a, b))
        for a, b in (
            (ids, ids[twice]),
            (learned, other),
            (hidden, other | behind),
            (weight, weight[twice]),
        )
    )
    return Batch(ids, hidden, learned), weight


def train(
    model: Transformer, task: Task, records: list[dict], mix: Mix, args: argparse.Namespace,
    seed: int, folder: Path,
) -> Transformer:  # fmt: skip
    """A copy of `model` after the round's steps: the average of its weights."""
    model = copy.deepcopy(model).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.0)
    schedule = Schedule(args.learning_rate, min(20, args.steps // 4), args.steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    began = time.perf_counter()
    with open(folder / "log.jsonl", "w") as log:
        for step in range(args.steps):
            while len(order) < args.batch_size:
                order += torch.randperm(len(records), generator=generator).tolist()
            chosen, order = order[: args.batch_size], order[args.batch_size :]
            batch, weight = make_batch([records[i] for i in chosen], task, mix, generator)
            targets = batch.ids[:, -task.answer_length :]
            weight = weight * batch.learned * task.weights(targets)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(schedule, step)
            logits = _answer_logits(model, hide(batch.ids, batch.hidden, task), task)
            nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            loss = (nll * weight.flatten()).sum() / weight.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
            if step % 25 == 24:
                line = {"step": step + 1, "loss": round(float(loss), 5)}
                line |= {"seconds": round(time.perf_counter() - began, 1)}
                log.write(json.dumps(line) + "\n")
                log.flush()
                print(line, flush=True)
    return average.module.eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--model", required=True, help="the base: a folder or a bundled model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=512, help="new ones in every round")
    parser.add_argument("--share", type=float, default=0.8, help="of the prompts, kept")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--ema-decay", type=float, default=0.99)
    parser.add_argument("--seed", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    task, model = get_task(args.task), load_model(args.model).float()
    texts: list[dict] = []
    for number in range(args.rounds):
        folder = args.out / f"round-{number + 1}"
        folder.mkdir(parents=True, exist_ok=True)
        found = roll_out(model, task, args.seed, number * args.prompts, args.prompts,
                         folder / "texts.jsonl", 64)  # fmt: skip
        texts = texts[-args.prompts :] + leanest(found, task, args.share)
        if not (folder / "model" / "config.json").is_file():
            print(f"round {number + 1}: {len(texts)} texts", flush=True)
            tuned = train(model, task, texts, Mix(), args, args.seed + number, folder)
            save_model(copy.deepcopy(tuned).half(), folder / "model")
        model = load_model(folder / "model").float()


if __name__ == "__main__":
    main()
