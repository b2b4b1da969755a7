"""Megatron-Core models. Importing any module of this package prepares Megatron-Core for import first."""

from refit.models.megatron.compat import ready_megatron

ready_megatron()
