# SPDX-License-Identifier: Apache-2.0
"""diffusers: `BlockRefinementScheduler` of `LLaDA2Pipeline`, decided by one pass over the logits.

    from r2dllm_ext.integrations.diffusers import R2BlockRefinementScheduler as R2
    pipe.scheduler = R2.from_config(pipe.scheduler.config)                   # theirs, faster
    pipe.scheduler = R2.from_config(pipe.scheduler.config, config=DecodeConfig.r2(None))

Importing this module takes diffusers 0.42: 0.43 is to give schedulers another `step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import refuse
from ..config import DecodeConfig, Rule
from ..ops import select
from ..row_params import RowParams
from ..state import Counter, DecodeState
from ._diffusers_rules import config_of, rules_of
from ._versions import require

require("diffusers")
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.schedulers import BlockRefinementScheduler  # noqa: E402
from diffusers.schedulers.scheduling_block_refinement import (  # noqa: E402
    BlockRefinementSchedulerOutput as Output,
)


class R2BlockRefinementScheduler(BlockRefinementScheduler):
    """`BlockRefinementScheduler` with the same options and the same tokens, or with R2's rules.

    Args:
        block_length, num_inference_steps, threshold, editing_threshold, minimal_topk: theirs.
        config: rules beyond theirs: a DecodeConfig, or fields of one as a mapping, which are added
            to theirs. The mask's id, thresholds, quota and sampling are the call's and have to be
            left at their default. Kept as a dict, saved and loaded with the scheduler's config.

    Raises:
        ValueError, TypeError: `config` says what the call says, or what no DecodeConfig may say.
    """

    @register_to_config
    def __init__(
        self,
        block_length: int = 32,
        num_inference_steps: int = 32,
        threshold: float = 0.95,
        editing_threshold: float | None = None,
        minimal_topk: int = 1,
        config: DecodeConfig | Mapping[str, Any] | None = None,
    ) -> None:
        # By keyword: diffusers takes what is given by place for a default, and does not keep it.
        names = "block_length num_inference_steps threshold editing_threshold minimal_topk"
        super().__init__(**{name: self.config[name] for name in names.split()})
        self._rules = rules_of(config)
        self.register_to_config(config=self._rules)
        self._state: DecodeState | None = None

    @classmethod
    def from_config(cls, config=None, /, return_unused_kwargs=False, **kwargs):
        """Theirs; `config=` as a keyword is that of `__init__`."""
        if "config" in kwargs:
            unset = [name for name in config.get("_use_default_values", ()) if name != "config"]
            own = {"config": kwargs.pop("config"), "_use_default_values": unset}
            config = {**config, **own}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Theirs, without a loop over the rows; no host synchronisation where `timestep` is an int.

        At temperature 0 the tokens are equal (ties: lowest index). A committed draw follows the
        same distribution, by a seed from `generator`; edits look at the argmax (in theirs at the
        draw). `minimal_topk` is not read in theirs either. `sampled_tokens` and `sampled_probs` are
        `sample` and 0 at cells that could not change, which are not read. Step 0 begins a block.

        Raises:
            ValueError: `mask_token_id` None (their mode without masks), no `set_timesteps` yet.
        """
        where = "R2BlockRefinementScheduler.step"
        if mask_token_id is None:
            refuse(ValueError, where, "mask_token_id", "a token id", None)
        if self._transfer_schedule is None:
            refuse(ValueError, where, "timestep", "a step after set_timesteps", timestep)
        threshold = self.config.threshold if threshold is None else threshold
        edit = self.config.editing_threshold if editing_threshold is None else editing_threshold
        draws = temperature != 0 and sampling_method in ("auto", "multinomial")
        sampling = (temperature, top_k, top_p) if draws else (0.0, None, None)
        config = config_of(mask_token_id, threshold, edit, self._rules, *sampling)
        active, index = sample == mask_token_id, int(timestep)
        share = self._transfer_schedule[min(index, len(self._transfer_schedule) - 1)]
        quota = share.to(sample.device).expand(len(sample)).contiguous()
        editable = None
        if config.edit_threshold is not None:
            editable = ~active if prompt_mask is None else ~active & ~prompt_mask
        state = self._state_of(sample, index, draws, generator)
        rows = RowParams(quota=quota)
        step = select(
            model_output, sample, state, config, candidates=active, editable=editable, rows=rows
        )
        transfer, edited = step.rule != Rule.NONE, step.rule == Rule.EDIT
        result = Output(
            prev_sample=torch.where(transfer, step.prediction, sample),
            transfer_index=transfer & ~edited,
            editing_transfer_index=edited,
            sampled_tokens=torch.where(step.prediction >= 0, step.prediction, sample),
            sampled_probs=step.confidence,
            pred_logits=model_output,
        )
        return result if return_dict else result.to_tuple()

    def _state_of(self, sample: Tensor, index: int, draws: bool, generator: Any) -> DecodeState:
        state, rows = self._state, tuple(sample.shape)
        if state is None or (state.rows, state.block_length, state.device) != (
            *rows,
            sample.device,
        ):
            self._state = state = DecodeState(*rows, device=sample.device)
        elif index == 0:
            state.reset()
        if draws:
            device = "cpu" if generator is None else generator.device
            seed = torch.randint(2**62, (), generator=generator, device=device)
            state.counters[:, Counter.ROW_SEED] = seed
            state.counters[:, Counter.STEP] = 0  # the generator alone says what is drawn
        return state
