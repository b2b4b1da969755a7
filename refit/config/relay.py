"""Relay: whether weights that several ranks need cross between hosts once, and go on from there."""

from __future__ import annotations

from enum import Enum


class Relay(str, Enum):
    """OFF: every rank gets its weights from the source. NODE: each node gets a byte once, and its ranks pass it on.

    ENGINE: the source also sends a byte once, and the nodes, of one engine or several, pass it on. AUTO: the one whose
    lower bound is least.
    """

    OFF = "off"
    NODE = "node"
    ENGINE = "engine"
    AUTO = "auto"
