# SPDX-License-Identifier: Apache-2.0
"""Every kernel on small shapes, checked against the CPU: what bench/on_gpu.sh runs under
compute-sanitizer.

    python bench/small_steps.py [--device cuda]
"""

from __future__ import annotations

import itertools

import torch
from report import Parser, fail, use_device

import r2dllm_ext as r2

# V around a vector, a slice and several slices of each dtype; rows that begin unaligned.
VOCABS = (5, 8, 4097, 20000)
MASK = 3
DRAWS = (
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.8},
)


def logits_of(vocab: int, dtype: torch.dtype, offset: int, rows: int, length: int) -> torch.Tensor:
    """[rows, length, V] with some bad rows; `offset` elements into its memory."""
    generator = torch.Generator().manual_seed(vocab + offset)
    values = torch.randn(rows * length, vocab, generator=generator) * 3
    values[2, 1], values[5] = torch.nan, -torch.inf
    memory = torch.empty(offset + values.numel(), dtype=dtype)
    memory[offset:] = values.flatten()
    return memory


def check(
    vocab: int, dtype: torch.dtype, offset: int, draw: dict, length: int, device: str
) -> None:
    shape = (2, length)
    config = r2.DecodeConfig(MASK, token_cluster="random", spatial_threshold=0.3, **draw)
    memory = logits_of(vocab, dtype, offset, *shape)
    results = []
    for where in ("cpu", device):
        logits = memory.to(where)[offset:].view(*shape, vocab)
        tokens = torch.full(shape, MASK, device=where)
        state = r2.DecodeState(*shape, device=where)
        for _ in range(2):
            step = r2.decode_step(logits, tokens, state, config)
        results.append((tokens.cpu(), step.rule.cpu(), state.streak_id.cpu()))
        if draw["temperature"] == 0:
            prediction, confidence = r2.token_confidence(logits, exclude_id=MASK)
            masked = torch.ones_like(prediction, dtype=torch.bool)
            marked = r2.window_pool(confidence, masked, window=3, min_confidence=0.3)
            chosen = r2.positional_ambiguity(prediction, confidence, masked, min_confidence=0.1)
            twice = r2.DecodeState(*shape, device=where)
            for _ in range(2):
                old = r2.update_stability_(
                    twice,
                    prediction,
                    confidence,
                    was_masked=masked,
                    is_masked=masked,
                    steps=2,
                    min_confidence=0.1,
                )
            half = vocab // 2
            parts = [
                r2.vocab_statistics(part, first_id=first, exclude_id=MASK)
                for first, part in ((0, logits[..., :half]), (half, logits[..., half:]))
            ]
            stacked = parts[0]._replace(values=torch.stack([part.values for part in parts]))
            whole = r2.merge_statistics(stacked)
            judged = r2.select(whole, torch.full_like(tokens, MASK), state, config)
            results[-1] += tuple(t.cpu() for t in (prediction, marked, chosen, old))
            results[-1] += (judged.prediction.cpu(),)
    for one, other in zip(*results, strict=True):
        if not torch.equal(one, other):
            fail(f"V={vocab} {dtype} offset={offset} {draw} L={length}: the devices differ")


def check_loss(vocab: int, dtype: torch.dtype, offset: int, inplace: bool, device: str) -> None:
    """Loss, its gradient and the statistics of rows, some without a target."""
    rows = 7
    memory = torch.randn(offset + rows * vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    targets = torch.arange(rows) % vocab
    targets[::3] = -100
    options = {"entropy_weight": 0.5, "entropy_temperature": 0.7, "inplace_backward": inplace}
    results = []
    for where in ("cpu", device):
        leaf = memory.to(where, dtype, copy=True).requires_grad_()
        logits = (leaf * 1.0)[offset:].view(rows, vocab)
        there = targets.to(where)
        stats = r2.row_stats(logits.detach(), there)
        loss = r2.sft_loss(logits, there, **options)
        loss.backward()
        results.append([t.detach().cpu().double() for t in (stats.nll, loss, leaf.grad)])
    for one, other in zip(*results, strict=True):
        if not torch.allclose(one, other, rtol=1e-2, atol=1e-3, equal_nan=True):
            fail(f"loss: V={vocab} {dtype} offset={offset} inplace={inplace}: the devices differ")


def main() -> None:
    parser = Parser(prog="small_steps.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args()
    use_device(args.device)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cases = list(itertools.product(VOCABS, dtypes, (0, 1), DRAWS, (32,)))
    cases += [(8, torch.bfloat16, 0, DRAWS[0], length) for length in (3, 33, 1024)]
    for case in cases:
        check(*case, args.device)
    losses = list(itertools.product(VOCABS, dtypes, (0, 1), (False, True)))
    for case in losses:
        check_loss(*case, args.device)
    print(f"{len(cases) + len(losses)} cases agree with the CPU")


if __name__ == "__main__":
    main()
