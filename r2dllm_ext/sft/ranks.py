# SPDX-License-Identifier: Apache-2.0
"""The processes of a run, one or those that `torchrun` started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among `world`."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value


def current_ranks() -> Ranks:
    """Of the default process group; alone where there is none."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """The process group that `torchrun` describes, if it does; yields this process' device."""
    if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):  # empty counts as unset
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
