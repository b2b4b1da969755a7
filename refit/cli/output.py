"""Checks, before ranks meet, that the result file can be written."""

from __future__ import annotations

import os
from collections.abc import Mapping

from refit.config.limits import MAX_NAME
from refit.config.scenario import Scenario
from refit.errors import UsageError

PROBE_BYTES = 64 << 10
"""Written and removed again, so that a full disk is noticed."""


def check_output(scenario: Scenario, environ: Mapping[str, str]) -> None:
    """Raise UsageError where the folder of the results cannot be made, or takes no file as long-named as a result.

    Ranks of the first node check, and find the same. Only rank 0 writes results, so other nodes need no such folder.
    """
    if int(environ.get("RANK", "0")) >= int(environ.get("LOCAL_WORLD_SIZE", "1")):
        return
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
