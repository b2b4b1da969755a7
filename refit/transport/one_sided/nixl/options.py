"""The settings of NIXL. No torch: flags are read without it."""

from __future__ import annotations

from dataclasses import dataclass

from refit.config.options import MethodOptions, method_setting

DEFAULT_BACKEND = "UCX"


@dataclass(frozen=True, slots=True)
class NixlOptions(MethodOptions):
    """`backend` is the library that NIXL moves bytes with, by NIXL's name for it."""

    backend: str = method_setting(
        DEFAULT_BACKEND,
        "nixl-backend",
        metavar="NAME",
        help=f"what nixl moves bytes with, as NIXL calls it; default: {DEFAULT_BACKEND}",
    )
