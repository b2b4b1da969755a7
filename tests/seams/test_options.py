"""A setting of one method or one format: a frozen class in its own module and a word in its row, nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from refit.bench.engines.refit import options_of
from refit.cli.flags import full_parser
from refit.cli.parsing import parse
from refit.config.layout import Layout
from refit.config.options import MethodOptions, SideOptions, UndecodedOptions, method_setting, side_setting
from refit.config.registry import AUTO, FORMATS, METHODS
from refit.config.scenario import Scenario
from refit.errors import UsageError
from refit.results.identity import differences
from refit.results.result import Result, decoded_result, encoded, read_result
from refit.transport.base import TransportOptions
from tests.seams.plain import PLAIN

HERE = "tests.seams.test_options"


@dataclass(frozen=True, slots=True)
class PigeonOptions(MethodOptions):
    """`flock` pigeons fly at once, `at_night` too."""

    flock: int = method_setting(3, "pigeon-flock", "doves", metavar="N", most=9, help="pigeons at once; default: 3")
    at_night: bool = method_setting(False, "pigeon-at-night", is_switch=True, help="they fly at night")

    @property
    def words(self) -> tuple[str, ...]:
        return ("at night",) if self.at_night else ()


@dataclass(frozen=True, slots=True)
class ShelfOptions(SideOptions):
    """Weights lie on `boards`."""

    boards: int = side_setting(
        1,
        source="shelf-boards",
        destination="rl-inference-shelf-boards",
        metavar="N",
        most=8,
        help="boards; default: 1",
    )

    def title(self, layout: Layout) -> str:
        return f"TP{layout.tp} boards{self.boards}"


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    pigeon = replace(METHODS["gloo"], options=f"{HERE}:PigeonOptions")
    shelf = replace(PLAIN, axes=("tp",), options=f"{HERE}:ShelfOptions", words=(("boards", "boards"),))
    with METHODS.added("pigeon", pigeon), FORMATS.added("shelf", shelf):
        yield


def scenario(*flags: str) -> Scenario:
    return parse(["--model", "tiny", "--dry-run", *flags]).scenario


def test_flags_set_them_and_transports_get_them() -> None:
    import torch

    found = scenario("--refit-method=pigeon", "--doves=5", "--pigeon-at-night")
    assert found.method_options == {"pigeon": PigeonOptions(5, True)}
    options = options_of(found, torch.device("cpu"))
    assert options.own_as(PigeonOptions) == PigeonOptions(5, True)
    assert TransportOptions().own_as(PigeonOptions) == PigeonOptions()
    assert scenario("--refit-method=pigeon").own_options == PigeonOptions()
    with pytest.raises(UsageError, match="--pigeon-flock/--doves: must be at most 9, got 10"):
        scenario("--refit-method=pigeon", "--pigeon-flock=10")
    assert "pigeons at once; default: 3" in " ".join(full_parser().format_help().split())


def test_a_choice_among_methods_keeps_the_settings_of_each() -> None:
    found = scenario(f"--refit-method={AUTO}", "--pigeon-flock=4", "--nixl-backend=POSIX").method_options
    assert found["pigeon"] == PigeonOptions(4)
    assert set(found) == {name for name, row in METHODS.items() if row.options is not None}
    ran = scenario("--refit-method=pigeon", "--pigeon-flock=4")
    assert differences(scenario(f"--refit-method={AUTO}", "--pigeon-flock=4"), ran) == []


def test_a_flag_of_another_method_gets_a_note() -> None:
    note = "--pigeon-flock is a setting of pigeon: gloo has no use for it"
    assert note in scenario("--refit-method=gloo", "--pigeon-flock=3").notes
    both = "--one-sided-buffers is a setting of nvshmem and shm: gloo has no use for it"
    assert both in scenario("--refit-method=gloo", "--nvshmem-buffers=ring").notes
    assert not any("no use for it" in note for note in scenario("--refit-method=pigeon", "--pigeon-flock=3").notes)


def test_a_format_has_its_flags_sizes_and_title() -> None:
    side = scenario("--destination", "shelf TP1 boards3").destination
    assert (side.options, side.title) == (ShelfOptions(3), "shelf TP1 boards3")
    assert scenario("--source-format=shelf", "--shelf-boards=2").source.options == ShelfOptions(2)
    with pytest.raises(UsageError, match="--shelf-boards needs --source-format shelf, the source is megatron"):
        scenario("--shelf-boards=2")


def test_files_keep_them_and_runs_are_compared_by_them(tmp_path: Path) -> None:
    flags = ("--refit-method=pigeon", "--destination", "shelf TP1 boards3")
    result = Result("run", scenario=scenario(*flags, "--pigeon-flock=5"))
    path = tmp_path / "run.json"
    path.write_text(encoded(result))
    assert json.loads(path.read_text())["scenario"]["method_options"] == {"pigeon": {"flock": 5, "at_night": False}}
    assert read_result(path) == result
    assert result.scenario is not None
    assert differences(scenario(*flags), result.scenario) == ["method_options.flock 5, planned 3"]


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("destination", {"boards": "many"}, r"destination.options: Expected `int`, got `str` - at `\$.boards`"),
        ("destination", 3, "Expected settings by name, got int"),
        ("method_options", {"pigeon": {"flock": None}}, "method_options.pigeon: Expected `int`, got `null`"),
    ],
)
def test_malformed_ones_are_named(place: str, value: object, reason: str) -> None:
    content = json.loads(encoded(Result("run", scenario=scenario("--destination", "shelf TP1 boards3"))))
    if place == "destination":
        content["scenario"]["destination"]["options"] = value
    else:
        content["scenario"][place] = value
    with pytest.raises(ValueError, match=reason):
        decoded_result(content)


def test_a_file_of_a_plugin_that_is_not_loaded_keeps_what_it_says() -> None:
    content = json.loads(encoded(Result("run", scenario=scenario("--destination", "shelf TP1 boards3"))))
    content["scenario"]["destination"]["format"] = "gone"
    content["scenario"]["method_options"] = {"gone": {"depth": 3}}
    result = decoded_result(content)
    assert result.scenario is not None
    assert result.scenario.destination.options == UndecodedOptions({"boards": 3})
    assert result.scenario.method_options == {"gone": UndecodedOptions({"depth": 3})}
    assert result.scenario.destination.title == "gone TP1 EP1"
    assert json.loads(encoded(result)) == content
