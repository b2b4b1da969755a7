"""Fits refit times as the sum of a cost per operation and a cost per byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_CONDITION = 50.0
"""Above this condition number, 1 % of noise in the times can change a fitted cost by half."""

MIN_RATIO = 1.1
"""Sizes with a smaller ratio than this count as one."""


class FitError(ValueError):
    """The measurements do not determine the two costs. The message gives the reason."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one scenario moved, in bytes, and its time. `operations` are those of one rank."""

    nbytes: float
    operations: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """time = `operation_s` x operations + bytes / `bytes_per_s`; `worst_error` is the largest relative deviation."""

    operation_s: float
    bytes_per_s: float
    worst_error: float

    def operations_s(self, load: Load) -> float:
        """Seconds of a load's operations."""
        return self.operation_s * load.operations

    def bytes_s(self, load: Load) -> float:
        """Seconds of a load's bytes."""
        return load.nbytes / self.bytes_per_s


def fit_time(loads: Sequence[Load]) -> Fit:
    """Least squares over relative errors, so that small scenarios count as much as large ones.

    Raises FitError with fewer than two sizes, where operations grow in step with bytes, and where the best fit has a
    negative cost, since something else then determines the time.
    """
    sizes = sorted(load.nbytes for load in loads)
    if len(sizes) < 2 or sizes[-1] < MIN_RATIO * sizes[0]:
        ran = "1 scenario" if len(sizes) == 1 else f"{len(sizes)} scenarios of about one size"
        raise FitError(f"needs scenarios of at least two sizes, there {'is' if len(sizes) == 1 else 'are'} {ran}")
    seconds = np.array([load.seconds for load in loads])
    # A row reads: operations / time x a + bytes / time x b = 1.
    rows = np.array([[load.operations, load.nbytes] for load in loads]) / seconds[:, None]
    scale = np.linalg.norm(rows, axis=0)
    if not scale.all() or np.linalg.cond(rows / scale) > MAX_CONDITION:
        raise FitError("the number of transfers grows in step with the bytes, so their costs cannot be told apart")
    operation_s, byte_s = np.linalg.lstsq(rows / scale, np.ones(len(loads)), rcond=None)[0] / scale
    if operation_s < 0 or byte_s <= 0:
        what = "a transfer" if operation_s < 0 else "a byte"
        raise FitError(f"the best fit gives {what} a negative cost, so something else decides these times")
    worst = float(np.abs(rows @ np.array([operation_s, byte_s]) - 1).max())
    return Fit(float(operation_s), float(1 / byte_s), worst)
