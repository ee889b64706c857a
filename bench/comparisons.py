# SPDX-License-Identifier: Apache-2.0
"""The cases: which variants are compared, and the check that they agree before a clock starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from baselines import (
    advance_streaks,
    authors_runs,
    authors_step,
    authors_windows,
    runs,
    softmax_max,
    vectorised_step,
    windows,
)
from gpu_kernels import other_ways
from shapes import Block, Shape, spiked_block
from timing import Variant

import r2dllm_ext as r2


class Disagreement(RuntimeError):
    """Two variants give different results."""


class Case(NamedTuple):
    """`variants[0]` is ours; `checked` and `rules` say what the comparison covered."""

    variants: list[Variant]
    bytes: int | None  # that a step has to read at least; None where that is no measure
    skipped: dict[str, str]  # column -> reason
    rules: list[str]  # that committed something
    errors: dict[str, dict[str, float]] = {}  # of the losses, by variant


# ---- a whole step ----------------------------------------------------------------------------


def decode_step_case(block: Block, compiled: bool | str, cache: str = "warm") -> Case:
    """`compiled`: True, or the reason to leave that column out."""
    turns = block.turns(cache)
    variants, tokens, skipped = _step_variants(turns)
    if compiled is True:
        own = _siblings(turns)
        torch.compiler.reset()
        step, config = torch.compile(vectorised_step, dynamic=False), block.config()
        try:
            step(own[0].logits, own[0].tokens, own[0].state, config)
        except Exception as error:  # any stage of the compiler may be missing or fail
            skipped["compiled"] = f"torch.compile: {(str(error).splitlines() or [''])[0]}"
        else:
            call = _on("compiled", own, lambda b: step(b.logits, b.tokens, b.state, config))
            variants.insert(3, call)
            tokens["compiled"] = own
    else:
        skipped["compiled"] = compiled

    results = {}
    for variant in variants:
        variant.renew()
        results[variant.name] = variant.call()
    want = tokens["ours"][0].tokens
    for name, own in tokens.items():
        for one in own:
            if not torch.equal(one.tokens, want):
                cells = (one.tokens != want).nonzero().tolist()
                raise Disagreement(f"decode_step: tokens of {name} differ from ours at {cells[:4]}")
    fired = [r2.Rule(code).name for code in results["ours"].rule.unique().tolist() if code]
    return Case(variants, block.logits.nbytes, skipped, fired)


def step_variants(block: Block) -> list[Variant]:
    """Ours, the authors' way, vectorised, and the softmax alone; each with tokens of its own."""
    return _step_variants([block])[0]


def _step_variants(
    turns: list[Block],
) -> tuple[list[Variant], dict[str, list[Block]], dict[str, str]]:
    config = turns[0].config()
    ways: dict[str, Callable[[Block], Any]] = {
        "ours": lambda b: r2.decode_step(b.logits, b.tokens, b.state, config),
        "authors": lambda b: authors_step(b.logits, b.tokens, b.state, config),
        "vectorised": lambda b: vectorised_step(b.logits, b.tokens, b.state, config),
    }
    # The authors' way takes long enough to be timed alone.
    own = {name: _siblings(turns[:1] if name == "authors" else turns) for name in ways}
    variants = [_on(name, own[name], way) for name, way in ways.items()]
    passes, skipped = _passes(turns)
    return variants + passes, own, skipped


def _passes(turns: list[Block]) -> tuple[list[Variant], dict[str, str]]:
    """The pass over V alone, as others do it, and why some are left out."""
    ways, skipped = other_ways(turns[0].logits.device.type)
    want, _ = softmax_max(turns[0].logits)
    for name, way in ways.items():
        if not torch.allclose(way(turns[0].logits)[0], want, rtol=1e-4):
            raise Disagreement(f"{name}: confidences differ from those of softmax")
    ways = {"softmax": softmax_max} | ways
    calls = [_on(name, turns, lambda b, way=way: way(b.logits)) for name, way in ways.items()]
    return calls, skipped


def _siblings(turns: list[Block]) -> list[Block]:
    return [block.sibling() for block in turns]


def _on(name: str, turns: list[Block], way: Callable[[Block], Any]) -> Variant:
    """`way` on each block in turn."""

    def call() -> Any:
        for block in turns:
            result = way(block)
        return result

    def renew() -> None:
        for block in turns:
            block.renew()

    return Variant(name, call, renew, graph=name != "authors", turns=len(turns))


# ---- ops alone -------------------------------------------------------------------------------


def token_confidence_case(block: Block, cache: str = "warm") -> Case:
    logits, turns = block.logits, block.turns(cache)

    def authors(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        logits = block.logits
        prediction = logits.argmax(-1)
        probabilities = torch.softmax(logits.to(torch.float64), -1)
        return prediction, probabilities.gather(-1, prediction.unsqueeze(-1)).squeeze(-1)

    variants = [
        _on("ours", turns, lambda b: r2.token_confidence(b.logits)),
        _on("authors", turns[:1], authors),
    ]
    passes, skipped = _passes(turns)
    prediction, confidence = variants[0].call()
    wide, p = authors(block)
    if not (torch.equal(prediction, wide) and torch.allclose(confidence, p.float(), rtol=1e-6)):
        raise Disagreement("token_confidence: ours and float64 softmax differ")
    return Case(variants + passes, logits.nbytes, skipped, [])


def rule_case(op: str, shape: Shape, device: str) -> Case:
    """window_pool, positional_ambiguity or update_stability on a block of B rows, L positions."""
    block = spiked_block(Shape(shape.B, shape.L, 1024), torch.float32, device)
    config, own, other = block.config(), block.sibling(), block.sibling()
    confidence, prediction = softmax_max(block.logits)
    masked = torch.ones_like(prediction, dtype=torch.bool)
    least = config.spatial_threshold
    if op == "window_pool":
        limits = {"window": 3, "min_confidence": least, "max_unmasked": 1}
        ours = lambda: r2.window_pool(confidence, masked, **limits)
        authors = lambda: authors_windows(prediction, confidence, own.tokens, config)
        vectorised = lambda: windows(confidence, masked, 3, least, 1)
    elif op == "positional_ambiguity":
        ours = lambda: r2.positional_ambiguity(prediction, confidence, masked, min_confidence=least)
        authors = lambda: authors_runs(prediction, confidence, own.tokens, config)
        vectorised = lambda: runs(prediction, confidence, masked, least, 2, "confidence")
    else:
        ours = lambda: r2.update_stability_(
            block.state,
            prediction,
            confidence,
            was_masked=masked,
            is_masked=masked,
            steps=config.temporal_steps,
            min_confidence=config.temporal_threshold,
        )
        authors = lambda: advance_streaks(
            prediction, confidence, own.tokens, masked, own.state, config
        )
        vectorised = None
    own.renew()
    block.renew()
    want = ours()
    authors()
    ways = {"authors": own.tokens != block.mask_id}
    variants = [
        Variant("ours", ours, block.renew),
        Variant("authors", authors, own.renew, graph=False),
    ]
    if vectorised is not None:
        ways["vectorised"] = vectorised()
        variants.append(Variant("vectorised", vectorised, other.renew))
    for name, cells in ways.items():
        if not torch.equal(cells, want):
            raise Disagreement(f"{op}: cells of {name} differ from ours")
    return Case(variants, None, {}, [])


def overhead_case(block: Block) -> Case:
    """A call on a block too small to compute anything, with the options that users set, beside one
    small torch op."""
    config, one = block.config(), torch.ones(4, device=block.logits.device)
    release = config.replace(mask_prediction="allow")
    configs = {
        "ours": config,
        "release": release,
        "dream": release.replace(confidence_dtype="logits"),
    }
    variants = [
        _on(
            name,
            [block.sibling()],
            lambda b, options=options: r2.decode_step(b.logits, b.tokens, b.state, options),
        )
        for name, options in configs.items()
    ]
    variants.append(Variant("torch_add", lambda: one + one))
    check = decode_step_case(block, "not measured")
    return Case(variants, None, {}, check.rules)
