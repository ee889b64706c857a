# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM's `llada/generate.py` (24cc59e) restated: what it decides, and when it runs the model.

A module like theirs, for `patch`: the loops find the two functions among its globals. Float64
softmax over all rows; ties go to the lowest index, where their `topk` promises none.
"""

from __future__ import annotations

import torch

INF = torch.inf


def _scored(logits, temperature, remasking, mask_index, x):
    assert temperature == 0 and remasking == "low_confidence"
    best = logits.argmax(-1)
    p = logits.double().softmax(-1).gather(-1, best[..., None]).squeeze(-1)
    return torch.where(mask_index, best, x), p.masked_fill(~mask_index, -INF)


def _best(confidence, counts):
    """[B, L] bool: of each row so many of the greatest that are not -inf."""
    rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < counts.reshape(-1, 1)) & (confidence > -INF)


def get_transfer_index(
    logits, temperature, remasking, mask_index, x, num_transfer_tokens, threshold=None
):
    x0, confidence = _scored(logits, temperature, remasking, mask_index, x)
    if threshold is None:
        return x0, _best(confidence, num_transfer_tokens)
    one = torch.ones(len(x), dtype=torch.int64)
    return x0, _best(confidence, one) | (mask_index & (confidence >= threshold))


def get_transfer_index_dynamic(
    logits, temperature, remasking, mask_index, x, num_transfer_tokens, factor=1
):
    x0, confidence = _scored(logits, temperature, remasking, mask_index, x)
    counts = []
    for row in confidence:
        falling = row[row > -INF].sort(descending=True).values.tolist()
        n = 0
        while n < len(falling) and (n == 0 or falling[n] >= 1 - factor / (n + 2)):
            n += 1
        # Their loop over the thresholds stands on the last one when it ends, and counts it in.
        counts.append(n + 1 if n == len(falling) - 1 else n)
    return x0, _best(confidence, torch.tensor(counts))


def _shares(masked, steps):
    """[B, steps]: so many tokens a step, the remainder in the first ones."""
    count = masked.sum(1, keepdim=True)
    return count // steps + (torch.arange(steps) < count % steps)


def _step(logits, mask_index, tokens, shares, i, temperature, remasking, threshold, factor):
    """One decision, written into `tokens` (a view)."""
    given = (logits, temperature, remasking, mask_index, tokens)
    if factor is not None:
        x0, chosen = get_transfer_index_dynamic(*given, None, factor)
    else:
        quota = shares[:, i] if threshold is None else None
        x0, chosen = get_transfer_index(*given, quota, threshold)
    tokens[chosen] = x0[chosen]


def _begin(prompt, gen_length, mask_id):
    answer = torch.full((len(prompt), gen_length), mask_id)
    return torch.cat([prompt, answer], dim=1)


@torch.no_grad()
def generate(
    model,
    prompt,
    steps=128,
    gen_length=128,
    block_length=128,
    temperature=0.0,
    remasking="low_confidence",
    mask_id=126336,
    threshold=None,
    factor=None,
):
    x, nfe = _begin(prompt, gen_length, mask_id), 0
    for start in range(prompt.shape[1], x.shape[1], block_length):
        block = x[:, start : start + block_length]
        shares, i = _shares(block == mask_id, steps * block_length // gen_length), 0
        while True:
            nfe += 1
            logits, mask_index = model(x).logits, x == mask_id
            mask_index[:, start + block_length :] = False
            _step(logits, mask_index, x, shares, i, temperature, remasking, threshold, factor)
            i += 1
            if not (block == mask_id).any():
                break
    return x, nfe


def _cached(model, x, start, length, shares, dual, mask_id, *options):
    """A block: a full pass, then steps from its cache; one at least, as in theirs."""
    output, mask_index = model(x, use_cache=True), x == mask_id
    mask_index[:, start + length :] = False
    _step(output.logits, mask_index, x, shares, 0, *options)
    past, given, view = output.past_key_values, {}, x[:, start:]
    if dual:
        place = torch.zeros_like(x, dtype=torch.bool)
        place[:, start : start + length] = True
        given, view = {"replace_position": place}, x[:, start : start + length]
    else:
        past = [tuple(tensor[:, :, :start] for tensor in pair) for pair in past]
    i = 1
    while True:
        logits = model(view, past_key_values=past, use_cache=True, **given).logits
        mask_index = view == mask_id
        mask_index[:, length:] = False
        _step(logits, mask_index, view, shares, i, *options)
        i += 1
        if not (view[:, :length] == mask_id).any():
            return i


def _with_cache(
    dual,
    model,
    prompt,
    steps,
    gen_length,
    block_length,
    temperature,
    remasking,
    mask_id,
    threshold,
    factor,
):
    x, nfe = _begin(prompt, gen_length, mask_id), 0
    for start in range(prompt.shape[1], x.shape[1], block_length):
        masked = x[:, start : start + block_length] == mask_id
        shares = _shares(masked, steps * block_length // gen_length)
        shares = torch.cat([shares, torch.zeros_like(shares)], dim=1)  # for the step in vain
        options = (temperature, remasking, threshold, factor)
        nfe += _cached(model, x, start, block_length, shares, dual, mask_id, *options)
    return x, nfe


@torch.no_grad()
def generate_with_prefix_cache(
    model,
    prompt,
    steps=128,
    gen_length=128,
    block_length=128,
    temperature=0.0,
    remasking="low_confidence",
    mask_id=126336,
    threshold=None,
    factor=None,
):
    return _with_cache(
        False,
        model,
        prompt,
        steps,
        gen_length,
        block_length,
        temperature,
        remasking,
        mask_id,
        threshold,
        factor,
    )


@torch.no_grad()
def generate_with_dual_cache(
    model,
    prompt,
    steps=128,
    gen_length=128,
    block_length=128,
    temperature=0.0,
    remasking="low_confidence",
    mask_id=126336,
    threshold=None,
    factor=None,
):
    return _with_cache(
        True,
        model,
        prompt,
        steps,
        gen_length,
        block_length,
        temperature,
        remasking,
        mask_id,
        threshold,
        factor,
    )
