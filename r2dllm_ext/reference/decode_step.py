# SPDX-License-Identifier: Apache-2.0
"""One decode step: the rules in their order, and what each of them sees.

`observe` is the pass over V; `decide` are the rules after it, which never look at the logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import Rule
from ..state import Counter, DecodeState, DecodeStep
from .base_rule import base_rule, passes
from .edits import edits
from .neighbour import neighbours
from .positional_ambiguity import positional_ambiguity
from .rows import each_row
from .sampling import banned_id, draw_tokens
from .stability import update_stability_
from .token_confidence import probability_of, token_confidence, token_entropy
from .window_pool import float32, window_pool


class Observation(NamedTuple):
    """What the rules know of the logits; -1 / 0 = not read, -1 / NaN = invalid.

    Base, window and neighbour rule judge and commit `token`; ambiguity, stability and edits `top`.
    They differ where a token was drawn or proposed.
    """

    top: Tensor  # [B, L] int64, argmax
    p: Tensor  # [B, L] float32, its probability
    token: Tensor  # [B, L] int64
    q: Tensor  # [B, L] float32, the probability that is its confidence
    entropy: Tensor  # [B, L] float32, nats; not read 0, invalid NaN


def decode_step(logits, tokens, state, config, **options) -> DecodeStep:
    """Decide, write the committed tokens into `tokens` and advance `state`. See `select`."""
    step = select(logits, tokens, state, config, **options)
    written = torch.where(step.rule != Rule.NONE, step.prediction, tokens)
    tokens.copy_(written)
    return step


def select(
    logits,
    tokens: Tensor,
    state,
    config,
    *,
    candidates: Tensor | None = None,
    editable: Tensor | None = None,
    proposed: Tensor | None = None,
    rows=None,
    slots: Tensor | None = None,
    logits_shift: int = 0,
) -> DecodeStep:
    """Decide which candidates are committed and advance `state`; `tokens` stay as they are.

    Args:
        logits: [B, L, V] floating point; or VocabStatistics.
        tokens: [B, L] int64 or int32.
        state: DecodeState; counters advance, streaks too if config.temporal_steps. None where no
            rule needs one.
        config: DecodeConfig.
        candidates: [B, L] bool, who may be committed; None = tokens == config.mask_id.
        editable: [B, L] bool, decided cells that may take another token.
        proposed: [B, L] int64, tokens to judge in place of the argmax.
        rows: RowParams; slots: [B] int64, rows of the state. A row is decided as a call on it alone
            with its values in the config would decide it.
        logits_shift: 1 judges cell i by row max(i - 1, 0), as Dream's block step does.
    """
    if candidates is None:
        candidates = tokens == config.mask_id
    if state is None:
        state = DecodeState(*tokens.shape, device=tokens.device)  # forgotten on return
    here = {"editable": editable, "rows": rows, "slots": slots}
    if isinstance(logits, Tensor):
        if logits_shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        dtype = logits.dtype
        seen = observe(logits, candidates, state, config, proposed=proposed, **here)
    else:
        dtype = logits.dtype
        seen = observe_statistics(logits.values, candidates, editable)
    return decide(seen, candidates, state, config, dtype, tokens=tokens, **here)


# ---- the pass over V -------------------------------------------------------------------------


def observe(
    logits: Tensor,
    candidates: Tensor,
    state,
    config,
    *,
    editable: Tensor | None = None,
    proposed: Tensor | None = None,
    rows=None,
    slots: Tensor | None = None,
) -> Observation:
    """Candidates and editable cells: argmax, judged token, probabilities, entropy, in float32."""
    read = candidates if editable is None else candidates | editable
    banned = banned_id(config)
    top, p = token_confidence(logits, candidates=read, exclude_id=banned)
    entropy = token_entropy(logits, candidates=read, exclude_id=banned)
    token, q = top.clone(), p.clone()
    for b, (own, alone) in enumerate(each_row(len(logits), state, config, rows, slots)):
        if alone is None:
            continue
        row = slice(b, b + 1)
        if proposed is not None:
            cells = candidates[row]
            given = probability_of(logits[row], proposed[row], candidates=cells, exclude_id=banned)
        elif alone.temperature > 0:
            cells = candidates[row] & (top[row] >= 0)
            identity = [Counter.ROW_ID, Counter.STEP, Counter.ROW_SEED]
            name, step, seed = own.counters[:, identity].unbind(1)
            given = draw_tokens(logits[row], cells, alone, row=name, step=step, seed=seed)
        else:
            continue
        token[row] = torch.where(cells, given[0], token[row])
        q[row] = torch.where(cells, given[1], q[row])
    return Observation(top, p.float(), token, q.float(), entropy.float())


def observe_statistics(values: Tensor, candidates: Tensor, editable: Tensor | None) -> Observation:
    """The same from `values` [B, L, 4] of the whole vocabulary: there is nothing to draw from."""
    _, mass, index, moment = values.unbind(-1)
    read = candidates if editable is None else candidates | editable
    valid = mass > 0
    top = torch.where(read & valid, index.long(), -1)
    p = torch.where(valid, 1 / mass, torch.nan).masked_fill(~read, 0).float()
    entropy = torch.where(valid, (mass.log() - moment / mass).clamp_min(0), torch.nan)
    return Observation(top, p, top, p, entropy.masked_fill(~read, 0).float())


# ---- the rules -------------------------------------------------------------------------------


def decide(
    seen: Observation,
    candidates: Tensor,
    state,
    config,
    logits_dtype: torch.dtype,
    *,
    tokens: Tensor,
    editable: Tensor | None = None,
    rows=None,
    slots: Tensor | None = None,
) -> DecodeStep:
    """All rules, row by row. `logits_dtype` matters to config.confidence_dtype="logits" alone."""
    length = candidates.shape[1]
    steps = [empty_step(length, config, candidates.device)]
    for b, (own, alone) in enumerate(each_row(len(candidates), state, config, rows, slots)):
        row = slice(b, b + 1)
        seen_here = Observation(*(part[row] for part in seen))
        cells = None if editable is None else editable[row]
        if alone is None:
            steps.append(left_alone(seen_here, candidates[row], config, logits_dtype))
        else:
            steps.append(
                decide_row(seen_here, candidates[row], own, alone, logits_dtype, tokens[row], cells)
            )
    prediction, confidence, rule, remaining, entropy = zip(*steps, strict=True)
    return DecodeStep(
        torch.cat(prediction),
        torch.cat(confidence),
        torch.cat(rule),
        torch.cat(remaining),
        torch.cat(entropy) if reports_entropy(config) else None,
    )


def decide_row(
    seen: Observation,
    candidates: Tensor,
    state,
    config,
    logits_dtype: torch.dtype,
    tokens: Tensor,
    editable: Tensor | None,
) -> DecodeStep:
    """The rules of one row ([1, L]).

    A cell is masked while it is a candidate that no rule has committed yet. "Committing" the mask
    id leaves a cell masked. With mask_prediction="skip" a cell whose argmax is the mask id is no
    candidate, but `remaining` and the schedule of the block count it.
    """
    top, token = seen.top, seen.token
    p_seen, q_seen = (rounded(x, config, logits_dtype) for x in (seen.p, seen.q))

    def enough(confidence: Tensor, threshold: float | None) -> Tensor:
        return passes(confidence, rounded_scalar(threshold, config, logits_dtype), config.compare)

    row, absolute, block_step, at_start, seed = state.counters.clone().unbind(1)
    at_start = torch.where(at_start < 0, candidates.sum(1), at_start)
    skipped = torch.zeros_like(candidates)
    if config.mask_prediction == "skip" and config.mask_id is not None:
        skipped = candidates & (top == config.mask_id)
    was_masked = candidates & ~skipped

    rule = torch.zeros_like(candidates, dtype=torch.uint8)
    masked = was_masked.clone()

    def commit(cells: Tensor, token: Tensor, code: Rule) -> None:
        settled = cells & masked
        if config.mask_id is not None:
            settled = settled & (token != config.mask_id)
        rule[settled] = code
        masked[settled] = False

    # 1. Base rule.
    own, forced = base_rule(
        q_seen,
        seen.entropy,
        masked & ~q_seen.isnan(),
        config,
        threshold=rounded_scalar(config.threshold, config, logits_dtype),
        step=block_step,
        masked_at_start=at_start,
    )
    commit(own, token, Rule.THRESHOLD if config.base == "threshold" else Rule.BASE)
    commit(forced, token, Rule.FORCED)

    # 2. Windows.
    if config.confidence_cluster_size:
        cells = window_pool(
            q_seen,
            masked,
            window=config.confidence_cluster_size,
            min_confidence=config.spatial_threshold,
            max_unmasked=config.confidence_cluster_unmasked,
            mean_dtype=logits_dtype if is_narrow(config, logits_dtype) else torch.float64,
        )
        commit(cells, token, Rule.WINDOW)

    # 3. Neighbours of sure cells, committed or not.
    if config.neighbour_radius:
        cells = neighbours(
            was_masked & enough(q_seen, config.threshold),
            masked & enough(q_seen, config.neighbour_threshold),
            config.neighbour_radius,
        )
        commit(cells, token, Rule.NEIGHBOUR)

    # 4. Runs of one prediction.
    if config.token_cluster is not None:
        cells = positional_ambiguity(
            top,
            seen.p,
            masked,
            min_confidence=config.spatial_threshold,
            min_run=config.token_cluster_size,
            mode=config.token_cluster,
            seed=config.seed + seed,
            row=row,
            step=absolute,
        )
        commit(cells, top, Rule.AMBIGUITY)

    # 5. Streaks.
    if config.temporal_steps:
        cells = update_stability_(
            state,
            top,
            seen.p,
            was_masked=was_masked,
            is_masked=masked,
            steps=config.temporal_steps,
            min_confidence=config.temporal_threshold,
            mode=config.temporal_eval,
        )
        commit(cells, top, Rule.STABILITY)

    # 6. Edits: of decided cells, which no other rule sees.
    if editable is not None:
        cells = edits(
            top,
            p_seen,
            tokens,
            editable & ~candidates,
            threshold=rounded_scalar(config.edit_threshold, config, logits_dtype),
            compare=config.compare,
            mask_id=config.mask_id,
        )
        rule[cells] = Rule.EDIT

    if state.step_map is not None:
        number = block_step.clamp_max(torch.iinfo(torch.int16).max).to(torch.int16)
        state.step_map.copy_(torch.where(rule != Rule.NONE, number[:, None], state.step_map))
    state.counters[:, Counter.STEP] += candidates.any(1)
    state.counters[:, Counter.BLOCK_STEP] += 1
    state.counters[:, Counter.BLOCK_MASKED] = at_start
    by_top = (rule == Rule.AMBIGUITY) | (rule == Rule.STABILITY) | (rule == Rule.EDIT)
    return DecodeStep(
        prediction=torch.where(by_top, top, token),
        confidence=torch.where(by_top, p_seen, q_seen),
        rule=rule,
        remaining=(masked | skipped).sum(1, dtype=torch.int32),
        entropy=seen.entropy if reports_entropy(config) else None,
    )


def left_alone(
    seen: Observation, candidates: Tensor, config, logits_dtype: torch.dtype
) -> DecodeStep:
    """A row whose parameters or slot are out of range commits nothing."""
    return DecodeStep(
        prediction=seen.top,
        confidence=rounded(seen.p, config, logits_dtype),
        rule=torch.zeros_like(candidates, dtype=torch.uint8),
        remaining=candidates.sum(1, dtype=torch.int32),
        entropy=seen.entropy if reports_entropy(config) else None,
    )


def empty_step(length: int, config, device) -> DecodeStep:
    """What a batch of no rows gives."""
    return DecodeStep(
        prediction=torch.empty((0, length), dtype=torch.int64, device=device),
        confidence=torch.empty((0, length), dtype=torch.float32, device=device),
        rule=torch.empty((0, length), dtype=torch.uint8, device=device),
        remaining=torch.empty(0, dtype=torch.int32, device=device),
        entropy=torch.empty((0, length), dtype=torch.float32, device=device)
        if reports_entropy(config)
        else None,
    )


def reports_entropy(config) -> bool:
    return config.base == "entropy" or config.report_entropy


# ---- precision -------------------------------------------------------------------------------


def is_narrow(config, logits_dtype: torch.dtype) -> bool:
    """Whether confidences and thresholds are rounded to the dtype of the logits."""
    return config.confidence_dtype == "logits" and logits_dtype.itemsize == 2


def rounded(confidence: Tensor, config, logits_dtype: torch.dtype) -> Tensor:
    """float32 confidences in the precision that they are compared in."""
    return confidence.to(logits_dtype).float() if is_narrow(config, logits_dtype) else confidence


def rounded_scalar(threshold: float | None, config, logits_dtype: torch.dtype) -> float | None:
    """A threshold in the precision of the confidences."""
    if threshold is None:
        return None
    value = torch.tensor(float32(threshold), dtype=torch.float32, device="cpu")
    return rounded(value, config, logits_dtype).item()
