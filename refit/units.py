"""Formats numbers for people. GB = 1e9 bytes; GiB only for memory."""

from __future__ import annotations


def count(number: int) -> str:
    """`1.026 T`, `671.0 B`, `12.5 M`, `840`: four significant figures at most."""
    for scale, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number:,}"


def gb(nbytes: float) -> str:
    """`65.93 GB`, `23.4 MB`, `512 bytes`."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= scale:
            return f"{nbytes / scale:,.2f} {unit}"
    return f"{nbytes:.0f} bytes"


def gib(nbytes: float) -> str:
    """`61.40 GiB` or `8.6 MiB`, for memory."""
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"


def seconds(number: float) -> str:
    """`1.32 s`, `168.6 ms`, `12.0 us`."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number / 1e-6:.4g} us"


def duration(number_s: float) -> str:
    """`8 s`, `12 min`, `1.5 h`: a rough time for people who wait."""
    if number_s < 100:
        return f"{number_s:.0f} s"
    return f"{number_s / 60:.0f} min" if number_s < 6000 else f"{number_s / 3600:.1f} h"
