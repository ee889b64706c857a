# SPDX-License-Identifier: Apache-2.0
"""The exact distribution of hidden ledger cells equals a sum over all answers."""

import itertools

import pytest
import torch
from cases import roundings

from r2dllm_ext.tasks import get_task, ledger
from r2dllm_ext.tasks.ledger import Problem, Tokenizer, make_sample
from r2dllm_ext.tasks.ledger_posterior import posterior

WORDS = Tokenizer()


def all_answers(problem: Problem) -> dict[str, float]:
    """Every answer to a problem of one step, and its probability, by the generator's own words."""
    (operand,), (v, w) = problem.operands, problem.values
    fillers = [("", 3 / 6)] + [(one, 2 / 6 / 4) for one in ledger._OPENERS]
    fillers += [(" ".join(two), 1 / 6 / 16) for two in itertools.product(ledger._OPENERS, repeat=2)]
    adverbs = [("", 2 / 5)] + [(one, 1 / 5) for one in ledger._ADVERBS]
    found: dict[str, float] = {}
    for template, (f, pf), (g, pg), final in itertools.product(
        ledger._SENTENCES, fillers, adverbs, ledger._FINALS
    ):
        sentence = template.format(
            k="first", f=f, g=g, v=" ".join(str(v)), n=abs(operand), w=" ".join(str(w)),
            verb=ledger._VERBS[operand < 0], sign=ledger._SIGNS[operand < 0],
            prep=ledger._PREPOSITIONS[operand < 0],
        )  # fmt: skip
        text = " ".join(f"{sentence} {final.format(w=' '.join(str(w)))}".split())
        found[text] = found.get(text, 0) + pf * pg / 12
    assert sum(found.values()) == pytest.approx(1)
    return found


@pytest.mark.parametrize("problem", [Problem(9, (3,)), Problem(12, (-5,)), Problem(4, (2,))])
@pytest.mark.parametrize("length", [32, 20])  # in 20 slots not all answers fit with an end token
def test_posterior_equals_enumeration(problem, length):
    ids, weight = [], []
    for text, p in all_answers(problem).items():
        row = WORDS.encode(text)
        if len(row) < length:
            ids.append(row + [WORDS.end_id] * (length - len(row)))
            weight.append(p)
    ids, weight = torch.tensor(ids), torch.tensor(weight)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(weight, 12, generator=generator)
    answers = ids[chosen]
    hidden = torch.rand(answers.shape, generator=generator) < torch.linspace(0.1, 1, 12)[:, None]
    got = posterior([problem] * 12, answers, hidden, WORDS)
    for row in range(12):
        agrees = ((ids == answers[row]) | hidden[row]).all(1)
        p = weight * agrees / (weight * agrees).sum()
        one_hot = torch.nn.functional.one_hot(ids, len(WORDS)).float()
        expected = torch.einsum("n,nlv->lv", p, one_hot)
        # 168 and 1,678 roundings of a share: products along a sentence, and sums of such.
        torch.testing.assert_close(
            got[row][hidden[row]], expected[hidden[row]], atol=1e-5, rtol=1e-4
        )


def test_five_steps_of_several_problems_at_once():
    task, samples = get_task("ledger"), [make_sample(0, i) for i in range(8)]
    answers = torch.tensor([task.encode(sample)[1] for sample in samples])
    hidden = torch.rand(answers.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    got = task.posterior([sample.prompt for sample in samples], answers, hidden)
    # A share goes through a product a word of a sentence, and 56 of them are added.
    assert torch.allclose(got.sum(-1), torch.ones(8, 96), rtol=0, atol=roundings(2 * 96 + 56))
    truth = got.gather(2, answers[..., None])[..., 0][hidden]
    assert truth.min() > 0 and truth.mean() > 0.7
    # Whatever the greedy choice is, one cell at a time it ends in a right answer.
    ids, open_ = answers[:2].clone(), torch.ones(2, 96, dtype=torch.bool)
    for _ in range(96):
        p, best = task.posterior([s.prompt for s in samples[:2]], ids, open_).max(-1)
        cell = p.masked_fill(~open_, -1).argmax(1)
        rows = torch.arange(2)
        ids[rows, cell], open_[rows, cell] = best[rows, cell], False
    for sample, row in zip(samples, ids.tolist(), strict=False):
        assert task.verify(sample.prompt, WORDS.decode(row)).correct


def test_what_belongs_to_no_answer_is_refused():
    sample = make_sample(0, 0)
    answers = torch.tensor([get_task("ledger").encode(sample)[1]])
    answers[0, 0] = WORDS.id_of("second", 0)
    hidden = torch.arange(96)[None] > 0
    with pytest.raises(ValueError, match="belongs to no answer"):
        posterior([sample.problem], answers, hidden, WORDS)
    loose = posterior([sample.problem], answers, hidden, WORDS, strict=False)
    assert loose.isnan().all()
