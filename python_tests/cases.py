# SPDX-License-Identifier: Apache-2.0
"""Inputs: logits with chosen confidences, awkward memory layouts, random draws, hand cases."""

from __future__ import annotations

import copy
import math
from random import Random

import torch
from hypothesis import strategies as st
from torch import Tensor

from r2dllm_ext import build_info
from r2dllm_ext.config import (
    BASE_RULES,
    COMPARES,
    CONFIDENCE_DTYPES,
    MASK_PREDICTIONS,
    SAMPLED_CONFIDENCES,
    TEMPORAL_EVALS,
    TOKEN_CLUSTERS,
    DecodeConfig,
)

OFF = {
    "confidence_cluster_size": 0,
    "neighbour_radius": 0,
    "token_cluster": None,
    "temporal_steps": 0,
}
NARROW = (torch.bfloat16, torch.float16)
# In a build that emulates CUDA (setup.py) the CPU stands in for a card.
EMULATED = build_info()["cuda_architectures"] == ["emulated"]


def runs_cuda(device: str) -> bool:
    """Whether ops on tensors of `device` go through the CUDA back end."""
    return EMULATED or device == "cuda"


DTYPES = {
    device: (torch.float32, *NARROW, *(() if runs_cuda(device) else (torch.float64,)))
    for device in ("cpu", "cuda")
}


def roundings(n: int) -> float:
    """Relative error of n float32 roundings: a chain of n operations, or a sum of n terms, in any
    order, whose magnitudes add up to the result. What reorders or vectorises sums keeps to it."""
    return n * 2.0**-24


STREAKS = ("streak_count", "streak_id", "streak_sum", "streak_max")
# Known answers of Philox4x32-10, from the Random123 distribution: counter, key, words.
RANDOM123 = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]

# ---- logits ----------------------------------------------------------------------------------


def sure_logits(cells: list[tuple[int, float]], vocab: int = 16) -> Tensor:
    """[1, L, V] float32: cell i predicts token cells[i][0] with probability cells[i][1].

    Probability 1 / n with n in 2, 4, 8 is exact: n tied tokens, of which the given one is the
    lowest; 1 is exact too. Others hold to rounding. The last token, a place for the mask id, has
    none.
    """
    logits = torch.zeros(1, len(cells), vocab)
    logits[..., -1] = -1e4
    for i, (token, p) in enumerate(cells):
        if p in (1, 0.5, 0.25, 0.125):
            logits[0, i] = -1e4
            logits[0, i, token : token + round(1 / p)] = 0
        else:
            logits[0, i, token] = math.log(p / (1 - p) * (vocab - 2))
    return logits


def spiked_logits(
    generator: torch.Generator, target: Tensor, probability: Tensor, vocab: int, noise: float = 0.5
) -> Tensor:
    """[B, L, V] float32 noise in which token `target` [B, L] has about that probability [B, L]."""
    z = torch.randn(*target.shape, vocab, generator=generator) * noise
    others = z.scatter(-1, target[..., None], -torch.inf).logsumexp(-1)
    spike = others + torch.logit(probability.clamp(1e-3, 1 - 1e-6))
    return z.scatter(-1, target[..., None], spike.nan_to_num(0.0, 0.0, 0.0)[..., None])


# ---- memory layouts --------------------------------------------------------------------------

LAYOUTS = ("contiguous", "padded", "offset", "transposed")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in other memory, last dimension contiguous.

    "padded": row stride > V and a gap between batch rows; "offset": starts at an odd element;
    "transposed": the first two dimensions are swapped in memory.
    """
    if layout == "contiguous":
        return values.contiguous()
    shape = list(values.shape)
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "offset":
        buffer = values.new_zeros(values.numel() + 3)
        view = buffer[3:].view(shape)
    else:
        pads = (2, 3, 5)[: len(shape)]
        view = values.new_zeros([n + pad for n, pad in zip(shape, pads, strict=True)])
        for axis, n in enumerate(shape):
            view = view.narrow(axis, pads[axis] - 1, n)
    return view.copy_(values)


def strided_tokens(tokens: Tensor) -> Tensor:
    """The same tokens as every second column of a larger buffer."""
    rows, length = tokens.shape
    view = tokens.new_full((rows, 2 * length + 1), -7)[:, 1 : 2 * length + 1 : 2]
    return view.copy_(tokens)


# ---- comparisons -----------------------------------------------------------------------------


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal shape, dtype and values, or both None; NaN equals NaN."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.cpu(), b.cpu()
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_same(got, want, where: str = "") -> None:
    """Two tuples of tensors (DecodeStep, ...) agree bit for bit."""
    assert len(got) == len(want)
    names = getattr(want, "_fields", range(len(want)))
    for name, a, b in zip(names, got, want, strict=True):
        if not same_bits(a, b):
            shown = [x if x is None else (x.dtype, x.tolist()) for x in (a, b)]
            raise AssertionError(f"{where} {name}: got {shown[0]}, expected {shown[1]}")


def state_tensors(state) -> tuple[Tensor, ...]:
    """Streaks, counters and, where there is one, the step map."""
    tensors = (getattr(state, name) for name in (*STREAKS, "counters", "step_map"))
    return tuple(tensor for tensor in tensors if tensor is not None)


def clone(state):
    return copy.deepcopy(state)


# Relative error of anything made of the probabilities of a row, where V < 10^6: the bound of
# csrc/cpu/vocab_kernels.h with 1 for 1 - p, and of float64 as long a sum as a slice has terms.
ROW_ERROR = dict.fromkeys((torch.float32, *NARROW), 24 * 2.0**-24)
ROW_ERROR[torch.float64] = 4096 * 2.0**-53


def mass_error(p: Tensor, vocab: int, device: str) -> Tensor:
    """Relative error of the probability of a token of a row whose argmax has `p`, before it is
    rounded to float32; an argmax has 1 - p times as much.

    On the CPU the bound of csrc/cpu/vocab_kernels.h, for any instruction set. On CUDA a term is
    within 4 * 2^-24 too, no more than three roundings lead to a double, and z - max and its product
    with log2(e) are rounded: 2 per nat beside the 0.25 of log2(e) itself.
    """
    terms, per_nat = (2 * 4 + 3, 2.25) if runs_cuda(device) else (2 * 4 + 11, 0.25)
    below = (p * vocab / (1 - p).clamp_min(1e-9)).log1p()
    return (terms + per_nat * below) * 2.0**-24


def confidence_ulps(p: Tensor, vocab: int, device: str) -> Tensor:
    """How far the confidence of an argmax may be from the float64 softmax `p`, in its last
    places."""
    return (1 - p) * mass_error(p, vocab, device) * p / last_place(p) + 0.5


def ulps(got: Tensor, want: Tensor) -> Tensor:
    """Distance of float32 `got` from float64 `want` in units of want's last float32 place."""
    return (got.double() - want).abs() / last_place(want)


def last_place(p: Tensor) -> Tensor:
    """The float32 spacing at float64 `p`."""
    exponent = torch.frexp(p.clamp_min(torch.finfo(torch.float32).tiny)).exponent
    return torch.ldexp(torch.ones_like(p), exponent - 24)


# ---- random draws (hypothesis) ---------------------------------------------------------------

PROBABILITIES = (0.0, 0.125, 0.25, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BUDGETS = (0.0, 0.005, 0.1, 0.5, 2.0)
TEMPERATURES = (0.3, 1.0, 2.5, 1e-300, 1e300)


def random_config(random: Random, vocab: int, **fixed) -> DecodeConfig:
    """Any valid DecodeConfig for V = vocab; `fixed` fields as given."""
    pick = random.choice
    options = {
        "mask_id": random.randrange(vocab),
        "mask_prediction": pick(MASK_PREDICTIONS),
        "base": pick(BASE_RULES),
        "threshold": pick((None, *PROBABILITIES)),
        "compare": pick(COMPARES),
        "quota": pick((0, 1, 1, 1, 2, 3, 9)),
        "factor": pick((0.01, 0.5, 1.0, 1.5, 4.0)),
        "error_budget": pick(BUDGETS),
        "entropy_budget": pick(BUDGETS),
        "last_free": pick((False, True)),
        "steps_per_block": pick((None, 1, 2, 3, 5)),
        "confidence_cluster_size": pick((None, 0, 1, 2, 3, 5, 40)),
        "spatial_threshold": pick(PROBABILITIES),
        "confidence_cluster_unmasked": pick((None, 0, 1, 2, 9)),
        "neighbour_radius": pick((None, 0, 1, 2, 4, 99)),
        "neighbour_threshold": pick(PROBABILITIES),
        "token_cluster": pick(TOKEN_CLUSTERS),
        "token_cluster_size": random.randint(1, 3),
        "temporal_steps": pick((None, 0, 1, 2, 3)),
        "temporal_threshold": pick(PROBABILITIES),
        "temporal_eval": pick(TEMPORAL_EVALS),
        "edit_threshold": pick((None, *PROBABILITIES)),
        "seed": random.randrange(-(2**63), 2**63),
        "confidence_dtype": pick(CONFIDENCE_DTYPES),
        "report_entropy": pick((False, True)),
    }
    if random.random() < 0.25:
        options |= {
            "temperature": pick(TEMPERATURES),
            "top_k": pick((None, 1, 5)),
            "top_p": pick((None, 0.5, 0.95)),
            "min_p": pick((None, 0.05, 0.5, 1.0)),
            "sampled_confidence": pick(SAMPLED_CONFIDENCES),
        }
    return DecodeConfig(**(options | fixed))


def configs(vocab: int, **fixed):
    """Strategy of `random_config`."""
    return st.integers(0, 2**32).map(lambda seed: random_config(Random(seed), vocab, **fixed))


def random_steps(seed: int, shape: tuple[int, int, int], steps: int, mask_id: int) -> list[Tensor]:
    """Logits of consecutive steps, [B, L, V] float32: runs of predictions that drift slowly.

    Some cells predict the mask id, some tie, some rows are invalid (NaN, +inf, all -inf).
    """
    rows, length, vocab = shape
    g = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(rows, length, generator=g)

    target = torch.randint(vocab, (rows, length), generator=g)
    for i in range(1, length):  # neighbours often agree
        target[:, i] = torch.where(uniform()[:, i] < 0.5, target[:, i - 1], target[:, i])
    level = torch.rand(rows, 1, generator=g)
    made = []
    for _ in range(steps):
        redrawn = torch.randint(vocab, (rows, length), generator=g)
        target = torch.where(uniform() < 0.15, redrawn, target)
        target = torch.where(uniform() < 0.05, mask_id, target)
        z = spiked_logits(g, target, (level + uniform()).clamp(max=1.6) / 1.6, vocab)
        odd = uniform()
        z[odd < 0.02] = -torch.inf
        z[(0.02 < odd) & (odd < 0.08)] = torch.rand(1, generator=g).item()  # all tied
        for low, bad in ((0.08, torch.nan), (0.1, torch.inf), (0.12, -torch.inf)):
            b, i = ((low < odd) & (odd < low + 0.02)).nonzero(as_tuple=True)
            z[b, i, torch.randint(vocab, b.shape, generator=g)] = bad
        made.append(z)
    return made
