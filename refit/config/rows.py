"""What a row of each table of `refit.config.registry` says.

A row names its code as `module:name`, which is imported on request, so that reading a table needs neither torch nor
Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass

DATA_PARALLEL = "data-parallel"
"""In `Format.words`: the number of ranks, by the replicas that they hold."""

WITHIN, BETWEEN = "within", "between"
"""In `Method.links`: hosts."""


@dataclass(frozen=True, slots=True)
class StepSupport:
    """Training steps and forward passes of one format.

    `check(model, side, steps, trains, name)` raises UsageError, naming the framework's rule, for settings that cannot
    run. `memory(model, side, sharding, steps)` estimates what each rank needs beside its weights to train.
    """

    check: str
    memory: str


@dataclass(frozen=True, slots=True)
class Format:
    """How one framework holds a model.

    `predict(model, side) -> Sharding` states what every rank holds without building anything; it raises UsageError
    where the model cannot be sharded this way. `check(model, side, name)` raises the same at lower cost.
    `build(scenario, name, side, device) -> ShardedModel` builds this rank's part; see `refit.models.sharded_model`.
    `axes` are the parallel sizes of `Layout` that a side may have above 1, and that `refit search` varies. `options` is
    the class of its settings (`refit.config.options.SideOptions`), None for a format without any. `libraries` are the
    modules that `build` needs beyond those that are always installed, each with the command that installs it.
    `takes_provider`: `build` can build the model of `--model-provider`. `has_layer_specs`: `--transformer-impl` chooses
    a side's layers. `destination_only`: no trainer holds a model this way. `steps` is how it trains and runs forward;
    None where it does not. `serving(model, side) -> Served` says how its ranks serve and counts what they hold, from
    which bounds follow (`refit.predict.serving`); `refit search` looks for such destinations, and varies the settings
    `searched_options` beside the axes. None: it does not serve. `builds_codes`: an FP8 side comes out of `build` with
    codes and scales; of other formats the runner puts them in place of the weights, in the same cuts.
    `parts(model, side) -> Parts` are the logical tensors that an FP8 side quantises part by part; None: as they are.

    `words` are what titles and `--source TEXT` call settings beside the axes, with the field of `options` that each is;
    DATA_PARALLEL: replicas of the dense weights, which with the other sizes make the number of ranks.

    `note(model, side) -> str | None` says which version of a library the prediction follows, and what that one does
    otherwise than another; None where nothing depends on it.

    `available(scenario, device)` raises UnavailableError where this machine lacks a library or a device for what the
    scenario asks of such sides beyond `libraries`; None where nothing can be asked.

    `preload(scenario, device)` imports what `build` imports when it is called, for ranks that share it; None: nothing.

    `is_reference`: reports compare the losses of other trainers with those of this one.

    `rearrange(model, scenario, side) -> ShardedModel` is for sides with `SideSpec.rearranged`: the same memory with the
    experts placed as the new `side` says.
    """

    predict: str
    check: str
    build: str
    axes: tuple[str, ...] = ("tp", "ep", "etp", "pp")
    options: str | None = None
    libraries: tuple[tuple[str, str], ...] = ()
    takes_provider: bool = False
    has_layer_specs: bool = False
    steps: StepSupport | None = None
    destination_only: bool = False
    serving: str | None = None
    searched_options: tuple[str, ...] = ()
    builds_codes: bool = False
    parts: str | None = None
    is_reference: bool = False
    available: str | None = None
    note: str | None = None
    preload: str | None = None
    rearrange: str | None = None
    words: tuple[tuple[str, str], ...] = (("DP", DATA_PARALLEL),)

    @property
    def serves(self) -> bool:
        return self.serving is not None

    @property
    def is_transformers(self) -> bool:
        """Whether a side is a model of transformers, whose attention and autocast can be chosen."""
        return "transformers" in dict(self.libraries)


@dataclass(frozen=True, slots=True)
class Method:
    """A way of moving the bytes. `transport` is the class; see `refit.transport.base`.

    `devices` are those whose memory it moves, the default first. `one_sided` methods write into memory of the
    destination; two-sided ones send and receive. `single_host` ones need all ranks on one host. `cpu_stand_in` runs the
    same executor where there is no GPU. `needs` is for help texts. `options` is the class of its settings
    (`refit.config.options.MethodOptions`), None for a method without any. `message_bytes` is the most of a message, and
    `messages_per_pair` how many of a pair are in flight: for estimates, as the transport has them. `suggested_for` are
    the modes for which `search` writes it where none was chosen, `megatron_service` is what Megatron-Core's own refit
    moves its bytes with then. `links` are those that it stands for where one method has to: pairs of a device and
    WITHIN or BETWEEN hosts.
    """

    transport: str
    devices: tuple[str, ...]
    needs: str
    options: str | None = None
    one_sided: bool = False
    single_host: bool = False
    cpu_stand_in: str | None = None
    message_bytes: int = 64 << 20
    messages_per_pair: int = 4
    suggested_for: tuple[str, ...] = ()
    megatron_service: str = "nccl"
    links: tuple[tuple[str, str], ...] = ()

    @property
    def device(self) -> str:
        return self.devices[0]


@dataclass(frozen=True, slots=True)
class Encoding:
    """What is sent in place of a destination's weights. `title` is for help texts.

    `wire(source, destination, side) -> Wire` states what crosses between two shardings; it is pure and imports no torch
    (`refit.plan.wire`). `bind(plan, wire, peers, source, destination) -> LiveEncoding` makes and uses the weights of
    a rank message by message (`refit.encodings.base`). `oracle(inner, scenario) -> OraclePart` says what a source is
    filled with and what a destination must then hold (`refit.encodings.oracle`). None, as identity has them, stands for
    weights that are sent, filled and compared as they are.

    `dtypes` are those of destinations from which the encoding follows, as codes from FP8. An encoding without any is
    one that users choose, with `--refit-encoding`. One with `has_options` gets the scenario's as a fourth argument of
    `wire` (`refit.config.delta`). One with `num_to_decide` is left out of refits where that is faster
    (`refit.transport.chosen`): so many refits try both.
    """

    title: str
    wire: str | None = None
    bind: str | None = None
    oracle: str | None = None
    dtypes: tuple[str, ...] = ()
    has_options: bool = False
    num_to_decide: int = 0


@dataclass(frozen=True, slots=True)
class Engine:
    """A refit implementation. `engine` is the class; see `refit.bench.engines.base`. Reports print `title`.

    A baseline is measured beside the engine under test. It decides the exit code only where it runs alone.
    `formats` are the sides it can refit; None stands for all. `single_chunk` ones refit one model chunk per rank.
    `encodes`: it sends through encodings, so it can refit to FP8 destinations, or send other than the weights.
    `of_running`: it is a running engine's own update, which puts the weights to use itself; `of_cuda`: by CUDA IPC.
    `sends_everything`: it leaves out the scenario's encoding, which others are compared with.
    """

    engine: str
    title: str
    is_baseline: bool = False
    formats: tuple[str, ...] | None = None
    single_chunk: bool = False
    encodes: bool = False
    of_running: bool = False
    of_cuda: bool = False
    sends_everything: bool = False


@dataclass(frozen=True, slots=True)
class MeasurementKind:
    """A kind of measurement. `measurement` is the class (`refit.bench.measurements.base`). `result` is the type that it
    returns and that result files hold. `closing_lines(result, run)` gives the last lines of a log. Rows are in the
    order in which a run takes its measurements. `runs_steps` ones need the settings of steps. `sides` are those it
    uses."""

    measurement: str
    result: str
    closing_lines: str
    runs_steps: bool = False
    sides: tuple[str, ...] = ("source", "destination")


@dataclass(frozen=True, slots=True)
class LauncherKind:
    """One way to start ranks.

    `launcher(host, environ)` is a `refit.launch.base.Launcher`. `title` is what it starts them on, in words.
    """

    launcher: str
    title: str


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """Models with tensors of the same names in Hugging Face. `family` is a `refit.predict.families.tables.Family`."""

    family: str
