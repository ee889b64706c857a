# SPDX-License-Identifier: Apache-2.0
"""The losses, forward and backward: their variants, and the check of each against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from comparisons import Case, Disagreement
from report import on_cuda, optional
from shapes import Shape
from timing import Variant, as_words
from torch import Tensor

import r2dllm_ext as r2

SHARES = (25, 50, 100)  # percent of the rows that carry loss
WIDTH = {"cpu": 1024, "cuda": 4096}  # of the hidden states
IGNORED = -100
LOSSES = ("sft_loss", "linear_sft_loss")


class Result(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]  # of the logits, or of hidden states and head


def loss_targets(rows: int, vocab: int, share: int, device: str) -> Tensor:
    """Exactly share % of the rows have a target, spread evenly."""
    ids = (torch.arange(rows, device=device) * 7919 + 1) % vocab
    carries = (torch.arange(rows, device=device) * share) % 100 < share
    return torch.where(carries, ids, IGNORED)


def differentiate(loss: Tensor, *inputs: Tensor) -> Result:
    return Result(loss.detach(), torch.autograd.grad(loss, inputs))


# ---- from logits -----------------------------------------------------------------------------


class _Output(torch.autograd.Function):
    """The same memory as a model's output, which an in-place backward may overwrite. It is made in
    each call: autograd joins the stream on which a tensor was made, and no stream but the one that
    is captured may wait for a capture."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class LogitsProblem:
    """N = B * L rows of Gaussian logits. `renew` writes those that are differentiated, which stay
    where they are, as a captured graph needs."""

    def __init__(self, shape: Shape, dtype: torch.dtype, share: int, device: str):
        rows = shape.B * shape.L
        generator = torch.Generator(device).manual_seed(0)
        source = torch.empty(rows, shape.V, dtype=dtype, device=device)
        self.source = source.normal_(0.0, 2.0, generator=generator)
        self.targets = loss_targets(rows, shape.V, share, device)
        self.logits = self.source.clone().requires_grad_()

    @torch.no_grad()
    def renew(self) -> None:
        self.logits.copy_(self.source)

    def variant(self, name: str, loss: Callable[[Tensor, Tensor], Tensor], **options) -> Variant:
        def call() -> Result:
            logits = _Output.apply(self.logits)
            return differentiate(loss(logits, self.targets), logits)

        return Variant(name, call, self.renew, **options)

    def exact(self) -> Result:
        """In float64, some rows at a time."""
        count = (self.targets != IGNORED).sum()
        loss, gradient = 0.0, torch.zeros_like(self.source, dtype=torch.float64)
        for i in (self.targets != IGNORED).nonzero().flatten().tolist():
            row = self.source[i].double()
            log_p, target = row.log_softmax(-1), self.targets[i]
            loss = loss - log_p[target] / count
            gradient[i] = log_p.exp() / count
            gradient[i, target] = torch.expm1(log_p[target]) / count
        return Result(loss, (gradient,))


def logits_variants(problem: LogitsProblem) -> list[Variant]:
    """What needs no compiler and no other library; ours first."""
    inplace = lambda z, t: r2.sft_loss(z, t, inplace_backward=True)
    return [
        problem.variant("ours", inplace),
        problem.variant("out of place", r2.sft_loss),
        problem.variant("eager", F.cross_entropy),
    ]


def sft_loss_case(
    shape: Shape, dtype: torch.dtype, share: int, device: str, compiled: bool | str
) -> Case:
    problem = LogitsProblem(shape, dtype, share, device)
    variants, skipped = logits_variants(problem), {}
    add_compiled(
        variants, skipped, compiled, lambda f: problem.variant("compiled", f), F.cross_entropy
    )
    skipped["liger"] = optional("liger_kernel") or on_cuda(device)
    if skipped["liger"] is None:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        variants.append(problem.variant("liger", LigerCrossEntropyLoss(), graph=False))
    errors = check("sft_loss", variants, problem.exact())
    if device == "cuda":  # what one read and one write of the same bytes take
        words = as_words(torch.zeros_like(problem.source))
        variants.append(Variant("read + write", words.bitwise_not_))
    rows = (problem.targets != IGNORED).sum().item()
    # The logits that carry loss read twice, all of the gradient written.
    size = dtype.itemsize * shape.V * (2 * rows + len(problem.targets))
    return Case(variants, size, {k: v for k, v in skipped.items() if v}, [], errors)


# ---- from hidden states ----------------------------------------------------------------------


class HiddenProblem:
    """N = B * L hidden states, a head of V rows."""

    def __init__(self, shape: Shape, dtype: torch.dtype, share: int, device: str):
        rows, width = shape.B * shape.L, WIDTH[device]
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, spread: float) -> Tensor:
            made = torch.empty(size, dtype=dtype, device=device)
            return made.normal_(0.0, spread, generator=generator).requires_grad_()

        self.hidden = normal(rows, width, spread=1.0)
        self.head = normal(shape.V, width, spread=2.0 * width**-0.5)
        self.targets = loss_targets(rows, shape.V, share, device)

    def first_rows(self, rows: int) -> HiddenProblem:
        """The same problem with fewer rows."""
        other = object.__new__(HiddenProblem)
        other.hidden = self.hidden.detach()[:rows].clone().requires_grad_()
        other.head, other.targets = self.head, self.targets[:rows]
        return other

    def variant(self, name: str, loss: Callable[..., Tensor], **options) -> Variant:
        def call() -> Result:
            return differentiate(loss(self.hidden, self.head, self.targets), self.hidden, self.head)

        return Variant(name, call, **options)

    def exact(self) -> Result:
        hidden, head = (t.detach().double().requires_grad_() for t in (self.hidden, self.head))
        carries = self.targets != IGNORED
        loss = F.cross_entropy(hidden[carries] @ head.T, self.targets[carries])
        return differentiate(loss, hidden, head)


def eager_linear(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head), targets)


def hidden_variants(problem: HiddenProblem) -> list[Variant]:
    """What needs no compiler and no other library; ours first."""
    variants = [
        problem.variant("ours", r2.linear_sft_loss, graph=False),
        problem.variant("eager", eager_linear),
    ]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        chunked = lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options)
        variants.append(problem.variant("torch chunked", chunked, graph=False))
    return variants


def linear_sft_loss_case(
    shape: Shape, dtype: torch.dtype, share: int, device: str, compiled: bool | str
) -> Case:
    def every(problem: HiddenProblem) -> tuple[list[Variant], dict[str, str | None]]:
        variants, skipped = hidden_variants(problem), {}
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            skipped["torch chunked"] = f"torch {torch.__version__} is older than 2.13"
        add_compiled(
            variants, skipped, compiled, lambda f: problem.variant("compiled", f), eager_linear
        )
        skipped["liger"] = optional("liger_kernel") or on_cuda(device)
        if skipped["liger"] is None:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            call = lambda h, w, t: liger(w, h, t)
            variants.append(problem.variant("liger", call, graph=False))
        skipped["cce"] = optional("cut_cross_entropy") or on_cuda(device)
        if skipped["cce"] is None:
            from cut_cross_entropy import linear_cross_entropy

            variants.append(problem.variant("cce", linear_cross_entropy, graph=False))
        return variants, skipped

    problem = HiddenProblem(shape, dtype, share, device)
    few = problem.first_rows(64)  # float64 products of all rows would take minutes
    errors = check("linear_sft_loss", every(few)[0], few.exact())
    variants, skipped = every(problem)
    return Case(variants, None, {k: v for k, v in skipped.items() if v}, [], errors)


# ---- both ------------------------------------------------------------------------------------


def add_compiled(variants, skipped, compiled, variant, function) -> None:
    """`compiled`: True, or the reason to leave that column out."""
    if compiled is not True:
        skipped["compiled"] = compiled
        return
    torch.compiler.reset()
    made = variant(torch.compile(function, dynamic=False))
    try:
        made.renew()
        made.call()
    except Exception as error:  # any stage of the compiler may be missing or fail
        skipped["compiled"] = f"torch.compile: {(str(error).splitlines() or [''])[0]}"
    else:
        variants.append(made)


def greatest_difference(got: Tensor, want: Tensor) -> float:
    """A block of rows at a time: no copy of the whole in float64."""
    pairs = zip(got.split(256), want.split(256), strict=True)
    return max((a.double() - b).abs().max().item() for a, b in pairs)


def check(op: str, variants: list[Variant], exact: Result) -> dict[str, dict[str, float]]:
    """Errors by variant: of the loss, and the greatest of a gradient over its greatest entry.

    Ours are at most twice those of eager torch (and a few units in the last place of float32).
    """
    errors: dict[str, dict[str, float]] = {}
    for variant in variants:
        variant.renew()
        result = variant.call()
        relative = [
            greatest_difference(got, want) / want.abs().max().item()
            for got, want in zip(result.gradients, exact.gradients, strict=True)
        ]
        loss = abs(result.loss.double() - exact.loss).item()
        errors[variant.name] = {"loss": loss, "gradient": max(relative)}
    for name in ("ours", "out of place"):
        for what, error in errors.get(name, {}).items():
            limit = 2 * errors["eager"][what] + 2e-6
            if not error <= limit:
                raise Disagreement(f"{op}: {what} of {name} is off by {error:.3g} > {limit:.3g}")
    return errors


CASES: dict[str, Callable[..., Case]] = {
    "sft_loss": sft_loss_case,
    "linear_sft_loss": linear_sft_loss_case,
}


def memory_variants(op: str, shape: Shape, dtype: torch.dtype, share: int, device: str) -> Any:
    """What the memory probe runs."""
    if op == "sft_loss":
        return logits_variants(LogitsProblem(shape, dtype, share, device))
    return hidden_variants(HiddenProblem(shape, dtype, share, device))


def returned_bytes(op: str, shape: Shape, dtype: torch.dtype, device: str) -> int:
    """Of the gradients that every linear loss has to return; no extra of any of them."""
    if op != "linear_sft_loss":
        return 0
    return (shape.B * shape.L + shape.V) * WIDTH[device] * dtype.itemsize
