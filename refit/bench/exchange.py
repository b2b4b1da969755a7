"""Exchange of small Python objects between ranks. Weights are not sent this way."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather(group: dist.ProcessGroup, mine: Any) -> list[Any]:
    """Return `mine` of every rank of `group`, in rank order. Collective: every rank of `group`."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    return gathered
