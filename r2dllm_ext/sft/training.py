# SPDX-License-Identifier: Apache-2.0
"""Train: fine-tune a model on chosen answers, on one process or on many."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .._checks import choice, flag, integer, integers, make_plain, number, refuse
from ..models import Transformer
from ..text_input import read_text, split_lines
from .artefacts import naming, remove_folder, write_text
from .objective import Batch, Example, Masking, Objective, check_examples, make_batch
from .progress import bar
from .ranks import current_ranks

PARALLEL = ("ddp", "fsdp")
_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Training:
    """What the weights depend on; a resumed run must agree on all of it.

    steps, batch_size: updates, and examples in each of them (over all processes); with
        `complementary` an example is two sequences.
    learning_rate, warmup, weight_decay, clip_norm: of AdamW; linear warm-up, then half a cosine
        down to zero.
    trajectory_share, iid_share, frontier_share: of the examples, masked in these modes of
        `corrupt`; the others in mode "block". A share is masked over the whole answer, as training
        on the states of confident decoding alone is known to teach confidence where it is not due.
        Frontier masks take examples that know their serial tokens.
    ratio, complementary, weighting: of `corrupt`.
    near, far_weight: in a state of a decode, tokens that it decided `near` forwards later or more
        weigh `far_weight`: they could not be known yet. near=0: all weigh 1.
    ema_decay: in [0, 1], of the average of the weights that is the result, from step to step; 0 =
        the last weights are the result, 1 = the mean of all.
    entropy_weight, entropy_temperature, entropy_gate: of `linear_sft_loss`.
    lora_rank, lora_alpha: 0 = all weights are trained.
    autocast: forward and backward in bfloat16; the weights stay float32.
    """

    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 2e-5
    warmup: int = 20
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    trajectory_share: float = 0.0
    iid_share: float = 0.25
    frontier_share: float = 0.0
    ratio: tuple[float, float] = (0.001, 0.999)
    complementary: bool = True
    weighting: str = "flat"
    near: int = 0
    far_weight: float = 0.3
    ema_decay: float = 0.0
    entropy_weight: float = 0.0
    entropy_temperature: float = 1.0
    entropy_gate: str = "correct"
    lora_rank: int = 0
    lora_alpha: float = 32.0
    autocast: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self, integer, "steps", "batch_size", low=1)
        make_plain(self, integer, "warmup", "near", "lora_rank", low=0)
        make_plain(self, integer, "seed")
        make_plain(self, number, "learning_rate", "lora_alpha", low=0, open_low=True)
        make_plain(self, number, "entropy_temperature", low=1e-6, high=1e6)  # what the loss takes
        make_plain(self, number, "weight_decay", "far_weight", "entropy_weight", low=0)
        if self.clip_norm != math.inf:  # which clips nothing
            make_plain(self, number, "clip_norm", low=0, open_low=True)
        make_plain(self, number, "ema_decay", low=0, high=1)
        make_plain(self, flag, "complementary", "autocast")
        shares = ("trajectory_share", "iid_share", "frontier_share")
        make_plain(self, number, *shares, low=0, high=1)
        if sum(getattr(self, name) for name in shares) > 1 + 1e-9:
            raise ValueError(
                f"Training: {' + '.join(shares)} takes at most 1, got "
                f"{sum(getattr(self, name) for name in shares):g}"
            )
        # No "mean": the loss is a mean over rows, not over sequences.
        choice("Training", "weighting", self.weighting, ("flat", "elbo"))
        choice("Training", "entropy_gate", self.entropy_gate, ("correct", "all"))
        takes = "(low, high) with 0 <= low <= high <= 1"
        if not isinstance(self.ratio, (tuple, list)):
            refuse(TypeError, "Training", "ratio", takes, self.ratio)
        if len(self.ratio) != 2:
            refuse(ValueError, "Training", "ratio", takes, self.ratio)
        low, high = (number("Training", "ratio", bound, 0, 1) for bound in self.ratio)
        if low > high:
            refuse(ValueError, "Training", "ratio", takes, self.ratio)
        object.__setattr__(self, "ratio", (low, high))

    def cautious(self) -> Training:
        """Half the learning rate, and at least 60 % iid and frontier masks where there are any:
        what keeps a model right."""
        others = self.iid_share + self.frontier_share
        factor = max(1.0, 0.6 / others) if others else 1.0
        return dataclasses.replace(
            self,
            learning_rate=self.learning_rate / 2,
            iid_share=self.iid_share * factor,
            frontier_share=self.frontier_share * factor,
            trajectory_share=min(self.trajectory_share, max(0.0, 1 - others * factor)),
        )

    def masking(self, mask_id: int, block_length: int) -> Masking:
        return Masking(self, mask_id, block_length)


def learning_rate(training: Training, step: int) -> float:
    """Of the update `step`, counted from 0."""
    if step < training.warmup:
        return training.learning_rate * (step + 1) / training.warmup
    done = (step - training.warmup) / max(1, training.steps - training.warmup)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def add_lora(model: Transformer, rank: int, alpha: float) -> Any:
    """Puts adapters into `model`, freezes the rest; the result has `merge_and_unload()`."""
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ImportError("lora_rank > 0 needs peft: pip install 'r2dllm_ext[lora]'") from error
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(_LORA_TARGETS))
    tuner = LoraModel(model, config, "default")
    for weight in model.parameters():
        if weight.requires_grad:  # peft makes adapters in the precision of what they adapt
            weight.data = weight.data.float()
    return tuner


class Trainer:
    """Model, optimiser and step counter.

    Args:
        model: its weights are trained in place, and should be float32: a small update is lost on
            bfloat16. Adapters are float32, whatever the frozen weights are.
        examples: at least one; every example is met once before any is met again.
        training: what the result depends on.
        mask_id, block_length, logits_shift: as in decoding.
        pad_id: fills prompts up on the left.
        micro_batch_size: examples in one forward; None = all of a process' share.
        parallel: how several processes work together: "ddp" (each holds all weights) or "fsdp"
            (each holds a share, FSDP2).

    The gradient of a step is that of one process on the whole batch: every micro-batch counts
    by its share of the rows that carry loss, over all micro-batches and processes. (The entropy
    term is a mean over the rows that pass its gate in each micro-batch, weighted alike.)
    """

    def __init__(
        self,
        model: Transformer,
        examples: Sequence[Example],
        training: Training,
        *,
        mask_id: int,
        block_length: int,
        logits_shift: int = 0,
        pad_id: int = 0,
        micro_batch_size: int | None = None,
        parallel: str = "ddp",
    ) -> None:
        if not examples:
            raise ValueError("Trainer: examples takes at least one, got none")
        check_examples("Trainer", examples)
        choice("Trainer", "parallel", parallel, PARALLEL)
        self.ranks = current_ranks()
        if training.batch_size % self.ranks.world:
            raise ValueError(
                f"Trainer: batch_size takes a multiple of the {self.ranks.world} processes, got "
                f"{training.batch_size}"
            )
        micro_batch_size = integer(
            "Trainer", "micro_batch_size", micro_batch_size, 1, optional=True
        )
        block_length = integer("Trainer", "block_length", block_length, 1)
        logits_shift = integer("Trainer", "logits_shift", logits_shift, 0, 1)
        highest = model.config.embedding_size - 1
        mask_id = integer("Trainer", "mask_id", mask_id, 0, highest)
        pad_id = integer("Trainer", "pad_id", pad_id, 0, highest)
        for place, example in enumerate(examples):
            _check_example(f"examples[{place}]", example, model)
        self.training, self.examples, self.step = training, examples, 0
        self.device = model.device
        self._masking = training.masking(mask_id, block_length)
        self._layout = {"logits_shift": logits_shift, "pad_id": pad_id}
        self._micro = micro_batch_size or training.batch_size
        if training.lora_rank:
            # The same adapters everywhere, whatever random numbers were drawn before.
            with torch.random.fork_rng():
                torch.manual_seed(training.seed)
                add_lora(model, training.lora_rank, training.lora_alpha)
        self.model = model.train()
        objective = Objective(
            model,
            entropy_weight=training.entropy_weight,
            entropy_temperature=training.entropy_temperature,
            entropy_gate=training.entropy_gate,
        )
        self.objective = _distributed(objective, parallel) if self.ranks.world > 1 else objective
        self.optimizer = torch.optim.AdamW(
            self._trained(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
        )
        # Of the share that this process holds, in the order of the trained parameters.
        self.average = [p.detach().clone() for p in self._trained()] if training.ema_decay else []

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.objective.parameters() if p.requires_grad]

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches that this process computes in an update."""
        whole = self.training.batch_size
        places = range(whole)[self.ranks.rank :: self.ranks.world]
        chosen = example_order(len(self.examples), step * whole, whole, self.training.seed)
        return [
            make_batch(
                [self.examples[chosen[place]] for place in places[i : i + self._micro]],
                places[i : i + self._micro],
                step,
                self._masking,
                **self._layout,
            )
            for i in range(0, len(places), self._micro)
        ]

    def gradients(self) -> tuple[Tensor, int]:
        """Sets the gradients of the next update; returns its loss and the rows that carried it."""
        batches = self.batches(self.step)
        mine = sum(len(batch.targets) for batch in batches)
        total = self.ranks.sum(torch.tensor([mine], dtype=torch.float32, device=self.device))[0]
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        self.optimizer.zero_grad()
        for place, batch in enumerate(batches):
            with self._sync(place == len(batches) - 1):
                with torch.autocast(
                    self.device.type, torch.bfloat16, enabled=self.training.autocast
                ):
                    mean = self.objective(batch.to(self.device))
                part = mean * (len(batch.targets) / total.clamp(min=1))
                # DDP and FSDP average over the processes; the sum is wanted.
                (part * self.ranks.world).backward()
            loss += part.detach()
        return self.ranks.sum(loss), int(total)

    def update(self) -> dict[str, Any]:
        """One update; returns what the log says about it."""
        lr = learning_rate(self.training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, rows = self.gradients()
        total = nn.utils.clip_grad_norm_(self.objective.parameters(), self.training.clip_norm)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if not math.isfinite(norm):
            raise ValueError(
                f"training: at step {self.step + 1} the gradient is {norm}, the loss {float(loss)}"
                ". The last checkpoint is as it was; try a lower learning_rate"
            )
        self.optimizer.step()
        if self.average:
            weights = [_local(p.detach()) for p in self._trained()]
            # The mean of all steps until there are enough of them: the start weighs no more.
            decay = min(self.training.ema_decay, self.step / (self.step + 1))
            torch._foreach_lerp_([_local(x) for x in self.average], weights, 1 - decay)
        self.step += 1
        return {
            "step": self.step,
            "loss": float(f"{float(loss):.6g}"),
            "rows": rows,
            "gradient_norm": float(f"{norm:.6g}"),
            "learning_rate": float(f"{lr:.6g}"),
        }

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged once, with the last micro-batch."""
        if isinstance(self.objective, FSDPModule):
            self.objective.set_requires_gradient_sync(last)
        elif not last and isinstance(self.objective, nn.parallel.DistributedDataParallel):
            return self.objective.no_sync()
        return contextlib.nullcontext()

    def save(self, folder: Path) -> None:
        """Writes weights (those that are trained) and optimiser, each process its share.

        Raises ValueError, and writes nothing, if a weight is not finite, its average or what the
        optimiser knows of it.
        """
        wrong = self._non_finite()
        if self._anywhere(bool(wrong)):
            raise ValueError(
                f"training: after step {self.step} {wrong or 'a share of the weights'} is not "
                "finite; try a lower learning_rate"
            )
        part = folder.with_name(folder.name + ".part")
        if self.ranks.is_first:
            remove_folder(part)
            part.parent.mkdir(parents=True, exist_ok=True)
        self.ranks.wait()
        with naming(part), _checkpointing():
            dcp.save(self._state(), checkpoint_id=part, no_dist=self.ranks.world == 1)
        self.ranks.wait()
        if self.ranks.is_first:
            remove_folder(folder)  # there is one if it was damaged, see `train`
            os.replace(part, folder)
        self.ranks.wait()

    def load(self, folder: Path, step: int) -> None:
        """Goes on from what `save` wrote after `step` updates, on any number of processes.

        Raises CheckpointError if it is damaged, of another step or of more than is trained here, in
        all processes if it is in one. The weights are then of no use until another one is loaded.
        """
        self.optimizer.zero_grad()  # or torch would not prepare its state to be filled
        state, reason = self._state(), ""
        try:
            with _checkpointing():
                _check_keys(folder, state)
                dcp.load(state, checkpoint_id=folder, no_dist=self.ranks.world == 1)
            set_state_dict(
                self.objective,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=StateDictOptions(strict=False, ignore_frozen_params=True),
            )
            if wrong := self._non_finite():
                reason = f"{wrong} is not finite"
            elif (updates := self._updates()) not in (0, step):
                reason = f"it was written after {updates} updates"
        except Exception as error:  # what a damaged pickle raises is up to its bytes
            reason = f"{type(error).__name__}: {error}"
        if self._anywhere(bool(reason)):
            reason = reason or "another process can't read its share"
            raise CheckpointError(f"{folder} is no whole checkpoint: {reason}")
        self.step = step

    def _non_finite(self) -> str:
        """A trained weight that is not finite in the share of this process, or its average, or what
        the optimiser knows of it; "" if all are."""
        trained = [(n, p) for n, p in self.objective.named_parameters() if p.requires_grad]
        for place, (name, weight) in enumerate(trained):
            held: dict[str, Tensor] = {name: weight}
            if self.average:
                held[f"the average of {name}"] = self.average[place]
            known = self.optimizer.state.get(weight, {})
            held |= {f"{key} of {name}": value for key, value in known.items()}
            for what, tensor in held.items():
                if not _local(tensor).isfinite().all():
                    return what
        return ""

    def _updates(self) -> int:
        """How many the optimiser has counted."""
        counts = [state["step"] for state in self.optimizer.state.values()]
        return int(_local(counts[0])) if counts else 0

    def _anywhere(self, here: bool) -> bool:
        """Whether `here` is true in any process; all have to call it."""
        count = torch.tensor([here], dtype=torch.float32, device=self.device)
        return bool(self.ranks.sum(count)[0])

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(
            self.objective, self.optimizer, options=StateDictOptions(ignore_frozen_params=True)
        )
        average = {str(i): weight for i, weight in enumerate(self.average)}
        return {"model": model, "optimizer": optimizer, "average": average}

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights that were trained (their average with `ema_decay`), whole, on the CPU of the
        first process; by their names in the model. All processes have to call it."""
        self._swap()
        try:
            options = StateDictOptions(
                full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
            )
            state = get_model_state_dict(self.objective, options=options)
            # Copies: on the CPU these are the model's own tensors, which are swapped back.
            weights = {
                n.removeprefix("model."): x.clone()
                for n, x in state.items()
                if isinstance(x, Tensor)
            }
        finally:
            self._swap()
        assert len(weights) == len(state)  # the objective has no other state
        return weights

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges weights and average, if there is one."""
        if self.average:
            for weight, average in zip(self._trained(), self.average, strict=True):
                kept = weight.detach().clone()
                weight.copy_(average)
                average.copy_(kept)


def _check_keys(folder: Path, state: dict[str, Any]) -> None:
    """Raises ValueError for a checkpoint of more than is trained: a larger model, an average. What
    it lacks is found when it is read."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for part in ("model", "average"):
        wanted = {f"{part}.{name}" for name in state[part]}
        more = [name for name in stored if name.startswith(f"{part}.") and name not in wanted]
        if more:
            raise ValueError(f"it holds {more[0]} (one of {len(more)}), which is not trained here")


def _check_example(name: str, example: Example, model: Transformer) -> None:
    """Once for all steps: ids that the model has, positions that it has, weights to learn by."""
    for field in ("prompt_ids", "answer_ids"):
        ids = getattr(example, field)
        integers("Trainer", f"{name}.{field}", ids, 0, model.config.embedding_size - 1)
    length = len(example.prompt_ids) + len(example.answer_ids)
    if length > model.context_length:
        takes = f"at most as many tokens as the model has positions ({model.context_length})"
        refuse(ValueError, "Trainer", name, takes, length)
    for weight in example.token_weights or ():
        number("Trainer", f"{name}.token_weights", weight, 0)


def _local(weight: Tensor) -> Tensor:
    """The share of a tensor that this process holds."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class CheckpointError(ValueError):
    """A folder that `Trainer.save` did not write, or that was damaged since."""


@contextlib.contextmanager
def _checkpointing() -> Iterator[None]:
    """torch's exception, which is no `Exception`, as the first one that it holds; without what it
    logs of it, a traceback, and without the warning that a process alone checkpoints by itself."""
    root = logging.getLogger()

    def is_ours(record: logging.LogRecord) -> bool:
        return record.module != "state_dict_loader"

    root.addFilter(is_ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")
        try:
            yield
        except dcp.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
        finally:
            root.removeFilter(is_ours)


def example_order(count: int, start: int, number: int, seed: int) -> list[int]:
    """Examples `start` .. `start + number` of an endless sequence of shuffles of all `count`."""
    chosen: list[int] = []
    while len(chosen) < number:
        epoch, place = divmod(start + len(chosen), count)
        generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(count, generator=generator, device="cpu")[place:]
        chosen += order.tolist()
    return chosen[:number]


def _distributed(objective: Objective, parallel: str) -> nn.Module:
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh

    # The views are the keys and values of a layer, which nothing in training touches.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    device = objective.model.device.type
    mesh = init_device_mesh(device, (current_ranks().world,))
    for block in objective.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)  # in place
    return objective


def train(trainer: Trainer, folder: Path, *, save_every: int = 100, progress: bool = False) -> None:
    """Trains to the last step, with a checkpoint every `save_every` and a line of log a step.

    `folder` gets `log.jsonl` and, as the last one, `step-N`. A run that was killed goes on from its
    last checkpoint and writes the lines of the log that it had lost; the result is the same.

    A checkpoint that is damaged, or of which the log has lost lines, is passed over with a warning,
    and the one before is taken.

    Raises ValueError if there are checkpoints and none of them can be taken, or one of a step
    beyond the last.
    """
    save_every = integer("train", "save_every", save_every, 1)
    log, first, steps = folder / "log.jsonl", trainer.ranks.is_first, trainer.training.steps
    logged = _logged(log)
    trainer.ranks.wait()  # all have read it before it is written
    done = _load_latest(trainer, folder, log, len(logged))
    if done > steps:
        raise ValueError(f"train: {folder} takes at most step-{steps}, the last, got step-{done}")
    if first:
        write_text(log, "".join(line + "\n" for line in logged[:done]))
    trainer.ranks.wait()
    with contextlib.ExitStack() as stack:
        stack.enter_context(naming(log))
        b = stack.enter_context(bar(progress and first, "train", steps, "step", done))
        file = stack.enter_context(open(log, "a", encoding="utf-8")) if first else None
        while trainer.step < steps:
            entry = trainer.update()
            if file is not None:
                file.write(json.dumps(entry) + "\n")
                file.flush()
            b.update()
            b.set_postfix(loss=entry["loss"], refresh=False)
            if trainer.step % save_every == 0 or trainer.step == steps:
                if file is not None:
                    os.fsync(file.fileno())  # a checkpoint is of no use without its lines
                trainer.save(folder / f"step-{trainer.step}")
                if first and done:
                    remove_folder(folder / f"step-{done}")
                done = trainer.step


def _logged(log: Path) -> list[str]:
    """The lines of the log up to one that is damaged; none where there is no log."""
    lines: list[str] = []
    for line in split_lines(read_text(log)) if log.exists() else ():
        try:
            if json.loads(line)["step"] != len(lines) + 1:
                break
        except (ValueError, TypeError, KeyError):
            break
        lines.append(line)
    return lines


def _load_latest(trainer: Trainer, folder: Path, log: Path, lines: int) -> int:
    """Loads the latest whole checkpoint of those whose `lines` the log has; its step, 0 where there
    is none to load."""
    saved = saved_steps(folder)
    for step in saved:
        try:
            if step > lines:
                raise CheckpointError(f"{log} has {lines} whole lines, but step-{step} was reached")
            trainer.load(folder / f"step-{step}", step)
            return step
        except CheckpointError as error:
            if step == saved[-1]:
                raise CheckpointError(f"{error}; delete {folder} to train anew") from error
            if trainer.ranks.is_first:
                warnings.warn(f"{error}; the one before is taken", stacklevel=3)
    return 0


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, the latest first."""
    names = [path.name for path in folder.glob("step-*")] if folder.is_dir() else []
    return sorted((int(n[5:]) for n in names if re.fullmatch(r"step-[1-9][0-9]*", n)), reverse=True)
