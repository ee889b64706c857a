# SPDX-License-Identifier: Apache-2.0
"""SGLang 0.5.23: `--dllm-algorithm R2DLLM` and `--dllm-algorithm R2JointThreshold`.

Where the package is installed beside SGLang its servers know both names: nothing has to be
imported. `--dllm-algorithm-config FILE` names a yaml file of options, none of them required:

    rules: r2        # or fast_dllm, vanilla, budget, entropy: presets of DecodeConfig;
                     # low_confidence, joint_threshold: SGLang's own algorithms
    threshold: 0.95  # and any other field of DecodeConfig, except mask_id, which is the model's

A server with a bad option does not start; the error names it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._checks import flag, integer, number, refuse
from ..config import DecodeConfig
from ..ops import decode_step
from ._sglang_plugin import register
from ._slots import Block, BlockSlots
from ._versions import require
from .rules import PRESETS, NamedRules, engine_config, named_config

require("sglang")

from sglang.srt.dllm.algorithm.base import DllmAlgorithm  # noqa: E402  (after our own error)

__all__ = ["R2DLLM", "R2JointThreshold", "register"]


class R2DLLM(DllmAlgorithm):
    """Masked cells get their tokens by the rules of a `DecodeConfig`; `rules: r2` by default.

    With `rules: low_confidence` tokens and forwards are those of SGLang's LowConfidence. A block
    takes the same steps under both schedulers, whatever other requests are in its batch; what it
    draws (`temperature` > 0) depends on its number among all blocks, which ranks count alike.

    Under first-done-first-out a block that more than `max_steps` steps on end leave as it is (no
    finite logits; nothing but the mask id where the config allows it) is emitted so; the
    synchronous scheduler does that with any block after `max_steps`.

    The host reads two flags of each request a step, in one copy, and waits for nothing else.
    """

    _own = {"low_confidence": partial(engine_config, "sglang.LowConfidence")}
    _rules: NamedRules = {**PRESETS, **_own}
    _kept: dict[str, tuple[str, torch.dtype]] = {}  # of a block, by slot, beside its DecodeState

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        options = {k: v for k, v in config.algorithm_config.items() if k != "block_size"}
        self.config = self._decode_config(options)
        self._slots = BlockSlots(self.block_size, config.max_running_requests, self._kept)

    @classmethod
    def configure_server_args(cls, server_args: Any) -> None:
        """Builds the algorithm once, before any process is started: it refuses bad options."""
        cls.from_server_args(server_args)

    def _decode_config(self, options: dict[str, Any]) -> DecodeConfig:
        config = named_config("R2DLLM", self._rules, self.mask_id, options)
        if config.edit_threshold is not None:
            takes = "None (R2JointThreshold is what edits)"
            refuse(ValueError, "R2DLLM", "edit_threshold", takes, config.edit_threshold)
        return config

    def init_step_state(self, forward_batch: Any) -> list[Block]:
        return [self._slots.new_block() for _ in range(forward_batch.batch_size)]

    def step(self, forward_batch: Any, full_logits: Tensor, states: list[Block]) -> list[bool]:
        tokens = forward_batch.input_ids.view(len(states), self.block_size)
        slots, _ = self._slots.of(states, tokens.device)
        masked = tokens == self.mask_id
        if forward_batch.dllm_prompt_mask is not None:
            masked &= ~forward_batch.dllm_prompt_mask
        logits, state = full_logits.view(*tokens.shape, full_logits.shape[-1]), self._slots.state
        step = decode_step(logits, tokens, state, self.config, candidates=masked, slots=slots)
        # Done is what had no masks before the step: the forward has seen its last tokens.
        waits, changes = torch.stack((masked, step.rule != 0)).any(-1).tolist()
        return self._done(states, [not wait for wait in waits], changes)

    def _done(self, blocks: list[Block], done: list[bool], changes: list[bool]) -> list[bool]:
        """Whether a block may be emitted: done, or given up."""
        for block, changed in zip(blocks, changes, strict=True):
            block.still = 0 if changed else block.still + 1
        most = self.max_steps(self.block_size) if self.fdfo else float("inf")
        return [ends or block.still > most for ends, block in zip(done, blocks, strict=True)]


class R2JointThreshold(R2DLLM):
    """Decided cells of the answer may change too; `rules: joint_threshold` by default.

    That is SGLang's JointThreshold, tokens and forwards, with its options: `threshold` (0.5),
    `edit_threshold` (0), `max_post_edit_steps` (16: steps of a block without masks) and
    `penalty_lambda` (0: taken off a cell's logit of the token to its left); other rules have these
    defaults too, `threshold` aside. With `mask_prediction: allow`, as there, an edit may write the
    mask id. `vectorized_decoding` chooses between SGLang's loops, which decide alike: no effect.
    """

    _own = {"joint_threshold": partial(engine_config, "sglang.JointThreshold")}
    _rules: NamedRules = {**_own, **PRESETS}
    _kept = {"answer": ("cells", torch.bool), "edits": ("block", torch.int32)}

    def _decode_config(self, options: dict[str, Any]) -> DecodeConfig:
        name = "R2JointThreshold"
        steps, penalty = options.pop("max_post_edit_steps", 16), options.pop("penalty_lambda", 0)
        self._most_edits = integer(name, "max_post_edit_steps", steps, 0, 2**30)
        self._penalty = number(name, "penalty_lambda", penalty, 0)
        flag(name, "vectorized_decoding", options.pop("vectorized_decoding", False))
        config = named_config(name, self._rules, self.mask_id, {"edit_threshold": 0.0, **options})
        if config.edit_threshold is None:
            refuse(ValueError, name, "edit_threshold", "a number in [0, 1]", None)
        # Without a mask id of its own the step takes that id for a token like any other.
        return config.replace(mask_id=None) if config.mask_prediction == "allow" else config

    def max_steps(self, block_size: int) -> int:
        return block_size + self._most_edits + 1

    def step(self, forward_batch: Any, full_logits: Tensor, states: list[Block]) -> list[bool]:
        tokens = forward_batch.input_ids.view(len(states), self.block_size)
        slots, fresh = self._slots.of(states, tokens.device)
        if fresh is not None:
            prompt = self._prompt_mask(forward_batch)
            self._slots["answer"][fresh.slots] = ~prompt[fresh.rows]
        answer = self._slots["answer"][slots]
        masked = answer & (tokens == self.mask_id)
        waits = masked.any(1)
        edits = self._slots["edits"][slots] + ~waits  # steps without masks
        goes_on = edits <= self._most_edits
        answer &= goes_on[:, None]
        masked &= answer
        logits = full_logits.view(*tokens.shape, full_logits.shape[-1])
        if self._penalty > 0:
            left = tokens[:, :-1, None]
            logits[:, 1:].scatter_add_(2, left, logits.new_full(left.shape, -self._penalty))
        before = tokens.clone()
        state, config = self._slots.state, self.config
        decode_step(logits, tokens, state, config, candidates=masked, editable=answer, slots=slots)
        changes = (tokens != before).any(1)  # what commits the mask id changes nothing
        # Done is what no step will change any more: the forward has seen its last tokens.
        done = ~(goes_on & (waits | changes))
        self._slots["edits"][slots] = edits.masked_fill(done, self._most_edits + 1)
        return self._done(states, *torch.stack((done, changes)).tolist())
