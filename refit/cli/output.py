"""Checks, before ranks meet, that the result file can be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping

from refit import units
from refit.checkpoints.layout import partial_of, plan_side
from refit.config.limits import MAX_NAME
from refit.config.scenario import Scenario
from refit.errors import UsageError

PROBE_BYTES = 64 << 10
"""Written and removed again, so that a full disk is noticed."""


def check_written(scenario: Scenario) -> None:
    """Raise UsageError where the folder of `--write-weights` has something in it, cannot be made, or has no space."""
    folder = scenario.write_weights
    if folder is None or scenario.model is None or scenario.destination.dtype is None:
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--write-weights {folder} is there already: give a folder that is not, or an empty one")
    if partial_of(folder).exists():
        raise UsageError(
            f"{partial_of(folder)} is left of a run that was killed, or of one that goes on: remove it first"
        )
    needed = plan_side(folder, scenario.model, scenario.destination)[0].nbytes
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent):
            pass
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        raise UsageError(f"--write-weights {folder} cannot be written: {error.strerror}: give another folder") from None
    if needed > free:
        raise UsageError(
            f"--write-weights {folder} needs {units.gb(needed)}, {folder.parent} has {units.gb(free)} free: give "
            "another folder, or make space"
        )


def discard_partial(scenario: Scenario) -> None:
    """Remove what ranks have left of a checkpoint that they could not finish."""
    if scenario.write_weights is not None:
        shutil.rmtree(partial_of(scenario.write_weights), ignore_errors=True)


def check_output(scenario: Scenario, environ: Mapping[str, str]) -> None:
    """Raise UsageError where the folder of the results cannot be made, or takes no file as long-named as a result.

    Ranks of the first node check, and find the same. Only rank 0 writes results, so other nodes need no such folder.
    """
    if int(environ.get("RANK", "0")) >= int(environ.get("LOCAL_WORLD_SIZE", "1")):
        return
    check_written(scenario)
    directory = scenario.output_dir
    # The longest name that a result's file has: a number where the name is taken, and the temporary file's suffix.
    name = f"{scenario.run_name or '_' * MAX_NAME}-999.json.{os.getpid()}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / name
        try:
            probe.write_bytes(bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"results cannot be written to --output-dir {directory}: {reason}: give a folder that can be written"
        ) from None
