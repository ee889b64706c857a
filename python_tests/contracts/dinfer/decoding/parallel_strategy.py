# SPDX-License-Identifier: Apache-2.0
"""dInfer fce4e32, python/dinfer/decoding/parallel_strategy.py: interface and threshold rule."""

from __future__ import annotations

import torch


class ParallelDecoder:
    def __init__(self, temperature, remasking="low_confidence", mask_id=126336):
        self.temperature, self.remasking, self.mask_id = temperature, remasking, mask_id

    def block_init(self, block_x, block_id):
        """Called before a block."""


class ThresholdParallelDecoder(ParallelDecoder):
    def __init__(self, temperature, threshold, mask_id=126336, eos_id=126081):
        super().__init__(temperature, mask_id=mask_id)
        self.threshold, self.eos_id = threshold, eos_id

    def decode(self, logits, block_start, block_end, x, iter_threshold=None):
        """All cells that are as sure as the threshold, or nearly as sure as the best one."""
        threshold = self.threshold if iter_threshold is None else iter_threshold
        block = x[:, block_start:block_end]
        p, token = logits.float().softmax(-1).max(-1)
        token = logits.argmax(-1)
        p = torch.where((block == self.mask_id) & (token != self.mask_id), p, -torch.inf)
        least = (p.amax(1, keepdim=True) - 1e-5).clamp(-1000, threshold)
        x[:, block_start:block_end] = torch.where(p >= least, token, block)
