# SPDX-License-Identifier: Apache-2.0
"""vLLM's dllm-plugin: `batched_remask` for its sampler, `R2RemaskingPolicy` for its worker."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .._checks import instance, refuse
from ..config import DecodeConfig
from ..ops import decode_step
from ..state import DecodeState
from ._dllm_plugin_options import policy_config, replaced
from ._near_ties import near_ties_step
from ._versions import require
from .rules import cached_engine_config

require("dllm_plugin")

from dllm_plugin.remasking import RemaskStepResult  # noqa: E402


@torch.no_grad()
def batched_remask(
    logits: torch.Tensor,
    input_draft: torch.Tensor,
    mask_token_id: int,
    threshold: float,
    *,
    config: DecodeConfig | None = None,
    state: DecodeState | None = None,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The function of the plugin's `DiffusionSampler` that commits tokens, here in one call.

    Args:
        logits: [B, L, V] float32, bfloat16 or float16.
        input_draft: [B, L] int64 or int32, the blocks; not written.
        mask_token_id: of the model.
        threshold: a probability; where no cell passes it, all within 1e-5 of the best commit.
        config: None is this, the plugin's rule. Otherwise what a step may commit, and
            `mask_token_id` and `threshold` take the place of its own.
        state: what `config` remembers of each request, [any, L], where it needs that; `reset` a
            row when its block is done.
        slots: [B] int64, the row of the state that each row uses.

    Returns:
        draft: [B, L] as `input_draft`, with the committed tokens.
        all_done: [B] bool, no cell is masked.
        num_transferred: [B] int64, cells that have changed.

    No host synchronisation. TypeError, ValueError name a bad argument.

    >>> draft = torch.tensor([[3, 3]])
    >>> batched_remask(torch.eye(4)[None, :2] * 9, draft, 3, 0.9)
    (tensor([[0, 1]]), tensor([True]), tensor([2]))
    """
    draft = input_draft.clone()
    if config is None:
        rule = cached_engine_config(
            "dllm_plugin.batched_remask", mask_token_id, threshold=threshold
        )
        near_ties_step(logits, draft, state, rule, slots=slots)
    else:
        instance("batched_remask", "config", config, DecodeConfig)
        config = replaced(config, mask_id=mask_token_id, threshold=threshold)
        decode_step(logits, draft, state, config, slots=slots)
    is_masked = draft == mask_token_id
    return draft, ~is_masked.any(1), (draft != input_draft).sum(1)


class R2RemaskingPolicy:
    """A `RemaskingPolicy` of the plugin, by the rules of a `DecodeConfig`.

    What the rules remember is kept for each request, told apart by "request_id" of
    `remasking_config`; without one, a policy serves one request. A draft that is not the one that
    the step before returned begins a new block.

    Args:
        config: None is the plugin's `Llada2DefaultRemaskingPolicy`. Otherwise what a step may
            commit; its `mask_id` is that of the model, and options of `remasking_config` go before
            its own.

    >>> policy = R2RemaskingPolicy(DecodeConfig(3))
    >>> policy.apply(input_draft=[3, 3], logits=torch.eye(4)[:2] * 9).committed_token_ids
    (0, 1)
    """

    def __init__(self, config: DecodeConfig | None = None) -> None:
        instance("R2RemaskingPolicy", "config", config, DecodeConfig, optional=True)
        if config is not None and config.mask_id is None:
            refuse(ValueError, "R2RemaskingPolicy", "config.mask_id", "a token id", None)
        if config is not None and config.temperature:  # blocks share no counter to draw from
            refuse(ValueError, "R2RemaskingPolicy", "config.temperature", "0", config.temperature)
        self.config = config
        # Of each request within a block: the draft that it was given, and what its rules remember.
        self._blocks: dict[Hashable, tuple[tuple[int, ...] | None, DecodeState | None]] = {}

    @torch.no_grad()
    def apply(
        self,
        *,
        input_draft: Sequence[int],
        logits: Any | None = None,
        remasking_config: Mapping[str, Any] | None = None,
    ) -> RemaskStepResult:
        """One step of one request.

        Args:
            input_draft: L token ids, those of the forward.
            logits: [L, V] float32, bfloat16 or float16, or as many lists of numbers.
            remasking_config: "request_id", and the plugin's own options (`policy_config`).

        Returns:
            The whole block as `committed_token_ids` and masks as the next one once no cell is
            masked; until then none, and the draft of the next step.

        Reads the tokens on the host, where the plugin takes them.
        """
        if logits is None:
            refuse(TypeError, "R2RemaskingPolicy.apply", "logits", "[L, V]", None)
        if not isinstance(logits, torch.Tensor):  # lists: numpy reads them several times as fast
            logits = torch.from_numpy(np.asarray(logits, dtype=np.float32))
        draft, options = tuple(input_draft), dict(remasking_config or {})
        request = options.pop("request_id", None)
        config = policy_config(self.config, options, len(draft))
        before, state = self._blocks.get(request, (None, None))
        if state is None or before != draft:
            state = DecodeState(1, len(draft), device=logits.device)
        tokens = torch.tensor([draft], dtype=torch.int64, device=logits.device)
        decode_step(logits[None], tokens, state, config)
        draft = tuple(tokens[0].tolist())
        if config.mask_id not in draft:
            self._blocks.pop(request, None)
            return RemaskStepResult(draft, (config.mask_id,) * len(draft))
        self._blocks[request] = draft, state
        return RemaskStepResult((), draft)

    def forget(self, request_id: Hashable) -> None:
        """Drop what is kept of a request that ended within a block."""
        self._blocks.pop(request_id, None)
