# SPDX-License-Identifier: Apache-2.0
"""A decode step in plain torch, twice: as the release computes it, and vectorised.

Both write `tokens` [B, L] and the streaks of `state` in place. Neither hides the mask id from the
argmax, which is `DecodeConfig(mask_prediction="allow")`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r2dllm_ext.config import DecodeConfig
from r2dllm_ext.state import DecodeState

# ---- the authors' way ------------------------------------------------------------------------
# Three softmaxes over V, in float64 for the base rule and in float32 for the last two, and Python
# loops that read the device cell by cell.


def authors_step(
    logits: Tensor,
    tokens: Tensor,
    state: DecodeState,
    config: DecodeConfig,
    quota: list[int] | None = None,
) -> None:
    """One step of the LLaDA loop; `quota`: cells a row may commit under base="schedule"."""
    was_masked = tokens == config.mask_id
    prediction, confidence = _authors_base(logits, tokens, config, quota)
    if config.confidence_cluster_size:
        authors_windows(prediction, confidence, tokens, config)
    if config.token_cluster is not None:
        confidence, prediction = torch.softmax(logits.to(torch.float32), -1).max(-1)
        authors_runs(prediction, confidence, tokens, config)
    if config.temporal_steps:
        confidence, prediction = torch.softmax(logits.to(torch.float32), -1).max(-1)
        advance_streaks(prediction, confidence, tokens, was_masked, state, config)


def _authors_base(logits, tokens, config, quota) -> tuple[Tensor, Tensor]:
    masked = tokens == config.mask_id
    prediction, confidence = _authors_confidence(logits)
    score = torch.where(masked, confidence, -torch.inf)
    chosen = torch.zeros_like(masked)
    for b in range(tokens.shape[0]):
        open_cells = int(masked[b].sum())
        if open_cells == 0:
            continue
        falling, order = score[b].topk(open_cells)
        if config.base == "factor":
            count = 1
            while count < open_cells and falling[count] >= 1 - config.factor / (count + 2):
                count += 1
            chosen[b, order[: count + 1 if count == open_cells - 1 else count]] = True
        elif config.base == "schedule":
            chosen[b, order[: quota[b]]] = True
        else:
            chosen[b, order] = True
            for k in range(1, open_cells):
                if score[b, order[k]] < config.threshold:
                    chosen[b, order[k]] = False
    tokens[chosen] = prediction[chosen]
    return prediction, confidence


def _authors_confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    prediction = logits.argmax(-1)
    probabilities = torch.softmax(logits.to(torch.float64), -1)
    return prediction, probabilities.gather(-1, prediction.unsqueeze(-1)).squeeze(-1)


def authors_transfer_index(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    x: Tensor,
    num_transfer_tokens: Tensor | None,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Fast-dLLM's `get_transfer_index` with a threshold, greedy: prediction and chosen cells."""
    prediction, confidence = _authors_confidence(logits)
    score = torch.where(mask_index, confidence, -torch.inf)
    chosen = torch.zeros_like(mask_index)
    for b, open_cells in enumerate(mask_index.sum(1)):
        order = score[b].topk(int(open_cells)).indices
        chosen[b, order] = True
        for k in range(1, int(open_cells)):
            if score[b, order[k]] < threshold:
                chosen[b, order[k]] = False
    return torch.where(mask_index, prediction, x), chosen


def authors_windows(prediction: Tensor, confidence: Tensor, tokens: Tensor, config) -> None:
    width, most = config.confidence_cluster_size, config.confidence_cluster_unmasked
    masked = tokens == config.mask_id
    chosen = torch.zeros_like(masked)
    for b in range(tokens.shape[0]):
        for start in range(tokens.shape[1] - width + 1):
            cells = slice(start, start + width)
            inside = masked[b, cells]
            open_cells = inside.sum().item()
            if open_cells == 0 or (most is not None and width - open_cells > most):
                continue
            if confidence[b, cells][inside].mean().item() >= config.spatial_threshold:
                chosen[b, cells] |= inside
    tokens[chosen] = prediction[chosen]


def authors_runs(prediction: Tensor, confidence: Tensor, tokens: Tensor, config) -> None:
    masked = tokens == config.mask_id
    for b in range(tokens.shape[0]):
        i, length = 0, tokens.shape[1]
        while i < length:
            if not masked[b, i].item():
                i += 1
                continue
            token, end = prediction[b, i].item(), i + 1
            while end < length and masked[b, end].item() and prediction[b, end].item() == token:
                end += 1
            values = [confidence[b, j].item() for j in range(i, end)]
            if end - i >= config.token_cluster_size and max(values) > config.spatial_threshold:
                best = values.index(max(values))
                cell = i + (best if config.token_cluster == "confidence" else (end - i) // 2)
                tokens[b, cell] = token
            i = end


def advance_streaks(
    prediction: Tensor, confidence: Tensor, tokens: Tensor, was_masked: Tensor, state, config
) -> None:
    """The temporal rule, shared by both ways: the release has no loop here."""
    masked = tokens == config.mask_id
    same = masked & (state.streak_id == prediction)
    count = torch.where(same, state.streak_count + 1, 1)
    total = torch.where(same, state.streak_sum + confidence, confidence)
    highest = torch.where(same, torch.maximum(state.streak_max, confidence), confidence)
    value = {"last": confidence, "ave": total / count, "max": highest}[config.temporal_eval]
    final = masked & (count >= config.temporal_steps) & (value >= config.temporal_threshold)
    kept = masked & ~final
    tokens.copy_(torch.where(final, prediction, tokens))
    for streak, new, empty in (
        (state.streak_count, count, 0),
        (state.streak_id, prediction, -1),
        (state.streak_sum, total, 0),
        (state.streak_max, highest, 0),
    ):
        advanced = torch.where(kept, new, empty).to(streak.dtype)
        streak.copy_(torch.where(was_masked, advanced, streak))


# ---- vectorised ------------------------------------------------------------------------------


def softmax_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and prediction; the conversion to float32 happens inside the softmax."""
    return torch.softmax(logits, -1, dtype=torch.float32).max(-1)


def vectorised_step(
    logits: Tensor, tokens: Tensor, state: DecodeState, config: DecodeConfig
) -> None:
    """One float32 softmax, no loop, no host read; base="threshold" only."""
    was_masked = tokens == config.mask_id
    confidence, prediction = softmax_max(logits)
    best = torch.where(was_masked, confidence, -1).argmax(-1, keepdim=True)
    is_best = torch.zeros_like(was_masked).scatter(-1, best, True)
    chosen = was_masked & (is_best | (confidence >= config.threshold))
    tokens.copy_(torch.where(chosen, prediction, tokens))
    if 0 < (config.confidence_cluster_size or 0) <= tokens.shape[1]:
        chosen = windows(
            confidence,
            tokens == config.mask_id,
            config.confidence_cluster_size,
            config.spatial_threshold,
            config.confidence_cluster_unmasked,
        )
        tokens.copy_(torch.where(chosen, prediction, tokens))
    if config.token_cluster is not None:
        chosen = runs(
            prediction,
            confidence,
            tokens == config.mask_id,
            config.spatial_threshold,
            config.token_cluster_size,
            config.token_cluster,
        )
        tokens.copy_(torch.where(chosen, prediction, tokens))
    if config.temporal_steps:
        advance_streaks(prediction, confidence, tokens, was_masked, state, config)


def windows(
    confidence: Tensor, masked: Tensor, width: int, least: float, max_unmasked: int | None
) -> Tensor:
    """Masked cells of passing windows, [B, L] bool."""
    inside = masked.unfold(1, width, 1)  # [B, L - W + 1, W]
    count = inside.sum(-1)
    mean = torch.where(inside, confidence.unfold(1, width, 1), 0).sum(-1) / count
    passes = mean >= least  # NaN, a window without masked cells, does not
    if max_unmasked is not None:
        passes &= width - count <= max_unmasked
    spread = F.pad(passes.float(), (width - 1, width - 1))[:, None]
    return masked & (F.max_pool1d(spread, width, 1)[:, 0] > 0)


def runs(
    prediction: Tensor, confidence: Tensor, masked: Tensor, least: float, min_run: int, mode: str
) -> Tensor:
    """The chosen cell of each run, [B, L] bool; mode "confidence" or "mid"."""
    joined = masked[:, 1:] & masked[:, :-1] & (prediction[:, 1:] == prediction[:, :-1])
    run = F.pad(~joined, (1, 0), value=True).cumsum(1) - 1  # number of the run of each cell
    place = torch.arange(masked.shape[1], device=masked.device).expand_as(run)
    far = torch.full_like(run, masked.shape[1])
    score = torch.where(masked, confidence, -1)
    highest = torch.full_like(score, -1).scatter_reduce(1, run, score, "amax").gather(1, run)
    length = torch.zeros_like(run).scatter_add(1, run, masked.long()).gather(1, run)
    if mode == "confidence":
        candidate = torch.where(score == highest, place, far)
        cell = far.scatter_reduce(1, run, candidate, "amin").gather(1, run)
    else:
        cell = far.scatter_reduce(1, run, place, "amin").gather(1, run) + length // 2
    return masked & (length >= min_run) & (highest > least) & (place == cell)
