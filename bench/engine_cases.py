# SPDX-License-Identifier: Apache-2.0
"""An engine's own step and ours in its place, both in the engine's loop.

The loop is the engine's code; where it runs a model it gets the same logits in every forward. Of a
block's cells three quarters are above every threshold, and the others differ in probability, so
that a decode is a step that commits many and then steps that commit one.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from baselines import authors_transfer_index
from comparisons import Disagreement
from report import optional
from shapes import Shape, spike
from timing import Variant
from torch import Tensor

_TESTS = Path(__file__).parent.parent / "python_tests"
_BLOCK = 32  # cells that are open in a full pass of Fast-dLLM
_SURE = 0.995


class Problem(NamedTuple):
    """Logits [B, L, V] of the step, and tokens [B, L] of which the last block is masked."""

    logits: Tensor
    tokens: Tensor
    mask_id: int


class Loop(NamedTuple):
    """`call` runs the engine's loop to its end; `renew` undoes it."""

    call: Callable[[], tuple[Tensor, ...]]
    forwards: Callable[[], int]  # of the last call
    renew: Callable[[], Any] = lambda: None


class EngineCase(NamedTuple):
    """Times are of a step: `turns` of the variants are the forwards of the loop."""

    variants: list[Variant]
    forwards: int
    bytes: int  # of a step's logits
    source: str  # of the engine's code


class Step(NamedTuple):
    """A step of an engine that is measured."""

    loops: Callable[[Problem], tuple[Loop, Loop, str]]  # ours, theirs, source of theirs
    engine: str
    dtypes: tuple[str, ...]  # that the engine hands over
    shapes: tuple[Shape, ...]


def engine_case(name: str, shape: Shape, dtype: torch.dtype, device: str) -> EngineCase:
    """Both ways, after they have given the same tokens in as many forwards."""
    ours, theirs, source = STEPS[name].loops(_problem(shape, dtype, device))
    results = []
    for loop in (ours, theirs):
        loop.renew()
        results.append((*(tensor.clone() for tensor in loop.call()), loop.forwards()))
    (*got, forwards), (*want, their_forwards) = results
    if not all(torch.equal(*pair) for pair in zip(got, want, strict=True)):
        raise Disagreement(f"{name}: what is decoded differs")
    if forwards != their_forwards:
        raise Disagreement(f"{name}: {forwards} forwards, theirs {their_forwards}")
    variants = [
        Variant(way, loop.call, loop.renew, graph=False, turns=forwards)
        for way, loop in (("ours", ours), ("theirs", theirs))
    ]
    bytes_of_a_step = shape.B * shape.L * shape.V * dtype.itemsize
    return EngineCase(variants, forwards, bytes_of_a_step, source)


def missing(name: str) -> str | None:
    """Why a step can't be measured here, or None."""
    engine = STEPS[name].engine
    return None if engine == "fast_dllm" else optional(engine)


@torch.no_grad()
def _problem(shape: Shape, dtype: torch.dtype, device: str) -> Problem:
    B, L, V = shape
    g = torch.Generator(device).manual_seed(0)
    logits = torch.empty(shape, dtype=dtype, device=device).normal_(generator=g)
    cell = torch.arange(L, device=device)
    target = (torch.arange(B * L, device=device).view(B, L) * 7919 + 1) % V
    target[target == shape.mask_id] = 0
    # The unsure ones are below every engine's threshold, and far enough apart for bfloat16.
    place = (cell % _BLOCK // 4 * 5 + torch.arange(B, device=device)[:, None]) % (_BLOCK // 4)
    unsure = (place * 0.3 - 2.5).sigmoid()
    spike(logits, target, torch.where(cell % 4 == 1, unsure, _SURE))
    tokens = target.clone()
    tokens[:, -_BLOCK:] = shape.mask_id
    return Problem(logits, tokens, shape.mask_id)


# ---- Fast-dLLM -------------------------------------------------------------------------------


def their_generate(repository: str) -> ModuleType | None:
    """`llada/generate.py` of a checkout in R2DLLM_ENGINE_SOURCES, or None; what it imports of the
    model is not needed."""
    sources = os.environ.get("R2DLLM_ENGINE_SOURCES", "").strip()  # blank counts as unset
    path = Path(sources, repository, "llada", "generate.py")
    if not (sources and path.is_file()):
        return None
    stubs = {name: ModuleType(name) for name in ("model", "model.modeling_llada", "transformers")}
    for name in ("LLaDAModelLM", "AutoTokenizer", "AutoModel"):
        for stub in stubs.values():
            setattr(stub, name, None)
    spec = spec_from_file_location("their_generate", path)
    module = module_from_spec(spec)
    with mock.patch.dict(sys.modules, stubs):
        spec.loader.exec_module(module)
    return module


def _fast_dllm(problem: Problem) -> tuple[Loop, Loop, str]:
    """A pass over prompt and answer, of which the last block is open."""
    from r2dllm_ext.integrations.fast_dllm import get_transfer_index

    logits, x, mask_id = problem
    open_cells = x == mask_id
    checkout = their_generate("Fast-dLLM")
    theirs = checkout.get_transfer_index if checkout else authors_transfer_index

    def loop(way: Callable) -> Loop:
        given = (logits, 0.0, "low_confidence", open_cells, x, None, 0.9)
        return Loop(lambda: way(*given), lambda: 1)

    return loop(get_transfer_index), loop(theirs), "checkout" if checkout else "restated"


# ---- diffusers -------------------------------------------------------------------------------


def _diffusers(problem: Problem) -> tuple[Loop, Loop, str]:
    """`LLaDA2Pipeline` on one block after a prompt of one block."""
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
    from diffusers import __version__ as version

    from r2dllm_ext.integrations.diffusers import R2BlockRefinementScheduler

    logits, x, mask_id = problem

    class Model(torch.nn.Module):
        device, dtype, forwards = logits.device, logits.dtype, 0

        def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
            self.forwards += 1
            return SimpleNamespace(logits=logits)

    length = x.shape[1]

    def loop(scheduler: Any) -> Loop:
        model = Model()
        pipe = LLaDA2Pipeline(model=model, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)

        def call() -> tuple[Tensor]:
            model.forwards = 0
            sizes = {"gen_length": length, "block_length": length, "num_inference_steps": length}
            output = pipe(
                input_ids=torch.zeros_like(x), mask_token_id=mask_id, output_type="seq", **sizes
            )
            return (output.sequences,)

        return Loop(call, lambda: model.forwards)

    theirs = BlockRefinementScheduler(block_length=length)
    ours = R2BlockRefinementScheduler.from_config(theirs.config)
    return loop(ours), loop(theirs), version


# ---- SGLang ----------------------------------------------------------------------------------


def _sglang(their_name: str, our_name: str, options: dict[str, Any]) -> Callable:
    def loops(problem: Problem) -> tuple[Loop, Loop, str]:
        """`DllmAlgorithm.run`, the synchronous scheduler, on a batch of blocks."""
        runpy.run_path(str(_TESTS / "sglang_stub.py"))
        from sglang.srt.dllm.algorithm import get_algorithm
        from sglang.srt.dllm.config import DllmConfig
        from sglang.version import __version__ as version

        from r2dllm_ext.integrations.sglang import register

        register()
        logits, x, mask_id = problem
        rows, length = x.shape
        logits = logits.flatten(0, 1)

        def loop(name: str, **options: Any) -> Loop:
            algorithm = get_algorithm(DllmConfig(name, options, length, mask_id, rows))
            batch = SimpleNamespace(
                batch_size=rows, input_ids=x.flatten().clone(), dllm_prompt_mask=None
            )
            output = SimpleNamespace(full_logits=logits)
            runner = SimpleNamespace(forwards=0)

            def forward(batch: Any, pp_proxy_tensors: Any = None) -> Any:
                runner.forwards += 1
                return SimpleNamespace(logits_output=output, can_run_graph=False)

            def renew() -> None:
                runner.forwards = 0
                batch.input_ids.copy_(x.flatten())

            def call() -> tuple[Tensor]:
                algorithm.run(runner, batch)
                return (batch.input_ids,)

            runner.forward = forward
            return Loop(call, lambda: runner.forwards, renew)

        return loop(our_name, **options), loop(their_name), version

    return loops


# ---- LMDeploy --------------------------------------------------------------------------------


def _lmdeploy(problem: Problem) -> tuple[Loop, Loop, str]:
    """The processor on blocks of which each cell is open, after the sampler's argmax."""
    from lmdeploy.pytorch.config import DLLMConfig, UnmaskingStrategy
    from lmdeploy.pytorch.strategies.dllm.unmasking import UnmaskingProcessor
    from lmdeploy.version import __version__ as version

    from r2dllm_ext.integrations.lmdeploy import R2UnmaskingProcessor

    logits, x, _ = problem
    config = DLLMConfig(
        block_length=x.shape[1],
        unmasking_strategy=UnmaskingStrategy.from_str("low_confidence_dynamic"),
        denoising_steps=x.shape[1],
        confidence_threshold=0.85,
    )
    flat, ids = logits.flatten(0, 1), x.flatten()
    proposed = flat.argmax(-1)

    def loop(processor: Callable) -> Loop:
        mask = torch.zeros(len(ids), dtype=torch.uint8, device=ids.device)  # theirs writes into it
        return Loop(lambda: processor(flat, ids, proposed, mask), lambda: 1, lambda: mask.zero_())

    return loop(R2UnmaskingProcessor(config)), loop(UnmaskingProcessor(config)), version


_BLOCKS = Shape(8, 32, 126464)
STEPS = {
    "fast_dllm get_transfer_index": Step(
        _fast_dllm, "fast_dllm", ("bf16",), (Shape(1, 856, 126464),)
    ),
    "diffusers LLaDA2Pipeline": Step(
        _diffusers, "diffusers", ("bf16",), (Shape(1, 32, 126464), _BLOCKS)
    ),
    "sglang LowConfidence": Step(
        _sglang("LowConfidence", "R2DLLM", {"rules": "low_confidence"}),
        "sglang",
        ("fp32",),
        (_BLOCKS,),
    ),
    "sglang JointThreshold": Step(
        _sglang("JointThreshold", "R2JointThreshold", {}), "sglang", ("fp32",), (_BLOCKS,)
    ),
    "lmdeploy UnmaskingProcessor": Step(_lmdeploy, "lmdeploy", ("bf16",), (_BLOCKS,)),
}
