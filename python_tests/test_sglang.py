# SPDX-License-Identifier: Apache-2.0
"""SGLang: its own loops (`DllmAlgorithm.run`) with our algorithms and with its own.

The package is the real one; the model runner is ours, and a batch is the four fields of
`ForwardBatch` that an algorithm sees. Logits depend on a block's tokens and its request alone, so
that a block has to take the same steps in any batch. Two tokens of a cell may be equally likely;
two cells are not equally sure: `torch.topk`, by which SGLang forces one, chooses as it likes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import spiked_logits
from torch import Tensor

pytest.importorskip("sglang", reason="SGLang is not installed")

import sglang_stub  # noqa: E402, F401
from sglang.srt.dllm.algorithm import get_algorithm  # noqa: E402
from sglang.srt.dllm.config import DllmConfig  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

from r2dllm_ext import DecodeConfig  # noqa: E402
from r2dllm_ext.integrations.sglang import register  # noqa: E402

MASK, VOCAB, SIZE = 7, 211, 8


@pytest.fixture(autouse=True)
def registered():
    register()


def algorithm(name: str, *, fdfo: bool = False, size: int = SIZE, **options):
    config = DllmConfig(name, options, size, MASK, 2, first_done_first_out_mode=fdfo)
    return get_algorithm(config)


class Request:
    """A block to decode: its first cells are the prompt's."""

    def __init__(self, seed: int, *, dtype=torch.float32, masks: float = 0.0, size: int = SIZE):
        g = torch.Generator().manual_seed(seed)
        self.seed, self.dtype, self.masks = seed, dtype, masks
        prompt = seed % 4
        self.tokens = torch.full((size,), MASK)
        self.tokens[:prompt] = torch.randint(VOCAB, (prompt,), generator=g)
        self.prompt = torch.arange(size) < prompt
        if seed % 3 == 0:  # a mask id that is text
            self.tokens[: prompt // 2] = MASK
        self.target = torch.randint(VOCAB, (size,), generator=g)
        self.target[2:5] = self.target[2]  # a run of one prediction

    def logits(self, tokens: Tensor) -> Tensor:
        """[L, V] float32: a function of the tokens; what is decided makes its neighbours surer."""
        g = torch.Generator().manual_seed(hash((self.seed, *tokens.tolist())) % 2**62)
        shape = (1, len(tokens))
        target = torch.where(torch.rand(shape[1], generator=g) < 0.2, self.target + 1, self.target)
        target = (target % VOCAB)[None]
        target[torch.rand(shape, generator=g) < self.masks] = MASK
        decided = (tokens != MASK).float().mean()
        sure = 1 - 10 ** (-(1 + 3 * decided) * torch.rand(shape, generator=g))
        z = spiked_logits(g, target, sure, VOCAB)[0].to(self.dtype).float()
        tied = torch.rand(len(tokens), generator=g) < 0.1  # two tokens on top
        z[tied, torch.randint(VOCAB, (1,), generator=g)] = z[tied].amax(-1)
        return z


class Runner:
    """Stands where SGLang's ModelRunner stands."""

    def __init__(self) -> None:
        self.forwards = 0

    def forward(self, batch, pp_proxy_tensors=None):
        self.forwards += 1
        tokens = batch.input_ids.view(batch.batch_size, -1)
        logits = [r.logits(row) for r, row in zip(batch.requests, tokens, strict=True)]
        output = SimpleNamespace(full_logits=torch.cat(logits))
        return SimpleNamespace(logits_output=output, can_run_graph=False)


def batch_of(requests: list[Request], tokens: list[Tensor] | None = None):
    """SGLang gives a prompt mask only to batches with a mask id among the decided tokens."""
    prompt = torch.stack([r.prompt for r in requests])
    tokens = torch.stack([r.tokens for r in requests] if tokens is None else tokens)
    literal = bool(((tokens == MASK) & prompt).any())
    return SimpleNamespace(
        batch_size=len(requests),
        input_ids=tokens.flatten(),
        dllm_prompt_mask=prompt if literal else None,
        requests=requests,
    )


@torch.inference_mode()
def run_together(algorithm, requests: list[Request]) -> tuple[list[list[int]], int]:
    """The synchronous scheduler: the answers of a batch of blocks, and the forwards they took."""
    runner = Runner()
    _, answers, *_ = algorithm.run(runner, batch_of(requests))
    return [answer.tolist() for answer in answers], runner.forwards


@torch.inference_mode()
def serve(algorithm, requests: list[Request], at_once: int) -> dict[int, tuple[list[int], int]]:
    """First-done-first-out, batches of changing size and order: answer and forwards by request."""
    waiting, running, answers, runner = list(requests), [], {}, Runner()
    while waiting or running:
        if waiting and len(running) < at_once:
            running.insert(len(waiting) % (len(running) + 1), [waiting.pop(0), None, None, 0])
        batch = batch_of(
            [r for r, *_ in running], [r.tokens if t is None else t for r, t, *_ in running]
        )
        _, blocks, accepted, states, _ = algorithm.run(runner, batch, [s for *_, s, _ in running])
        rest = []
        for (request, _, _, forwards), block, length, state in zip(
            running, blocks, accepted, states, strict=True
        ):
            if length:
                answers[request.seed] = (block[int(request.prompt.sum()) :], forwards + 1)
            else:
                rest.append([request, torch.tensor(block), state, forwards + 1])
        running = rest
    return answers


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


@DTYPES
@pytest.mark.parametrize("threshold", [0.95, 0.7])
@pytest.mark.parametrize("masks", [0.0, 0.25], ids=["", "mask id on top"])
def test_low_confidence(dtype, threshold, masks):
    """250 blocks, 1,000 of a dtype."""
    for seed in range(0, 400, 4):
        requests = [
            Request(s, dtype=dtype, masks=masks) for s in range(seed, seed + 1 + seed // 4 % 4)
        ]
        theirs = algorithm("LowConfidence", threshold=threshold)
        ours = algorithm("R2DLLM", rules="low_confidence", threshold=threshold)
        assert run_together(ours, requests) == run_together(theirs, requests)


@DTYPES
@pytest.mark.parametrize("masks", [0.0, 0.25], ids=["", "mask id on top"])
@pytest.mark.parametrize(
    "vectorized, options",
    [
        (False, {}),
        (True, {"threshold": 0.8, "edit_threshold": 0.9, "max_post_edit_steps": 3}),
        (False, {"threshold": 0.7, "edit_threshold": 0.5, "penalty_lambda": 1.5}),
        (True, {"max_post_edit_steps": 0}),
    ],
)
def test_joint_threshold(dtype, masks, vectorized, options):
    """130 blocks, 1,040 of a dtype."""
    forwards = 0
    for seed in range(0, 208, 4):
        requests = [
            Request(s, dtype=dtype, masks=masks) for s in range(seed, seed + 1 + seed // 4 % 4)
        ]
        theirs = algorithm("JointThreshold", vectorized_decoding=vectorized, **options)
        want = run_together(theirs, requests)
        assert run_together(algorithm("R2JointThreshold", **options), requests) == want
        forwards += want[1]
    assert forwards > 160


# ---- first-done-first-out ----------------------------------------------------------------------

R2 = {"threshold": 0.8, "temporal_steps": 2, "temporal_threshold": 0.5, "spatial_threshold": 0.6}
CASES = {
    "low_confidence": ("R2DLLM", {"rules": "low_confidence"}, ("LowConfidence", {})),
    "joint_threshold": ("R2JointThreshold", {}, ("JointThreshold", {})),
    "r2": ("R2DLLM", R2, None),
    "r2 that edits": ("R2JointThreshold", {"rules": "r2", "edit_threshold": 0.9, **R2}, None),
    "schedule": ("R2DLLM", {"rules": "vanilla", "steps_per_block": 3}, None),
}


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_schedulers_agree(case, dtype):
    """A block takes the steps that it takes alone, whoever comes, leaves and changes rows."""
    name, options, engine = CASES[case]
    requests = [Request(seed, dtype=dtype) for seed in range(40)]
    ours = algorithm(name, fdfo=True, **options)
    served = serve(ours, requests, at_once=5)
    for request in requests:
        alone = run_together(algorithm(name, **options), [request])
        assert served[request.seed] == (alone[0][0], alone[1]), request.seed
    assert sum(forwards for _, forwards in served.values()) > 80
    if engine is not None:
        assert served == serve(algorithm(engine[0], fdfo=True, **engine[1]), requests, at_once=5)


def test_rules_of_r2_take_fewer_forwards():
    requests = [Request(seed) for seed in range(40)]
    forwards = {
        rules: run_together(algorithm("R2DLLM", rules=rules, threshold=0.95), requests)[1]
        for rules in ("low_confidence", "r2")
    }
    assert forwards["r2"] < forwards["low_confidence"]


@pytest.mark.parametrize("name", ["R2DLLM", "R2JointThreshold"])
def test_a_rank_without_requests_waits(name):
    """An idle batch, which data parallelism gives to ranks that have none."""
    batch = SimpleNamespace(
        batch_size=0,
        input_ids=torch.empty(0, dtype=torch.int64),
        dllm_prompt_mask=None,
        requests=[],
    )
    runner = Runner()
    runner.forward = lambda batch, pp_proxy_tensors=None: SimpleNamespace(
        logits_output=SimpleNamespace(full_logits=torch.empty(0, VOCAB)), can_run_graph=False
    )
    got = algorithm(name, fdfo=True).run(runner, batch, [])
    assert got[1:] == algorithm("LowConfidence", fdfo=True).run(runner, batch, [])[1:]


@torch.inference_mode()
def test_draws_do_not_hang_on_when_python_frees_a_slot():
    """On one rank the state of an aborted request may live on; blocks that follow draw alike."""
    answers = []
    for keep in (False, True):
        ours = algorithm("R2DLLM", fdfo=True, rules="low_confidence", temperature=1.0)
        held = []
        first = batch_of([Request(1), Request(2)])
        states = ours.run(Runner(), first, [None, None])[3]
        held.append(states if keep else None)
        del states
        answers.append(serve(ours, [Request(seed) for seed in range(10, 16)], at_once=2))
    assert answers[0] == answers[1]


def test_slots_are_used_again():
    """By whoever comes, when a block is finished or SGLang drops it."""
    ours = algorithm("R2DLLM", fdfo=True)  # two slots to begin with
    serve(ours, [Request(seed) for seed in range(30)], at_once=5)
    assert ours._slots.state.rows <= 8
    assert sorted(ours._slots._free) == list(range(ours._slots.state.rows))


@pytest.mark.parametrize("name", ["R2DLLM", "R2JointThreshold"])
def test_a_block_without_finite_logits_does_not_stay(name):
    broken, fine = Request(1), Request(2)
    broken.logits = lambda tokens: torch.full((SIZE, VOCAB), torch.nan)
    alone = run_together(algorithm(name), [fine])
    served = serve(algorithm(name, fdfo=True), [broken, fine], at_once=2)
    assert served[2] == (alone[0][0], alone[1])
    assert served[1][0] == [MASK] * (SIZE - 1)


@pytest.mark.parametrize("name", ["R2DLLM", "R2JointThreshold"])
def test_a_model_that_insists_on_the_mask_id_does_not_stay(name):
    stubborn = Request(1)
    stubborn.logits = lambda tokens: (
        torch.nn.functional.one_hot(torch.full((SIZE,), MASK), VOCAB) * 9.0
    )
    rules = {"R2DLLM": "low_confidence", "R2JointThreshold": "joint_threshold"}[name]
    served = serve(algorithm(name, fdfo=True, rules=rules), [stubborn], at_once=1)
    assert served[1][0] == run_together(algorithm(name, rules=rules), [stubborn])[0][0]


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, error",
    [
        ("R2DLLM", {"treshold": 0.9}, "R2DLLM: an option takes one of rules, .*, got 'treshold'"),
        ("R2DLLM", {"mask_id": 3}, "R2DLLM: an option takes one of rules, .*, got 'mask_id'"),
        ("R2DLLM", {"rules": "fast"}, "R2DLLM: rules takes one of .*, got 'fast'"),
        ("R2DLLM", {"rules": "joint_threshold"}, "R2DLLM: rules takes one of"),
        ("R2DLLM", {"threshold": 1.5}, r"threshold takes a number in \[0, 1\] or None, got 1.5"),
        ("R2DLLM", {"temporal_steps": "3"}, "temporal_steps takes an integer .*, got '3'"),
        ("R2DLLM", {"edit_threshold": 0.5}, "R2DLLM: edit_threshold takes None"),
        ("R2JointThreshold", {"edit_threshold": None}, "edit_threshold takes a number"),
        ("R2JointThreshold", {"penalty_lambda": -1}, "penalty_lambda takes a .*>= 0, got -1"),
        ("R2JointThreshold", {"max_post_edit_steps": 2.5}, "max_post_edit_steps takes an integer"),
        ("R2JointThreshold", {"vectorized_decoding": 1}, "vectorized_decoding takes"),
    ],
)
def test_bad_options_are_named(name, options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        algorithm(name, **options)


def test_options():
    ours = algorithm("R2DLLM", rules="vanilla", steps_per_block=3, quota=2, block_size=SIZE)
    assert ours.config == DecodeConfig.vanilla(MASK, steps_per_block=3, quota=2)
    assert algorithm("R2DLLM").config == DecodeConfig.r2(MASK)
    assert algorithm("R2DLLM", rules="low_confidence").config.threshold == 0.95
    edits = algorithm("R2JointThreshold", rules="r2")
    assert edits.config == DecodeConfig.r2(MASK, edit_threshold=0.0)
    assert edits.max_steps(SIZE) == SIZE + 17


MODEL = {  # whose size of block and mask id SGLang knows by its architecture
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 157184,
}


@pytest.mark.parametrize("name", ["R2DLLM", "R2JointThreshold"])
def test_a_server_with_a_bad_option_does_not_start(tmp_path, name):
    """SGLang's arguments, resolved as a server does before it starts a process."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    options = tmp_path / "options.yaml"
    server = {"model_path": str(tmp_path), "device": "cpu", "skip_tokenizer_init": True}
    dllm = {"dllm_algorithm": name, "dllm_algorithm_config": str(options)}
    options.write_text("rules: r2\ntemporal_steps: 2\nblock_size: 32\n")
    ServerArgs(**server, **dllm).resolve_once()
    options.write_text("rules: r2\ntemporal_steps: -2\n")
    with pytest.raises(ValueError, match="temporal_steps takes an integer in .*, got -2"):
        ServerArgs(**server, **dllm).resolve_once()


# ---- the plugin --------------------------------------------------------------------------------

LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import sglang_stub
from sglang.srt.plugins import load_plugins
load_plugins()
assert "sglang.srt.dllm.algorithm" not in sys.modules, "loaded by the plugin"
from sglang.srt.dllm.algorithm import get_algorithm
from sglang.srt.dllm.config import DllmConfig
for name in ("R2DLLM", "R2JointThreshold"):
    print(get_algorithm(DllmConfig(name, {}, 32, 7, 8)).config.threshold)
"""


def test_load_plugins_finds_the_package():
    if not entry_points(group="sglang.srt.plugins").select(name="r2dllm"):
        pytest.skip("r2dllm_ext is on the path, but not installed")
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.split() == ["0.9", "0.5"], result.stderr
