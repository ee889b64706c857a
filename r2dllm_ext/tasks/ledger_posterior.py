# SPDX-License-Identifier: Apache-2.0
"""What stands in the hidden cells of a ledger answer, exactly.

Given the prompt, all values are known, and the answers are the words of a small probabilistic
automaton: sentence by sentence a template, up to two fillers, an adverb or none. Forward and
backward passes over the cells then give every hidden cell's distribution given all visible ones.
Trained on that instead of on one sampled answer, a model sees no noise of style, only what it does
not know yet; and how far it is from the truth is a number.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ledger

_FILLER, _ADVERB = -2, -3  # emissions of more than one token
_NO_FLAG = -1
# Tables are kept: neither dtype nor device may be those that a caller happens to have as default.
_INTEGERS: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_BOOLS: dict[str, Any] = {"dtype": torch.bool, "device": "cpu"}


class _Edge(NamedTuple):
    weight: float
    flag: int = _NO_FLAG  # number of a value: the edge is there if that value has two digits,
    negated: bool = False  # or, negated, if it has one


class _Role(NamedTuple):
    """A token that depends on the problem: `what` of step or value `k`."""

    what: str
    k: int


class Automaton:
    """States, each emitting one cell, and edges of all answers with `operations` steps."""

    def __init__(self, operations: int) -> None:
        self.emissions: list[str | int | _Role] = []
        self.edges: dict[tuple[int, int], _Edge] = {}
        self.start: list[tuple[int, float]] = []
        ends: list[int] = []
        for k in range(operations):
            ends = self._choice(ends, [self._sentence(t, k) for t in ledger._SENTENCES])
        ends = self._choice(ends, [self._sentence(t, operations - 1) for t in ledger._FINALS])
        self.end = self._state(ledger.END)
        for state in ends:
            self.edges[state, self.end] = _Edge(1.0)
        self.edges[self.end, self.end] = _Edge(1.0)

    def _state(self, emission: str | int | _Role) -> int:
        self.emissions.append(emission)
        return len(self.emissions) - 1

    def _choice(self, sources: list[int], sentences) -> list[int]:
        """Alternatives of equal weight behind `sources` (none: at the start)."""
        share = 1 / len(sentences)
        for first, _ in sentences:
            for entry, edge in first:
                assert edge.flag == _NO_FLAG
                if not sources:
                    self.start.append((entry, share))
                for source in sources:
                    self.edges[source, entry] = _Edge(share)
        return [last for _, last in sentences]

    def _word(self, text: str, k: int) -> tuple[list[tuple[int, _Edge]], int]:
        """States of one item of a template: ways in, and its last state."""
        if text in ("{v}", "{w}"):
            value = k + (text == "{w}")
            tens, ones = self._state(_Role("tens", value)), self._state(_Role("ones", value))
            self.edges[tens, ones] = _Edge(1.0)
            return [(tens, _Edge(1.0, value)), (ones, _Edge(1.0, value, True))], ones
        names = {"{verb}": "verb", "{sign}": "sign", "{prep}": "prep", "{n}": "n"}
        emission = _Role(names[text], k) if text in names else text
        state = self._state(ledger.ORDINALS[k] if text == "{k}" else emission)
        return [(state, _Edge(1.0))], state

    def _sentence(self, template: str, k: int):
        """Ways in, and the last state, of a template: "{g}" may be left out, "{f}" is 0 to 2."""
        ways: list[tuple[int, _Edge]] = []
        open_: list[tuple[int, float]] = []
        for text in template.split():
            if text == "{f}":
                ((ordinal, _),) = open_
                one, two = self._state(_FILLER), self._state(_FILLER)
                self.edges[ordinal, one], self.edges[one, two] = _Edge(1 / 2), _Edge(1 / 3)
                open_ = [(ordinal, 1 / 2), (one, 2 / 3), (two, 1.0)]
            elif text == "{g}":
                adverb = self._state(_ADVERB)
                ((before, _),) = open_
                self.edges[before, adverb] = _Edge(3 / 5)
                open_ = [(before, 2 / 5), (adverb, 1.0)]
            else:
                entries, last = self._word(text, k)
                for state, weight in open_:
                    for entry, edge in entries:
                        self.edges[state, entry] = edge._replace(weight=weight * edge.weight)
                ways = ways or entries
                open_ = [(last, 1.0)]
        return ways, open_[0][0]


class _Table(NamedTuple):
    """An automaton as tensors: of each state up to four neighbours and the edges to them."""

    neighbour: Tensor  # [S, 4] int64
    weight: Tensor  # [S, 4]; 0 where there is no neighbour
    flag: Tensor  # [S, 4] int64, -1 = none
    negated: Tensor  # [S, 4] bool


def _table(automaton: Automaton, *, forward: bool) -> _Table:
    S = len(automaton.emissions)
    near: list[list[tuple[int, _Edge]]] = [[] for _ in range(S)]
    for (source, target), edge in automaton.edges.items():
        near[target if forward else source].append((source if forward else target, edge))
    width = max(map(len, near))
    padded = [row + [(0, _Edge(0.0))] * (width - len(row)) for row in near]
    return _Table(
        torch.tensor([[state for state, _ in row] for row in padded], **_INTEGERS),
        torch.tensor([[edge.weight for _, edge in row] for row in padded], **_FLOATS),
        torch.tensor([[edge.flag for _, edge in row] for row in padded], **_INTEGERS),
        torch.tensor([[edge.negated for _, edge in row] for row in padded], **_BOOLS),
    )


@cache
def _compiled(operations: int) -> tuple[Automaton, _Table, _Table]:
    automaton = Automaton(operations)
    return automaton, _table(automaton, forward=True), _table(automaton, forward=False)


def _weights(table: _Table, two_digits: Tensor) -> Tensor:
    """Edge weights [B, S, 4] of problems whose values have two digits or not [B, values]."""
    there = two_digits[:, table.flag.clamp(min=0)] ^ table.negated
    return table.weight * (there | (table.flag == _NO_FLAG))


def posterior(
    problems: list[ledger.Problem],
    answers: Tensor,
    hidden: Tensor,
    words: ledger.Tokenizer,
    *,
    strict: bool = True,
) -> Tensor:
    """Distribution [B, A, V] of every cell of `answers` [B, A] given those that are not `hidden`.

    The problems have equally many steps. `ValueError` if what is visible belongs to no answer; if
    not `strict`, the row is NaN.
    """
    (operations,) = {len(problem.operands) for problem in problems}
    automaton, into, out_of = _compiled(operations)
    two_digits = torch.tensor([[value > 9 for value in p.values] for p in problems], **_BOOLS)
    tokens = torch.tensor(
        [_emitted(automaton, problem, words) for problem in problems], **_INTEGERS
    )
    fillers = torch.tensor([words.id_of(word, 0) for word in ledger._OPENERS], **_INTEGERS)
    adverbs = torch.tensor([words.id_of(word, 0) for word in ledger._ADVERBS], **_INTEGERS)
    (B, A), S, V = answers.shape, len(automaton.emissions), len(words)

    # What a state emits, [B, S, V]; then how likely it makes a visible cell, [B, A, S].
    emits = torch.zeros(B, S, V, **_FLOATS).scatter_(2, tokens.clamp(min=0)[..., None], 1.0)
    for code, several in ((_FILLER, fillers), (_ADVERB, adverbs)):
        spread = torch.zeros(V, **_FLOATS).index_fill_(0, several, 1 / len(several))
        emits = torch.where((tokens == code)[..., None], spread, emits)
    likely = emits.gather(2, answers[:, None].expand(B, S, A)).transpose(1, 2)
    likely = torch.where(hidden[..., None], 1.0, likely)

    forward_weight, backward_weight = _weights(into, two_digits), _weights(out_of, two_digits)
    state = torch.zeros(B, S, **_FLOATS)
    state[:, [s for s, _ in automaton.start]] = torch.tensor(
        [w for _, w in automaton.start], **_FLOATS
    )
    forward, tiny = [], torch.finfo(torch.float32).tiny
    for i in range(A):
        if i:
            state = (state[:, into.neighbour] * forward_weight).sum(-1)
        state = state * likely[:, i]
        state = state / state.sum(1, keepdim=True).clamp(min=tiny)
        forward.append(state)
    # An answer has ended before the last cell: that is how the generator draws it.
    state = torch.zeros(B, S, **_FLOATS)
    state[:, automaton.end] = 1.0
    both = [forward[-1] * state]
    for i in range(A - 1, 0, -1):
        state = ((state * likely[:, i])[:, out_of.neighbour] * backward_weight).sum(-1)
        state = state / state.sum(1, keepdim=True).clamp(min=tiny)
        both.append(forward[i - 1] * state)
    joint = torch.stack(both[::-1], dim=1)
    total = joint.sum(-1, keepdim=True)
    if strict and not bool((total > 0).all()):
        raise ValueError("posterior: what is visible belongs to no answer of the problem")
    return joint / total @ emits


def _emitted(automaton: Automaton, problem: ledger.Problem, words: ledger.Tokenizer) -> list[int]:
    """Token id of each state, or the code of several."""
    values = problem.values
    table = {}
    for k, value in enumerate(values):
        table["tens", k], table["ones", k] = str(value // 10), str(value % 10)
    for k, operand in enumerate(problem.operands):
        less = operand < 0
        table["n", k], table["verb", k] = str(abs(operand)), ledger._VERBS[less]
        table["sign", k], table["prep", k] = ledger._SIGNS[less], ledger._PREPOSITIONS[less]
    ids = []
    for emission in automaton.emissions:
        if isinstance(emission, _Role):
            ids.append(words.id_of(table[emission.what, emission.k], 0))
        else:
            ids.append(words.id_of(emission, 0) if isinstance(emission, str) else emission)
    return ids
