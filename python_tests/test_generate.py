# SPDX-License-Identifier: Apache-2.0
"""`generate` on scripted models: what is forwarded, when it stops, what it reports."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import r2dllm_ext as r2
from r2dllm_ext import generation, step_graph

MASK, STOP, VOCAB = 9, 8, 10


class Scripted:
    """Predicts `answer[row of the prompt id]` at every position with one confidence for all.

    The first token of a prompt says which answer the row gets, so rows may be dropped or reordered.
    """

    def __init__(self, answers, prompt_length, logit=20.0):
        self.answers, self.prompt_length, self.logit = answers, prompt_length, logit
        self.calls = []

    def logits(self, ids, first_position):
        logits = torch.zeros(*ids.shape, VOCAB)
        for b in range(ids.shape[0]):
            answer = self.answers[int(self.row_ids[b])]
            for t in range(ids.shape[1]):
                g = first_position + t - self.prompt_length
                if 0 <= g < len(answer):
                    logits[b, t, answer[g]] = self.logit
        return logits

    def __call__(self, ids, **options):
        assert "past_key_values" not in options
        self.row_ids = ids[:, 0].tolist()
        self.calls.append(SimpleNamespace(ids=ids.clone(), options=options))
        return SimpleNamespace(logits=self.logits(ids, 0), past_key_values=None)


def run(model, prompt, **options):
    options = {"gen_length": 8, "block_length": 4, "config": r2.DecodeConfig(MASK)} | options
    return r2.generate(model, prompt, **options)


def test_one_confident_pass_per_block():
    model = Scripted([[1, 2, 3, 4, 5, 6, 7, 1]], 2)
    result = run(model, torch.tensor([[0, 0]]))
    assert result.sequences.tolist() == [[0, 0, 1, 2, 3, 4, 5, 6, 7, 1]]
    assert result.nfe == len(model.calls) == 2 and result.trace is None


def test_vanilla_takes_one_forward_per_token():
    model = Scripted([[1, 2, 3, 4, 5, 6, 7, 1]], 1)
    assert run(model, torch.tensor([[0]]), config=r2.DecodeConfig.vanilla(MASK)).nfe == 8


def test_finished_rows_cost_nothing_and_forwards_stop_with_the_last_row():
    answers = [[1, 2, STOP, 4, 5, 6, 7, 1], [1, 2, 3, 4, STOP, 5, 5, 5], [1] * 12]
    model = Scripted(answers, 1)
    result = run(model, torch.tensor([[0], [1]]), gen_length=12, stop_id=STOP)
    assert result.sequences.tolist() == [
        [0, 1, 2, STOP, 4] + [STOP] * 8,
        [1, 1, 2, 3, 4, STOP, 5, 5, 5] + [STOP] * 4,
    ]
    assert [call.ids.shape[0] for call in model.calls] == [2, 1]
    assert result.nfe == 2


def test_a_row_finishes_inside_a_block_once_everything_before_the_stop_is_decided():
    model = Scripted([[1, STOP, 3, 4], [2] * 4], 1, logit=3.0)  # below the threshold: one by one
    config = r2.DecodeConfig.vanilla(MASK)
    result = run(model, torch.tensor([[0], [1]]), gen_length=4, config=config, stop_id=STOP)
    assert result.sequences[0].tolist() == [0, 1, STOP, STOP, STOP]
    assert [call.ids.shape[0] for call in model.calls] == [2, 2, 1, 1]


@pytest.mark.parametrize("kind", [False, True, "loop"])
def test_a_mask_token_of_the_prompt_stays_where_a_row_is_finished(graphs_on_cpu, kind):
    model = Capturable([[1, STOP, 3, 4]])
    prompt = torch.tensor([[0, MASK]])
    model.table = torch.cat([model.table[:, :1], model.table], dim=1)  # a prompt of two
    config = r2.DecodeConfig.vanilla(MASK)
    result = run(model, prompt, gen_length=4, stop_id=STOP, config=config, cuda_graph=kind)
    assert result.sequences.tolist() == [[0, MASK, 1, STOP, STOP, STOP]]


def test_the_stop_token_alone_does_not_finish_a_row():
    model = Scripted([[1, 2, STOP, STOP]], 1, logit=3.0)
    seen = []
    result = run(
        model,
        torch.tensor([[0]]),
        gen_length=4,
        stop_id=STOP,
        on_step=seen.append,
        config=r2.DecodeConfig(
            MASK,
            base="budget",
            error_budget=0.0,
            confidence_cluster_size=0,
            token_cluster=None,
            temporal_steps=0,
        ),
    )
    assert result.sequences.tolist() == [[0, 1, 2, STOP, STOP]]
    assert result.nfe == 3 == len(seen)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_attention_mask_reaches_the_model_lengthened(dtype):
    model = Scripted([[1] * 8, [2] * 8], 2)
    mask = torch.tensor([[0, 1], [1, 1]], dtype=dtype)
    run(model, torch.tensor([[0, 0], [1, 1]]), attention_mask=mask)
    for call in model.calls:
        assert call.options["attention_mask"].tolist() == [[0, 1] + [1] * 8, [1] * 10]
    model.calls.clear()
    run(model, torch.tensor([[0, 0]]), attention_mask=torch.ones(1, 2, dtype=dtype))
    assert all("attention_mask" not in call.options for call in model.calls)


def test_logits_outside_the_block_are_not_looked_at():
    class Poisoned(Scripted):
        def logits(self, ids, first_position):
            logits = super().logits(ids, first_position)
            masked = (ids == MASK).any(0)
            block = slice(int(masked.int().argmax()), int(masked.int().argmax()) + 4)
            logits[:, : block.start] = logits[:, block.stop :] = torch.nan
            return logits

    result = run(Poisoned([[1, 2, 3, 4, 5, 6, 7, 1]], 1), torch.tensor([[0]]))
    assert result.sequences.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 1]]


def test_a_model_can_compute_the_block_alone():
    class BlockOnly(Scripted):
        supports_logits_positions = True

        def __call__(self, ids, *, logits_positions):
            self.row_ids = ids[:, 0].tolist()
            begin, end = logits_positions
            return SimpleNamespace(logits=self.logits(ids, 0)[:, begin:end])

    result = run(BlockOnly([[1, 2, 3, 4, 5, 6, 7, 1]], 1), torch.tensor([[0]]))
    assert result.sequences.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 1]]


def test_trace_tells_every_step():
    # Confidence 0.848: below the threshold, so the best cell goes; stable after three steps.
    model = Scripted([[1, 2, 3, 4, 5, 6, 7, 1]], 1, logit=3.8)
    config = r2.DecodeConfig(MASK, confidence_cluster_size=0, token_cluster=None)
    trace = run(model, torch.tensor([[0]]), config=config, trace=True).trace
    assert trace.nfe == 6 and trace.block.tolist() == [0, 0, 0, 1, 1, 1]
    assert trace.full_pass.all()
    assert trace.prediction[0, 0].tolist() == [1, 2, 3, 4]
    assert trace.prediction[1, 0].tolist() == [-1, 2, 3, 4]
    assert trace.masked.sum((1, 2)).tolist() == [4, 3, 2, 4, 3, 2]
    assert trace.confidence[0, 0, 0].item() == pytest.approx(0.848, abs=1e-3)
    assert trace.rule[2, 0].tolist() == [0, 0, r2.Rule.FORCED, r2.Rule.STABILITY]
    assert trace.commit_rule[0].tolist() == [2, 2, 2, 5] * 2
    assert trace.commit_step[0].tolist() == [0, 1, 2, 2, 3, 4, 5, 5]
    assert trace.rule_counts()[r2.Rule.STABILITY] == 2
    assert trace.row_nfe().tolist() == [6]
    assert trace.sequences.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 1]]


def test_row_nfe_is_that_of_a_decode_alone():
    # Row 0 is sure at once, row 1 takes a step a token: together as many steps as row 1 alone.
    class Unequal(Scripted):
        def logits(self, ids, first_position):
            logits = super().logits(ids, first_position)
            logits[1] /= 10
            return logits

    result = run(Unequal([[1] * 8, [1, 2] * 4], 1), torch.tensor([[0], [1]]), trace=True)
    assert result.trace.row_nfe().tolist() == [2, result.nfe] and result.nfe > 2


def test_no_progress_says_where_and_loses_nothing():
    class Breaks(Scripted):
        def logits(self, ids, first_position):
            logits = super().logits(ids, first_position)
            if len(self.calls) > 1:
                logits[1] = torch.nan
            return logits

    model = Breaks([[1] * 8, [2] * 8], 1)
    with pytest.raises(r2.NoProgressError, match="step 2, row 1: .*non-finite") as caught:
        run(model, torch.tensor([[0], [1]]))
    assert (caught.value.step, caught.value.row) == (2, 1)
    assert caught.value.sequences[1].tolist() == [1, 2, 2, 2, 2, MASK, MASK, MASK, MASK]
    assert caught.value.sequences[0, 5:].tolist() == [1] * 4


def test_cells_that_may_be_edited_do_not_speak_for_those_that_are_masked():
    class BreaksAhead(Scripted):
        def logits(self, ids, first_position):
            logits = super().logits(ids, first_position)
            if len(self.calls) > 1 and len(ids) == 2:
                logits[1, ids[1] == MASK] = torch.nan
            return logits

    config = r2.DecodeConfig.vanilla(MASK, edit_threshold=0.99)
    with pytest.raises(r2.NoProgressError, match="step 2, row 1: .*non-finite"):
        run(BreaksAhead([[1] * 8, [2] * 8], 1), torch.tensor([[0], [1]]), config=config, edit=True)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_rows_that_can_not_be_finished_do_not_cost_the_others_their_answers(cache):
    model, words = r2.load_model("ledger"), r2.ledger.Tokenizer()
    bad = words.encode("well")[0]

    class Breaks:
        device = model.device

        def __call__(self, ids, **options):
            output = model(ids, **options)
            if ids.shape[1] < 35:  # a block step sees no prompt; the first forward has broken
                return output
            rows = (ids[:, 0] == bad)[:, None, None]
            return output._replace(logits=output.logits.masked_fill(rows, torch.nan))

    prompt = torch.tensor([[33, 14, 5], [bad, 14, 5], [34, 14, 5], [bad, 9, 9]])
    good = [0, 2]
    options = {
        "gen_length": 32,
        "block_length": 16,
        "config": r2.DecodeConfig.r2(model.mask_id),
        "cache": cache,
        "stop_id": words.end_id,
    }
    alone = r2.generate(model, prompt[good], trace=True, **options)
    with pytest.raises(r2.NoProgressError, match="row 1 .and 1 more.: .*non-finite") as caught:
        r2.generate(Breaks(), prompt, trace=True, **options)
    error = caught.value
    assert error.rows == (1, 3) and (error.step, error.row) == (1, 1)
    assert torch.equal(error.sequences[good], alone.sequences)
    assert (error.sequences[[1, 3], 3:] == model.mask_id).all()
    assert error.generation.nfe == alone.nfe
    assert torch.equal(error.generation.trace.commit_step[good], alone.trace.commit_step)


def test_rows_that_are_all_stuck_end_the_decode():
    model = Scripted([[1] * 8, [2] * 8], 1, logit=torch.nan)
    with pytest.raises(r2.NoProgressError, match="row 0 .and 1 more") as caught:
        run(model, torch.tensor([[0], [1]]))
    assert caught.value.generation.nfe == len(model.calls) == 1


@pytest.mark.parametrize("stop_id", [[STOP], (9, STOP), torch.tensor([STOP, 8]), np.array([STOP])])
def test_any_of_several_ids_ends_a_row(stop_id):
    answers = [[1, 2, STOP, 4, 5, 6, 7, 1], [1, 2, 3, 4, STOP, 5, 5, 5], [1] * 12]
    prompt = torch.tensor([[0], [1]])
    plain = run(Scripted(answers, 1), prompt, gen_length=12, stop_id=STOP)
    result = run(Scripted(answers, 1), prompt, gen_length=12, stop_id=stop_id)
    assert torch.equal(result.sequences, plain.sequences) and result.nfe == plain.nfe


def test_each_row_is_filled_up_with_the_id_that_ended_it():
    model = Scripted([[1, 2, 3, 4] + [1] * 4, [1, 4, 3, 2] + [1] * 4], 1, logit=3.0)
    config = r2.DecodeConfig.vanilla(MASK)
    out = run(model, torch.tensor([[0], [1]]), gen_length=8, config=config, stop_id=[4, 3])
    assert out.sequences[:, 1:].tolist() == [[1, 2] + [3] * 6, [1] + [4] * 7]


@pytest.mark.parametrize(
    "stop_id, error",
    [
        ("7", TypeError),
        (7.0, TypeError),
        (True, TypeError),
        ([], ValueError),
        ([7, None], TypeError),
        ([7, "8"], TypeError),
        ([[7]], TypeError),
        (torch.tensor([[7]]), TypeError),
        ({7}, TypeError),
        (-1, ValueError),
        ([7, 10**30], ValueError),
    ],
)
def test_what_is_no_stop_id_is_refused_by_name(stop_id, error):
    with pytest.raises(error, match="generate: stop_id takes "):
        run(Scripted([[1] * 8], 1), torch.tensor([[0]]), stop_id=stop_id)


def test_a_model_that_only_predicts_the_mask_ends_in_an_error():
    model = Scripted([[MASK] * 4], 1)
    config = r2.DecodeConfig(MASK, mask_prediction="allow")
    with pytest.raises(r2.NoProgressError, match="nothing was committed"):
        run(model, torch.tensor([[0]]), gen_length=4, config=config)


def test_progress_bar_counts_tokens(capsys):
    run(Scripted([[1] * 8], 1), torch.tensor([[0]]), progress=True)
    assert "8/8" in capsys.readouterr().err


def test_whatever_on_step_raises_ends_the_decode():
    def stop(event):
        assert event.rows == [0] and event.start == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Scripted([[1] * 8], 1), torch.tensor([[0]]), on_step=stop)


@pytest.mark.parametrize("prompt", [torch.zeros(0, 3, dtype=torch.int64)])
def test_no_rows(prompt):
    result = run(Scripted([], 3), prompt)
    assert result.sequences.shape == (0, 11) and result.nfe == 0


def test_nothing_to_generate():
    result = run(Scripted([], 1), torch.tensor([[4]]), gen_length=0, trace=True)
    assert result.sequences.tolist() == [[4]] and result.nfe == 0 == result.trace.nfe


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gen_length": 6}, ValueError, "gen_length takes a multiple of block_length .4., got 6"),
        ({"gen_length": -4}, ValueError, "gen_length takes an integer >= 0, got -4"),
        ({"block_length": 0}, ValueError, "block_length takes an integer >= 1, got 0"),
        ({"block_length": 4.0}, TypeError, "block_length takes an integer >= 1, got 4.0"),
        ({"cache": "both"}, ValueError, "cache takes one of .*, got 'both'"),
        ({"logits_shift": 2}, ValueError, r"logits_shift takes an integer in \[0, 1\], got 2"),
        ({"config": None}, TypeError, "config takes a DecodeConfig, got NoneType"),
        ({"attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask takes the shape of"),
        ({"config": r2.DecodeConfig(VOCAB)}, ValueError, "config.mask_id takes a token id in"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        run(Scripted([[1] * 8], 1), torch.tensor([[0]]), **change)


def test_bad_prompt_and_bad_model():
    with pytest.raises(TypeError, match="prompt takes dtype torch.int64, got torch.int32"):
        run(Scripted([[1] * 8], 1), torch.tensor([[0]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"prompt takes shape \[B, P\], got \[3\]"):
        run(Scripted([[1] * 8], 1), torch.tensor([0, 0, 0]))

    def short(ids):
        return SimpleNamespace(logits=torch.zeros(1, 3, VOCAB))

    with pytest.raises(ValueError, match=r"has to return logits \[1, 9, V\], got \[1, 3, 10\]"):
        run(short, torch.tensor([[0]]))


def test_a_mask_id_beyond_the_embedding_is_named():
    model = r2.load_model("ledger")
    rows = model.get_input_embeddings().num_embeddings
    config = r2.DecodeConfig(rows)
    with pytest.raises(ValueError, match=rf"mask_id takes an id in \[0, {rows}\).*got {rows}"):
        r2.generate(model, torch.tensor([[0]]), gen_length=32, config=config)


# ---- rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache, shift", [("none", 0), ("dual", 0), ("prefix", 1)])
def test_each_row_decodes_as_alone_with_its_options(cache, shift):
    """Rows that finish early leave with their options; Dream's full pass has a quota of its own."""
    model, words = r2.load_model("ledger"), r2.ledger.Tokenizer()
    samples = [r2.ledger.make_sample(0, i, split="test").prompt for i in range(4)]
    prompt = torch.tensor([words.encode(text)[:18] for text in samples])
    fields = {
        "threshold": (0.5, 0.99, 0.7, 0.9),
        "quota": (1, 3, 2, 1),
        "spatial_threshold": (0.8, 0.95, 0.5, 0.7),
        "temporal_threshold": (0.8, 0.2, 0.9, 1.0),
    }
    config = r2.DecodeConfig(model.mask_id)
    options = {"gen_length": 64, "cache": cache, "logits_shift": shift, "stop_id": words.end_id}
    rows = r2.RowParams(**{name: torch.tensor(values) for name, values in fields.items()})
    got = r2.generate(model, prompt, config=config, rows=rows, trace=True, **options)
    nfe = []
    for b in range(4):
        # What a tensor of float32 says of a probability.
        own = {name: getattr(rows, name)[b].item() for name in fields}
        alone = config.replace(**own)
        want = r2.generate(model, prompt[b : b + 1], config=alone, trace=True, **options)
        assert torch.equal(got.sequences[b], want.sequences[0])
        assert torch.equal(got.trace.commit_rule[b], want.trace.commit_rule[0])
        nfe.append(want.nfe)
    assert got.trace.row_nfe().tolist() == nfe and len(set(nfe)) > 1


def test_rows_that_draw_beside_rows_that_do_not():
    model, words = r2.load_model("ledger"), r2.ledger.Tokenizer()
    prompt = torch.tensor([words.encode(r2.ledger.make_sample(0, 3, split="test").prompt)] * 2)
    options = {"gen_length": 96, "config": r2.DecodeConfig(model.mask_id)}
    rows = r2.RowParams(temperature=torch.tensor([0.0, 1.5]))
    out = r2.generate(model, prompt, rows=rows, **options)
    plain = r2.generate(model, prompt[:1], **options)
    assert torch.equal(out.sequences[0], plain.sequences[0])
    assert not torch.equal(out.sequences[1], plain.sequences[0])


@pytest.mark.parametrize(
    "name, value",
    [
        ("threshold", 1.5),
        ("threshold", math.nan),
        ("edit_threshold", -0.5),
        ("quota", -1),
        ("entropy_budget", math.nan),
        ("temperature", math.inf),
        ("top_p", 1.5),
        ("top_k", -3),
    ],
)
def test_a_bad_value_of_a_row_is_named(name, value):
    """`generate` reads the tensors once; a step, which does not, would leave the row alone."""
    good = type(value)(0)
    rows = r2.RowParams(**{name: torch.tensor([good, value])})
    model = Scripted([[1] * 8, [2] * 8], 1)
    with pytest.raises(ValueError, match=rf"generate: rows.{name} takes .*, got {value} in row 1"):
        run(model, torch.tensor([[0], [1]]), rows=rows)
    assert not model.calls


@pytest.mark.parametrize("kind", [False, True])
@pytest.mark.parametrize("stop", [None, STOP])
def test_a_row_with_a_seed_draws_the_same_in_any_batch(graphs_on_cpu, kind, stop):
    """Beside others, in another order, alone, and while others keep it waiting in its block."""
    answers = [[1, 2, 3, 4, 5, 6, 7, 1], [2, STOP, 3, 4, 5, 6, 7, 1], [3, 3, 3, 3, 1, 1, 1, 1]]
    config = r2.DecodeConfig(MASK, temperature=1.0, threshold=0.5)
    seeds = torch.tensor([11, 2**40, -3])

    def decode(*rows: int) -> list[list[int]]:
        model = Capturable([answers[row] for row in rows], 2.0)
        prompt, own = torch.arange(len(rows))[:, None], r2.RowParams(seed=seeds[list(rows)])
        options = {"config": config, "rows": own, "cuda_graph": kind, "stop_id": stop}
        return run(model, prompt, **options).sequences[:, 1:].tolist()

    alone = [decode(row)[0] for row in range(3)]
    assert decode(0, 1, 2) == alone
    assert decode(2, 0, 1) == [alone[2], alone[0], alone[1]]
    assert decode(1, 1) == [alone[1]] * 2
    assert len({tuple(row) for row in alone}) == 3


# ---- edits -------------------------------------------------------------------------------------


class Wavering:
    """Logits by what is decided: `answer(tokens of the block) -> tokens`, all of p = 0.999."""

    def __init__(self, answer, prompt_length=1, length=4, logit=9.0):
        self.answer, self.prompt_length, self.length = answer, prompt_length, length
        self.logit, self.calls = logit, 0

    def __call__(self, ids):
        self.calls += 1
        logits = torch.zeros(*ids.shape, VOCAB)
        for b, row in enumerate(ids.tolist()):
            for start in range(self.prompt_length, len(row), self.length):
                block = row[start : start + self.length]
                for i, token in enumerate(self.answer(block, self.calls)):
                    logits[b, start + i, token] = self.logit
        return SimpleNamespace(logits=logits)


EDITS = {"config": r2.DecodeConfig.fast_dllm(MASK, edit_threshold=0.9), "edit": True}


def corrected(block, call):
    """2 at first, then 5, then 6."""
    return [{2: 5, 5: 6, 6: 6}.get(token, 2) for token in block]


def test_edits_end_when_a_step_edits_nothing():
    config = r2.DecodeConfig.vanilla(MASK, edit_threshold=0.9)
    model = Wavering(corrected)
    out = run(model, torch.tensor([[0]]), gen_length=4, config=config, edit=True, trace=True)
    assert out.sequences.tolist() == [[0, 6, 6, 6, 6]]
    # Four commits, two steps in which the last cells are edited, one that edits nothing.
    assert out.nfe == model.calls == 7
    assert (out.trace.rule[:, 0] == r2.Rule.EDIT).sum(0).tolist() == [2, 2, 2, 2]
    assert out.trace.commit_rule.tolist() == [[r2.Rule.EDIT] * 4]
    assert out.trace.commit_step.tolist() == [[2, 3, 4, 5]]
    assert out.trace.row_nfe().tolist() == [7]
    off = run(Wavering(corrected), torch.tensor([[0]]), gen_length=4, config=config)
    assert off.sequences.tolist() == [[0, 2, 2, 2, 2]] and off.nfe == 4


def test_a_block_of_one_step_is_left_at_once():
    out = run(Wavering(corrected), torch.tensor([[0]]), gen_length=8, **EDITS)
    assert out.sequences.tolist() == [[0] + [2] * 8] and out.nfe == 2


@pytest.mark.parametrize("max_edits", [1, 3])
def test_a_model_that_never_stands_still_comes_to_an_end(max_edits):
    def flips(block, call):
        return [3 + call % 2] * 4

    config = r2.DecodeConfig.vanilla(MASK, edit_threshold=0.9)
    model = Wavering(flips)
    out = run(model, torch.tensor([[0]]), config=config, edit=True, max_edits=max_edits, trace=True)
    edits = (out.trace.rule == r2.Rule.EDIT).sum((0, 1))
    assert edits.tolist() == [2 * max_edits] * 4  # in each of two blocks
    assert out.nfe == model.calls == 2 * (4 + max_edits)


def test_a_row_is_edited_no_more_once_it_has_settled():
    """Row 0 is whole after a step; what the model says of it while row 1 is decoded is too late."""

    class Two(Wavering):
        def __call__(self, ids):
            logits = super().__call__(ids).logits
            first = ids[:, 0] == 0
            logits[first, 1:] = 0
            logits[first, 1:, 1 if self.calls == 1 else 7] = self.logit
            logits[~first, 2:] *= self.calls > 2  # unsure of all but one cell
            return SimpleNamespace(logits=logits)

    model = Two(lambda block, call: [2] * 4)
    out = run(model, torch.tensor([[0], [1]]), gen_length=4, trace=True, **EDITS)
    assert out.sequences.tolist() == [[0, 1, 1, 1, 1], [1, 2, 2, 2, 2]] and out.nfe > 2
    assert out.trace.row_nfe().tolist() == [1, out.nfe]


def test_a_stop_token_counts_once_nothing_is_edited():
    """The first one is written while the cell before it is edited, and then edited away."""

    def answer(block, call):
        return [{2: 5, 5: 5}.get(block[0], 2), 3 if block[1] in (STOP, 3) else STOP, STOP, STOP]

    config = r2.DecodeConfig.vanilla(MASK, edit_threshold=0.9)
    options = {"gen_length": 12, "config": config, "stop_id": STOP}
    out = run(Wavering(answer), torch.tensor([[0]]), edit=True, **options)
    assert out.sequences.tolist() == [[0, 5, 3] + [STOP] * 10] and out.nfe == 4
    plain = run(Wavering(answer), torch.tensor([[0]]), **options)
    assert plain.sequences.tolist() == [[0, 2] + [STOP] * 11] and plain.nfe == 2


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
def test_edits_with_caches(cache, shift):
    """Rows in a batch, with a stop id, as alone; something is edited."""
    model, words = r2.load_model("ledger"), r2.ledger.Tokenizer()
    samples = [r2.ledger.make_sample(0, i, split="test").prompt for i in range(3)]
    prompt = torch.tensor([words.encode(text)[:18] for text in samples])
    config = r2.DecodeConfig.r2(model.mask_id, threshold=0.5, edit_threshold=0.5)
    options = {"gen_length": 96, "cache": cache, "logits_shift": shift, "edit": True}
    options |= {"config": config, "stop_id": words.end_id, "trace": True}
    out = r2.generate(model, prompt, **options)
    assert not (out.sequences == model.mask_id).any()
    assert (out.trace.rule == r2.Rule.EDIT).sum() > 3
    for b in range(3):
        alone = r2.generate(model, prompt[b : b + 1], **options)
        assert torch.equal(out.sequences[b], alone.sequences[0])
        assert out.trace.row_nfe()[b] == alone.trace.row_nfe()[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"edit": True}, ValueError, "edit takes False where config.edit_threshold is None"),
        ({"edit": 1}, TypeError, "edit takes a bool, got 1"),
        ({"max_edits": 0}, ValueError, "max_edits takes an integer in .1, 2147483647., got 0"),
        ({"max_edits": 1.5}, TypeError, "max_edits takes an integer"),
        ({"rows": {"quota": 1}}, TypeError, "rows takes a RowParams or None, got dict"),
        (
            {"config": r2.DecodeConfig(None)},
            ValueError,
            "config.mask_id takes the model's mask token, got None",
        ),
        (
            {"rows": r2.RowParams(quota=torch.ones(2, dtype=torch.int64))},
            ValueError,
            "rows.quota takes shape .B. = .1., got .2.",
        ),
    ],
)
def test_bad_rows_and_edits(change, error, message):
    with pytest.raises(error, match=message):
        run(Scripted([[1] * 8], 1), torch.tensor([[0]]), **change)


# ---- cuda_graph --------------------------------------------------------------------------------


class Recording(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: the operations done inside, on the tensors where they were.

    As in a capture nothing has happened afterwards; `replay` does it, as often as wanted.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(op._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and value is not None:
                self.before.append((value, value.clone()))
        out = kwargs.get("out")
        if out is not None:
            self.before.append((out, out.clone()))
        result = op(*args, **kwargs)
        self.calls.append((op, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def replay(self):
        for op, args, kwargs, recorded in self.calls:
            if op.is_view:
                continue
            for old, new in zip(
                tree_leaves(recorded), tree_leaves(op(*args, **kwargs)), strict=True
            ):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)


class RecordedGraph:
    """`StepGraph` without CUDA: reports come late as on a device."""

    made = replays = reports = 0

    def __init__(self, step, forward, pool):
        RecordedGraph.made += 1
        forward()
        with Recording() as self.recording:
            self.step = step()

    def replay(self):
        RecordedGraph.replays += 1
        self.recording.replay()
        remaining = self.step.remaining.clone()

        def report():
            RecordedGraph.reports += 1
            return self.step._replace(remaining=remaining)

        return report


class RecordedLoop:
    """`LoopGraph` without CUDA."""

    def __init__(self, step, forward, pool, counters):
        RecordedGraph.made += 1
        self.counters = counters
        forward()
        with Recording() as self.recording:
            self.step = step()
            self.goes_on = counters.goes_on(self.step.remaining)

    def run(self):
        self.counters.steps.zero_()
        while True:
            self.recording.replay()
            assert self.counters.steps < 1000, "a loop that does not end"
            if not self.goes_on:
                return self.step, int(self.counters.steps)


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    monkeypatch.setattr(step_graph, "StepGraph", RecordedGraph)
    monkeypatch.setattr(step_graph, "LoopGraph", RecordedLoop)
    monkeypatch.setattr(generation, "check_graph", lambda kind, device, **options: None)
    RecordedGraph.made = RecordedGraph.replays = RecordedGraph.reports = 0
    return RecordedGraph


class Capturable:
    """`Scripted` in tensor operations alone; predicts the mask id in its first `late` forwards."""

    def __init__(self, answers, logit=20.0, late=0):
        table = F.one_hot(torch.tensor([[0, *answer] for answer in answers]), VOCAB)
        self.table, self.forwards, self.late = table * logit, torch.tensor(0), late

    def __call__(self, ids):
        self.forwards += 1
        logits = self.table[ids[:, 0], : ids.shape[1]].clone()
        logits[..., MASK] += 1000 * (self.forwards <= self.late)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("kind", [True, "loop"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_loop_over_graphs_decodes_the_same_tokens(graphs_on_cpu, temperature, kind):
    answers, prompt = [[1, 2, 3, 4, 5, 6, 7, 1], [7, 6, 5, 4, 3, 2, 1, 1]], torch.tensor([[0], [1]])
    config = r2.DecodeConfig.vanilla(MASK, temperature=temperature, seed=3)
    plain = run(Capturable(answers, 2.0), prompt, config=config)
    model = Capturable(answers, 2.0)
    graph = run(model, prompt, config=config, cuda_graph=kind)
    assert torch.equal(graph.sequences, plain.sequences)
    assert graphs_on_cpu.made == 1
    in_vain = 2 if kind is True else 0  # one forward per block
    assert graph.nfe == model.forwards - 1 == plain.nfe + in_vain  # and one before the capture


@pytest.mark.parametrize("kind", [True, "loop"])
@pytest.mark.parametrize("preset", ["vanilla", "r2"])
def test_graphs_stop_where_the_plain_loop_stops(graphs_on_cpu, preset, kind):
    """Equal tokens, though a finished row stays in the batch; no step once all are finished."""
    answers = [
        [1, 2, STOP, 4, 5, 6, 7, 1, 0, 0, 0, 0],
        [1, 2, 3, 4, STOP, 5, 5, 5, 0, 0, 0, 0],
        [7, STOP, 1, 2] * 3,
    ]
    prompt = torch.tensor([[0], [1], [2]])
    options = {
        "gen_length": 12,
        "stop_id": STOP,
        "config": getattr(r2.DecodeConfig, preset)(MASK, threshold=0.5),
    }

    plain = run(Capturable(answers), prompt, **options)
    graph = run(Capturable(answers), prompt, cuda_graph=kind, **options)
    assert torch.equal(graph.sequences, plain.sequences)
    assert graph.sequences[0].tolist()[1:] == [1, 2, STOP] + (
        [STOP] * 9 if preset == "vanilla" else [4] + [STOP] * 8
    )
    assert graphs_on_cpu.made == 1 and graph.nfe == plain.nfe + (2 if kind is True else 0)


@pytest.mark.parametrize("kind", [True, "loop"])
def test_a_graph_that_makes_no_progress_is_noticed(graphs_on_cpu, kind):
    with pytest.raises(r2.NoProgressError, match="non-finite") as error:
        run(Capturable([[1] * 8], torch.nan), torch.tensor([[0]]), cuda_graph=kind)
    assert error.value.step == 1


@pytest.mark.parametrize("kind", [True, "loop"])
def test_a_graph_finishes_the_rows_that_it_can(graphs_on_cpu, kind):
    answers, prompt = [[1, 2, 3, 4, 5, 6, 7, 1], [7, 6, 5, 4, 3, 2, 1, 1]], torch.tensor([[0], [1]])
    config = r2.DecodeConfig.vanilla(MASK)
    plain = run(Capturable(answers, 2.0), prompt[:1], config=config)
    model = Capturable(answers, 2.0)
    model.table[1] = torch.nan
    with pytest.raises(r2.NoProgressError, match="row 1: .*non-finite") as error:
        run(model, prompt, config=config, cuda_graph=kind)
    assert error.value.rows == (1,)
    assert torch.equal(error.value.sequences[:1], plain.sequences)


def test_a_row_that_is_stuck_for_a_while_does_not_end_a_loop_on_the_device(graphs_on_cpu):
    options = {"config": r2.DecodeConfig(MASK, mask_prediction="allow")}
    prompt, answers = torch.tensor([[0]]), [[1, 2, 3, 4, 5, 6, 7, 1]]
    plain = run(Capturable(answers, late=3), prompt, **options)
    loop = run(Capturable(answers, late=4), prompt, cuda_graph="loop", **options)
    assert torch.equal(loop.sequences, plain.sequences) and loop.nfe == plain.nfe == 5


def test_cuda_graph_errors():
    model, prompt = Scripted([[1] * 8], 1), torch.tensor([[0]])
    with pytest.raises(ValueError, match="cuda_graph takes False on cpu"):
        run(model, prompt, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph takes False, True or 'loop', got 'yes'"):
        run(model, prompt, cuda_graph="yes")
    for wrong in (None, 0, 1, torch.tensor(True)):  # the false ones would go unnoticed
        with pytest.raises(TypeError, match="cuda_graph takes False, True or 'loop', got"):
            run(model, prompt, cuda_graph=wrong)
    model.device = "cuda"
    if not step_graph.HAS_LOOPS:
        with pytest.raises(ValueError, match="'loop' with torch 2.15 or newer"):
            run(model, prompt, cuda_graph="loop")
    for options in ({"on_step": print}, {"trace": True}, {"progress": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} takes its default"):
            run(model, prompt, cuda_graph=True, **options)
    assert model.calls == []


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("temperature, stop", [(0.9, False), (0.0, True)])
@pytest.mark.parametrize("kind", [True, "loop"])
@pytest.mark.parametrize("graphs", ["recorded", "cuda"])
def test_graphs_on_the_ledger_model(request, graphs, cache, shift, temperature, stop, kind):
    if graphs == "cuda" and kind == "loop" and not step_graph.HAS_LOOPS:
        pytest.skip("torch is older than 2.15")
    on_cuda = graphs == "cuda"
    device = request.getfixturevalue("cuda") if on_cuda else "cpu"
    model = r2.load_model("ledger", device=device)
    prompt = torch.randint(1, 20, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)
    config = r2.DecodeConfig(model.mask_id, temperature=temperature, seed=5)
    options = {"gen_length": 64, "config": config, "cache": cache, "logits_shift": shift}
    if stop:
        options["stop_id"] = r2.ledger.Tokenizer().end_id
    plain = r2.generate(model, prompt, **options)
    recorded = None if on_cuda else request.getfixturevalue("graphs_on_cpu")
    graph = r2.generate(model, prompt, **options, cuda_graph=kind)
    assert torch.equal(graph.sequences, plain.sequences)
    assert plain.nfe <= graph.nfe <= plain.nfe + (2 if kind is True else 0)
    if recorded:
        assert graph.nfe == plain.nfe + recorded.replays - recorded.reports
        assert recorded.made <= (2 if cache == "prefix" else 1)


@pytest.mark.parametrize("cache, shift", [("none", 0), ("dual", 0), ("prefix", 1)])
@pytest.mark.parametrize("kind", [True, "loop"])
@pytest.mark.parametrize("graphs", ["recorded", "cuda"])
def test_graphs_with_rows_and_edits(request, graphs, cache, shift, kind):
    """Finished rows stay in the batch, and are edited no more."""
    if graphs == "cuda" and kind == "loop" and not step_graph.HAS_LOOPS:
        pytest.skip("torch is older than 2.15")
    device = request.getfixturevalue("cuda") if graphs == "cuda" else "cpu"
    model, words = r2.load_model("ledger", device=device), r2.ledger.Tokenizer()
    samples = [r2.ledger.make_sample(0, i, split="test").prompt for i in range(3)]
    prompt = torch.tensor([words.encode(text)[:18] for text in samples], device=device)
    config = r2.DecodeConfig.r2(model.mask_id, edit_threshold=0.5)
    rows = r2.RowParams(
        threshold=torch.tensor([0.5, 0.9, 0.7], device=device),
        edit_threshold=torch.tensor([0.5, 0.7, 0.9], device=device),
    )
    options = {"gen_length": 96, "config": config, "cache": cache, "logits_shift": shift}
    options |= {"rows": rows, "edit": True, "stop_id": words.end_id}
    edits = []
    plain = r2.generate(
        model, prompt, **options, on_step=lambda e: edits.append(int((e.step.rule == 8).sum()))
    )
    if graphs == "recorded":
        request.getfixturevalue("graphs_on_cpu")
    graph = r2.generate(model, prompt, **options, cuda_graph=kind)
    assert torch.equal(graph.sequences, plain.sequences) and sum(edits) > 3
    assert plain.nfe <= graph.nfe <= plain.nfe + (3 if kind is True else 0)


# ---- padding -----------------------------------------------------------------------------------


class Counting:
    """Row i says which token of its own sequence it is; rows of padding say something else.

    Nothing of the past is computed: caches are of the right shape alone.
    """

    device = torch.device("cpu")

    def __init__(self, block_alone: bool) -> None:
        self.supports_logits_positions = block_alone

    def __call__(
        self, ids, attention_mask=None, past_key_values=None, logits_positions=None, **options
    ):
        B, T = ids.shape
        past = 0 if past_key_values is None else past_key_values[0][0].shape[1]
        replace = options.get("replace_position")
        start = past if replace is None else replace[0].int().argmax()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        padding = (mask == 0).sum(1, keepdim=True)
        place = torch.arange(T) + start - padding
        logits = 9.0 * F.one_hot(torch.where(place < 0, MASK - 1, place % (MASK - 1)), VOCAB)
        if isinstance(logits_positions, torch.Tensor):
            logits = logits.index_select(1, logits_positions)
        elif logits_positions is not None:
            logits = logits[:, logits_positions[0] : logits_positions[1]]
        pairs = [(torch.zeros(B, past + T if replace is None else past, 2),) * 2]
        return SimpleNamespace(logits=logits, past_key_values=pairs)


@pytest.mark.parametrize(
    "block_alone, kind", [(False, False), (True, False), (True, True), (True, "loop")]
)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_rows_are_clamped_within_their_own_sequence(graphs_on_cpu, cache, shift, block_alone, kind):
    """An empty prompt beside others: its first token is not what the padding predicts."""
    model, options = Counting(block_alone), {"cache": cache, "logits_shift": shift}
    prompts = [[], [1], [1, 2, 3], []]
    tokens = torch.tensor([[0] * (3 - len(ids)) + ids for ids in prompts])
    real = torch.tensor([[0] * (3 - len(ids)) + [1] * len(ids) for ids in prompts])
    together = run(model, tokens, attention_mask=real, cuda_graph=kind, **options)
    for ids, row in zip(prompts, together.sequences[:, 3:], strict=True):
        prompt = torch.tensor([ids], dtype=torch.int64)
        alone = run(model, prompt, **options)
        assert row.tolist() == alone.sequences[0, len(ids) :].tolist()
