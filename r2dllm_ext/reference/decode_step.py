# SPDX-License-Identifier: Apache-2.0
"""One decode step: the rules in their order, and what each of them sees.

`observe` is the pass over V; `decide` are the rules after it, which never look at the logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Rule
from ..state import Counter, DecodeStep
from .base_rule import base_rule
from .positional_ambiguity import positional_ambiguity
from .sampling import draw_tokens
from .stability import update_stability_
from .token_confidence import token_confidence
from .window_pool import float32, window_pool


class Observation(NamedTuple):
    """What the rules know of the logits; -1 / 0 = no candidate, -1 / NaN = invalid.

    Base and window rule commit `drawn`, the other two `top`. Equal at temperature 0.
    """

    top: Tensor  # [B, L] int64, argmax
    p: Tensor  # [B, L] float32, its probability
    drawn: Tensor  # [B, L] int64
    q: Tensor  # [B, L] float32, its untempered probability


def decode_step(
    logits, tokens, state, config, *, candidates=None, logits_shift: int = 0
) -> DecodeStep:
    """Decide, write the committed tokens into `tokens` and advance `state`. See `select`."""
    options = {"candidates": candidates, "logits_shift": logits_shift}
    step = select(logits, tokens, state, config, **options)
    tokens.copy_(torch.where(step.rule != Rule.NONE, step.prediction, tokens))
    return step


def select(
    logits: Tensor,
    tokens: Tensor,
    state,
    config,
    *,
    candidates: Tensor | None = None,
    logits_shift: int = 0,
) -> DecodeStep:
    """Decide which candidates are committed and advance `state`; `tokens` stay as they are.

    Args:
        logits: [B, L, V] floating point.
        tokens: [B, L] int64.
        state: DecodeState; counters advance, streaks too if config.temporal_steps.
        config: DecodeConfig.
        candidates: [B, L] bool, who may be committed; None = tokens == config.mask_id.
        logits_shift: 1 judges cell i by row max(i - 1, 0), as Dream's block step does.
    """
    if candidates is None:
        candidates = tokens == config.mask_id
    if logits_shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    seen = observe(logits, candidates, state, config)
    return decide(seen, candidates, state, config, logits.dtype)


def observe(logits: Tensor, candidates: Tensor, state, config) -> Observation:
    """The pass over V: argmax, draw and their probabilities, rounded to float32."""
    excluded = None if config.allow_mask_id else config.mask_id
    top, p = token_confidence(logits, candidates=candidates, exclude_id=excluded)
    drawn, q = top, p
    if config.temperature > 0:
        identity = [Counter.ROW_ID, Counter.STEP, Counter.ROW_SEED]
        row, step, seed = state.counters[:, identity].unbind(1)
        valid = top >= 0
        drawn, q = draw_tokens(logits, valid, config, row=row, step=step, seed=seed)
        drawn, q = torch.where(valid, drawn, top), torch.where(valid, q, p)
    return Observation(top, p.float(), drawn, q.float())


def decide(
    seen: Observation, candidates: Tensor, state, config, logits_dtype: torch.dtype
) -> DecodeStep:
    """The rules. A cell is masked while it is a candidate that no rule has committed yet.

    A cell whose token is the mask id itself (config.allow_mask_id) stays masked, whoever "commits"
    it. `logits_dtype` matters to config.confidence_dtype="logits" alone.
    """
    top, p, drawn, q = seen
    narrow = config.confidence_dtype == "logits" and logits_dtype.itemsize == 2
    q_seen = q.to(logits_dtype).float() if narrow else q
    p_seen = p.to(logits_dtype).float() if narrow else p
    threshold = float32(config.threshold)
    if narrow:
        threshold = torch.tensor(threshold, dtype=logits_dtype, device="cpu").item()
    row, absolute, block_step, at_start, seed = state.counters.clone().unbind(1)
    at_start = torch.where(at_start < 0, candidates.sum(1), at_start)

    rule = torch.zeros_like(candidates, dtype=torch.uint8)
    masked = candidates.clone()

    def commit(cells: Tensor, token: Tensor, code: Rule) -> None:
        settled = cells & masked & (token != config.mask_id)
        rule[settled] = code
        masked[settled] = False

    # 1. Base rule.
    own, forced = base_rule(
        q_seen,
        masked & (drawn >= 0),
        config,
        threshold=threshold,
        step=block_step,
        masked_at_start=at_start,
    )
    commit(own, drawn, Rule.THRESHOLD if config.base == "threshold" else Rule.BASE)
    commit(forced, drawn, Rule.FORCED)

    # 2. Windows.
    if config.confidence_cluster_size:
        cells = window_pool(
            q_seen,
            masked,
            window=config.confidence_cluster_size,
            min_confidence=config.spatial_threshold,
            max_unmasked=config.confidence_cluster_unmasked,
            mean_dtype=logits_dtype if narrow else torch.float64,
        )
        commit(cells, drawn, Rule.WINDOW)

    # 3. Runs of one prediction.
    if config.token_cluster is not None:
        cells = positional_ambiguity(
            top,
            p,
            masked,
            min_confidence=config.spatial_threshold,
            min_run=config.token_cluster_size,
            mode=config.token_cluster,
            seed=config.seed + seed,
            row=row,
            step=absolute,
        )
        commit(cells, top, Rule.AMBIGUITY)

    # 4. Streaks.
    if config.temporal_steps:
        cells = update_stability_(
            state,
            top,
            p,
            was_masked=candidates,
            is_masked=masked,
            steps=config.temporal_steps,
            min_confidence=config.temporal_threshold,
            mode=config.temporal_eval,
        )
        commit(cells, top, Rule.STABILITY)

    state.counters[:, Counter.STEP] += 1
    state.counters[:, Counter.BLOCK_STEP] += 1
    state.counters[:, Counter.BLOCK_MASKED] = at_start
    by_top = (rule == Rule.AMBIGUITY) | (rule == Rule.STABILITY)
    return DecodeStep(
        prediction=torch.where(by_top, top, drawn),
        confidence=torch.where(by_top, p_seen, q_seen),
        rule=rule,
        remaining=masked.sum(1, dtype=torch.int32),
    )
