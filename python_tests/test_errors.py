# SPDX-License-Identifier: Apache-2.0
"""Bad input: ValueError or TypeError naming op, argument, got and taken; nothing is written."""

import dataclasses

import numpy as np
import pytest
import torch
from cases import STREAKS, assert_same, clone, runs_cuda, same_bits, state_tensors
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from r2dllm_ext.config import DecodeConfig, Rule
from r2dllm_ext.row_params import RowParams
from r2dllm_ext.state import Counter, DecodeState

B, L, V = 2, 3, 7


class Call:
    """Valid arguments of a step; a test spoils one of them."""

    def __init__(self, device: str):
        self.logits = torch.randn(B, L, V, generator=torch.Generator().manual_seed(0)).to(device)
        self.tokens = torch.zeros(B, L, dtype=torch.int64, device=device)
        self.state = DecodeState(B, L, device=device)
        self.config = DecodeConfig(0)
        self.candidates = self.editable = self.proposed = self.rows = self.slots = None
        self.logits_shift = 0


def change(name, function):
    """Spoil one argument: `function` of it takes its place."""
    return lambda call: setattr(call, name, function(getattr(call, name)))


def change_state(name, function):
    return lambda call: setattr(call.state, name, function(getattr(call.state, name)))


def ones(*shape, dtype=torch.bool):
    return lambda _: torch.ones(shape, dtype=dtype)


def given(config=None, **arguments):
    """Other arguments, made on the CPU, and options of the config."""

    def spoil(call):
        call.config = call.config.replace(**(config or {}))
        vars(call).update(arguments)

    return spoil


def moved(value, device: str):
    """On the device, if it is on the CPU."""
    if isinstance(value, RowParams):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return RowParams(**{name: moved(tensor, device) for name, tensor in fields.items()})
    on_cpu = isinstance(value, (torch.Tensor, DecodeState)) and value.device.type == "cpu"
    return value.to(device) if on_cpu else value


def stretched(tensor):
    """The same shape with a last dimension of stride 2."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


EDITS, OFF = {"edit_threshold": 0.5}, {"token_cluster": None, "temporal_steps": 0}
CELLS, IDS = torch.ones(B, L, dtype=torch.bool), torch.ones(B, L, dtype=torch.int64)
META = torch.device("meta")
SLOTS, HALVES = torch.arange(B), torch.full((B,), 0.5)
STEPS = {
    # what is wrong: (spoil, exception, words of the message)
    "logits 2-D": (change("logits", lambda t: t[0]), ValueError, "logits [B, L, V]"),
    "logits int": (change("logits", lambda t: t.int()), TypeError, "logits dtype Int"),
    "logits complex": (change("logits", lambda t: t.cfloat()), TypeError, "logits dtype"),
    "logits V = 0": (change("logits", lambda t: t[..., :0]), ValueError, "logits"),
    "logits stride": (change("logits", stretched), ValueError, "logits stride 1 42 14 2"),
    "logits grad": (
        change("logits", lambda t: t.clone().requires_grad_()),
        ValueError,
        "logits require grad",
    ),
    "logits list": (change("logits", lambda t: t.tolist()), TypeError, "logits Tensor list"),
    "logits batch": (change("logits", lambda t: t[:1]), ValueError, "tokens [B, L]"),
    "logits length": (change("logits", lambda t: t[:, :2]), ValueError, "tokens [B, L]"),
    "tokens int16": (change("tokens", lambda t: t.short()), TypeError, "tokens int64 int32 Short"),
    "tokens 1-D": (change("tokens", lambda t: t[0]), ValueError, "tokens [B, L] [3]"),
    "tokens shape": (change("tokens", lambda t: t.t()), ValueError, "tokens [2, 3] [3, 2]"),
    "tokens list": (change("tokens", lambda t: t.tolist()), TypeError, "tokens Tensor list"),
    "tokens None": (change("tokens", lambda t: None), TypeError, "tokens Tensor None"),
    "tokens device": (change("tokens", lambda t: t.to("meta")), ValueError, "tokens device meta"),
    "logits device": (change("logits", lambda t: t.to("meta")), ValueError, "device meta"),
    "candidates int": (change("candidates", ones(B, L, dtype=torch.int8)), TypeError, "candidates"),
    "candidates shape": (change("candidates", ones(B, 1)), ValueError, "candidates [2, 3] [2, 1]"),
    "candidates device": (
        change("candidates", lambda _: torch.ones(B, L).bool().to("meta")),
        ValueError,
        "candidates device meta",
    ),
    "candidates list": (change("candidates", lambda _: [[True] * L] * B), TypeError, "candidates"),
    "mask id too big": (change("config", lambda c: c.replace(mask_id=V)), ValueError, "mask_id 7"),
    "config dict": (change("config", lambda c: {"mask": 0}), TypeError, "config DecodeConfig dict"),
    "config None": (change("config", lambda c: None), TypeError, "config DecodeConfig None"),
    "candidates None": (given({"mask_id": None}), ValueError, "candidates config.mask_id None"),
    "editable int": (given(EDITS, editable=IDS), TypeError, "editable Bool Long"),
    "editable shape": (given(EDITS, editable=CELLS.t()), ValueError, "editable [2, 3] [3, 2]"),
    "editable device": (given(EDITS, editable=CELLS.to("meta")), ValueError, "editable meta"),
    "editable list": (given(EDITS, editable=[True]), TypeError, "editable Tensor list"),
    "editable for no rule": (given(editable=CELLS), ValueError, "editable config.edit_threshold"),
    "proposed bool": (given(proposed=CELLS), TypeError, "proposed Long Bool"),
    "proposed int32": (given(proposed=IDS.int()), TypeError, "proposed Long Int"),
    "proposed shape": (given(proposed=IDS[0]), ValueError, "proposed [2, 3] [3]"),
    "proposed device": (given(proposed=IDS.to("meta")), ValueError, "proposed meta"),
    "proposed list": (given(proposed=[1]), TypeError, "proposed Tensor list"),
    "slots int32": (given(slots=SLOTS.int()), TypeError, "slots Long Int"),
    "slots shape": (given(slots=IDS), ValueError, "slots [2] [2, 3]"),
    "slots device": (given(slots=SLOTS.to("meta")), ValueError, "slots meta"),
    "slots list": (given(slots=[0, 1]), TypeError, "slots Tensor list"),
    "rows dict": (given(rows={"quota": SLOTS}), TypeError, "rows RowParams dict"),
    "rows integers": (given(rows=RowParams(min_p=SLOTS)), TypeError, "rows.min_p Double Long"),
    "rows numbers": (given(rows=RowParams(quota=HALVES)), TypeError, "rows.quota Long Float"),
    "rows half": (given(rows=RowParams(top_p=HALVES.half())), TypeError, "rows.top_p Float Half"),
    "rows int16": (given(rows=RowParams(top_k=SLOTS.short())), TypeError, "rows.top_k Int Short"),
    "rows seed": (given(rows=RowParams(seed=SLOTS.int())), TypeError, "rows.seed Long Int"),
    "rows shape": (given(rows=RowParams(quota=IDS)), ValueError, "rows.quota [2] [2, 3]"),
    "rows batch": (given(rows=RowParams(quota=IDS[0])), ValueError, "rows.quota [2] [3]"),
    "rows stride": (
        given(rows=RowParams(threshold=HALVES.repeat(2)[::2])),
        ValueError,
        "rows.threshold contiguous [2]",
    ),
    "rows device": (
        given(rows=RowParams(temperature=HALVES.to("meta"))),
        ValueError,
        "rows.temperature meta",
    ),
    "rows for no rule": (
        given(rows=RowParams(edit_threshold=HALVES)),
        ValueError,
        "rows.edit_threshold config.edit_threshold",
    ),
    "state dict": (change("state", lambda s: {}), TypeError, "state DecodeState None dict"),
    "state None": (given(state=None), ValueError, "state config.temporal_steps None"),
    "state None for a schedule": (
        given({"base": "schedule", **OFF}, state=None),
        ValueError,
        "state config.base schedule None",
    ),
    "state None for a random cell": (
        given(OFF | {"token_cluster": "random"}, state=None),
        ValueError,
        "state config.token_cluster random None",
    ),
    "state None for draws": (
        given({"temperature": 0.5, **OFF}, state=None),
        ValueError,
        "state config.temperature None",
    ),
    "state None for draws of rows": (
        given(OFF, state=None, rows=RowParams(temperature=HALVES)),
        ValueError,
        "state rows.temperature None",
    ),
    "state None for slots": (given(OFF, state=None, slots=SLOTS), ValueError, "state slots None"),
    "state batch": (change("state", lambda _: DecodeState(3, 3)), ValueError, "state B = 2 got 3"),
    "state length of slots": (
        given(state=DecodeState(7, 4), slots=SLOTS),
        ValueError,
        "state.streak_count [7, 3] [7, 4]",
    ),
    "state step map": (
        change_state("step_map", lambda _: torch.zeros(B, L, dtype=torch.int32)),
        TypeError,
        "state.step_map Short Int",
    ),
    "state length": (change("state", lambda _: DecodeState(B, 1)), ValueError, "state [2, 1]"),
    "state device": (
        change("state", lambda _: DecodeState(B, L, device="meta")),
        ValueError,
        "state device meta",
    ),
    "state dtype": (
        change_state("streak_sum", lambda t: t.double()),
        TypeError,
        "state streak_sum Float Double",
    ),
    "state counters": (change_state("counters", lambda t: t[:, :3]), ValueError, "state counters"),
    "state strides": (
        change_state("streak_id", lambda t: t.t().contiguous().t()),
        ValueError,
        "state streak_id",
    ),
    "shift": (change("logits_shift", lambda _: 2), ValueError, "logits_shift 2"),
}


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
    for name, value in vars(call).items():
        setattr(call, name, moved(value, device))
    with pytest.raises(exception) as error:
        getattr(r2, op)(**vars(call))
    check_message(error, op, words)
    assert not tokens.any()
    left = call.state
    if isinstance(left, DecodeState) and left.streak_id.shape == (B, L) and left.device != META:
        for name in STREAKS:
            assert same_bits(getattr(call.state, name).float(), getattr(state, name).float()), name
        assert call.state.counters[:, Counter.STEP].tolist() == [0, 0]


# What fake tensors do not say, where they are among it, and what options need.
NOT_OF_FAKES = ("device", "grad", "strides", "rows stride", "None", "for no rule", "list")


@pytest.mark.parametrize("op", ["decode_step", "select"])
@pytest.mark.parametrize("what", [w for w in STEPS if not any(no in w for no in NOT_OF_FAKES)])
def test_step_of_fake_tensors(r2, op, what):
    """Shapes and dtypes that the op refuses its fake kernel refuses, by the same exception."""
    spoil, exception, words = STEPS[what]
    call = Call("meta")
    spoil(call)
    for name, value in vars(call).items():
        setattr(call, name, moved(value, "meta"))
    with pytest.raises(exception) as error:
        getattr(r2, op)(**vars(call))
    check_message(error, op, words.split()[0])


def test_tokens_that_share_memory(r2, device):
    """`decode_step` would write a cell twice; `select` only reads."""
    call = Call(device)
    tokens = torch.zeros(1, L, dtype=torch.int64, device=device).expand(B, L)
    with pytest.raises(ValueError) as error:
        r2.decode_step(call.logits, tokens, call.state, call.config)
    check_message(error, "decode_step", "tokens memory")
    assert not tokens.any() and not call.state.counters[:, Counter.STEP].any()
    assert r2.select(call.logits, tokens, call.state, call.config).rule.any()


def test_grad_mode(r2, device):
    """Parameters around it are no obstacle; logits with a graph are, also under no_grad."""
    call = Call(device)
    call.logits.requires_grad_()
    with torch.no_grad(), pytest.raises(ValueError, match="grad"):
        r2.decode_step(call.logits, call.tokens, call.state, call.config)
    step = r2.decode_step(call.logits.detach(), call.tokens, call.state, call.config)
    assert step.rule.any() and not step.confidence.requires_grad


@pytest.mark.parametrize("op", ["decode_step", "select", "token_confidence", "vocab_statistics"])
def test_forward_mode_raises(r2, device, op):
    """A confidence without a tangent would be taken for a constant."""
    call = Call(device)
    own = (call.tokens, call.state, call.config) if op in ("decode_step", "select") else ()
    words = f"{op}: logits takes no tangent of forward-mode differentiation"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(call.logits, torch.ones_like(call.logits))
        with pytest.raises(NotImplementedError, match=words):
            getattr(r2, op)(dual, *own)
        getattr(r2, op)(call.logits, *own)


def test_forward_mode_of_a_streak_raises(r2, device):
    is_masked = torch.ones(2, 4, dtype=torch.bool, device=device)
    confidence = torch.ones(2, 4, device=device)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="confidence takes no"):
        r2.update_stability_(
            r2.DecodeState(2, 4, device=device),
            torch.zeros(2, 4, dtype=torch.int64, device=device),
            forward_ad.make_dual(confidence, confidence),
            was_masked=is_masked,
            is_masked=is_masked,
            steps=1,
            min_confidence=0.5,
        )


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
    logits = torch.zeros(B, L, V, device=device)
    state = DecodeState(B, L, device=device)
    cells = {"prediction": ids, "confidence": p, "is_masked": masked, "min_confidence": 0.5}
    step = {"logits": logits, "tokens": ids * 0, "state": state, "config": DecodeConfig(0)}
    return {
        "token_confidence": {"logits": logits},
        "vocab_statistics": {"logits": logits},
        "window_pool": {
            "confidence": p,
            "is_masked": masked,
            "window": 2,
            "min_confidence": 0.5,
        },
        "positional_ambiguity": cells,
        "update_stability_": {"state": state, **cells, "was_masked": masked, "steps": 2},
        "decode_step": step,
        "select": step,
        "row_stats": {"logits": logits, "targets": ids},
        "sft_loss": {"logits": logits, "targets": ids},
    }[op]


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
    with pytest.raises(exception) as error:
        getattr(r2, op)(**arguments)
    check_message(error, op, f"{argument} {words}")
    if state is not None:
        assert_same(state_tensors(state), state_tensors(DecodeState(B, L, device=device)))


# ---- scalars ---------------------------------------------------------------------------------

INTEGERS = [
    ("decode_step", "logits_shift"),
    ("select", "logits_shift"),
    ("token_confidence", "exclude_id"),
    ("vocab_statistics", "first_id"),
    ("vocab_statistics", "exclude_id"),
    ("window_pool", "window"),
    ("window_pool", "max_unmasked"),
    ("positional_ambiguity", "min_run"),
    ("positional_ambiguity", "seed"),
    ("positional_ambiguity", "step"),
    ("update_stability_", "steps"),
    ("row_stats", "ignore_index"),
    ("sft_loss", "ignore_index"),
]
NUMBERS = [
    ("window_pool", "min_confidence"),
    ("positional_ambiguity", "min_confidence"),
    ("update_stability_", "min_confidence"),
    ("row_stats", "temperature"),
    ("sft_loss", "entropy_weight"),
    ("sft_loss", "entropy_temperature"),
    ("sft_loss", "normalizer"),
]
OPTIONAL_TENSORS = [
    ("decode_step", "candidates"),
    ("decode_step", "editable"),
    ("decode_step", "proposed"),
    ("select", "slots"),
    ("token_confidence", "candidates"),
    ("vocab_statistics", "candidates"),
    ("positional_ambiguity", "row"),
    ("sft_loss", "weight"),
]


def refused(r2, op: str, argument: str, value, exception) -> str:
    """The message; what it says of op, argument and value is checked, and that the state stays."""
    arguments = valid(op, "cpu") | {argument: value}
    with pytest.raises(exception) as error:
        getattr(r2, op)(**arguments)
    message = str(error.value)
    assert message.startswith(f"{op}: {argument} takes "), message
    if "state" in arguments:
        assert_same(state_tensors(arguments["state"]), state_tensors(DecodeState(B, L)))
    return message


@pytest.mark.parametrize("op, argument", INTEGERS)
def test_what_is_no_integer(r2, op, argument):
    no_integers = (2.5, 1.0, "1", True, [1], torch.tensor(True), torch.tensor([1]), np.float64(1))
    for value in no_integers:
        assert "an integer" in refused(r2, op, argument, value, TypeError)
    for value in (2**63, -(2**63) - 1, 10**30):
        message = refused(r2, op, argument, value, ValueError)
        assert " of 64 bits" in message or "in [0, 1]" in message
        assert message.endswith(f", got {value}")


@pytest.mark.parametrize("op, argument", INTEGERS)
def test_whatever_indexes_is_an_integer(r2, op, argument):
    def result(value):
        made = getattr(r2, op)(**valid(op, "cpu") | {argument: value})
        return [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]

    for value in (np.int64(1), np.uint8(1), torch.tensor(1), Rule.THRESHOLD):
        assert_same(result(value), result(1))


@pytest.mark.parametrize("op, argument", NUMBERS)
def test_what_is_no_number(r2, op, argument):
    for value in ("0.5", True, [0.5], 1j):
        assert "number" in refused(r2, op, argument, value, TypeError)
    refused(r2, op, argument, 10**400, ValueError)
    half = [getattr(r2, op)(**valid(op, "cpu") | {argument: x}) for x in (0.5, np.float32(0.5))]
    assert_same(*(tree_leaves(made) for made in half))


@pytest.mark.parametrize("op, argument", OPTIONAL_TENSORS)
def test_what_is_no_tensor(r2, op, argument):
    for value in ([[1]], "mask", 0.5):
        message = refused(r2, op, argument, value, TypeError)
        assert message.endswith(f"a torch.Tensor or None, got {type(value).__name__}")


def test_a_flag_is_a_bool(r2):
    for value in (1, None, "yes"):
        refused(r2, "sft_loss", "inplace_backward", value, TypeError)


@pytest.mark.parametrize("name", ["values", "dtype"])
def test_statistics_of_something_else(r2, name):
    part = r2.vocab_statistics(torch.zeros(B, L, V))._replace(**{name: [1.0]})
    for op, argument in (("decode_step", "logits"), ("merge_statistics", "parts")):
        arguments = valid(op, "cpu") | {"logits": part} if op == "decode_step" else {"parts": part}
        with pytest.raises(TypeError, match=rf"{op}: {argument}.{name} takes .*, got list"):
            getattr(r2, op)(**arguments)


# ---- DecodeConfig and DecodeState ------------------------------------------------------------

FIELDS = {
    # field: (values of the right type, values of the wrong type)
    "mask_id": ((-1,), (1.0, "1", True)),
    "base": (("greedy", "", None), (1,)),
    "threshold": ((-0.1, 1.1, float("nan"), float("inf")), ("0.9", True)),
    "compare": (("<", "", None), (1,)),
    "quota": ((-1, 2**31), (None, 1.5, "1", True)),
    "factor": ((0.0, -1.0, float("nan"), float("inf")), (None, "1")),
    "error_budget": ((-0.1, float("nan"), float("inf")), (None, "1")),
    "entropy_budget": ((-0.1, float("nan"), float("inf")), (None, "1")),
    "last_free": ((), (None, 1, "yes")),
    "steps_per_block": ((0, -1, 2**31), (1.5, "4", True)),
    "confidence_cluster_size": ((-1, 2**31), (1.5, "3", True)),
    "spatial_threshold": ((-0.1, 1.1, float("nan")), (None, "0.8")),
    "confidence_cluster_unmasked": ((-1, 2**31), (0.5, "1", False)),
    "neighbour_radius": ((-1, 2**31), (1.5, "4", True)),
    "neighbour_threshold": ((-0.1, 1.1, float("nan")), (None, "0.8")),
    "token_cluster": (("best", "max"), (1, True)),
    "token_cluster_size": ((0, -2, 2**31), (None, 2.0, "2")),
    "temporal_steps": ((-1, 2**31), (2.5, "3", True)),
    "temporal_threshold": ((-0.1, 1.1, float("nan")), (None, "0.8")),
    "temporal_eval": (("mean", "first", None), (0,)),
    "edit_threshold": ((-0.1, 1.1, float("nan")), ("0.9", True)),
    "temperature": ((-0.1, float("nan"), float("inf")), (None, "1")),
    "sampled_confidence": (("cold", None), (1, True)),
    "top_k": ((0, -1, 2**31), (1.5, "5", True)),
    "top_p": ((0.0, -0.1, 1.1, float("nan")), ("0.9", True)),
    "min_p": ((0.0, -0.1, 1.1, float("nan")), ("0.9", True)),
    "seed": ((2**63, -(2**63) - 1), (None, 1.5, "0", True)),
    "mask_prediction": (("forbid", None), (1, True)),
    "confidence_dtype": (("bfloat16", "float64", None), (torch.bfloat16,)),
    "report_entropy": ((), (None, 1, "yes")),
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
        assert message.startswith(f"DecodeConfig: {field} takes ")
        assert message.endswith(f", got {value!r}")


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
    assert DecodeConfig.budget(5) == DecodeConfig(5, base="budget", last_free=True, **off)
    assert DecodeConfig.entropy(5) == DecodeConfig(5, base="entropy", last_free=True, **off)
    assert DecodeConfig.r2(5) == DecodeConfig(5)
    release = {
        "threshold": 0.9,
        "confidence_cluster_size": 3,
        "spatial_threshold": 0.8,
        "confidence_cluster_unmasked": 1,
        "token_cluster": "confidence",
        "token_cluster_size": 2,
        "temporal_steps": 3,
        "temporal_threshold": 0.8,
        "temporal_eval": "last",
        "temperature": 0.0,
        "sampled_confidence": "untempered",
        "confidence_dtype": "float32",
        "compare": ">=",
        "quota": 1,
    }
    ours = {"mask_prediction": "ban", "neighbour_radius": 0, "edit_threshold": None}
    release |= ours | {"report_entropy": False}
    assert dataclasses.asdict(DecodeConfig(5)).items() >= release.items()


def test_config_holds_plain_values():
    """Numpy scalars and 0-dim tensors become integers and floats: equal, hashable, printable."""
    given = DecodeConfig(np.int64(5), threshold=np.float32(0.5), top_k=torch.tensor(3), factor=2)
    config = DecodeConfig(5, threshold=0.5, top_k=3, factor=2.0)
    assert given == config and hash(given) == hash(config) and repr(given) == repr(config)
    assert [type(value) for value in given._op_args] == [type(value) for value in config._op_args]


@pytest.mark.parametrize(
    "sizes, exception",
    [((-1, 2), ValueError), ((2, -1), ValueError), ((1.0, 2), TypeError), ((1, True), TypeError)],
)
def test_state_sizes(sizes, exception):
    with pytest.raises(exception, match="DecodeState: (rows|block_length) takes"):
        DecodeState(*sizes)


def test_memory_that_is_written_is_not_shared(r2, device):
    """Two cells in one place would take the token of whichever is written last."""
    call = Call(device)
    memory = torch.zeros(64, dtype=torch.int64, device=device)
    good = {"dense": (L, 1), "apart": (7, 2), "transposed": (1, B), "interleaved": (1, 2)}
    shared = {"windows": (1, 1), "wider windows": (2, 1), "one row": (0, 1), "one column": (1, 0)}
    for strides in (*good.values(), *shared.values()):
        tokens = memory.zero_().as_strided((B, L), strides)
        step = (call.logits, tokens, call.state.reset(), call.config)
        if strides in good.values():
            assert (r2.decode_step(*step).rule != Rule.NONE).any() and tokens.any()
            continue
        with pytest.raises(ValueError, match="^decode_step: tokens takes .* do not share memory"):
            r2.decode_step(*step)
        assert not memory.any()
        r2.select(*step)  # writes none of it
    rows = torch.randn(64, device=device).as_strided((2, 3), (2, 1))
    targets = torch.tensor([1, 2], device=device)
    with pytest.raises(ValueError, match="^sft_loss: logits takes .* do not share memory"):
        r2.sft_loss(rows, targets, inplace_backward=True)
