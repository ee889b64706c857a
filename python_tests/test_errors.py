# SPDX-License-Identifier: Apache-2.0
"""Bad input: ValueError or TypeError naming op, argument, got and taken; nothing is written."""

import pytest
import torch
from cases import STREAKS, assert_same, clone, runs_cuda, same_bits, state_tensors

from r2dllm_ext.config import DecodeConfig
from r2dllm_ext.state import DecodeState

B, L, V = 2, 3, 7


class Call:
    """Valid arguments of a step; a test spoils one of them."""

    def __init__(self, device: str):
        self.logits = torch.randn(B, L, V, generator=torch.Generator().manual_seed(0)).to(device)
        self.tokens = torch.zeros(B, L, dtype=torch.int64, device=device)
        self.state = DecodeState(B, L, device=device)
        self.config = DecodeConfig(0)
        self.candidates = None
        self.logits_shift = 0


def change(name, function):
    """Spoil one argument: `function` of it takes its place."""
    return lambda call: setattr(call, name, function(getattr(call, name)))


def change_state(name, function):
    return lambda call: setattr(call.state, name, function(getattr(call.state, name)))


def ones(*shape, dtype=torch.bool):
    return lambda _: torch.ones(shape, dtype=dtype)


def stretched(tensor):
    """The same shape with a last dimension of stride 2."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


STEPS = {
    # what is wrong: (spoil, exception, words of the message)
    "logits 2-D": (change("logits", lambda t: t[0]), ValueError, "logits [B, L, V]"),
    "logits int": (change("logits", lambda t: t.int()), TypeError, "logits dtype Int"),
    "logits complex": (change("logits", lambda t: t.cfloat()), TypeError, "logits dtype"),
    "logits V = 0": (change("logits", lambda t: t[..., :0]), ValueError, "logits"),
    "logits stride": (change("logits", stretched), ValueError, "logits stride 1 42 14 2"),
    "logits grad": (
        change("logits", lambda t: t.clone().requires_grad_()), ValueError, "logits require grad",
    ),
    "logits list": (change("logits", lambda t: t.tolist()), TypeError, "logits Tensor list"),
    "logits batch": (change("logits", lambda t: t[:1]), ValueError, "tokens [B, L]"),
    "logits length": (change("logits", lambda t: t[:, :2]), ValueError, "tokens [B, L]"),
    "tokens int32": (change("tokens", lambda t: t.int()), TypeError, "tokens Long Int"),
    "tokens 1-D": (change("tokens", lambda t: t[0]), ValueError, "tokens [B, L] [3]"),
    "tokens shape": (change("tokens", lambda t: t.t()), ValueError, "tokens [2, 3] [3, 2]"),
    "tokens list": (change("tokens", lambda t: t.tolist()), TypeError, "tokens Tensor list"),
    "tokens None": (change("tokens", lambda t: None), TypeError, "tokens Tensor None"),
    "tokens device": (change("tokens", lambda t: t.to("meta")), ValueError, "tokens device meta"),
    "logits device": (change("logits", lambda t: t.to("meta")), ValueError, "device meta"),
    "candidates int": (change("candidates", ones(B, L, dtype=torch.int8)), TypeError, "candidates"),
    "candidates shape": (change("candidates", ones(B, 1)), ValueError, "candidates [2, 3] [2, 1]"),
    "candidates device": (
        change("candidates", lambda _: torch.ones(B, L).bool().to("meta")), ValueError,
        "candidates device meta",
    ),
    "candidates list": (change("candidates", lambda _: [[True] * L] * B), TypeError, "candidates"),
    "mask id too big": (change("config", lambda c: c.replace(mask_id=V)), ValueError, "mask_id 7"),
    "config dict": (change("config", lambda c: {"mask": 0}), TypeError, "config DecodeConfig dict"),
    "config None": (change("config", lambda c: None), TypeError, "config DecodeConfig None"),
    "state None": (change("state", lambda s: None), TypeError, "state DecodeState None"),
    "state batch": (change("state", lambda _: DecodeState(3, 3)), ValueError, "state [3, 3]"),
    "state length": (change("state", lambda _: DecodeState(B, 1)), ValueError, "state [2, 1]"),
    "state device": (
        change("state", lambda _: DecodeState(B, L, device="meta")), ValueError,
        "state device meta",
    ),
    "state dtype": (
        change_state("streak_sum", lambda t: t.double()), TypeError,
        "state streak_sum Float Double",
    ),
    "state counters": (change_state("counters", lambda t: t[:, :3]), ValueError, "state counters"),
    "state strides": (
        change_state("streak_id", lambda t: t.t().contiguous().t()), ValueError, "state streak_id",
    ),
    "shift": (change("logits_shift", lambda _: 2), ValueError, "logits_shift 2"),
}  # fmt: skip


def check_message(error: pytest.ExceptionInfo, op: str, words: str) -> None:
    message = str(error.value)
    for word in (op, *words.split()):
        assert word.strip("[],") in message, f"{word!r} is not in: {message}"


@pytest.mark.parametrize("op", ["decode_step", "select"])
@pytest.mark.parametrize("what", STEPS)
def test_step(r2, device, op, what):
    spoil, exception, words = STEPS[what]
    call = Call(device)
    tokens, state = call.tokens, clone(call.state)
    spoil(call)
    if isinstance(call.candidates, torch.Tensor) and not call.candidates.is_meta:
        call.candidates = call.candidates.to(device)
    if isinstance(call.state, DecodeState) and call.state.device.type == "cpu":
        call.state = call.state.to(device)
    with pytest.raises(exception) as error:
        getattr(r2, op)(
            call.logits, call.tokens, call.state, call.config,
            candidates=call.candidates, logits_shift=call.logits_shift,
        )  # fmt: skip
    check_message(error, op, words)
    assert not tokens.any()
    if call.state is not None and what not in ("state batch", "state length", "state device"):
        for name in STREAKS:
            assert same_bits(getattr(call.state, name).float(), getattr(state, name).float()), name
        assert call.state.counters[:, 1].tolist() == [0, 0]


def test_tokens_that_share_memory(r2, device):
    """`decode_step` would write a cell twice; `select` only reads."""
    call = Call(device)
    tokens = torch.zeros(1, L, dtype=torch.int64, device=device).expand(B, L)
    with pytest.raises(ValueError) as error:
        r2.decode_step(call.logits, tokens, call.state, call.config)
    check_message(error, "decode_step", "tokens memory")
    assert not tokens.any() and not call.state.counters[:, 1].any()
    assert r2.select(call.logits, tokens, call.state, call.config).rule.any()


def test_grad_mode(r2, device):
    """Parameters around it are no obstacle; logits with a graph are, also under no_grad."""
    call = Call(device)
    call.logits.requires_grad_()
    with torch.no_grad(), pytest.raises(ValueError, match="grad"):
        r2.decode_step(call.logits, call.tokens, call.state, call.config)
    step = r2.decode_step(call.logits.detach(), call.tokens, call.state, call.config)
    assert step.rule.any() and not step.confidence.requires_grad


def test_float64_is_for_the_cpu(r2, device):
    call = Call(device)
    call.logits = call.logits.double()
    if not runs_cuda(device):
        assert r2.decode_step(call.logits, call.tokens, call.state, call.config).rule.any()
    else:
        with pytest.raises(TypeError, match="decode_step: logits .*float32"):
            r2.decode_step(call.logits, call.tokens, call.state, call.config)


# ---- the other ops ---------------------------------------------------------------------------


def valid(op: str, device: str) -> dict:
    masked = torch.ones(B, L, dtype=torch.bool, device=device)
    p = torch.full((B, L), 0.5, device=device)
    ids = torch.ones(B, L, dtype=torch.int64, device=device)
    return {
        "token_confidence": {"logits": torch.zeros(B, L, V, device=device)},
        "window_pool": {
            "confidence": p, "is_masked": masked, "window": 2, "min_confidence": 0.5,
        },
        "positional_ambiguity": {
            "prediction": ids, "confidence": p, "is_masked": masked, "min_confidence": 0.5,
        },
        "update_stability_": {
            "state": DecodeState(B, L, device=device), "prediction": ids, "confidence": p,
            "was_masked": masked, "is_masked": masked, "steps": 2, "min_confidence": 0.5,
        },
    }[op]  # fmt: skip


def same(value):
    return lambda _: value


RULES = [
    # op, argument, how it is spoilt, exception, words
    ("token_confidence", "logits", lambda t: t[0], ValueError, "[B, L, V]"),
    ("token_confidence", "logits", lambda t: t.long(), TypeError, "dtype Long"),
    ("token_confidence", "logits", stretched, ValueError, "stride 1"),
    ("token_confidence", "logits", lambda t: t.clone().requires_grad_(), ValueError, "grad"),
    ("token_confidence", "logits", same("logits"), TypeError, "Tensor str"),
    ("token_confidence", "candidates", ones(B, L, dtype=torch.float32), TypeError, "Bool Float"),
    ("token_confidence", "candidates", ones(L, B), ValueError, "[2, 3] [3, 2]"),
    ("token_confidence", "exclude_id", same(V), ValueError, "V = 7 got 7"),
    ("token_confidence", "exclude_id", same(-1), ValueError, "V = 7 got -1"),
    ("window_pool", "confidence", lambda t: t[0], ValueError, "[B, L]"),
    ("window_pool", "confidence", lambda t: t.long(), TypeError, "float32 Long"),
    ("window_pool", "confidence", same(0.5), TypeError, "Tensor float"),
    ("window_pool", "is_masked", lambda t: t.int(), TypeError, "Bool Int"),
    ("window_pool", "is_masked", lambda t: t[:, :2], ValueError, "[2, 3] [2, 2]"),
    ("window_pool", "is_masked", lambda t: t.to("meta"), ValueError, "device meta"),
    ("window_pool", "window", same(0), ValueError, "1 got 0"),
    ("window_pool", "window", same(-3), ValueError, "1 got -3"),
    ("window_pool", "min_confidence", same(1.5), ValueError, "[0, 1] 1.5"),
    ("window_pool", "min_confidence", same(-0.5), ValueError, "[0, 1] -0.5"),
    ("window_pool", "min_confidence", same(float("nan")), ValueError, "[0, 1] nan"),
    ("window_pool", "max_unmasked", same(-1), ValueError, "0 got -1"),
    ("positional_ambiguity", "prediction", lambda t: t.int(), TypeError, "Long Int"),
    ("positional_ambiguity", "prediction", lambda t: t[:1], ValueError, "[2, 3] [1, 3]"),
    ("positional_ambiguity", "confidence", lambda t: t[0], ValueError, "[B, L]"),
    ("positional_ambiguity", "is_masked", lambda t: t.long(), TypeError, "Bool Long"),
    ("positional_ambiguity", "is_masked", lambda t: t.to("meta"), ValueError, "device meta"),
    ("positional_ambiguity", "min_confidence", same(2.0), ValueError, "[0, 1] 2"),
    ("positional_ambiguity", "min_run", same(0), ValueError, "1 got 0"),
    ("positional_ambiguity", "mode", same("best"), ValueError, "confidence mid random best"),
    ("positional_ambiguity", "mode", same(None), ValueError, "confidence mid random None"),
    ("positional_ambiguity", "row", ones(B), TypeError, "Long Bool"),
    ("positional_ambiguity", "row", ones(B + 1, dtype=torch.int64), ValueError, "[2] [3]"),
    ("update_stability_", "state", same(None), TypeError, "DecodeState None"),
    ("update_stability_", "state", same(DecodeState(B, L + 1)), ValueError, "[2, 3] [2, 4]"),
    ("update_stability_", "prediction", lambda t: t.int(), TypeError, "Long Int"),
    ("update_stability_", "confidence", lambda t: t.bool(), TypeError, "float32 Bool"),
    ("update_stability_", "was_masked", lambda t: t.int(), TypeError, "Bool Int"),
    ("update_stability_", "is_masked", lambda t: t[:, :1], ValueError, "[2, 3] [2, 1]"),
    ("update_stability_", "is_masked", lambda t: t.to("meta"), ValueError, "device meta"),
    ("update_stability_", "steps", same(0), ValueError, "1 got 0"),
    ("update_stability_", "min_confidence", same(-1.0), ValueError, "[0, 1] -1"),
    ("update_stability_", "mode", same("mean"), ValueError, "last ave max mean"),
]


@pytest.mark.parametrize(
    "op, argument, spoil, exception, words", RULES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_rule(r2, device, op, argument, spoil, exception, words):
    arguments = valid(op, device)
    state = arguments.get("state")
    bad = spoil(arguments.get(argument))
    if isinstance(bad, (torch.Tensor, DecodeState)) and "meta" not in str(bad.device):
        bad = bad.to(device)
    arguments[argument] = bad
    order = {"update_stability_": 3, "positional_ambiguity": 3, "window_pool": 2}.get(op, 1)
    positional = [arguments.pop(name) for name in list(arguments)[:order]]
    with pytest.raises(exception) as error:
        getattr(r2, op)(*positional, **arguments)
    check_message(error, op, f"{argument} {words}")
    if state is not None:
        assert_same(state_tensors(state), state_tensors(DecodeState(B, L, device=device)))


# ---- DecodeConfig and DecodeState ------------------------------------------------------------

FIELDS = {
    # field: (values of the right type, values of the wrong type)
    "mask_id": ((-1,), (None, 1.0, "1", True)),
    "base": (("greedy", "", None), (1,)),
    "threshold": ((-0.1, 1.1, float("nan"), float("inf")), (None, "0.9", True)),
    "factor": ((0.0, -1.0, float("nan"), float("inf")), (None, "1")),
    "error_budget": ((-0.1, float("nan"), float("inf")), (None, "1")),
    "steps_per_block": ((0, -1, 2**31), (1.5, "4", True)),
    "confidence_cluster_size": ((-1, 2**31), (1.5, "3", True)),
    "spatial_threshold": ((-0.1, 1.1, float("nan")), (None, "0.8")),
    "confidence_cluster_unmasked": ((-1, 2**31), (0.5, "1", False)),
    "token_cluster": (("best", "max"), (1, True)),
    "token_cluster_size": ((0, -2, 2**31), (None, 2.0, "2")),
    "temporal_steps": ((-1, 2**31), (2.5, "3", True)),
    "temporal_threshold": ((-0.1, 1.1, float("nan")), (None, "0.8")),
    "temporal_eval": (("mean", "first", None), (0,)),
    "temperature": ((-0.1, float("nan"), float("inf")), (None, "1")),
    "top_k": ((0, -1, 2**31), (1.5, "5", True)),
    "top_p": ((0.0, -0.1, 1.1, float("nan")), ("0.9", True)),
    "seed": ((2**63, -(2**63) - 1), (None, 1.5, "0", True)),
    "allow_mask_id": ((), (None, 1, "yes")),
    "confidence_dtype": (("bfloat16", "float64", None), (torch.bfloat16,)),
}
CASES = [
    (field, value, exception)
    for field, kinds in FIELDS.items()
    for values, exception in zip(kinds, (ValueError, TypeError), strict=True)
    for value in values
]


@pytest.mark.parametrize("field, value, exception", CASES)
def test_config_field(field, value, exception):
    """The message names the field, what it got and what it takes; `replace` validates too."""
    options = {"mask_id": 0, field: value}
    for make in (lambda: DecodeConfig(**options), lambda: DecodeConfig(0).replace(**options)):
        with pytest.raises(exception) as error:
            make()
        message = str(error.value)
        assert f"DecodeConfig.{field}: got {value!r}, takes " in message
        assert len(message.split("takes ")[1]) > 3


def test_every_field_is_validated():
    fields = set(DecodeConfig.__dataclass_fields__)
    assert {name for name in fields if not name.startswith("_")} == set(FIELDS)


def test_config_is_frozen_and_whole():
    config = DecodeConfig(5)
    with pytest.raises(AttributeError):
        config.threshold = 0.1
    with pytest.raises(TypeError):
        config.replace(gamma=1)
    with pytest.raises(TypeError):
        DecodeConfig(5, "schedule")
    assert config.replace(threshold=0.5) == DecodeConfig(5, threshold=0.5)
    assert hash(config) == hash(DecodeConfig(5)) and config != DecodeConfig(6)


def test_presets():
    off = {"confidence_cluster_size": 0, "token_cluster": None, "temporal_steps": 0}
    assert DecodeConfig.vanilla(5) == DecodeConfig(5, base="schedule", **off)
    assert DecodeConfig.fast_dllm(5) == DecodeConfig(5, threshold=0.9, **off)
    assert DecodeConfig.budget(5) == DecodeConfig(5, base="budget", error_budget=0.1, **off)
    assert DecodeConfig.r2(5) == DecodeConfig(5)
    release = (0.9, 3, 0.8, 1, "confidence", 2, 3, 0.8, "last", 0.0, False, "float32")
    config = DecodeConfig(5)
    assert release == (
        config.threshold, config.confidence_cluster_size, config.spatial_threshold,
        config.confidence_cluster_unmasked, config.token_cluster, config.token_cluster_size,
        config.temporal_steps, config.temporal_threshold, config.temporal_eval, config.temperature,
        config.allow_mask_id, config.confidence_dtype,
    )  # fmt: skip


@pytest.mark.parametrize(
    "sizes, exception",
    [((-1, 2), ValueError), ((2, -1), ValueError), ((1.0, 2), TypeError), ((1, True), TypeError)],
)
def test_state_sizes(sizes, exception):
    with pytest.raises(exception, match="DecodeState: (batch_size|block_length) takes"):
        DecodeState(*sizes)
