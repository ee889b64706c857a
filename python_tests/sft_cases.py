# SPDX-License-Identifier: Apache-2.0
"""Small models, examples and trainers for the tests of the fine-tuning pipeline."""

from __future__ import annotations

import torch

from r2dllm_ext import DecodeConfig, sft
from r2dllm_ext.models import ModelConfig, Transformer
from r2dllm_ext.tasks.ledger import Tokenizer

WORDS = Tokenizer()
MASK, END, VOCAB, L = WORDS.mask_id, WORDS.end_id, len(WORDS), 8


def tiny(family: str = "llada", seed: int = 5, **changes) -> Transformer:
    """A random model with the ledger's vocabulary."""
    shape = {
        "vocab_size": VOCAB,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "mlp_width": 32,
        "mask_id": MASK,
        "eos_id": END,
        "pad_id": WORDS.pad_id,
        "max_length": 64,
    }
    config = ModelConfig(family, **{**shape, **changes})
    return Transformer(config).init_weights(seed, std=0.3)


def examples(n: int = 5, answer: int = 16) -> list[sft.Example]:
    """Prompts of different lengths and random answers."""
    g = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCAB, (length,), generator=g).tolist()

    steps = torch.randint(0, 12, (n, answer), generator=g).tolist()
    return [sft.Example(ids(3 + i % 3), ids(answer), steps[i]) for i in range(n)]


def trainer(model=None, data=None, *, micro_batch_size=None, parallel="ddp", **changes):
    options = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup": 2} | changes
    return sft.Trainer(
        model or tiny(),
        data or examples(),
        sft.Training(**options),
        mask_id=MASK,
        block_length=L,
        micro_batch_size=micro_batch_size,
        parallel=parallel,
    )


ROLLOUT = sft.Rollout(DecodeConfig.fast_dllm(MASK), gen_length=16, block_length=L, batch_size=2)


def prompts(n: int = 5) -> list[sft.Prompt]:
    return [sft.Prompt({"prompt_ids": e.prompt_ids}, e.prompt_ids) for e in examples(n)]
