"""Models that a user's function builds: `--model-provider module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from refit.config.layout import Layout
from refit.errors import RefitError, UsageError
from refit.models.megatron import compat
from refit.models.megatron.build import BuiltModel

Provider: TypeAlias = Callable[[Layout, Any, torch.device], torch.nn.Module | list[torch.nn.Module]]
"""Called on every rank of a layout with the layout, Megatron's ProcessGroupCollection and the device; returns the
rank's part of the model, or several chunks of it."""


def load_provider(text: str) -> Provider:
    """Import `package.module:function`, looking in the working directory too.

    Raises UsageError where the text is malformed, the import fails or the name is not callable.
    """
    module_name, colon, function_name = text.partition(":")
    if not (module_name and colon and function_name):
        raise UsageError(f"--model-provider {text!r} is not of the form module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--model-provider {text!r} cannot be imported: {error}") from error
    if not callable(function):
        raise UsageError(f"--model-provider {text!r} names a {type(function).__name__}, not a function")
    provider: Provider = function
    return provider


def build_from_provider(
    provider: Provider, layout: Layout, groups: Any, device: torch.device | str
) -> BuiltModel | None:
    """This rank's part of the user's model in eval mode; None where `groups` is None: the rank is outside the side.

    Raises RefitError where the provider returns anything but modules, or not as many as the layout has virtual stages.
    """
    if groups is None:
        return None
    device = torch.device(device)
    with compat.running_on(groups, device, layout.vpp):
        built = provider(layout, groups, device)
    chunks = tuple(built) if isinstance(built, (list, tuple)) else (built,)
    if not chunks or not all(isinstance(chunk, torch.nn.Module) for chunk in chunks):
        kinds = ", ".join(type(chunk).__name__ for chunk in chunks) or "an empty list"
        raise RefitError(f"the model provider must return a module or a list of modules, it returned {kinds}")
    if layout.vpp > 1 and len(chunks) != layout.vpp:
        raise RefitError(
            f"the model provider must return a list of {layout.vpp} modules, one per virtual pipeline stage, it "
            f"returned {len(chunks)}"
        )
    return BuiltModel(tuple(chunk.eval() for chunk in chunks), groups, layout)
