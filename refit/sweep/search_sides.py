"""The layouts of each side that a search looks at, as flags and as what their ranks hold. Flags are read once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from refit.cli.layout_text import layout_flags
from refit.cli.model_checks import check_parameters, without_unbuildable_biases
from refit.cli.model_flags import model_shape
from refit.cli.parsing import parse, read_flags
from refit.cli.side_flags import read_side
from refit.config.registry import FORMATS, load
from refit.config.scenario import Mode, Scenario
from refit.config.shape import ModelShape
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.serving.layout import Served
from refit.predict.sides import check_side, predict_side


@dataclass(frozen=True)
class Option:
    """A layout of a side with its own flags; or, where its sizes are none of the format's, why (`spec` is None)."""

    flags: tuple[str, ...]
    spec: SideSpec | None
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Holding:
    """What the ranks of a side hold: bytes by rank, in order. `served` is None for a format that does not serve."""

    bytes_by_rank: Sequence[int]
    served: Served | None

    @property
    def most(self) -> int:
        return max(self.bytes_by_rank)


class Sides:
    """Reads the layouts of both sides of scenarios with the flags `common`."""

    def __init__(self, common: tuple[str, ...]) -> None:
        """Raises UsageError where no scenario has these flags, or where a provider builds the model."""
        words = [*common, "--dry-run"]
        self.scenario: Scenario = parse(words).scenario
        if self.scenario.model is None:
            raise UsageError("a search predicts the models that flags describe: leave --model-provider out")
        self._args = read_flags(words)
        self._shape = model_shape(self._args)
        self._holdings: dict[tuple[SideSpec, ModelShape], Holding | UsageError] = {}

    @property
    def num_layers(self) -> int:
        return self._shape.num_layers

    def option(self, name: str, flags: tuple[str, ...], first_rank: int) -> Option:
        """The layout that the flags of `layout_flags` say, on ranks from `first_rank` on."""
        args = copy.copy(self._args)
        for word in flags:
            flag, _, value = word[2:].partition("=")
            setattr(args, flag.replace("-", "_"), int(value) if value.isdecimal() else value)
        try:
            return Option(flags, read_side(name, args, first_rank=first_rank))
        except UsageError as error:
            return Option(flags, None, str(error))

    def shape(self, source: SideSpec, destination: SideSpec) -> ModelShape:
        """The model that both sides can build. Raises UsageError where it has too many parameters."""
        layouts = [source.layout, destination.layout]
        shape, _ = without_unbuildable_biases(self._shape, layouts)
        check_parameters(shape, layouts)
        return shape

    def holding(self, name: str, spec: SideSpec, shape: ModelShape) -> Holding:
        """What the ranks of a side hold. Raises UsageError where the model cannot be sharded so."""
        key = spec, shape
        if key not in self._holdings:
            try:
                self._holdings[key] = self._held(name, spec, shape)
            except UsageError as error:
                self._holdings[key] = error
        found = self._holdings[key]
        if isinstance(found, UsageError):
            raise found
        return found

    def _held(self, name: str, spec: SideSpec, shape: ModelShape) -> Holding:
        padded: int | None = self._args.padded_vocab_size
        if padded and padded % spec.layout.tp:
            raise UsageError(
                f"{name}: --padded-vocab-size {padded} cannot be divided by TP size {spec.layout.tp}: give a multiple "
                "of it, or --vocab-size"
            )
        row = FORMATS[spec.format]
        if row.serving is None:
            check_side(shape, spec, name)
            return Holding(list(predict_side(shape, spec).bytes_per_rank.values()), None)
        load(row.check)(shape, spec, name)
        count: Callable[[ModelShape, SideSpec], Served] = load(row.serving)
        try:
            served = count(shape, spec)
        except ValueError:
            check_side(shape, spec, name)  # says which tensor is not cut between blocks
            raise
        return Holding(served.bytes_by_rank, served)


def side_flags(
    side: str, formats: Iterable[str], num_gpus: int, num_layers: int, max_pp: int
) -> Iterator[tuple[str, ...]]:
    """The flags of every layout of `num_gpus` ranks, in each format: all sizes that divide them.

    Whether the model can be sharded so is not checked. The order decides between layouts that are equally good: sizes
    come largest first, so that experts are kept whole (EP before ETP).
    """
    divisors = [size for size in range(num_gpus, 0, -1) if num_gpus % size == 0]
    for name in formats:
        searched = (*FORMATS[name].axes, *(FORMATS[name].searched_options if side == "destination" else ()))
        axes = [[size for size in divisors if axis != "pp" or size <= max_pp] for axis in searched]
        for values in itertools.product(*axes):
            yield layout_flags(side, name, dict(zip(searched, values, strict=True)), num_gpus, num_layers)


def first_rank(mode: Mode, source: SideSpec) -> int:
    """Of a destination."""
    return 0 if mode is Mode.COLLOCATED else source.world_size


def positions_of(common: Sequence[str]) -> int:
    """The positions of the model that these flags describe. Raises UsageError where they describe none."""
    return model_shape(read_flags([*common, "--dry-run"])).max_position_embeddings
