"""Tests of what is sent need the client and the types of Kubeflow's trainer."""

from __future__ import annotations

import importlib.util

import pytest

MISSING = [name for name in ("kubernetes", "kubeflow_trainer_api") if importlib.util.find_spec(name) is None]
needs_client = pytest.mark.skipif(bool(MISSING), reason="pip install 'refit-benchmark[kubernetes]'")
