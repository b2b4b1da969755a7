"""Small objects between ranks: the suite's own bookkeeping, never weights."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather(group: dist.ProcessGroup, mine: Any) -> list[Any]:
    """`mine` of every rank of `group`, in rank order, on every rank. Collective."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    return gathered
