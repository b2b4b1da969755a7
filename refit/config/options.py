"""Settings that one format or one method alone has: a frozen class beside its code, each field with its flags.

    @dataclass(frozen=True, slots=True)
    class Fsdp2Options(SideOptions):
        replicate_size: int = side_setting(1, source="fsdp-replicate-size", help=..., most=limits.MAX_RANKS)

The row of the format or the method names the class as `options`. Flags, help, completion, dry runs, result files and
their comparison all go by its fields.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from refit.config.layout import Layout, short_text

T = TypeVar("T")

FLAG = "flag"
"""The key of a field's metadata."""


@dataclass(frozen=True, slots=True)
class OptionFlag:
    """How a setting is given on a command line. `names` are flags without dashes.

    Of a side's setting they are the source's and the destination's, None where that side has no such setting. Of a
    method's they are spellings of one flag, the first one current. A setting with `parse` is what that makes of the
    text, one with `choices` is one of them; a switch has no value, a number is from `least` to `most`, and all else is
    text.
    """

    names: tuple[str | None, ...]
    help: str
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    is_switch: bool = False
    least: int = 1
    most: int | None = None


def side_setting(
    default: Any, *, help: str, source: str | None = None, destination: str | None = None, **how: Any
) -> Any:
    """A field of a format's options: its default, or what makes it, and the flag of each side that has it.

    `how` are fields of `OptionFlag`.
    """
    return _setting(default, OptionFlag((source, destination), help, **how))


def method_setting(default: Any, *names: str, help: str, **how: Any) -> Any:
    """A field of a method's options: its default, or what makes it, and its flag, by all spellings."""
    return _setting(default, OptionFlag(names, help, **how))


def _setting(default: Any, flag: OptionFlag) -> Any:
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={FLAG: flag})
    return dataclasses.field(default=default, metadata={FLAG: flag})


def flags_of(options: type) -> dict[str, OptionFlag]:
    """The flags of an options class, by field."""
    return {field.name: field.metadata[FLAG] for field in dataclasses.fields(options) if FLAG in field.metadata}


class MethodOptions:
    """The settings of one refit method: a frozen dataclass. Transports find them in `TransportOptions.own`."""

    __slots__ = ()

    @property
    def words(self) -> tuple[str, ...]:
        """What is not the default, in words for tables."""
        return ()

    @property
    def moves_weights(self) -> str | None:
        """The flag that gives a destination's weights other memory than they were made in; None where none does."""
        return None


class SideOptions:
    """The settings of one format: a frozen dataclass. What a format has none of keeps the answer given here."""

    __slots__ = ()

    def title(self, layout: Layout) -> str:
        """The sizes of a side, for titles and the rank map: `TP2 EP1 FSDP4`."""
        return short_text(layout)

    @classmethod
    def complete(
        cls, name: str, options: Mapping[str, Any], sizes: Mapping[str, int], given: Mapping[str, int | None]
    ) -> Sized:
        """The settings and sizes of the side `name`. `options` and `given` are the fields and sizes that flags gave.

        `sizes` has the same sizes with defaults in place of None, less `world_size`. Raises UsageError where they
        contradict each other.
        """
        return Sized(cls(**options), default_sizes(sizes, given))

    @property
    def rearranged(self) -> SideOptions | None:
        """These settings once the experts have moved between two refits; None for a side whose experts do not."""
        return None

    @property
    def places_experts(self) -> bool:
        """Whether a user may place experts."""
        return False

    @property
    def linear(self) -> SideOptions | None:
        """These settings with the experts in order and none twice; None where they are so."""
        return None

    @property
    def running_engine(self) -> str | None:
        """The Python of the engine that serves the side; None where no engine runs."""
        return None

    @property
    def recorded(self) -> dict[str, Any]:
        """What the document of measured steps says of a side beside its sizes."""
        return {}


class UndecodedOptions(SideOptions, MethodOptions):
    """Settings read from a file whose format or method no row names: of a plugin that is not loaded."""

    __slots__ = ("values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UndecodedOptions) and self.values == other.values

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.values)))


@dataclass(frozen=True, slots=True)
class Sized:
    """The settings of a side's format and its sizes, `world_size` among them."""

    options: SideOptions | None
    sizes: dict[str, int]


def default_sizes(sizes: Mapping[str, int], given: Mapping[str, int | None]) -> dict[str, int]:
    """`sizes` on as many ranks as given, or on TP x EP x PP."""
    return {**sizes, "world_size": given["world_size"] or sizes["tp"] * sizes["ep"] * sizes["pp"]}


def fewest_ranks(layout: Layout) -> int:
    """The smallest world of a Megatron side: PP times the least that TP and ETP x EP divide, since experts are folded
    over TP x DP (`initialize_model_parallel` in parallel_state.py). It is TP x EP x PP where ETP is TP."""
    return layout.pp * math.lcm(layout.tp, layout.etp * layout.ep)


def options_as(options: object, kind: type[T]) -> T:
    """`options`, which are of `kind`, or the defaults where none are given."""
    found = kind() if options is None else options
    assert isinstance(found, kind), f"settings of {type(found).__name__}, expected {kind.__name__}"
    return found
