"""The largest sizes that are accepted. What is within them is planned in bounded time and memory.

docs/fields.md lists them, from here.
"""

MAX_RANKS = 4096
"""Ranks of both sides together."""

MAX_LAYERS = 1000
"""Layers."""

MAX_EXPERTS = 4096
"""Routed experts."""

MAX_SIZE = 1 << 24
"""Widths, heads, positions and the vocabulary."""

MAX_PARAMETERS = 10**14
"""Parameters of a model.

All bytes between MAX_RANKS ranks then fit a 64-bit number.
"""

MAX_COUNT = 1_000_000
"""Refits of a run, GPUs available and GPUs of a node."""

MAX_REPEATS = 10_000
"""Refits of `--repeat-until-stable`."""

MAX_RECORDED = 10**18
"""Whole numbers that are recorded only."""

MAX_STAGING_MIB = 1 << 20
"""MiB of staging."""

MAX_TIMEOUT_S = 10_000_000
"""Seconds of `--timeout`."""

MAX_NAME = 200
"""Characters of `--run-name`.

With its suffixes a file's name must fit 255 bytes.
"""

MAX_SCENARIOS = 500
"""Scenarios of one list, with its axes multiplied out."""
