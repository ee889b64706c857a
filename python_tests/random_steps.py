# SPDX-License-Identifier: Apache-2.0
"""Random decode steps of the extension against the oracle, bit for bit.

    python python_tests/random_steps.py --steps 200000 --seed 0

A seed makes a block: shape, dtype, memory layout, options, and a few steps on one state. The rules
are held to the oracle on what the extension itself reads from the logits (top-1, draw, entropy;
`test_properties.py` holds these to float64 with a tolerance), so that no draw has to be dropped for
being too close to a threshold. Block i of a run has seed SEED + i: the seed that a disagreement
names, with --steps 1, is that block alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from cases import (
    BUDGETS,
    DTYPES,
    LAYOUTS,
    OFF,
    PROBABILITIES,
    TEMPERATURES,
    assert_same,
    clone,
    laid_out,
    random_config,
    random_steps,
    same_bits,
    state_tensors,
    strided_tokens,
)
from torch import Tensor

from r2dllm_ext import reference
from r2dllm_ext.config import DecodeConfig, Rule
from r2dllm_ext.row_params import RowParams
from r2dllm_ext.state import DecodeState, DecodeStep

STEPS = 4  # of a block
VARIATIONS = 2  # options of a step that are taken back, to see whether they matter


# ---- the arguments of a call -------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What a step is given beside logits, tokens, state and config; on the CPU."""

    candidates: Tensor | None = None
    editable: Tensor | None = None
    proposed: Tensor | None = None
    rows: RowParams | None = None
    slots: Tensor | None = None
    logits_shift: int = 0

    def on(self, device: str) -> dict[str, Any]:
        """Keywords of `decode_step`."""
        there = {f.name: moved(getattr(self, f.name), device) for f in dataclasses.fields(self)}
        if self.rows is not None:
            rows = {name: value.to(device) for name, value in given(self.rows).items()}
            there["rows"] = RowParams(**rows)
        return there

    def names(self) -> list[str]:
        """Arguments that are given; those in `rows` as "rows.quota"."""
        own = [name for name in given(self) if name != "rows"]
        return own + [f"rows.{name}" for name in given(self.rows)]

    def without(self, name: str) -> Call:
        argument, _, field = name.partition(".")
        if field:
            return self.replace(rows=dataclasses.replace(self.rows, **{field: None}))
        return self.replace(**{argument: 0 if argument == "logits_shift" else None})

    def replace(self, **changes: Any) -> Call:
        return dataclasses.replace(self, **changes)


def given(arguments: Call | RowParams | None) -> dict[str, Any]:
    """Fields that are neither None nor 0."""
    if arguments is None:
        return {}
    values = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)}
    return {k: v for k, v in values.items() if isinstance(v, Tensor) or v}


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


ALL_OPTIONS = (
    {f.name for f in dataclasses.fields(DecodeConfig)} - {"mask_id"}
    | {f.name for f in dataclasses.fields(Call)} - {"rows"}
    | {f"rows.{f.name}" for f in dataclasses.fields(RowParams)}
)


# ---- random arguments --------------------------------------------------------------------------

# Field of RowParams -> values that its tensor is made of; about one in thirty is out of range.
ROW_VALUES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    **dict.fromkeys(
        ("threshold", "spatial_threshold", "temporal_threshold", "edit_threshold"),
        (PROBABILITIES, (math.nan, -0.25, 1.5, math.inf)),
    ),
    **dict.fromkeys(("error_budget", "entropy_budget"), (BUDGETS, (math.nan, -0.25))),
    "quota": ((0, 1, 2, 3, 9, 2**31 - 1), (-1,)),
    "temperature": ((0.0, *TEMPERATURES), (math.nan, -1.0, math.inf)),
    "top_k": ((0, 1, 2, 5), (-1,)),
    "top_p": ((0.0, 0.3, 0.9, 1.0), (math.nan, -0.5, 1.5)),
    "min_p": ((0.0, 0.1, 0.5, 1.0), (math.nan, -0.5, 1.5)),
    "seed": ((0, 1, -1, 2**62), ()),
}


def random_rows(random: Random, rows: int, *, draws: bool, edits: bool) -> RowParams:
    """Parameters of some fields, in any dtype that they may have."""
    tensors = {}
    for name, (values, bad) in ROW_VALUES.items():
        allowed = {"temperature": draws, "edit_threshold": edits}.get(name, True)
        if not allowed or random.random() < 0.7:
            continue
        drawn = [
            random.choice(bad if bad and random.random() < 0.03 else values) for _ in range(rows)
        ]
        if name == "seed":
            dtype = torch.int64
        elif name in ("quota", "top_k"):
            dtype = random.choice((torch.int32, torch.int64))
        else:
            dtype = random.choice((torch.float32, torch.float64))
        tensors[name] = torch.tensor(
            drawn, dtype=torch.float64 if dtype.is_floating_point else dtype
        )
        tensors[name] = tensors[name].to(dtype)
    return RowParams(**tensors)


def random_cells(g: torch.Generator, tokens: Tensor, share: float) -> Tensor:
    return torch.rand(tokens.shape, generator=g) < share


def needs_state(config: DecodeConfig, call: Call) -> bool:
    return (
        config.base == "schedule"
        or bool(config.temporal_steps)
        or config.token_cluster == "random"
        or config.temperature > 0
        or "temperature" in given(call.rows)
        or call.slots is not None
    )


class Block:
    """What one seed makes: everything but the steps' own candidates, proposals and logits."""

    def __init__(self, seed: int, device: str) -> None:
        self.random = random = Random(seed)
        self.device = device
        self.generator = g = torch.Generator().manual_seed(seed)
        rows, length = (
            random.choice((4, 3, 2, 2, 1, 0)),
            random.choice((16, 33, 8, 8, 7, 3, 2, 1, 0)),
        )
        vocab = random.choice((2, 3, 17, 64, 301))
        self.shape = (rows, length, vocab)
        self.dtype = random.choice(DTYPES[device])
        self.layout = random.choice(LAYOUTS)
        fixed = {"mask_id": None} if random.random() < 0.1 else {}
        self.by_statistics = random.random() < 0.1
        if self.by_statistics:
            fixed["temperature"] = 0.0
        self.config = random_config(random, vocab, **fixed)
        self.mask = random.randrange(vocab) if self.config.mask_id is None else self.config.mask_id
        self.explicit = self.config.mask_id is None or random.random() < 0.5
        self.edits = self.config.edit_threshold is not None and random.random() < 0.8
        self.proposes = not self.by_statistics and random.random() < 0.2
        self.has_rows = random.random() < 0.4
        self.has_slots = random.random() < 0.3
        self.shift = 0 if self.by_statistics else random.randint(0, 1)
        self.step_map = random.random() < 0.3
        self.stateless = not self.step_map and random.random() < 0.5
        self.capacity = rows + random.randrange(4) if self.has_slots else rows
        self.tokens = torch.randint(vocab, (rows, length), generator=g)
        self.tokens[random_cells(g, self.tokens, 0.8)] = self.mask
        if random.random() < 0.3:
            self.tokens = self.tokens.int()
        self.strided = random.random() < 0.5
        self.logits = random_steps(seed, self.shape, STEPS, self.mask)
        for z in self.logits:  # two tokens share all: probabilities that are a threshold exactly
            even = random_cells(g, self.tokens, 0.1)
            z[even] = -torch.inf
            z[..., :2][even] = 0.0

    def call(self) -> Call:
        """Arguments of the next step."""
        random, g, tokens = self.random, self.generator, self.tokens
        rows, _, vocab = self.shape
        changes: dict[str, Any] = {"logits_shift": self.shift}
        if self.explicit:
            changes["candidates"] = random_cells(g, tokens, 0.7)
        if self.edits:
            changes["editable"] = random_cells(g, tokens, 0.6)
        if self.proposes:
            ids = torch.randint(-1, vocab + 1, tokens.shape, generator=g)
            likely = self.logits[0].nan_to_num(-9.0).argmax(-1) if vocab else ids
            changes["proposed"] = torch.where(random_cells(g, tokens, 0.7), likely, ids)
        if self.has_rows:
            edits = self.config.edit_threshold is not None
            changes["rows"] = random_rows(random, rows, draws=not self.by_statistics, edits=edits)
        if self.has_slots:
            slots = torch.tensor(random.sample(range(self.capacity), rows), dtype=torch.int64)
            lost = torch.tensor([random.random() < 0.05 for _ in range(rows)], dtype=torch.bool)
            changes["slots"] = slots.masked_fill(lost, random.choice((-1, self.capacity, 2**40)))
        return Call(**changes)


# ---- a step of the extension -------------------------------------------------------------------


def statistics_of(r2, logits: Tensor, config: DecodeConfig):
    """The same logits as merged statistics of two shards."""
    vocab = logits.shape[-1]
    banned = config.mask_id if config.mask_prediction == "ban" else None
    borders = (0, vocab // 2, vocab) if vocab > 1 else (0, vocab)
    parts = [
        r2.vocab_statistics(logits[..., a:b], first_id=a, exclude_id=banned, with_entropy=True)
        for a, b in zip(borders[:-1], borders[1:], strict=True)
    ]
    return r2.merge_statistics(parts[0]._replace(values=torch.stack([p.values for p in parts])))


def observe(r2, logits, tokens, state, config: DecodeConfig, call: Call, device: str):
    """What the rules of the op see, taken from the op: an `Observation` on the CPU."""
    cells = (tokens == config.mask_id).cpu() if call.candidates is None else call.candidates
    read = cells if call.editable is None else cells | call.editable
    bare = {"base": "first", "confidence_dtype": "float32", "edit_threshold": None, **OFF}
    argmax = config.replace(**bare, temperature=0.0, report_entropy=True)
    first = call.replace(candidates=read, editable=None, proposed=None, rows=None, slots=None)
    plain = r2.select(logits, tokens, None, argmax, **first.on(device))
    top, p, entropy = (x.cpu() for x in (plain.prediction, plain.confidence, plain.entropy))
    judged = call.replace(candidates=cells, editable=None)
    if "edit_threshold" in given(judged.rows):  # which needs the rule
        judged = judged.without("rows.edit_threshold")
    own = r2.select(logits, tokens, clone(state), config.replace(**bare), **judged.on(device))
    token = torch.where(cells, own.prediction.cpu(), top)
    q = torch.where(cells, own.confidence.cpu(), p)
    return reference.Observation(top, p, token, q, entropy)


# ---- a block -----------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a run has met."""

    steps: int = 0
    rules: Counter = dataclasses.field(default_factory=Counter)  # (base, Rule) -> cells
    tried: Counter = dataclasses.field(default_factory=Counter)  # option -> steps without it
    changed: Counter = dataclasses.field(default_factory=Counter)  # ... with another result
    left_alone: int = 0  # rows that were out of range


def check_block(r2, seed: int, seen: Seen, device: str = "cpu") -> None:
    """A few steps of a random block: AssertionError where extension and oracle differ."""
    block, writing = Block(seed, device), Random(seed)
    config = block.config
    rows, length, _ = block.shape
    tokens = block.tokens
    there = strided_tokens(tokens.to(device)) if block.strided else tokens.to(device)
    state = twin = None
    for number, logits in enumerate(block.logits):
        call = block.call()
        if state is None and not (block.stateless and not needs_state(config, call)):
            state, twin = (
                DecodeState(block.capacity, length, device=where, step_map=block.step_map)
                for where in (device, "cpu")
            )
        where = (
            f"seed {seed} step {number}: {config}, {call.names()}, {block.shape}, {block.dtype}:"
        )
        given_logits = laid_out(logits.to(block.dtype).to(device), block.layout)
        z = statistics_of(r2, given_logits, config) if block.by_statistics else given_logits
        cells = tokens == config.mask_id if call.candidates is None else call.candidates
        facts = observe(r2, z, there, state, config, call, device)
        memory = DecodeState(block.capacity, length) if twin is None else twin
        want = reference.decide(
            facts, cells, memory, config, block.dtype,
            tokens=tokens, editable=call.editable, rows=call.rows, slots=call.slots,
        )  # fmt: skip
        tokens = torch.where(want.rule != Rule.NONE, want.prediction.to(tokens.dtype), tokens)
        before = clone(state), there.clone()
        writes = writing.random() < 0.8
        step = r2.decode_step if writes else r2.select
        got = step(z, there, state, config, **call.on(device))
        assert_same(got, want, where)
        if not writes:
            there.copy_(tokens)
        assert_same([there], [tokens], f"{where} tokens")
        if state is not None:
            assert_same(state_tensors(state), state_tensors(twin), f"{where} state")
        block.tokens = tokens

        seen.steps += 1
        seen.rules.update((config.base, Rule(code)) for code in want.rule.flatten().tolist())
        alone = reference.each_row(rows, memory, config, call.rows, call.slots)
        seen.left_alone += sum(own is None for _, own in alone)
        for _ in range(VARIATIONS):
            vary(r2, block, given_logits, *before, call, got, seen)


def vary(r2, block: Block, logits, state, tokens, call: Call, got: DecodeStep, seen: Seen) -> None:
    """Whether an option of a step makes a difference: take it back (slots: swap them) and compare.

    The one that has been seen to the least so far; what a block decides does not depend on it.
    """
    config = block.config
    options = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING and getattr(config, field.name) != field.default
    }
    if "edit_threshold" in options and block.edits:  # which has to stay on
        options["edit_threshold"] = 0.0 if config.edit_threshold == 1 else 1.0
    arguments = call.names()
    if config.mask_id is None:
        arguments.remove("candidates")
    used = [*options, *arguments]
    if not used:
        return
    name = min(used, key=lambda used: (20 * seen.changed[used] + seen.tried[used], used))
    seen.tried[name] += 1
    if name == "slots":
        call = call.replace(slots=call.slots.flip(0))
    elif name in options:
        config = config.replace(**{name: options[name]})
        if config.edit_threshold is None and "edit_threshold" in given(call.rows):
            call = call.without("rows.edit_threshold")
    else:
        call = call.without(name)
    if state is None and needs_state(config, call):
        return
    if block.by_statistics:
        logits = statistics_of(r2, logits, config)
    other = r2.select(logits, tokens, clone(state), config, **call.on(block.device))
    seen.changed[name] += not all(map(same_bits, other, got))


# ---- the command -------------------------------------------------------------------------------


def report(seen: Seen) -> str:
    """Cells per base and rule, and how often each option decided something."""
    lines = [f"{seen.steps} steps, {seen.left_alone} rows out of range left alone", ""]
    bases = sorted({base for base, _ in seen.rules})
    lines.append("cells".ljust(12) + "".join(base.rjust(11) for base in bases))
    for rule in Rule:
        counts = (str(seen.rules[base, rule]) for base in bases)
        lines.append(rule.name.lower().ljust(12) + "".join(count.rjust(11) for count in counts))
    lines += ["", "option".ljust(30) + "taken back  another result"]
    for name in sorted(seen.tried):
        lines.append(f"{name:30}{seen.tried[name]:10}{seen.changed[name]:16}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    import r2dllm_ext

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000, help="at least so many (20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first block (0)")
    parser.add_argument("--device", default="cpu", help="of the extension (cpu)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seen, seed, begun = Seen(), options.seed, time.monotonic()
    while seen.steps < options.steps:
        try:
            check_block(r2dllm_ext, seed, seen, options.device)
        except Exception:
            print(report(seen))
            print(f"\nblock {seed} disagrees; alone: --seed {seed} --steps 1", file=sys.stderr)
            raise
        seed += 1
    print(report(seen))
    print(f"\nseeds {options.seed} .. {seed - 1}, {time.monotonic() - begun:.0f} s: all equal")
    if idle := sorted(ALL_OPTIONS - set(+seen.changed)):
        print(f"never seen to change a result: {', '.join(idle)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
