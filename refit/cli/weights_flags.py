"""What `--source-weights` and `--write-weights` ask for, checked against the model before anything is started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from refit.checkpoints.contents import contents_of
from refit.checkpoints.files import CONFIG_NAME, read_folder
from refit.checkpoints.layout import plan_side
from refit.cli.flags import full_parser
from refit.cli.model_flags import model_shape
from refit.cli.presets import config_flags
from refit.config.registry import LOAD, MEASUREMENTS
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.families.config_json import read_config_json
from refit.predict.families.names import check_names

COMPARED = ("num_layers", "num_attention_heads", "num_query_groups", "kv_channels", "tied_embeddings", "mla")
"""Fields of ModelShape that the shapes of tensors need not show."""


def measurements(args: argparse.Namespace) -> tuple[str, ...]:
    """Those that were asked for, and the loading of a checkpoint, in the order of MEASUREMENTS."""
    loads = (LOAD,) if args.source_weights is not None else ()
    return tuple(name for name in MEASUREMENTS if name in (*loads, *args.measure))


def check_weights_flags(
    args: argparse.Namespace, model: ModelShape | None, sides: Sequence[SideSpec]
) -> tuple[str, ...]:
    """Notes on what of a checkpoint is read otherwise than it is there.

    Raises UsageError where a flag lacks what it needs, the folder is damaged, or its tensors are not the model's.
    """
    source, destination = sides
    if LOAD in args.measure and args.source_weights is None:
        raise UsageError(f"--measure {LOAD} fills the source from a checkpoint: give --source-weights")
    given = [name for name in ("source_weights", "write_weights") if getattr(args, name) is not None]
    if not given:
        return ()
    if model is None:
        flag = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{flag} needs the names of the model's tensors, which --model-provider does not say")
    check_names(model)
    if args.write_weights is not None:
        if "refit" not in args.measure:
            raise UsageError("--write-weights writes what a refit has moved: add refit to --measure, or leave it out")
        plan_side(Path(args.write_weights), model, destination)
    if args.source_weights is None:
        return ()
    assert source.dtype is not None
    folder = read_folder(Path(args.source_weights))
    contents = contents_of(folder, model, source.dtype)
    if folder.config and not _is_described_by(args, folder.path):
        _check_config(folder.path, model)
    return tuple(f"--source-weights: {note}" for note in contents.notes)


def _is_described_by(args: argparse.Namespace, folder: Path) -> bool:
    return args.hf_config is not None and args.hf_config.path.resolve() == (folder / CONFIG_NAME).resolve()


def _check_config(folder: Path, model: ModelShape) -> None:
    """Raise UsageError where a checkpoint's own config.json has other sizes than the model that flags describe.

    Tensors of equal shapes may be those of other heads. What the file leaves open says nothing.
    """
    try:
        flags = config_flags(read_config_json(folder, {}))
        described = model_shape(full_parser().parse_flags([], flags))
    except UsageError:  # a model that no flags describe, of which the tensors fit all the same
        return
    for name in COMPARED:
        theirs, ours = getattr(described, name), getattr(model, name)
        if theirs != ours:
            raise UsageError(
                f"{folder / CONFIG_NAME} has {name.replace('_', ' ')} {theirs}, the model has {ours}: leave the flags "
                "that describe it out"
            )
