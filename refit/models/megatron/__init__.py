"""The only room that imports Megatron-Core. Importing any module in here readies Megatron for import first."""

from refit.models.megatron.compat import ready_megatron

ready_megatron()
