# SPDX-License-Identifier: Apache-2.0
"""Recorded decodes of the authors' code: reader, checks of single steps, replay of whole decodes.

`python python_tests/golden.py SRC` picks the subset of SRC's traces that ships in `golden/`.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from r2dllm_ext.config import DecodeConfig, Rule
from r2dllm_ext.state import DecodeState

SHIPPED = Path(__file__).parent / "golden"
RECORDED = Path(
    os.environ.get("R2DLLM_GOLDEN", "").strip()
    or Path(__file__).parents[1] / ".." / "shared" / "golden"
)
FILES = (
    *(f"dream_{name}" for name in ("bf16", "edge", "f32")),
    *(f"llada_{name}" for name in ("all", "batch", "edge", "factor", "maskpred", "mix")),
    *(f"llada_{name}" for name in ("nofeature", "plain", "schedule", "single")),
)
# engine -> (cache, logits_shift) of `generate`
LOOPS = {
    "llada_plain": ("none", 0),
    "llada_prefix": ("prefix", 0),
    "llada_dual": ("dual", 0),
    "dream_nodual": ("prefix", 1),
    "dream_dual": ("dual", 1),
}
OFF = {"confidence_cluster_size": 0, "token_cluster": None, "temporal_steps": 0}


@dataclass(frozen=True)
class Trace:
    """One recorded decode: its index entry and its arrays (S steps, B rows, L cells, V tokens)."""

    meta: dict
    arrays: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return self.meta["id"]

    @property
    def is_dream(self) -> bool:
        return self.meta["engine"].startswith("dream")

    @property
    def steps(self) -> int:
        return len(self.arrays["block_start"])

    def tokens(self, name: str, s: int) -> Tensor:
        """[B, L] int64: `before`, `after_base`, `after_sweep`, `after_cluster` or `after`."""
        return torch.from_numpy(self.arrays[name][s].astype(np.int64))

    def logits(self, s: int) -> Tensor:
        """[B, L, V] float32 or bfloat16: the recorded rows of step s."""
        z = self.arrays["logits"][s]
        if z.dtype == np.uint16:
            return torch.from_numpy(z.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(z.copy())

    def logits_shift(self, s: int) -> int:
        """1 where cell i is judged by the recorded row i - 1 (cell 0 by row 0): Dream's blocks."""
        return int(self.is_dream and not self.arrays["is_full"][s])

    def rule_logits(self, s: int) -> Tensor:
        """[B, L, V]: the row each cell is judged by."""
        z = self.logits(s)
        return torch.cat([z[:, :1], z[:, :-1]], dim=1) if self.logits_shift(s) else z

    def config(self, s: int | None = None) -> DecodeConfig:
        """The options of the decode, or of step s (Dream's full pass has its own base rule)."""
        m = self.meta
        options = {"mask_prediction": "allow", **OFF}
        options["token_cluster_size"] = m["token_cluster_size"]
        if m["factor"] is not None:
            options |= {"base": "factor", "factor": m["factor"]}
        elif m["threshold"] is None:
            blocks = m["gen_length"] // m["block_length"]
            options |= {"base": "schedule", "steps_per_block": m["steps"] // blocks}
        else:
            options |= {"threshold": m["threshold"]}
        if m["spatial_threshold"] is not None:
            options["spatial_threshold"] = m["spatial_threshold"]
            options["confidence_cluster_size"] = m["window"]
            options["confidence_cluster_unmasked"] = m["max_unmasked"]
            if m["window"] or self.is_dream:
                options["token_cluster"] = m["token_cluster"]
        if m["temporal_threshold"] is not None:
            options["temporal_threshold"] = m["temporal_threshold"]
            options["temporal_steps"] = m["temporal_steps"]
            options["temporal_eval"] = m["temporal_eval"]
        if self.is_dream:
            if m["logits_dtype"] == "bf16":
                options["confidence_dtype"] = "logits"
            if s is not None and self.arrays["is_full"][s]:
                options |= {"base": "first", "quota": 1}
        return DecodeConfig(m["mask_id"], **options)


def read(path: Path, wanted: set[str] | None = None) -> Iterator[Trace]:
    """The traces of one file, in its order; only those named in `wanted`, if given."""
    with np.load(path) as file:
        for meta in json.loads(str(file["index"])):
            if wanted is None or meta["id"] in wanted:
                arrays = {name: file[f"{meta['id']}/{name}"] for name in meta["arrays"]}
                yield Trace(meta, arrays)


def stages(config: DecodeConfig) -> dict[str, DecodeConfig]:
    """Recorded tokens -> the config that stops there: later rules switched off."""
    window = {"confidence_cluster_size": config.confidence_cluster_size}
    cluster = {"token_cluster": config.token_cluster}
    return {
        "after_base": config.replace(**OFF),
        "after_sweep": config.replace(**(OFF | window)),
        "after_cluster": config.replace(**(OFF | window | cluster)),
        "after": config,
    }


def check_steps(implementation, trace: Trace, device: str = "cpu") -> Counter:
    """Every step from its recorded tokens: tokens after each rule, streaks, labels.

    `implementation` has `decode_step`. Returns the number of commits per rule.
    """
    m = trace.meta
    state = DecodeState(m["batch"], m["block_length"], device=device)
    fired: Counter = Counter()
    for s in range(trace.steps):
        if trace.arrays["is_full"][s]:
            state.reset()
        logits = trace.rule_logits(s).to(device)
        before = trace.tokens("before", s).to(device)
        seen: dict[DecodeConfig, Tensor] = {}
        for name, config in stages(trace.config(s)).items():
            if config not in seen:
                last = name == "after" or config == trace.config(s)
                here = state if last else copy.deepcopy(state)
                seen[config] = tokens = before.clone()
                step = implementation.decode_step(logits, tokens, here, config)
            where = f"{trace.name} step {s} {name}"
            assert torch.equal(seen[config].cpu(), trace.tokens(name, s)), where
        check_step(step, before, seen[config], config, f"{trace.name} step {s}")
        check_streaks(state, trace, s)
        fired.update(step.rule.flatten().tolist())
    del fired[Rule.NONE]
    check_fired(fired, m)
    return fired


def check_step(step, before: Tensor, after: Tensor, config: DecodeConfig, where: str) -> None:
    """A DecodeStep agrees with the tokens it was made from and with those it wrote."""
    committed = step.rule != Rule.NONE
    masked = before == config.mask_id
    assert torch.equal(committed, masked & (after != config.mask_id)), where
    assert torch.equal(after, torch.where(committed, step.prediction, before)), where
    assert torch.equal(step.remaining.long(), (after == config.mask_id).sum(1)), where
    assert (step.prediction[~masked] == -1).all() and (step.confidence[~masked] == 0).all(), where


def check_streaks(state: DecodeState, trace: Trace, s: int) -> None:
    """The state after step s is the recorded one; sums and maxima up to the margin of the
    recordings: no comparison in them hangs on less than 1e-5."""
    names = {"streak_n": "count", "streak_id": "id", "streak_sum": "sum", "streak_max": "max"}
    for recorded, name in names.items():
        if recorded in trace.arrays:
            want = torch.from_numpy(trace.arrays[recorded][s])
            got = getattr(state, f"streak_{name}").cpu().to(want.dtype)
            where = f"{trace.name} step {s} {recorded}"
            torch.testing.assert_close(
                got, want, rtol=1e-5, atol=0, msg=lambda text, where=where: f"{where}: {text}"
            )


def check_fired(fired: Counter, meta: dict) -> None:
    """Commits per rule are those that the index counts."""
    want = meta["fired"]
    base = fired[Rule.THRESHOLD] + fired[Rule.FORCED] + fired[Rule.BASE]
    got = (base, fired[Rule.WINDOW], fired[Rule.AMBIGUITY], fired[Rule.STABILITY])
    named = (want["base_ge"] + want["forced"], want["sweep"], want["cluster"], want["temporal"])
    assert got == named, f"{meta['id']}: fired {got}, recorded {named}"


def check_free_run(implementation, trace: Trace, device: str = "cpu") -> None:
    """A whole decode on our own tokens with the recorded logits, without a model."""
    m = trace.meta
    state = DecodeState(m["batch"], m["block_length"], device=device)
    mask = torch.full((m["batch"], m["gen_length"]), m["mask_id"])
    sequence = torch.cat([torch.from_numpy(trace.arrays["prompt"]).long(), mask], dim=1).to(device)
    for s in range(trace.steps):
        if trace.arrays["is_full"][s]:
            state.reset()
        start = int(trace.arrays["block_start"][s])
        block = sequence[:, start : start + m["block_length"]]
        logits, shift = trace.logits(s).to(device), trace.logits_shift(s)
        implementation.decode_step(logits, block, state, trace.config(s), logits_shift=shift)
    assert torch.equal(sequence.cpu(), torch.from_numpy(trace.arrays["output"]).long()), trace.name


class RecordedModel:
    """A model that answers with the recorded logits and checks how it is called.

    `model(ids)` is the full pass; with caches it follows the convention of the published loops:
    see "Models" in the README. Logits of cells that were not recorded are zero.
    """

    def __init__(self, trace: Trace, device: str = "cpu"):
        self.trace, self.device, self.step = trace, device, 0
        self.cache, self.shift = LOOPS[trace.meta["engine"]]
        self.length = trace.meta["prompt_len"] + trace.meta["gen_length"]

    def __call__(
        self,
        ids: Tensor,
        *,
        use_cache: bool = False,
        past_key_values: list | None = None,
        replace_position: Tensor | None = None,
        dual_cache: bool = False,
    ) -> SimpleNamespace:
        s, m, where = self.step, self.trace.meta, f"{self.trace.name} call {self.step}"
        assert s < self.trace.steps, f"{where}: more forwards than recorded"
        start = int(self.trace.arrays["block_start"][s])
        end = start + m["block_length"]
        full = bool(self.trace.arrays["is_full"][s]) or self.cache == "none"
        first, last = (0, self.length) if full else (start, self.length)
        if self.cache == "dual" and not full:
            last = end
        assert ids.shape == (m["batch"], last - first), f"{where}: ids {tuple(ids.shape)}"
        assert torch.equal(ids.cpu(), self._sequence(s)[:, first:last]), f"{where}: ids"
        assert use_cache == (self.cache != "none"), f"{where}: use_cache"
        if full:
            assert past_key_values is None and replace_position is None and not dual_cache, where
        else:
            kept = start if self.cache == "prefix" else self.length
            for pair in past_key_values:
                assert [t.shape[self._time_axis] for t in pair] == [kept, kept], f"{where}: cache"
        if self.cache == "dual" and not full:
            position = torch.zeros(m["batch"], self.length, dtype=torch.bool)
            position[:, start:end] = True
            assert torch.equal(replace_position.cpu(), position), f"{where}: replace_position"
            assert dual_cache == bool(self.shift), f"{where}: dual_cache"
        self.step += 1

        recorded = self.trace.logits(s).to(self.device)
        logits = recorded.new_zeros(m["batch"], last - first, m["vocab"])
        offset = start - first - (self.shift if full else 0)
        logits[:, offset : offset + m["block_length"]] = recorded
        return SimpleNamespace(logits=logits, past_key_values=self._cache() if use_cache else None)

    @property
    def _time_axis(self) -> int:
        return 1 if self.shift else 2

    def _cache(self) -> list[tuple[Tensor, Tensor]]:
        rows = self.trace.meta["batch"]
        shape = (rows, self.length, 4) if self.shift else (rows, 2, self.length, 3)
        return [(torch.zeros(shape, device=self.device), torch.ones(shape, device=self.device))]

    def _sequence(self, s: int) -> Tensor:
        """[B, T] tokens that the loop holds before step s: earlier blocks done, later ones mask."""
        start = int(self.trace.arrays["block_start"][s])
        ids = torch.from_numpy(self.trace.arrays["output"]).long().clone()
        ids[:, start : start + self.trace.meta["block_length"]] = self.trace.tokens("before", s)
        ids[:, start + self.trace.meta["block_length"] :] = self.trace.meta["mask_id"]
        return ids


def check_generate(generate, trace: Trace, device: str = "cpu") -> None:
    """`generate` on the recorded model gives the recorded output in as many forwards."""
    m = trace.meta
    model = RecordedModel(trace, device)
    result = generate(
        model,
        torch.from_numpy(trace.arrays["prompt"]).long().to(device),
        gen_length=m["gen_length"],
        block_length=m["block_length"],
        config=trace.config(),
        cache=model.cache,
        logits_shift=model.shift,
    )
    output = torch.from_numpy(trace.arrays["output"]).long()
    assert torch.equal(result.sequences.cpu(), output), trace.name
    assert result.nfe == model.step == trace.steps, f"{trace.name}: nfe {result.nfe}"


def features(meta: dict) -> set[tuple]:
    """What a trace covers; the shipped subset covers everything at least once per file."""
    names = ("engine", "logits_dtype", "max_unmasked", "token_cluster", "temporal_eval")
    window, length = meta["window"] or 0, meta["block_length"]
    found = {(name, meta[name]) for name in names}
    found |= {("fired", rule) for rule, count in meta["fired"].items() if count}
    found.add(("window", "longer" if window > length else min(window, 5)))
    found.add(("base", meta["factor"] is not None, meta["threshold"] is None))
    found.add(("uneven schedule", length % max(1, meta["steps"] // (meta["gen_length"] // length))))
    found.add(("batch", meta["batch"] > 1))
    found.add(("temporal", meta["temporal_steps"]))
    found.add(("rounding decides", not meta.get("same_with_f32_conf", True)))
    return found


def write_subset(source: Path, target: Path) -> None:
    """Cover every feature of every file with the smallest traces, greedily."""
    target.mkdir(exist_ok=True)
    for name in FILES:
        with np.load(source / f"{name}.npz") as file:
            index = json.loads(str(file["index"]))
        cost = {m["id"]: m["nfe"] * m["batch"] * m["block_length"] * m["vocab"] for m in index}
        missing = set().union(*(features(m) for m in index))
        wanted = set()
        while missing:
            best = max(index, key=lambda m: len(features(m) & missing) / cost[m["id"]] ** 0.5)
            wanted.add(best["id"])
            missing -= features(best)
        chosen = list(read(source / f"{name}.npz", wanted))
        arrays = {f"{t.name}/{key}": value for t in chosen for key, value in t.arrays.items()}
        index = np.array(json.dumps([t.meta for t in chosen]))
        np.savez_compressed(target / f"{name}.npz", index=index, **arrays)
        print(f"{name}: {len(chosen)} traces, {(target / name).with_suffix('.npz').stat().st_size}")


if __name__ == "__main__":
    write_subset(Path(sys.argv[1]), SHIPPED)
