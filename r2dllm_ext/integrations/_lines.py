# SPDX-License-Identifier: Apache-2.0
"""What a user types for each engine: `r2dllm engines` prints it, the README's table is the same."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from ._versions import ENGINES, installed_version, is_known


class Use(NamedTuple):
    """An engine with this package."""

    name: str  # of the engine, as it calls itself
    lines: tuple[str, str]  # what a user types; R2's rules where the engine's own are as short
    faster: str  # what becomes faster by them
    commit: str = ""  # that was tested, of a repository of scripts that nobody installs


# In the order of the README; the keys are the modules of `r2dllm_ext.integrations`.
USES: Mapping[str, Use] = MappingProxyType(
    {
        "sglang": Use(
            "SGLang",
            (
                "echo 'rules: r2' > r2.yaml",
                "python -m sglang.launch_server --dllm-algorithm R2DLLM "
                "--dllm-algorithm-config r2.yaml ...",
            ),
            "the step of all requests: one pass over the logits, one host read",
        ),
        "diffusers": Use(
            "diffusers",
            (
                "from r2dllm_ext.integrations.diffusers import R2BlockRefinementScheduler as R2",
                "pipe.scheduler = R2.from_config(pipe.scheduler.config)",
            ),
            "the scheduler's step, editing included",
        ),
        "transformers": Use(
            "transformers",
            (
                "from r2dllm_ext.integrations.transformers import r2_generate",
                "model.generate(**inputs, custom_generate=r2_generate, r2_config=config)",
            ),
            "the whole decode; transformers itself has no loop for these models",
        ),
        "lmdeploy": Use(
            "LMDeploy",
            (
                "from r2dllm_ext.integrations import lmdeploy as r2_lmdeploy",
                "undo = r2_lmdeploy.patch()  # before the pipeline is built",
            ),
            "the unmasking of a step: no softmax over the vocabulary is stored",
        ),
        "dllm_plugin": Use(
            "dllm-plugin (vLLM)",
            (
                "from r2dllm_ext.integrations.dllm_plugin import R2RemaskingPolicy, batched_remask",
                "worker.run_one_block(policy=R2RemaskingPolicy(config), ...)",
            ),
            "the remasking of a block, which the plugin's policy does on Python's floats",
        ),
        "dinfer": Use(
            "dInfer",
            (
                "from r2dllm_ext.integrations.dinfer import R2Decoder",
                "llm = BlockWiseDiffusionLLM(model, R2Decoder(config), BlockIteratorFactory())",
            ),
            "the decoder's step: no softmax over the vocabulary is stored",
        ),
        "fast_dllm": Use(
            "Fast-dLLM, its forks, R2-dLLM",
            (
                "from r2dllm_ext.integrations import fast_dllm",
                "undo = fast_dllm.patch(generate)  # their module of this name",
            ),
            "the decision after each forward; rows outside the block are not read",
            commit="24cc59e",
        ),
        "lm_eval": Use(
            "LM evaluation harness",
            (
                "python -m r2dllm_ext.integrations.lm_eval --model r2dllm --tasks gsm8k \\",
                "--model_args pretrained=FOLDER_OR_ID,preset=r2,cache=dual,answers=a.jsonl",
            ),
            "generation tasks of LLaDA and Dream; forwards and tokens a second beside the scores",
        ),
    }
)


def status(engine: str) -> str:
    """Which version is installed here, and whether it is one that was tested.

    >>> status("fast_dllm")
    'a repository of scripts; tested at 24cc59e'
    """
    if engine not in ENGINES:
        return f"a repository of scripts; tested at {USES[engine].commit}"
    row, version = ENGINES[engine], installed_version(engine)
    if version is None:
        return f"not installed; tested with {row.package} {row.tested}"
    found = f"{row.package} {version}".rstrip()
    if row.repository:
        return f"{found} is installed, of which commit no version tells; tested at {row.tested}"
    if version == row.tested:
        return f"{found}, as tested"
    known = "taken" if is_known(engine, version) else "refused"
    return f"{found} is {known}; tested with {row.tested}"
