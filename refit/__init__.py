"""Refit benchmark suite."""

__version__ = "0.2.0"
