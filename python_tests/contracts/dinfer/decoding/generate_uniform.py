# SPDX-License-Identifier: Apache-2.0
"""dInfer's loop over blocks, without caches; finished rows leave the batch between two rounds."""

from __future__ import annotations

import torch


class BlockWiseDiffusionLLM:
    def __init__(self, model, decoder, iterator_factory, early_stop=True, maximum_unroll=4):
        self.model, self.decoder, self.maximum_unroll = model, decoder, maximum_unroll
        self.num_forwards = 0
        self.rows_seen = []

    @torch.no_grad()
    def generate(self, prompt, gen_length, block_length):
        mask_id = self.decoder.mask_id
        x = torch.cat([prompt, prompt.new_full((len(prompt), gen_length), mask_id)], 1)
        for block_id, start in enumerate(range(prompt.shape[1], x.shape[1], block_length)):
            end = start + block_length
            self.decoder.block_init(x[:, start:end], block_id)
            self._block(x, start, end)
        return x

    def _block(self, x, start, end):
        mask_id, kept = self.decoder.mask_id, torch.arange(len(x))
        while True:
            kept = kept[(x[kept, start:end] == mask_id).any(1)]
            if len(kept) == 0:
                return
            live = x[kept]
            masks = int((live[:, start:end] == mask_id).sum())
            for _ in range(max(min(masks // 8, self.maximum_unroll), 1)):
                logits = self.model(live).logits[:, start:end]
                self.decoder.decode(logits, start, end, live)
                self.num_forwards += 1
                self.rows_seen.append(len(live))
            x[kept] = live
