"""Importing Megatron must wait for `refit.models.megatron`, which readies it; tests import the one or the other
first."""

import refit.models.megatron  # noqa: F401
