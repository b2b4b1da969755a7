"""Importing Megatron must wait for `refit.megatron`, which readies it; tests import the one or the other first."""

import refit.megatron  # noqa: F401
