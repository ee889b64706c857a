# SPDX-License-Identifier: Apache-2.0
"""LMDeploy: `R2UnmaskingProcessor`, and `patch`, which puts it where LMDeploy builds its own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .._checks import instance, refuse
from ..config import DecodeConfig, Rule
from ..ops import decode_step
from ._versions import require
from .rules import engine_config

require("lmdeploy")

from lmdeploy.pytorch import consts  # noqa: E402
from lmdeploy.pytorch.config import DLLMConfig  # noqa: E402
from lmdeploy.pytorch.strategies.dllm.unmasking import UnmaskingProcessor  # noqa: E402


def patch(config: DecodeConfig | None = None) -> Callable[[], None]:
    """From here on LMDeploy's pipelines and servers of this process unmask by `decode_step`.

    Call it before the pipeline is built. Model agents in other processes (several devices) are
    not reached.

    Args:
        config: as of `R2UnmaskingProcessor`.

    Returns:
        A function that undoes it, for pipelines built later.

    ```
    patch()  # LMDeploy's own strategy, or patch(DecodeConfig.r2(mask_id, temporal_steps=0))
    pipe = lmdeploy.pipeline(path, PytorchEngineConfig(dllm_block_length=4))
    ```
    """
    from lmdeploy.pytorch.strategies.dllm import model_agent  # its whole engine

    _check(config)
    before = model_agent.UnmaskingProcessor
    model_agent.UnmaskingProcessor = functools.partial(R2UnmaskingProcessor, config=config)

    def undo() -> None:
        model_agent.UnmaskingProcessor = before

    return undo


class R2UnmaskingProcessor(UnmaskingProcessor):
    """LMDeploy's unmasking of one step, by the rules of a `DecodeConfig`.

    Args:
        dllm_config: LMDeploy's; its `block_length` is L.
        config: None is LMDeploy's own strategy, that of `dllm_config`. Otherwise what a step may
            commit; nothing that takes a state (`temporal_steps`, base="schedule",
            token_cluster="random"), as LMDeploy does not say which rows it hands over, and no
            `temperature`, as its sampler has drawn the tokens already.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.
    """

    def __init__(self, dllm_config: DLLMConfig, config: DecodeConfig | None = None) -> None:
        super().__init__(dllm_config)
        _check(config)
        self.config = _own_rule(dllm_config) if config is None else config

    @torch.no_grad()
    def __call__(
        self,
        logits: torch.Tensor,
        input_ids: torch.Tensor,
        token_ids: torch.Tensor,
        dllm_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of B blocks.

        Args:
            logits: [B * L, V] float32, bfloat16 or float16.
            input_ids: [B * L] int64, the tokens of the forward.
            token_ids: [B * L] int64, what LMDeploy's sampler proposes; base rule, windows and
                neighbours judge it, ambiguity looks at the argmax.
            dllm_mask: [B * L] uint8, LMDeploy's MASKED, UNMASKED or CACHED of each cell.

        Returns:
            dllm_mask: [B * L], a new tensor: committed cells are UNMASKED, and blocks that came
                without a masked cell CACHED.
            token_ids: [B * L], the tokens of decided cells, the proposals of the others.

        No host synchronisation.
        """
        shape = (-1, self.dllm_config.block_length)
        mask = dllm_mask.view(shape)
        masked = mask == consts.DLLM_MASKED
        proposed = token_ids.view(shape)
        tokens = torch.where(masked, proposed, input_ids.view(shape))
        step = decode_step(
            logits.unflatten(0, shape),
            tokens,
            None,
            self.config,
            candidates=masked,
            proposed=proposed,
        )
        is_whole = (mask == consts.DLLM_UNMASKED).all(1, keepdim=True)
        mask = mask.masked_fill(is_whole, consts.DLLM_CACHED)
        mask = mask.masked_fill(step.rule != Rule.NONE, consts.DLLM_UNMASKED)
        return mask.flatten(), tokens.flatten()


def _own_rule(dllm_config: DLLMConfig) -> DecodeConfig:
    strategy = dllm_config.unmasking_strategy.name.lower()
    if strategy == "low_confidence_dynamic":
        options = {"confidence_threshold": dllm_config.confidence_threshold}
    else:
        length = dllm_config.block_length
        options = {"tokens_per_step": max(1, length // (dllm_config.denoising_steps or length))}
    return engine_config(f"lmdeploy.{strategy}", None, **options)


def _check(config: DecodeConfig | None) -> None:
    where = "R2UnmaskingProcessor"
    instance(where, "config", config, DecodeConfig, optional=True)
    if config is None:
        return
    if config.temporal_steps:
        refuse(ValueError, where, "config.temporal_steps", "0 or None", config.temporal_steps)
    for name, stateful in (("base", "schedule"), ("token_cluster", "random")):
        if getattr(config, name) == stateful:
            refuse(ValueError, where, f"config.{name}", f"no {stateful!r}", stateful)
    if config.temperature:
        refuse(ValueError, where, "config.temperature", "0", config.temperature)
    if config.edit_threshold is not None:
        refuse(ValueError, where, "config.edit_threshold", "None", config.edit_threshold)
