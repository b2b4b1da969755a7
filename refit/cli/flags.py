"""The parsers of the command line: all its flags, under Megatron-LM's names wherever Megatron-LM has one."""

from __future__ import annotations

import argparse
import difflib
from typing import Any

import refit
from refit.cli import flag_types, ignored_flags
from refit.cli.delta_flags import add_delta_flags
from refit.cli.flag_parser import FlagParser
from refit.cli.listing import add_list
from refit.cli.model_flags import add_model_flags
from refit.cli.quantisation_flags import add_quantisation_flags
from refit.cli.run_flags import add_refit_flags, add_run_flags
from refit.cli.side_flags import add_side_flags
from refit.cli.step_flags import STEP_FLAGS, add_step_flags, runs_steps
from refit.config import limits
from refit.config.flag_names import size_flag

SHORT_SIZES = ("tp", "pp", "ep", "etp")
"""Sizes as people say them: no flag is called so."""

SAME = 0.85
"""The similarity from which a word is a flag with a slip of the fingers, also one that is only recorded."""

EXAMPLES = """\
Flags without a value are off unless given. Megatron-LM's flags that change no weight (--seq-length, --wandb-project, \
...) are accepted and recorded, as listed for its versions 0.16 to 0.19.

examples:
  refit run --list
  refit run --model tiny --refit-method gloo --rl-inference-tensor-model-parallel-size 2
  refit run --model qwen3_30b_a3b --refit-method nccl --expert-model-parallel-size 4 --repeat-until-stable
  benchmark_refit.py --dry-run --model kimi_k2 --expert-model-parallel-size 64"""


class BenchmarkParser(FlagParser):
    """The parser of benchmark_refit.py, which also knows Megatron-LM's flags that change no weight."""

    def _has(self, flag: str) -> bool:
        """Whether there is such a flag. One that is listed is added here, when it is first seen."""
        if super()._has(flag):
            return True
        name = flag.removeprefix("--")
        if name == flag or name not in ignored_flags.LISTED:
            return False
        _add_hidden(self, name, nargs="?", const=True)
        return True

    def _nearest(self, flag: str) -> str:
        """A flag that is nearly the same, else the nearest of those that have an effect here."""
        name = flag.removeprefix("--")
        if name in SHORT_SIZES:
            return f"did you mean {size_flag('source', name)}, or both layouts as text, --source 'TP2 EP4'?"
        every = [*super()._known(), *(f"--{name}" for name in ignored_flags.LISTED)]
        if near := difflib.get_close_matches(flag, every, n=1, cutoff=SAME):
            return f"did you mean {near[0]}?"
        longer = self.longer(name)
        return f"did you mean {longer}?" if longer else super()._nearest(flag)

    def longer(self, name: str) -> str | None:
        """The flag with an effect here that has all words of `name`, and others: None without, or where it is one."""
        words, known = set(name.split("-")), self._known()
        holding = [flag for flag in known if words <= set(flag[2:].split("-"))]
        return (
            min(holding, key=lambda flag: ("benchmark" not in flag, len(flag)))
            if holding and f"--{name}" not in known
            else None
        )

    def _known(self) -> list[str]:
        hidden = (action for action in self._actions if action.help == argparse.SUPPRESS)
        recorded = {option for action in hidden for option in action.option_strings}
        return [flag for flag in super()._known() if flag not in recorded and len(flag) > len("--h")]


def model_parser() -> BenchmarkParser:
    """The flags that describe a model, as presets may hold them, and Megatron-LM's that change no weight."""
    parser = BenchmarkParser(add_help=False)
    _add_preset_flags(parser)
    return parser


def full_parser() -> BenchmarkParser:
    """Every flag of the command line. Those of a refit come first in its help, those of a model last."""
    parser = BenchmarkParser(
        prog="benchmark_refit.py",
        usage="refit run FLAGS, torchrun --nproc-per-node N benchmark_refit.py FLAGS, "
        "or benchmark_refit.py --dry-run FLAGS",
        description="Build a model in two parallel layouts, transfer its weights from one to the other, verify and "
        "time the transfer.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"refit-benchmark {refit.__version__}")
    add_list(parser)
    add_refit_flags(parser)
    add_side_flags(parser)
    add_quantisation_flags(parser)
    add_delta_flags(parser)
    add_run_flags(parser)
    _add_preset_flags(parser)
    return parser


def _add_preset_flags(parser: FlagParser) -> None:
    add_model_flags(parser)
    add_step_flags(parser)
    _add_ignored_flags(parser)


def recorded_flags(args: argparse.Namespace) -> dict[str, object]:
    """The flags given that change no weight, by name without dashes in front, with their values as given.

    Those of a step are among them where no step is measured.
    """
    named = {*ignored_flags.NAMED, *ignored_flags.LISTED, *ignored_flags.REFUSED_VALUES, *STEP_FLAGS}
    if runs_steps(getattr(args, "measure", ())):
        named -= STEP_FLAGS.keys()
    return {name: value for name, value in vars(args).items() if name in named}


def _add_ignored_flags(parser: FlagParser) -> None:
    takes: dict[str, dict[str, Any]] = {
        "#": {"type": flag_types.up_to(limits.MAX_RECORDED)},
        "=": {},
        "*": {"nargs": "*"},
        "": {"action": "store_true"},
    }
    for name, sign in ignored_flags.NAMED.items():
        _add_hidden(parser, name, **takes[sign])
    for name, (neutral, reason) in ignored_flags.REFUSED_VALUES.items():
        _add_hidden(parser, name, type=flag_types.refusal(neutral, reason))
    for name, reason in ignored_flags.REFUSED_SWITCHES.items():
        _add_hidden(parser, name, action=flag_types.RefusedSwitch, nargs=0, const=reason)


def _add_hidden(parser: FlagParser, name: str, **options: Any) -> None:
    """A flag that `--help` leaves out and that appears in the namespace, under its own name, only where given."""
    parser.add_argument(f"--{name}", dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)
