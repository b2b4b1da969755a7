"""CUDA's streams and events, typed."""

from __future__ import annotations

import torch


def new_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """Lower numbers go first."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
    return stream


def is_over(event: torch.cuda.Event) -> bool:
    """Whether all work before the event has ended; does not wait."""
    return bool(event.query())  # type: ignore[no-untyped-call]
