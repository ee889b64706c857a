# SPDX-License-Identifier: Apache-2.0
"""The processes of a run, one or those that `torchrun` started."""

from __future__ import annotations

import contextlib
import os
import re
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


def _whole_number(name: str) -> int | None:
    """What torchrun has put into an environment variable; blank counts as unset."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(f"environment variable {name} takes an integer >= 0, got {text!r}")
    return int(text)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """The process group that `torchrun` describes, if it does; yields this process' device."""
    rank, world, local = (_whole_number(n) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank is None or world is None:
        yield device
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name, "").strip():  # torch would wait for a host of no name
            raise ValueError(f"environment variable {name} takes what torchrun sets, got none")
    if device.type == "cuda":
        device = torch.device("cuda", local or 0)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
