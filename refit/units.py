"""Formats numbers for people. GB = 1e9 bytes; GiB only for memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TimeUnit:
    """A unit of time and its length in seconds."""

    name: str
    seconds: float


TIME_UNITS = (TimeUnit("s", 1.0), TimeUnit("ms", 1e-3), TimeUnit("us", 1e-6))


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


def signed_gb(nbytes: float) -> str:
    """`+65.93 GB`, `-23.4 MB`, `+0 bytes`."""
    return f"{'-' if nbytes < 0 else '+'}{gb(abs(nbytes))}"


def gib(nbytes: float) -> str:
    """`61.40 GiB` or `8.6 MiB`, for memory."""
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"


def seconds(number: float) -> str:
    """`1.32 s`, `168.6 ms`, `12.0 us`."""
    unit = time_unit(number)
    return f"{number / unit.seconds:.4g} {unit.name}"


def milliseconds(number: float) -> str:
    """`1,333.0 ms`, `43.4 ms`, `0.01478 ms`: a time in seconds, for texts that give all times in ms."""
    return f"{1e3 * number:,.1f} ms" if number >= 1 else f"{1e3 * number:.4g} ms"


def time_unit(number: float) -> TimeUnit:
    """The largest unit in which a time in seconds is at least 1, or microseconds."""
    return next((unit for unit in TIME_UNITS if number >= unit.seconds), TIME_UNITS[-1])


def decimals(number: float) -> int:
    """Decimals that give a number of at least 1 three significant digits."""
    return 2 if number < 10 else 1 if number < 100 else 0


def three_digits(number: float) -> str:
    """`291`, `48.1`, `2.00`, `0.423`: three significant digits."""
    return f"{number:,.{decimals(number)}f}" if number >= 1 else f"{number:.3g}"


def short_count(number: int) -> str:
    """`96.0 M`, `1.03 T`, `840`: three significant digits from a million on."""
    for scale, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= scale:
            return f"{three_digits(number / scale)} {unit}"
    return f"{number:,}"


def duration(number_s: float) -> str:
    """`8 s`, `12 min`, `1.5 h`: a rough time for people who wait."""
    if number_s < 100:
        return f"{number_s:.0f} s"
    return f"{number_s / 60:.0f} min" if number_s < 6000 else f"{number_s / 3600:.1f} h"
