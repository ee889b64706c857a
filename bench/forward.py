# SPDX-License-Identifier: Apache-2.0
"""A block step of a LLaDA-8B-shaped model with random weights: how much of it the decode step is.

    python bench/forward.py [--batch 8] [--json FILE]        needs a card with 20 GB

32 tokens of a block, dual cache, context 512. Held against reading the weights (without the
embedding) once. Columns: the forward alone and with each decode step, eager or as a graph replay.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from baselines import authors_step
from harness import (
    Parser,
    Variant,
    duration,
    environment,
    fail,
    measure,
    summary,
    table,
    use_device,
    write_json,
)

import r2dllm_ext as r2
from r2dllm_ext.models import ModelConfig, Transformer

LLADA_8B = ModelConfig(
    "llada", vocab_size=126464, width=4096, layers=32, heads=32, mlp_width=12288, mask_id=126336
)
SMALL = ModelConfig("llada", vocab_size=512, width=64, layers=2, heads=4, mlp_width=96, mask_id=511)


def random_model(config: ModelConfig, device: str, dtype: torch.dtype) -> Transformer:
    """Made where it stays: 16 GB of weights don't pass through the host."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model = model.to_empty(device=device).eval()
    for weight in model.parameters():
        weight.data.fill_(1) if weight.dim() == 1 else weight.data.normal_(0, 0.02)
        weight.requires_grad_(False)
    return model


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="forward.py", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="positions in the cache")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="a model of nothing, to try the script"
    )
    parser.add_argument("--compile", action="store_true", help="also under torch.compile")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.batch < 1 or args.context < 32:
        fail("--batch takes an integer >= 1, --context one >= 32")
    use_device(args.device)
    shape, length = SMALL if args.small else LLADA_8B, 32
    model = random_model(shape, args.device, torch.bfloat16)
    ids = torch.randint(shape.mask_id, (args.batch, args.context), device=args.device)
    block = slice(args.context - length, args.context)
    ids[:, block] = shape.mask_id
    tokens, state = ids[:, block], r2.DecodeState(args.batch, length, device=args.device)
    config = r2.DecodeConfig.r2(shape.mask_id)

    def renew() -> None:
        tokens.fill_(shape.mask_id)
        state.reset()

    with torch.inference_mode():
        past = model(ids, use_cache=True).past_key_values
        place = (block.start, block.stop)

        def forward(model=model):
            return model(
                tokens, past_key_values=past, use_cache=True, replace_position=place
            ).logits

        def ours(forward=forward):
            return r2.decode_step(forward(), tokens, state, config)

        def authors():
            authors_step(forward(), tokens, state, config)

        variants = [
            Variant("forward eager", forward, graph=False),
            Variant("ours eager", ours, renew, graph=False),
            Variant("authors eager", authors, renew, graph=False),
        ]
        if args.device == "cuda":
            variants += [
                Variant("forward graph", forward),
                Variant("ours graph", ours, renew),
            ]
        if args.compile:
            compiled = torch.compile(model, dynamic=False)
            variants.append(Variant("forward compiled", lambda: forward(compiled), graph=False))
        times = measure(variants, before=lambda: None, seconds=args.seconds, device=args.device)

    columns = {name: summary(samples) for name, samples in times.items()}
    median = {name: column["median_us"] for name, column in columns.items()}
    weights = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes
    rows = [
        (name, duration(us), f"{weights / us * 1e-3:.0f} GB/s of weights")
        for name, us in median.items()
    ]
    print(table(("step", "median", "as if bound by"), rows))
    mode = "graph" if args.device == "cuda" else "eager"
    outside = 1 - median[f"forward {mode}"] / median[f"ours {mode}"]
    authors_outside = 1 - median["forward eager"] / median["authors eager"]
    print(f"outside the forward: ours {outside:.2%} ({mode}), authors {authors_outside:.2%}")
    content = {
        "schema": 1,
        **environment(args.device),
        "model": "small" if args.small else "LLaDA-8B shape",
        "batch": args.batch,
        "context": args.context,
        "weight_bytes": weights,
        "columns": columns,
        "outside_forward": {"ours": outside, "authors": authors_outside},
    }
    write_json(args.json, content)


if __name__ == "__main__":
    main()
