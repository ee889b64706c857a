# SPDX-License-Identifier: Apache-2.0
"""Inputs of `generate` that a model would not notice, and models that return something else."""

import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import r2dllm_ext as r2
from r2dllm_ext.generate_checks import check_inputs, context_length, embedding_rows
from r2dllm_ext.model_driver import CACHES, ModelDriver
from r2dllm_ext.models import ModelConfig, Transformer

MODEL = Transformer(
    ModelConfig("llada", 50, width=32, layers=1, heads=4, mlp_width=48, max_length=16)
)
PROMPT = torch.tensor([[3, 4, 5], [6, 7, 8]])


def check(model=MODEL, prompt=PROMPT, attention_mask=None, gen_length=8, mask_id=49):
    check_inputs(model, prompt, attention_mask, gen_length=gen_length, mask_id=mask_id)


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1], [1, 1, 1]],
        [[0, 0, 1], [0, 1, 1]],
        [[0, 0, 0], [1, 1, 1]],  # a row that is an empty prompt
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_rows_padded_on_the_left_pass(mask, dtype):
    check(attention_mask=torch.tensor(mask).to(dtype))


@pytest.mark.parametrize(
    ("mask", "row"),
    [
        ([[1, 1, 1], [1, 1, 0]], 1),  # padded on the right
        ([[1, 0, 1], [1, 1, 1]], 0),  # a hole
        ([[0, 1, 1], [0, 1, 0]], 1),  # on both sides
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_behind_a_token_is_refused(mask, row, dtype):
    message = rf"generate: attention_mask takes rows padded on the left.*row {row}$"
    with pytest.raises(ValueError, match=message):
        check(attention_mask=torch.tensor(mask).to(dtype))


@pytest.mark.parametrize("pad", [-torch.inf, torch.finfo(torch.float32).min, -1.0, 2.0, torch.nan])
def test_masks_that_are_not_zeros_and_ones_are_refused(pad):
    mask = torch.zeros(2, 3)
    mask[0, 0] = pad
    for given in (mask, mask + 1.0):
        if given.unique().tolist() == [0.0, 1.0]:
            continue  # -1 + 1
        with pytest.raises(ValueError, match="attention_mask takes 1 / True .* additive mask"):
            check(attention_mask=given)


def test_an_empty_prompt_passes():
    none = torch.zeros(2, 0, dtype=torch.int64)
    check(prompt=none, attention_mask=none)
    check(prompt=PROMPT[:0], attention_mask=PROMPT[:0])


def test_prompt_and_answer_fit_the_positions_of_the_model():
    check(gen_length=13)
    with pytest.raises(ValueError, match=r"at most the 16 positions .*, got 3 \+ 14"):
        check(gen_length=14)
    with pytest.raises(ValueError, match=r"at most the 16 positions .*, got 17 \+ 0"):
        check(prompt=torch.zeros(1, 17, dtype=torch.int64), gen_length=0)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"max_sequence_length": 4096}, 4096),  # LLaDA
        ({"max_position_embeddings": 131072, "max_length": 20}, 131072),  # Dream
        ({"max_length": 20}, None),  # of a transformers config: a default of its own `generate`
        ({}, None),
    ],
)
def test_positions_of_published_classes(config, wanted):
    model = SimpleNamespace(config=SimpleNamespace(**config))
    assert context_length(model) == wanted
    assert context_length(lambda ids: ids) is None
    check(model, gen_length=10)


@pytest.mark.parametrize("bad", [50, 10**9, -1])
def test_a_prompt_id_outside_the_embedding_is_named_with_its_place(bad):
    prompt = PROMPT.clone()
    prompt[1, 2] = bad
    with pytest.raises(
        ValueError, match=rf"prompt takes ids in \[0, 50\).* {bad} in row 1 at pos.* 2"
    ):
        check(prompt=prompt)
    check(prompt=PROMPT.new_full((1, 3), 49))
    with pytest.raises(ValueError, match=r"config\.mask_id takes an id in \[0, 50\).*, got 50"):
        check(mask_id=50)


class Abstract(nn.Module):
    def get_input_embeddings(self):
        raise NotImplementedError  # what PreTrainedModel does where a class has not defined it


@pytest.mark.parametrize(
    "model",
    [
        lambda ids: ids,
        Abstract(),
        SimpleNamespace(get_input_embeddings=lambda: None),
        SimpleNamespace(get_input_embeddings=lambda: nn.Identity()),
    ],
    ids=["callable", "not implemented", "none", "no weight"],
)
def test_a_model_that_does_not_say_what_it_embeds_is_taken_at_its_word(model):
    assert embedding_rows(model) is None
    check(model, prompt=PROMPT + 1000, mask_id=10**6)


LOGITS = torch.zeros(1, 6, 50)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("output", "got"),
    [
        ((LOGITS,), "tuple"),
        ({"logits": LOGITS}, "dict"),
        (LOGITS, "Tensor"),
        (None, "NoneType"),
        (SimpleNamespace(logits=None), "SimpleNamespace"),
        (SimpleNamespace(logits=LOGITS.tolist()), "SimpleNamespace"),
    ],
    ids=["tuple", "dict", "tensor", "none", "no logits", "list"],
)
def test_a_model_that_returns_no_logits_is_refused(cache, output, got):
    driver = ModelDriver(lambda ids, **_: output, cache, 0, None, 0)
    with pytest.raises(TypeError, match=rf"generate: model takes .*`logits`, got {got} "):
        driver.forward(torch.zeros(1, 6, dtype=torch.int64), 2, 6, [0], new_block=True)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("fields", [{}, {"past_key_values": None}])
def test_a_model_that_returns_no_cache_is_refused(cache, fields):
    output = SimpleNamespace(logits=LOGITS, **fields)
    driver = ModelDriver(lambda ids, **_: output, cache, 0, None, 0)
    message = f"generate: model takes .*`past_key_values` .*cache='{cache}'"
    with pytest.raises(TypeError, match=message):
        driver.forward(torch.zeros(1, 6, dtype=torch.int64), 2, 6, [0], new_block=True)


INTEGERS = {"int64": np.int64, "uint8": np.uint8, "0-dim": torch.tensor}


@pytest.mark.parametrize("kind", INTEGERS.values(), ids=INTEGERS)
def test_lengths_may_be_integers_of_any_kind(kind):
    model = r2.load_model("ledger")
    config = r2.DecodeConfig.fast_dllm(model.mask_id)
    options = {"config": config, "gen_length": 32, "block_length": 16, "logits_shift": 1}
    want = r2.generate(model, QUESTION, **options)
    options |= {
        name: kind(options[name]) for name in ("gen_length", "block_length", "logits_shift")
    }
    assert torch.equal(r2.generate(model, QUESTION, **options).sequences, want.sequences)


QUESTION = torch.tensor([[33, 14, 5]])
WRONG = {
    # argument: what it does not take, the error
    "gen_length": [(32.0, TypeError), (True, TypeError), ("32", TypeError), (10**30, ValueError)],
    "block_length": [(0, ValueError), (np.array([16]), TypeError), (None, TypeError)],
    "logits_shift": [(True, TypeError), (2, ValueError), (np.array([0, 1]), TypeError)],
    "cache": [(None, ValueError), (np.array(["none", "dual"]), TypeError), ([], TypeError)],
    "progress": [("no", TypeError), (1, TypeError)],
    "trace": [(1, TypeError), (None, TypeError)],
    "edit": [(1, TypeError)],
    "on_step": [(3, TypeError), ("print", TypeError)],
    "rows": [([0.9], TypeError)],
    "rows.threshold": [(r2.RowParams(threshold=torch.ones(2)), ValueError)],
    "stop_id": [
        (56, ValueError),
        ((3, 10**6), ValueError),
        ({3, 5}, TypeError),
        (2, ValueError),  # the mask token
        ([2, 2], ValueError),
    ],
    "attention_mask": [([[1, 1, 1]], TypeError), (torch.ones(1, 35), ValueError)],
}


@pytest.mark.parametrize("name", WRONG)
def test_generate_checks_every_argument(name):
    """Before the first forward, and by name."""
    model = r2.load_model("ledger")
    for value, error in WRONG[name]:
        options = {"gen_length": 32, "config": r2.DecodeConfig.fast_dllm(model.mask_id)}
        options[name.partition(".")[0]] = value
        with pytest.raises(error, match=f"^generate: {re.escape(name)} takes .*, got "):
            r2.generate(model, QUESTION, **options)


def test_an_unfinished_row_can_be_told_by_another_process():
    error = r2.NoProgressError({1: (3, "why")}, r2.Generation(QUESTION, 4, None))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and (again.rows, again.step, again.row) == ((1,), 3, 1)
    assert torch.equal(again.sequences, QUESTION)
