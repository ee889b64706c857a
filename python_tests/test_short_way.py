# SPDX-License-Identifier: Apache-2.0
"""csrc/ops/torch_python.cpp: decode_step without torch.ops' parser, and where that is not done."""

import copy
import pickle
import sys
from random import Random

import pytest
import torch
from cases import assert_same, clone, random_config, random_steps
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import r2dllm_ext as r2
from r2dllm_ext import _library

MASK, SHAPE = 7, (2, 6, 11)
decision = sys.modules["r2dllm_ext.ops.decode_step"]  # the package has a function of that name


def call(step=r2.decode_step, config=None, **given):
    logits = random_steps(1, SHAPE, 1, MASK)[0]
    state = r2.DecodeState(*SHAPE[:2])
    tokens = torch.full(SHAPE[:2], MASK)
    result = step(logits, tokens, state, config or r2.DecodeConfig(MASK), **given)
    return result, tokens, state


@pytest.fixture
def short(monkeypatch):
    """Results of the short way, None where it left the call to torch.ops."""
    taken = []

    def spy(*arguments):
        taken.append(_library._C.step(*arguments))
        return taken[-1]

    monkeypatch.setattr(decision, "_short_step", spy)
    return taken


@pytest.mark.parametrize("step", [r2.decode_step, r2.select])
def test_both_ways_say_the_same(monkeypatch, step):
    """Options, rows, slots: their order in C++ is that of the schema."""
    random = Random(3)
    for seed in range(200):
        config = random_config(random, SHAPE[2]).replace(mask_id=MASK, seed=seed)
        given = {
            "slots": torch.tensor([1, 0]),
            "proposed": torch.randint(0, 11, SHAPE[:2]) if seed % 3 == 0 else None,
            "candidates": torch.rand(SHAPE[:2]) < 0.7 if seed % 2 else None,
            "rows": r2.RowParams(threshold=torch.tensor([0.2, 0.6])) if seed % 5 == 0 else None,
        }
        direct = call(step, config, **given)
        with monkeypatch.context() as patch:
            patch.setattr(decision, "_short_step", lambda *arguments: None)
            checked = call(step, config, **given)
        assert_same(direct[0], checked[0])
        assert_same(direct[1], checked[1])
        assert_same(clone(direct[2]).counters, clone(checked[2]).counters)


def test_a_plain_call_takes_the_short_way(short):
    call()
    call(candidates=torch.ones(SHAPE[:2], dtype=torch.bool))
    assert len(short) == 2 and None not in short


class Noted(torch.Tensor):
    seen: list[str] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_sees_the_op(short):
    Noted.seen.clear()
    logits = random_steps(1, SHAPE, 1, MASK)[0].as_subclass(Noted)
    tokens = torch.full(SHAPE[:2], MASK)
    r2.decode_step(logits, tokens, r2.DecodeState(*SHAPE[:2]), r2.DecodeConfig(MASK))
    assert short == [None]
    assert any("decode_step" in name for name in Noted.seen)


def test_a_function_mode_sees_the_op(short):
    class Mode(TorchFunctionMode):
        seen: list[str] = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode() as mode:
        call()
    assert short == [None]
    assert any("decode_step" in name for name in mode.seen)


def test_a_dispatch_mode_sees_the_op():
    class Mode(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    want = call()
    with Mode() as mode:
        got = call()
    assert "r2dllm.decode_step.default" in mode.seen
    assert_same(got[0], want[0])


def test_the_profiler_sees_the_op():
    with torch.profiler.profile() as profile:
        call()
    assert "r2dllm::decode_step" in {event.key for event in profile.key_averages()}


def test_it_keeps_what_python_counts():
    """No reference is lost or kept: of arguments, of results, of None."""
    logits, tokens = random_steps(1, SHAPE, 1, MASK)[0], torch.full(SHAPE[:2], MASK)
    state, config = r2.DecodeState(*SHAPE[:2]), r2.DecodeConfig(MASK)
    counted = (logits, tokens, state.counters, config._all_args)
    before = [sys.getrefcount(one) for one in counted]
    for _ in range(100):
        step = r2.select(logits, tokens, state, config)
        with pytest.raises(ValueError):
            r2.select(logits, tokens[:1], state, config)
    after, of_result = [sys.getrefcount(one) for one in counted], sys.getrefcount(step.prediction)
    assert after == before and of_result == 2


def test_a_config_is_copied_and_pickled_as_before():
    config = r2.DecodeConfig(MASK, threshold=0.25)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert_same(call(config=other)[0], call(config=config)[0])


def test_what_it_does_not_understand_is_left_to_torch():
    for arguments in ((), (True,), (True, 1, 2, 3, 4, 5, 6, 7)):
        assert _library._C.step(*arguments) is None
    logits, tokens = random_steps(1, SHAPE, 1, MASK)[0], torch.full(SHAPE[:2], MASK)
    none, config = (None,) * 6, r2.DecodeConfig.fast_dllm(MASK)
    good = [True, logits, tokens, none, none[:4], [], 0, config._all_args]
    assert _library._C.step(*good) is not None
    spoilt = (
        (1, None),
        (2, "tokens"),
        (3, none[:5]),
        (4, [None] * 4),
        (5, ()),
        (6, 0.0),
        (6, 2),
        (6, 2**70),
        (7, config._all_args[:-1]),
        (7, ("a", *config._all_args[1:])),
    )
    for place, bad in spoilt:
        assert _library._C.step(*good[:place], bad, *good[place + 1 :]) is None
