# SPDX-License-Identifier: Apache-2.0
r"""Train the bundled ledger model: `python -m r2dllm_ext.ledger.train --out DIR`.

Every batch, mask and initial weight is a function of (seed, step) alone, so a run that was killed
and resumed ends in the same weights as one that was not. What is evaluated and exported is an
exponential average of the weights: at a learning rate worth having, the weights of a single step
answer far worse. `--init` begins a run with the weights of another one's checkpoint. The bundled
model comes from four runs (all settings in `model/train_config.json`, the logs beside it):

    --out A
    --out B --init A/checkpoint.pt --seed 1 --steps 2200 --learning-rate 8e-4 STAGE
    --out C --init B/checkpoint.pt --seed 2 --steps 1200 --learning-rate 4e-4 STAGE
    --out D --init C/checkpoint.pt --seed 3 --steps 6000 --batch-size 64 --learning-rate 1e-3 \
        --iid-share 0.15 --frontier-share 0.5

with STAGE = --iid-share 0.15 --frontier-share 0.6 --frontier-digits 3.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..models import ModelConfig, Transformer, save_model
from .task import ANSWER_LENGTH, OPERATIONS, Sample, encode_sample, make_sample, verify
from .tokenizer import Tokenizer

BLOCK_LENGTH = 32


@dataclass(frozen=True)
class TrainConfig:
    """Everything the weights depend on; a resumed run must agree on all of it."""

    seed: int = 0
    steps: int = 4200
    batch_size: int = 48
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    ema_decay: float = 0.998  # of the averaged weights, the ones that are evaluated and exported
    digit_weight: float = 4.0
    iid_share: float = 0.25  # rows masked over the whole answer rather than in one block
    frontier_share: float = 0.4  # rows masked like a half-decoded block, see mask_answers
    frontier_digits: int = 0  # digits behind the front that are learned; 0: all of them
    init: str = ""  # "": random weights; else settings and step of the run they come from, as JSON
    width: int = 160
    layers: int = 4
    heads: int = 5
    mlp_width: int = 448
    operations: int = OPERATIONS
    answer_length: int = ANSWER_LENGTH
    autocast: bool = True
    compile: bool = True


def model_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Shape of the ledger model, a small LLaDA."""
    return ModelConfig(
        family="llada",
        vocab_size=len(tokenizer),
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        mlp_width=config.mlp_width,
        rope_theta=10000.0,
        max_length=512,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.end_id,
        pad_id=tokenizer.pad_id,
    )


def collate(samples: list[Sample], tokenizer: Tokenizer, answer_length: int) -> tuple[Tensor, int]:
    """Ids [B, P + answer_length] int64, prompts padded on the left to P, whole blocks; and P."""
    encoded = [encode_sample(sample, tokenizer, answer_length) for sample in samples]
    P = -(-max(len(prompt) for prompt, _ in encoded) // BLOCK_LENGTH) * BLOCK_LENGTH
    rows = [[tokenizer.pad_id] * (P - len(p)) + p + a for p, a in encoded]
    return torch.tensor(rows, dtype=torch.int64), P


def mask_answers(
    answers: Tensor, digit_ids: tuple[int, ...], config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which cells of `answers` [B, A] are hidden, and which of them are learned, both bool.

    iid rows hide each cell with one ratio t ~ U(0, 1). The others pick an active block: what lies
    before it is clean, what lies behind it is hidden and not learned. Inside it, either cells are
    hidden with ratio t, or, in frontier rows, words are mostly visible and the digits hidden from
    some point on: what decoding meets after the easy words are committed. Of these digits only
    the first `frontier_digits` are learned (0: all).
    """
    B, A = answers.shape
    uniform = torch.rand(B, 4, generator=generator)
    noise = torch.rand(B, A, generator=generator)
    ratio = uniform[:, :1]
    mode = uniform[:, 1:2]
    iid = mode < config.iid_share
    frontier = mode > 1 - config.frontier_share
    cell = torch.arange(A)
    start = (uniform[:, 2:3] * (A // BLOCK_LENGTH)).long() * BLOCK_LENGTH
    active = (cell >= start) & (cell < start + BLOCK_LENGTH)
    digit = torch.isin(answers, torch.tensor(digit_ids))
    behind_front = digit & (cell >= start + uniform[:, 3:4] * BLOCK_LENGTH)
    hidden = torch.where(frontier, behind_front | (~digit & (noise < ratio**2)), noise < ratio)
    learned = hidden & (iid | active)
    hidden = learned | (~iid & (cell >= start + BLOCK_LENGTH))
    if config.frontier_digits:
        # What follows hangs on digits that are hidden as well: mostly noise, so not learned.
        too_far = behind_front & (behind_front.cumsum(1) > config.frontier_digits)
        learned = learned & ~(frontier & too_far)
    return hidden, learned


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def decode(model: Transformer, ids: Tensor, prompt_length: int) -> Tensor:
    """Fills the masks of `ids` [B, T] one token a step: the surest cell of the first open block.

    A self-contained oracle for training; `r2dllm_ext.generate` is the real thing.
    """
    ids, tokenizer = ids.clone(), Tokenizer()
    attention_mask = ids != tokenizer.pad_id
    rows = torch.arange(len(ids))
    for start in range(prompt_length, ids.shape[1], BLOCK_LENGTH):
        block = ids[:, start : start + BLOCK_LENGTH]
        for _ in range(block.shape[1]):
            logits = model(
                ids, attention_mask=attention_mask, logits_positions=(start, start + BLOCK_LENGTH)
            ).logits.float()
            logits[..., tokenizer.mask_id] = -torch.inf
            confidence, prediction = logits.softmax(-1).max(-1)
            best = confidence.masked_fill(block != tokenizer.mask_id, -1).argmax(-1)
            block[rows, best] = prediction[rows, best]
    return ids


def evaluate(
    model: Transformer,
    samples: list[Sample],
    *,
    answer_length: int = ANSWER_LENGTH,
    batch: int = 64,
) -> tuple[float, list[str]]:
    """Share of `samples` decoded one token a step without any error, and the answer texts."""
    tokenizer = Tokenizer()
    texts = []
    for i in range(0, len(samples), batch):
        ids, P = collate(samples[i : i + batch], tokenizer, answer_length)
        ids[:, P:] = tokenizer.mask_id
        answers = decode(model, ids.to(model.device), P)[:, P:]
        texts += [tokenizer.decode(row) for row in answers.tolist()]
    right = sum(verify(s.problem, t).correct for s, t in zip(samples, texts, strict=True))
    return right / max(1, len(samples)), texts


class Trainer:
    """Model, optimizer and step counter of one run; `run` goes on from any checkpoint."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.tokenizer, self.step = config, Tokenizer(), 0
        self.model = Transformer(model_config(config, self.tokenizer)).init_weights(config.seed)
        average = get_ema_multi_avg_fn(config.ema_decay)
        self.average = AveragedModel(self.model, multi_avg_fn=average)
        hidden = [p for p in self.model.blocks.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if all(p is not h for h in hidden)]
        lr = config.learning_rate
        self.optimizers = (
            torch.optim.Muon(
                hidden, lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self._loss = (
            torch.compile(self._loss_of, dynamic=False) if config.compile else self._loss_of
        )

    def _loss_of(self, ids: Tensor, keys: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        answer = (ids.shape[1] - targets.shape[1], ids.shape[1])
        logits = self.model(ids, attention_mask=keys, logits_positions=answer).logits.float()
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (nll * weight.flatten()).sum() / weight.sum()

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids [B, T], key mask [B, T], targets [B, A] and loss weights [B, A] of a step."""
        config = self.config
        samples = [
            make_sample(
                config.seed,
                step * config.batch_size + i,
                operations=config.operations,
                answer_length=config.answer_length,
            )
            for i in range(config.batch_size)
        ]
        ids, P = collate(samples, self.tokenizer, config.answer_length)
        targets = ids[:, P:].clone()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        hidden, learned = mask_answers(targets, self.tokenizer.digit_ids, config, generator)
        digit = torch.isin(targets, torch.tensor(self.tokenizer.digit_ids))
        weight = learned * torch.where(digit, config.digit_weight, 1.0)
        keys = ids != self.tokenizer.pad_id
        ids[:, P:] = targets.masked_fill(hidden, self.tokenizer.mask_id)
        return ids, keys, targets, weight

    def train_step(self) -> tuple[float, float]:
        """One update; returns its loss and learning rate."""
        lr = learning_rate(self.config, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        batch = self.batch(self.step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.autocast):
            loss = self._loss(*batch)
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return float(loss.detach()), lr

    @property
    def averaged_model(self) -> Transformer:
        """The one that is evaluated and exported."""
        model = self.average.module
        assert isinstance(model, Transformer)  # torch types it as any module
        return model

    def save(self, path: Path) -> None:
        """Writes the whole state, or nothing: a crash leaves the old checkpoint in place."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    @classmethod
    def resume(cls, path: Path) -> Trainer:
        """The trainer a checkpoint was written by."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        trainer = cls(TrainConfig(**state["config"]))
        trainer.model.load_state_dict(state["model"])
        trainer.average.load_state_dict(state["average"])
        for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        trainer.step = state["step"]
        return trainer

    @classmethod
    def begin_from(cls, path: Path, config: TrainConfig) -> Trainer:
        """A new run whose weights, and nothing else, are those of another run's checkpoint."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["config"] | {"step": state["step"]}
        before["init"] = json.loads(before.get("init") or "null")
        trainer = cls(replace(config, init=json.dumps(before)))
        trainer.model.load_state_dict(state["model"])
        trainer.average.module.load_state_dict(state["model"])
        return trainer


def run(
    trainer: Trainer,
    out: Path,
    *,
    stop: int | None = None,
    save_every: int = 250,
    eval_every: int = 500,
    eval_samples: int = 64,
    log_every: int = 50,
    progress: bool = True,
) -> None:
    """Trains to `stop` (default: the configured steps), logging to `out/train_log.jsonl`."""
    config = trainer.config
    stop = config.steps if stop is None else min(stop, config.steps)
    out.mkdir(parents=True, exist_ok=True)
    held_out = [
        make_sample(
            config.seed,
            i,
            split="test",
            operations=config.operations,
            answer_length=config.answer_length,
        )
        for i in range(eval_samples)
    ]
    losses: list[float] = []
    # A killed run may have logged steps beyond its last checkpoint; they are about to come again.
    log_path = out / "train_log.jsonl"
    kept = log_path.read_text().splitlines() if log_path.exists() else []
    kept = [line for line in kept if json.loads(line)["step"] <= trainer.step]
    kept = kept if trainer.step else []
    log_path.write_text("".join(line + "\n" for line in kept))
    began = time.perf_counter() - (json.loads(kept[-1])["seconds"] if kept else 0)
    with open(log_path, "a") as log, _bar(progress, trainer.step, stop) as bar:
        while trainer.step < stop:
            loss, lr = trainer.train_step()
            losses.append(loss)
            bar.update()
            if trainer.step % log_every == 0 or trainer.step == stop:
                mean = sum(losses) / len(losses)
                record = {"step": trainer.step, "loss": round(mean, 5), "lr": lr}
                if trainer.step % eval_every == 0 or trainer.step == stop:
                    with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast):
                        accuracy, _ = evaluate(
                            trainer.averaged_model, held_out, answer_length=config.answer_length
                        )
                    record["accuracy"] = accuracy
                record["seconds"] = round(time.perf_counter() - began, 1)
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{mean:.4f}")
                losses.clear()
            if trainer.step % save_every == 0 or trainer.step == stop:
                trainer.save(out / "checkpoint.pt")


def export(trainer: Trainer, folder: Path) -> None:
    """Writes the model as a LLaDA checkpoint, with its vocabulary and how it was trained."""
    save_model(trainer.averaged_model, folder)
    tokenizer = trainer.tokenizer
    description = {
        "type": "one id a word, words parted by white space, numbers digit by digit",
        "pad_id": tokenizer.pad_id,
        "end_id": tokenizer.end_id,
        "mask_id": tokenizer.mask_id,
        "vocabulary": tokenizer.vocabulary,
    }
    (folder / "vocabulary.json").write_text(json.dumps(description, indent=1) + "\n")
    training = asdict(trainer.config) | {"step": trainer.step}
    training["init"] = json.loads(training["init"] or "null")
    (folder / "train_config.json").write_text(json.dumps(training, indent=1) + "\n")


def _bar(progress: bool, start: int, stop: int):
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "r2dllm_ext.ledger.train shows progress with tqdm: pip install 'r2dllm_ext[cli]'"
        ) from error
    return tqdm(initial=start, total=stop, disable=not progress, mininterval=5, desc="ledger")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the ledger model on the CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--stop", type=int, help="end at this step, schedule unchanged")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--batch-size", type=int, default=TrainConfig.batch_size)
    parser.add_argument("--learning-rate", type=float, default=TrainConfig.learning_rate)
    parser.add_argument("--iid-share", type=float, default=TrainConfig.iid_share)
    parser.add_argument("--frontier-share", type=float, default=TrainConfig.frontier_share)
    parser.add_argument("--frontier-digits", type=int, default=TrainConfig.frontier_digits)
    parser.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="begin with the weights of another run"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    checkpoint = args.out / "checkpoint.pt"
    if args.resume and not checkpoint.is_file():
        parser.error(f"--resume: there is no {checkpoint}")
    if args.resume:
        trainer = Trainer.resume(checkpoint)
    else:
        config = TrainConfig(
            seed=args.seed,
            steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            compile=not args.no_compile,
            iid_share=args.iid_share,
            frontier_share=args.frontier_share,
            frontier_digits=args.frontier_digits,
        )
        trainer = Trainer(config) if args.init is None else Trainer.begin_from(args.init, config)
    run(trainer, args.out, stop=args.stop, eval_every=args.eval_every)
    export(trainer, args.out / "model")


if __name__ == "__main__":
    main()
