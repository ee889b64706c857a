# SPDX-License-Identifier: Apache-2.0
"""A block step of a LLaDA-8B-shaped model with random weights: how much of it the decode step is.

    python bench/forward.py [--batch 8] [--json FILE]        needs a card with 20 GB

32 tokens of a block, dual cache, context 512. The forward alone and with each decode step, eager
and under torch.compile, called and as a graph replay, beside reading the weights (without the
embedding) once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bars import bar_table, held
from baselines import authors_step
from reading import fastest_read
from report import Parser, duration, environment, fail, table, use_device, write_json
from timing import Variant, measure, summary

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


def step_variants(
    model: Transformer, batch: int, context: int, compiled: bool
) -> tuple[list[Variant], dict[str, str]]:
    """What is timed, and why something is not."""
    device, mask_id, length = model.device, model.mask_id, 32
    ids = torch.randint(mask_id, (batch, context), device=device)
    block = slice(context - length, context)
    ids[:, block] = mask_id
    tokens, state = ids[:, block], r2.DecodeState(batch, length, device=device)
    config = r2.DecodeConfig.r2(mask_id)
    past = model(ids, use_cache=True).past_key_values
    options = {"past_key_values": past, "replace_position": (block.start, block.stop)}
    options["use_cache"] = True

    def renew() -> None:
        tokens.fill_(mask_id)
        state.reset()

    def ways(name: str, model: Callable[..., Any]) -> list[Variant]:
        forward = lambda: model(tokens, **options).logits
        ours = lambda: r2.decode_step(forward(), tokens, state, config)
        called = [
            Variant(f"forward {name}", forward, graph=False),
            Variant(f"ours {name}", ours, renew, graph=False),
        ]
        if device.type != "cuda":
            return called
        return [
            *called,
            Variant(f"forward {name} graph", forward),
            Variant(f"ours {name} graph", ours, renew),
        ]

    def authors() -> None:
        authors_step(model(tokens, **options).logits, tokens, state, config)

    variants = ways("eager", model)
    variants.append(Variant("authors eager", authors, renew, graph=False))
    skipped = {}
    if not compiled:
        skipped["compiled"] = "--no-compile"
    else:
        fast = torch.compile(model, dynamic=False)
        try:
            fast(tokens, **options)
        except Exception as error:  # any stage of the compiler may be missing or fail
            skipped["compiled"] = f"torch.compile: {(str(error).splitlines() or [''])[0]}"
        else:
            variants += ways("compiled", fast)
    return variants, skipped


def outside(median: dict[str, float]) -> dict[str, float]:
    """Share of a step that is spent outside of its forward."""
    shares = {}
    for name, us in median.items():
        who, _, mode = name.partition(" ")
        if who in ("ours", "authors"):
            shares[name] = 1 - median[f"forward {mode}"] / us
    return shares


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="forward.py", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="positions in the cache")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="a model of nothing, to try the script"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.batch < 1 or args.context < 32:
        fail("--batch takes an integer >= 1, --context one >= 32")
    use_device(args.device)
    model = random_model(SMALL if args.small else LLADA_8B, args.device, torch.bfloat16)
    weights = [p.data for p in model.parameters() if p.dim() == 2 and p is not model.embed.weight]
    with torch.inference_mode():
        variants, skipped = step_variants(model, args.batch, args.context, args.compile)
        read_kernel, read = fastest_read(*weights)
        variants.append(Variant("read", read))
        times = measure(variants, before=lambda: None, seconds=args.seconds, device=args.device)

    columns = {name: summary(samples) for name, samples in times.items()}
    median = {name: column["median_us"] for name, column in columns.items()}
    shares, size = outside(median), sum(weight.nbytes for weight in weights)
    rows = [
        (
            name,
            duration(us),
            f"{size / us * 1e-3:.0f}",
            f"{median['read'] / us:.2f}",
            f"{shares[name]:.2%}" if name in shares else "-",
        )
        for name, us in median.items()
    ]
    print(table(("step", "median", "GB/s of weights", "of read", "outside forward"), rows))
    print(f"read: {read_kernel} over {size / 1e9:.3g} GB of weights")
    for column, reason in skipped.items():
        print(f"{column} skipped: {reason}")
    bars = []
    if args.device == "cuda" and args.batch == 1 and not args.small:
        best = min((us, name) for name, us in median.items() if name in shares and "graph" in name)
        bars = [
            held(f"{best[1]}: ms a step", best[0] * 1e-3, "<=", 6, aim=4.5),
            held(f"{best[1]}: share outside the forward", shares[best[1]], "<", 0.01),
        ]
    print(bar_table(bars))
    content = {
        "schema": 2,
        **environment(args.device),
        "model": "small" if args.small else "LLaDA-8B shape",
        "batch": args.batch,
        "context": args.context,
        "weight_bytes": size,
        "read_kernel": read_kernel,
        "skipped": skipped,
        "columns": columns,
        "outside_forward": shares,
        "bars": bars,
    }
    write_json(args.json, content)


if __name__ == "__main__":
    main()
