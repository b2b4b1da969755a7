"""`refit.models.megatron` prepares Megatron for import, so it is imported before any test imports Megatron."""

import refit.models.megatron  # noqa: F401
