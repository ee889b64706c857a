# SPDX-License-Identifier: Apache-2.0
"""torch.compile: functions that call the ops are one graph and give the same bits."""

import shutil

import pytest
import torch
from cases import assert_same, clone, random_steps, state_tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from r2dllm_ext.config import DecodeConfig
from r2dllm_ext.state import Counter, DecodeState

CONFIGS = {
    "r2": DecodeConfig(0),
    "entropy": DecodeConfig(0, base="entropy", neighbour_radius=2, mask_prediction="skip"),
    "sampled": DecodeConfig(0, temperature=0.8, top_k=9, token_cluster="random", seed=3),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend: str, **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def run(step, config, shape, device, steps: int = 3):
    """Tensors of several steps of one block, driven by `step`."""
    state = DecodeState(*shape[:2], device=device)
    tokens = torch.full(shape[:2], config.mask_id, device=device)
    made = []
    for z in random_steps(3, shape, steps, config.mask_id):
        made += step(z.to(device), tokens, state, config)
    return [*made, tokens, *state_tensors(state)]


@pytest.mark.parametrize("op", ["decode_step", "select"])
@pytest.mark.parametrize("name", CONFIGS)
def test_step_in_a_graph(r2, device, name, op):
    """Tensor code and the step in one graph; tokens and state are written through it."""

    def step(logits, tokens, state, config):
        done = getattr(r2, op)(logits * 0.5 + 0.25, tokens, state, config)
        return (*done, done.remaining.sum() == 0)

    shape = (2, 8, 33)
    want = run(step, CONFIGS[name], shape, device)
    got = run(compiled(step, "aot_eager"), CONFIGS[name], shape, device)
    assert_same(got, want)
    assert want[2].any()


def test_rules_in_a_graph(r2, device):
    def rules(logits, state, masked):
        prediction, confidence = r2.token_confidence(logits, candidates=masked, exclude_id=0)
        window = r2.window_pool(confidence, masked, window=3, min_confidence=0.5)
        run = r2.positional_ambiguity(prediction, confidence, masked & ~window, min_confidence=0.3)
        final = r2.update_stability_(
            state,
            prediction,
            confidence,
            was_masked=masked,
            is_masked=masked & ~window & ~run,
            steps=1,
            min_confidence=0.2,
        )
        return prediction, confidence, window, run, final

    logits = random_steps(5, (3, 16, 65), 1, 0)[0].to(device)
    masked = torch.ones(3, 16, dtype=torch.bool, device=device)
    state = DecodeState(3, 16, device=device)
    twin = clone(state)
    want = rules(logits, state, masked)
    got = compiled(rules, "aot_eager")(logits, twin, masked)
    assert_same(got, want)
    assert_same(state_tensors(twin), state_tensors(state))
    assert all(cells.any() for cells in want[2:])


def test_dynamic_shapes(r2, device):
    """One graph for any batch and block."""
    torch._dynamo.utils.counters.clear()
    step, config = compiled(r2.decode_step, "aot_eager", dynamic=True), CONFIGS["r2"]
    for shape in ((2, 8, 33), (3, 16, 33), (5, 7, 65)):
        want = run(r2.decode_step, config, shape, device)
        assert_same(run(step, config, shape, device), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_errors_in_a_graph(r2, device):
    """Bad input is refused under the compiler too, with nothing written."""
    step = compiled(r2.decode_step, "aot_eager")
    state = DecodeState(2, 3, device=device)
    tokens = torch.zeros(2, 3, dtype=torch.int16, device=device)
    with pytest.raises(Exception, match="tokens"):
        step(torch.randn(2, 3, 5, device=device), tokens, state, CONFIGS["r2"])
    assert not tokens.any() and not state.counters[:, Counter.STEP].any()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(r2, device):
    def step(logits, tokens, state, config):
        done = r2.decode_step(logits.float() * 0.5, tokens, state, config)
        return (*done, (tokens == config.mask_id).sum(1))

    shape = (2, 8, 33)
    want = run(step, CONFIGS["r2"], shape, device)
    assert_same(run(compiled(step, "inductor"), CONFIGS["r2"], shape, device), want)


def test_export_of_a_dynamic_batch(r2):
    """With a state made inside: neither batch nor block length becomes a constant."""

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(16, 16)

        def forward(self, tokens):
            state = r2.DecodeState(*tokens.shape)
            tokens = tokens.clone()
            step = r2.decode_step(self.table(tokens), tokens, state, r2.DecodeConfig(3))
            return tokens, step.rule, state.counters

    dims = {0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("length", max=64)}
    with torch.no_grad():
        model = Step().eval()
        exported = torch.export.export(model, (torch.full((2, 8), 3),), dynamic_shapes=(dims,))
        for shape in ((1, 8), (2, 8), (5, 3)):
            tokens = torch.full(shape, 3)
            for got, want in zip(exported.module()(tokens), model(tokens), strict=True):
                assert torch.equal(got, want)


# ---- fake kernels ------------------------------------------------------------------------------

CELLS, ROWS = torch.rand(2, 4), torch.rand(3, 5)
IDS, MASK = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)
LOSS = [torch.tensor([1, 2, -100]), torch.ones(3)]
OPS = {
    # a call and what it takes
    "token_confidence": (
        lambda r2, z, c: r2.token_confidence(z, candidates=c),
        [torch.rand(2, 4, 8), MASK],
    ),
    "window_pool": (
        lambda r2, p, m: r2.window_pool(p, m, window=2, min_confidence=0.5),
        [CELLS, MASK],
    ),
    "positional_ambiguity": (
        lambda r2, i, p, m, b: r2.positional_ambiguity(i, p, m, min_confidence=0.5, row=b),
        [IDS, CELLS, MASK, torch.arange(2)],
    ),
    "update_stability_": (
        lambda r2, i, p, a, b: r2.update_stability_(
            DecodeState(2, 4), i, p, was_masked=a, is_masked=b, steps=2, min_confidence=0.5
        ),
        [IDS, CELLS, MASK, MASK],
    ),
    "row_stats": (lambda r2, z, t: r2.row_stats(z, t), [ROWS, LOSS[0]]),
    "sft_loss": (
        lambda r2, z, t, w, n: r2.sft_loss(z, t, w, normalizer=n),
        [ROWS, *LOSS, torch.tensor(2.0)],
    ),
    "linear_sft_loss": (
        lambda r2, h, v, t, w, b, n: r2.linear_sft_loss(
            h, v, t, w, bias=b, normalizer=n, max_rows=3
        ),
        [torch.rand(3, 4), torch.rand(5, 4), *LOSS, torch.rand(5), torch.tensor(2.0)],
    ),
}
SPOILT = {
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.cfloat(),
    "shorter": lambda t: t[:-1] if t.dim() else t[None],
    "narrower": lambda t: t[..., :-1] if t.dim() else t[None],
    "another dimension": lambda t: t[None],
    "empty": lambda t: t[..., :0] if t.dim() else t[None][:0],
    "another device": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("op", OPS)
def test_fake_kernels_refuse_what_the_op_refuses(r2, op):
    """Or a graph is captured of what can't be run."""
    call, arguments = OPS[op]

    def outcome(arguments):
        try:
            call(r2, *arguments)
        except (TypeError, ValueError) as error:
            return type(error)

    for place, argument in enumerate(arguments):
        for what, spoil in SPOILT.items():
            spoilt = [*arguments[:place], spoil(argument), *arguments[place + 1 :]]
            want, mode = outcome(spoilt), FakeTensorMode()
            with mode:
                got = outcome([mode.from_tensor(t) for t in spoilt])
            assert got == want, (place, what)
