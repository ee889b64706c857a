# SPDX-License-Identifier: Apache-2.0
r"""Train the base model of a task on the CPU: `python bench/train_base.py --task T --out DIR`.

A run goes through the stages of its task, each in a folder of its own, which ends with a checkpoint
in 16 bits: the last `DIR/stage-NAME/model` is the base model. Called again it goes on from where it
was: from the last checkpoint of the first stage that is not done. Initial weights, samples and
masks are functions of (seed, step) alone, and what the model decodes for itself is part of a
checkpoint. Evaluated and exported is an exponential average of the weights: at a learning rate
worth having, the weights of a single step answer far worse.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from muon import Muon
from own_decodes import OwnDecodes
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from r2dllm_ext.models import ModelConfig, Transformer, load_model, save_model
from r2dllm_ext.sft.training import learning_rate
from r2dllm_ext.tasks import TASKS, Pronounce, Task, get_task

BLOCK_LENGTH = 32


@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    heads: int
    mlp_width: int


@dataclass(frozen=True)
class Stage:
    """Everything that the weights depend on, beside the shape and the stage before.

    iid_share: rows masked over the whole answer. The others have an active block, see `mask`.
    frontier_share: rows masked like a half-decoded block whose serial cells (the ledger's digits)
        come last and in order; of them `frontier_digits` are learned, 0 = all.
    ended_share: rows kept whose active block lies behind the end of the answer; all such blocks
        look alike. Refused rows are drawn anew, text and block, so that which rows are refused
        depends on nothing that the model is not shown.
    behind_weight: of the cells behind the active block, which are hidden too.
    exact: learn the task's exact distribution of the hidden cells, not the sampled answer. The loss
        is the divergence, which is 0 for a model that knows all there is to know.
    own_decodes: rows beside those of `batch_size` that the model itself is decoding (`OwnDecodes`;
        takes `exact`). `front_weight` is added to the loss weight of 1 of the four cells that it is
        surest of there: one of these it commits.
    short: prompts and answers of half the length, where a task has such (pronounce).
    any_number: share of prompts of one word and more (pronounce), as people type them.
    """

    name: str
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 200
    horizon: int | None = None  # the step at which the rate would be zero; None = steps
    weight_decay: float = 0.05
    ema_decay: float = 0.998
    iid_share: float = 0.15
    frontier_share: float = 0.0
    frontier_digits: int = 0
    ended_share: float = 1.0
    exact: bool = False
    own_decodes: int = 0
    front_weight: float = 0.0
    behind_weight: float = 0.0
    short: bool = False
    any_number: float = 0.0


class Schedule(NamedTuple):
    """What `learning_rate` reads."""

    learning_rate: float
    warmup: int
    steps: int


class Plan(NamedTuple):
    shape: Shape
    stages: tuple[Stage, ...]


_FRONTIER = {"iid_share": 0.15, "frontier_share": 0.6, "frontier_digits": 3}
PLANS = {
    # Stages 1 to 4 make a model that answers 90.6 % of 512 unseen prompts: where it is wrong, few
    # cells are decided, far from each other, and it is too sure of what stands between them. No
    # mask of `mask` looks like that; stage 5 learns on such states. The bundled model had 1,500
    # steps of it, with the horizon moved forward twice (its train_config.json).
    "ledger": Plan(
        Shape(width=160, layers=4, heads=5, mlp_width=448),
        (
            Stage("1", 0, 4200, 48, 2e-3, iid_share=0.25, frontier_share=0.4),
            Stage("2", 1, 2200, 48, 8e-4, **_FRONTIER),
            Stage("3", 2, 1200, 48, 4e-4, **_FRONTIER),
            Stage("4", 3, 6000, 64, 1e-3, iid_share=0.15, frontier_share=0.5),
            Stage("5", 50, 2600, 12, 5e-4, warmup=150, iid_share=0.35, frontier_share=0.3,
                  ended_share=0.3, exact=True, own_decodes=24, front_weight=3.0),
        ),
    ),
    "pronounce": Plan(
        Shape(width=224, layers=4, heads=4, mlp_width=608),
        (
            Stage("1", 0, 1500, 128, 3e-3, warmup=100, iid_share=0.6, behind_weight=0.3,
                  short=True),
            Stage("2", 1, 5000, 64, 2e-3, warmup=100, iid_share=0.6, behind_weight=0.3),
            Stage("3", 2, 450, 64, 6e-4, warmup=30, ema_decay=0.98, iid_share=0.6,
                  behind_weight=0.3, any_number=1.0),
            Stage("4", 3, 4500, 64, 1.5e-3, warmup=100, iid_share=0.6, behind_weight=0.3,
                  any_number=0.25),
            Stage("5", 4, 1600, 64, 1e-3, warmup=50, iid_share=0.6, behind_weight=0.3,
                  any_number=0.25),
        ),
    ),
}  # fmt: skip


def model_config(shape: Shape, task: Task) -> ModelConfig:
    """A small LLaDA."""
    tokenizer = task.tokenizer
    return ModelConfig(
        family="llada",
        vocab_size=len(tokenizer),
        **asdict(shape),
        rope_theta=10000.0,
        max_length=512,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.end_id,
        pad_id=tokenizer.pad_id,
    )


# ---- batches ---------------------------------------------------------------------------------


class Batch(NamedTuple):
    """ids [B, P + A] with the answers whole; what is hidden and learned, where."""

    ids: Tensor
    hidden: Tensor  # [B, A] bool
    learned: Tensor  # [B, A] bool
    prompts: tuple[str, ...] = ()


def collate(encoded: list[tuple[list[int], list[int]]], task: Task) -> Tensor:
    """Ids [B, prompt_length + answer_length], prompts padded on the left."""
    P, pad = task.prompt_length, task.tokenizer.pad_id
    long = max(len(prompt) for prompt, _ in encoded)
    if long > P:
        raise ValueError(f"{task.name}: a prompt of {long} tokens in {P} slots")
    return torch.tensor([[pad] * (P - len(p)) + p + a for p, a in encoded], dtype=torch.int64)


def draw(task: Task, stage: Stage, step: int) -> Batch:
    """The batch of a step: texts, active blocks and masks."""
    A, blocks = task.answer_length, task.answer_length // BLOCK_LENGTH
    generator = torch.Generator().manual_seed(stage.seed * 1_000_003 + step)
    encoded, prompts, active = [], [], []
    index = step * stage.batch_size * 8  # up to 8 texts a row are drawn
    while len(encoded) < stage.batch_size:
        sample = task.sample(stage.seed, index)
        row = task.encode(sample)
        index += 1
        block, keep = torch.rand(2, generator=generator).tolist()
        block = int(block * blocks)
        first = block * BLOCK_LENGTH
        # The cell before the block tells whether the answer has ended there.
        ended = first > 0 and row[1][first - 1] == task.tokenizer.end_id
        if not ended or keep < stage.ended_share:
            encoded.append(row)
            prompts.append(sample.prompt)
            active.append(first)
    ids = collate(encoded, task)
    start = torch.tensor(active)[:, None]
    return Batch(ids, *mask(ids[:, -A:], start, task, stage, generator), tuple(prompts))


def mask(
    answers: Tensor, start: Tensor, task: Task, stage: Stage, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hides cells of `answers` [B, A] whose active blocks begin at `start` [B, 1].

    Returns which are hidden and which of them are learned.

    iid rows hide each cell with one ratio t ~ U(0, 1). In the others, what lies before the active
    block is clean, what lies behind it is hidden and not learned, and inside it

    - by default each cell is hidden with ratio t;
    - frontier rows show most words and hide the serial cells from some point on.
    """
    B, A = answers.shape
    uniform = torch.rand(B, 4, generator=generator)
    noise = torch.rand(B, A, generator=generator)
    ratio, mode = uniform[:, :1], uniform[:, 1:2]
    iid = mode < stage.iid_share
    frontier = mode > 1 - stage.frontier_share
    cell = torch.arange(A)
    active = (cell >= start) & (cell < start + BLOCK_LENGTH)
    serial = task.serial(answers)
    behind_front = serial & (cell >= start + uniform[:, 3:4] * BLOCK_LENGTH)
    hidden = torch.where(frontier, behind_front | (~serial & (noise < ratio**2)), noise < ratio)
    learned = hidden & (iid | active)
    hidden = learned | (~iid & (cell >= start + BLOCK_LENGTH))
    if stage.frontier_digits:
        # What follows hangs on digits that are hidden as well: mostly noise, so not learned.
        too_far = behind_front & (behind_front.cumsum(1) > stage.frontier_digits)
        learned = learned & ~(frontier & too_far)
    return hidden, learned


def hide(ids: Tensor, hidden: Tensor, task: Task) -> Tensor:
    ids = ids.clone()
    A = task.answer_length
    ids[:, -A:] = ids[:, -A:].masked_fill(hidden, task.tokenizer.mask_id)
    return ids


def _answer_logits(model: Transformer, ids: Tensor, task: Task) -> Tensor:
    T, A = ids.shape[1], task.answer_length
    keys = ids != task.tokenizer.pad_id
    logits = model(ids, attention_mask=keys, logits_positions=(T - A, T)).logits.float()
    logits[..., task.tokenizer.mask_id] = -torch.inf
    return logits


# ---- evaluation ------------------------------------------------------------------------------


@torch.no_grad()
def decode(model: Transformer, ids: Tensor, task: Task) -> Tensor:
    """Fills the masks of `ids` [B, T] one token a step: the surest cell of the first open block.

    A self-contained oracle for training; `r2dllm_ext.generate` is the real thing.
    """
    ids, mask_id = ids.clone(), task.tokenizer.mask_id
    keys = ids != task.tokenizer.pad_id
    rows = torch.arange(len(ids))
    for start in range(task.prompt_length, ids.shape[1], BLOCK_LENGTH):
        end = start + BLOCK_LENGTH
        block = ids[:, start:end]
        for _ in range(BLOCK_LENGTH):
            logits = model(ids, attention_mask=keys, logits_positions=(start, end)).logits.float()
            logits[..., mask_id] = -torch.inf
            confidence, prediction = logits.softmax(-1).max(-1)
            best = confidence.masked_fill(block != mask_id, -1).argmax(-1)
            block[rows, best] = prediction[rows, best]
    return ids


def evaluate(model: Transformer, task: Task, samples: list, batch: int = 64) -> float:
    """Share of the parts (answers, words) of `samples` decoded right, one token a step."""
    right = parts = 0
    for i in range(0, len(samples), batch):
        some = samples[i : i + batch]
        ids = collate([task.encode(sample) for sample in some], task)
        ids[:, -task.answer_length :] = task.tokenizer.mask_id
        rows = decode(model, ids, task)[:, -task.answer_length :].tolist()
        for sample, row in zip(some, rows, strict=True):
            verdict = task.verify(sample.prompt, task.tokenizer.decode(row))
            right, parts = right + verdict.right, parts + verdict.parts
    return right / max(1, parts)


# ---- training --------------------------------------------------------------------------------


class Trainer:
    """Model, optimizers and step counter of a stage; `run` goes on from any checkpoint."""

    def __init__(
        self, task: Task, shape: Shape, stage: Stage, *, compiled: bool, bfloat16: bool = False
    ) -> None:
        self.task, self.shape, self.stage, self.step = task, shape, stage, 0
        self.bfloat16 = bfloat16
        self.model = Transformer(model_config(shape, task)).init_weights(stage.seed)
        average = get_ema_multi_avg_fn(stage.ema_decay)
        self.average = AveragedModel(self.model, multi_avg_fn=average)
        hidden = [p for p in self.model.blocks.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if all(p is not h for h in hidden)]
        lr = stage.learning_rate
        self.optimizers = (
            Muon(hidden, lr, stage.weight_decay),
            torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.decodes = None
        if stage.own_decodes:
            self.decodes = OwnDecodes(task, stage.own_decodes, stage.seed + 1000, BLOCK_LENGTH)
        self._loss = torch.compile(self._loss_of, dynamic=False) if compiled else self._loss_of

    def begin_from(self, model: Transformer) -> None:
        """Takes over the weights, and nothing else, of a model."""
        state = model.float().state_dict()
        self.model.load_state_dict(state)
        self.average.module.load_state_dict(state)

    def _loss_of(
        self, ids: Tensor, targets: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and [B, A] how sure the model is of which token."""
        stage, logits = self.stage, _answer_logits(self.model, ids, self.task)
        confidence, prediction = logits.detach().softmax(-1).max(-1)
        if stage.own_decodes:
            first = len(ids) - stage.own_decodes
            mine = confidence[first:].masked_fill(weight[first:] == 0, -1.0)
            front = mine >= mine.topk(4, dim=1).values[:, -1:]
            factor = torch.cat([torch.zeros_like(confidence[:first]), front.float()])
            weight = weight * (1 + stage.front_weight * factor)
        if targets.dim() == 3:  # distributions, in which the mask token has no part
            kl = F.kl_div(logits.clamp(min=-1e4).log_softmax(-1), targets, reduction="none").sum(-1)
            return (kl * weight).sum() / weight.sum(), confidence, prediction
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (nll * weight.flatten()).sum() / weight.sum(), confidence, prediction

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [B, T], targets [B, A] or [B, A, V], and loss weights [B, A] of a step.

        The rows that the model decodes come last. One that has no right answer any more has a
        distribution of NaN and weighs nothing.
        """
        task, stage, batch = self.task, self.stage, draw(self.task, self.stage, step)
        targets = batch.ids[:, -task.answer_length :]
        ids, hidden, prompts = hide(batch.ids, batch.hidden, task), batch.hidden, batch.prompts
        learned = batch.learned + (batch.hidden & ~batch.learned) * stage.behind_weight
        if self.decodes is not None:
            own_hidden, own_learned = self.decodes.masks()
            # Under a mask stands any token: the distribution does not look there.
            own = self.decodes.answers().masked_fill(own_hidden, task.tokenizer.end_id)
            ids, targets = torch.cat([ids, self.decodes.ids]), torch.cat([targets, own])
            hidden, learned = torch.cat([hidden, own_hidden]), torch.cat([learned, own_learned])
            prompts = (*prompts, *self.decodes.prompts)
        if not stage.exact:
            return ids, targets, learned * task.weights(targets)
        exact = task.posterior(list(prompts), targets, hidden, strict=self.decodes is None)
        if exact is None:
            raise ValueError(f"stage {stage.name}: {task.name} has no exact distribution")
        # By what a cell may be, not by what it happens to be in this text.
        every = task.weights(torch.arange(len(task.tokenizer))[None])[0]
        return ids, exact, (learned * (exact @ every)).nan_to_num(0.0)

    def train_step(self) -> tuple[float, float]:
        """One update; returns its loss and learning rate."""
        stage = self.stage
        schedule = Schedule(stage.learning_rate, stage.warmup, stage.horizon or stage.steps)
        lr = learning_rate(schedule, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        ids, targets, weight = self.batch(self.step)
        known = targets.nan_to_num(0.0) if stage.exact else targets
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            loss, confidence, prediction = self._loss(ids, known, weight)
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update_parameters(self.model)
        if self.decodes is not None:
            rows = slice(stage.batch_size, None)
            self.decodes.advance(confidence[rows], prediction[rows], targets[rows])
        self.step += 1
        return float(loss.detach()), lr

    def save(self, path: Path) -> None:
        """Writes the whole state, or nothing: a crash leaves the old checkpoint in place."""
        state = {
            "stage": asdict(self.stage),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "decodes": None if self.decodes is None else self.decodes.state(),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote; ValueError if that belongs to other settings."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["stage"] != asdict(self.stage):
            raise ValueError(f"{path} was trained as {state['stage']}, not as {self.stage}")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        if self.decodes is not None:
            self.decodes.load(state["decodes"])


def run(trainer: Trainer, out: Path, args: argparse.Namespace) -> None:
    """Trains to the end of the stage, logging to `out/log.jsonl`."""
    task, stage = trainer.task, trainer.stage
    out.mkdir(parents=True, exist_ok=True)
    held_out = [task.sample(stage.seed, i, split="test") for i in range(args.eval_samples)]
    log_path, losses = out / "log.jsonl", []
    # A killed run may have logged steps beyond its last checkpoint; they are about to come again.
    kept = log_path.read_text().splitlines() if log_path.exists() else []
    kept = [line for line in kept if trainer.step and json.loads(line)["step"] <= trainer.step]
    log_path.write_text("".join(line + "\n" for line in kept))
    began = time.perf_counter() - (json.loads(kept[-1])["seconds"] if kept else 0)
    with open(log_path, "a") as log:
        while trainer.step < stage.steps:
            loss, lr = trainer.train_step()
            losses.append(loss)
            last = trainer.step == stage.steps
            if trainer.step % args.log_every == 0 or last:
                record = {"step": trainer.step, "loss": round(sum(losses) / len(losses), 5)}
                losses.clear()
                if trainer.step % args.eval_every == 0 or last:
                    record["right"] = round(evaluate(trainer.average.module, task, held_out), 4)
                record |= {"lr": float(f"{lr:.4g}")}
                record |= {"seconds": round(time.perf_counter() - began, 1)}
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(f"{task.name} {stage.name}", json.dumps(record), flush=True)
            if trainer.step % args.save_every == 0 or last:
                trainer.save(out / "checkpoint.pt")


def export(trainer: Trainer, folder: Path, history: list[dict]) -> None:
    """Writes the model in 16 bits as a LLaDA checkpoint, its vocabulary, and how it was trained."""
    model = Transformer(trainer.model.config)
    model.load_state_dict(trainer.average.module.state_dict())
    save_model(model.half(), folder)
    tokenizer = trainer.task.tokenizer
    described = {
        "pad_id": tokenizer.pad_id,
        "end_id": tokenizer.end_id,
        "mask_id": tokenizer.mask_id,
        "vocabulary": tokenizer.vocabulary,
    }
    (folder / "vocabulary.json").write_text(json.dumps(described, indent=1) + "\n")
    (folder / "training.json").write_text(json.dumps(history, indent=1) + "\n")


def unfinished(plan: Plan, out: Path) -> Iterator[tuple[int, Stage, Path]]:
    for number, stage in enumerate(plan.stages):
        folder = out / f"stage-{stage.name}"
        if not (folder / "done").exists():
            yield number, stage, folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--from-stage", metavar="NAME", help="begin with this stage")
    parser.add_argument(
        "--init", metavar="MODEL", help="weights that --from-stage begins with: those of the stages"
        " before, a checkpoint folder or the name of a bundled model"
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of matrix products; auto: bfloat16 where the CPU multiplies it in hardware",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if (args.from_stage is None) != (args.init is None):
        parser.error("--from-stage and --init go together")
    torch.set_num_threads(args.threads)
    bfloat16 = args.precision == "bfloat16"
    if args.precision == "auto":
        bfloat16 = torch.cpu.get_capabilities().get("amx_bf16", False)
    plan = PLANS[args.task]
    names = [stage.name for stage in plan.stages]
    if args.from_stage is not None and args.from_stage not in names:
        parser.error(f"--from-stage takes one of {', '.join(names)}, got {args.from_stage!r}")
    first = names.index(args.from_stage) if args.from_stage else 0
    for number, stage, folder in unfinished(plan, args.out):
        if number < first:
            continue
        task = get_task(args.task)
        if stage.short or stage.any_number:
            task = Pronounce(short=stage.short, any_number=stage.any_number)
        trainer = Trainer(task, plan.shape, stage, compiled=not args.no_compile, bfloat16=bfloat16)
        if (folder / "checkpoint.pt").is_file():
            trainer.load(folder / "checkpoint.pt")
        elif number == first and args.init:
            trainer.begin_from(load_model(args.init))
        elif number:
            trainer.begin_from(load_model(args.out / f"stage-{names[number - 1]}" / "model"))
        run(trainer, folder, args)
        history = [asdict(plan.shape), *map(asdict, plan.stages[: number + 1])]
        export(trainer, folder / "model", history)
        (folder / "done").touch()


if __name__ == "__main__":
    main()
