"""The result types of the refit measurement, as result files hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

from refit.config.registry import ENGINES
from refit.plan.cost import Bound, Cost
from refit.results.checkpoints import WriteResult
from refit.results.delta import DeltaSample
from refit.results.serving import Served
from refit.results.stats import Stability, Summary
from refit.results.status import Status


@dataclass(frozen=True, slots=True)
class Sample:
    """One refit: seconds of every rank of the job, in rank order. Phases are those of the slowest rank.

    `unattributed_s` is that rank's time outside all phases, `beside_s` the time of its GPU's work that was hidden
    beside them. Summaries leave `warmup` samples out. `sent_bytes` are those that all ranks sent, headers included, of
    at most `most_sent_bytes`; None where messages are as long as their weights, whose bytes the plan has. `delta` is
    what a refit that sends changes counted; None of others.

    Of a running engine, `around_s` are the phases before and after the refit, which its requests wait for, too, and
    `apart_s` those of an own update of the engine while it still serves, such as converting weights for it. Its own
    processes compared `engine_compared` elements of what they compute with; `engine_wrong` of them, or of the memory
    that they share with the ranks, were wrong.
    """

    iteration: int
    warmup: bool
    seconds_per_rank: tuple[float, ...]
    slowest_rank: int
    phases_s: dict[str, float]
    unattributed_s: float
    num_compared: int
    num_wrong: int
    beside_s: dict[str, float] = field(default_factory=dict)
    sent_bytes: int | None = None
    most_sent_bytes: int | None = None
    around_s: dict[str, float] = field(default_factory=dict)
    engine_compared: int = 0
    engine_wrong: int = 0
    apart_s: dict[str, float] = field(default_factory=dict)
    delta: DeltaSample | None = None

    @property
    def seconds(self) -> float:
        return max(self.seconds_per_rank)

    @property
    def pause_s(self) -> float | None:
        """How long a running engine served nothing: the refit and all phases around it; None without one."""
        return self.seconds + sum(self.around_s.values()) if self.around_s else None


@dataclass(frozen=True, slots=True)
class WrongWeights:
    """Elements of one tensor found wrong on one rank in one iteration, and the first of them.

    JSON has no NaN: `expected` and `found` are None in its place.
    """

    iteration: int
    rank: int
    key: str
    num_wrong: int
    first_index: tuple[int, ...]
    expected: float | None
    found: float | None


@dataclass(frozen=True, slots=True)
class ForwardCheck:
    """Whether both sides' models compute the same for the same tokens, in float32, layer by layer.

    `agreement` is the share of the `num_tokens` that agree in every layer and in the logits: all must. Values agree
    where they differ by at most `tolerance` times the largest. `layer_difference` is the largest difference of what a
    layer adds, `router_difference` that of routers' scores, both as shares of the largest. `num_layers` counts layers,
    `num_excluded` the results of a token in a layer that were left out because a near tie sent it to other experts.
    `first_wrong` is where a token first disagrees. `num_experts` counts experts of all layers, `num_reached` those that
    some token chose.

    `skipped` is the reason why there is no verdict: no pass ran, or too little was left to compare.
    """

    passed: bool
    skipped: str | None = None
    agreement: float | None = None
    max_difference: float | None = None
    max_logit: float | None = None
    tolerance: float | None = None
    num_tokens: int | None = None
    num_layers: int | None = None
    num_excluded: int | None = None
    layer_difference: float | None = None
    router_difference: float | None = None
    first_wrong: str | None = None
    num_experts: int | None = None
    num_reached: int | None = None

    @property
    def fault(self) -> str | None:
        """What is wrong, in one sentence; None where nothing is, or nothing was compared."""
        if self.passed:
            return None
        where = f" at {self.first_wrong}" if self.first_wrong else ""
        share = f": {100 * self.agreement:.0f} % of tokens agree" if self.agreement is not None else ""
        return f"forward check failed{where}{share}"


@dataclass(frozen=True, slots=True)
class Activity:
    """The work of one kind on one stream of a GPU in a profiled refit.

    `busy_s` is the length of the union of its launches. `first_s` and `last_s` are the start of the first and the end
    of the last, counted from the first activity on any stream.
    """

    stream: int
    kind: str
    num_launches: int
    busy_s: float
    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True)
class NotMoved:
    """Destination tensors that an engine left as they were, for one reason: how many, and the first of their keys.

    Elements and bytes are those of all ranks of the destination, as the payload counts them.
    """

    reason: str
    num_tensors: int
    num_elements: int
    nbytes: int
    first_keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineResult:
    """The result of one engine. `reason` is why it was waived or failed. `transport` is what moves its bytes: a
    baseline's may be another than the scenario's method. None where it is not known.

    `cold_s` holds the slowest rank's seconds of planning, preparing and the first refit. `connect_s` is the time of the
    set-up that a process does once before that: communicators, connections, libraries and kernels, and `connected` says
    what was connected where there was a choice, `slow` what of it is slower than it need be, and why. `summary` is over
    the measured iterations. Bytes and memory are per rank. `share_of_lower_bound` is the lower bound over the median: 1
    where a refit is as fast as the plan allows, None without a bound. `stability` is None without
    `--repeat-until-stable`. `trained` compares the logits of both sides after one more refit, of the weights that
    training steps left. Where some tensors were `not_moved`, the others were timed and compared, and nothing is set
    against the plan's bytes. `served` is the running engine of the destination, None without one. `written` is what the
    destination held behind it as a checkpoint, None where none was asked for.
    """

    status: Status = Status.RUNNING
    reason: str | None = None
    transport: str | None = None
    not_moved: tuple[NotMoved, ...] = ()
    connect_s: float | None = None
    connected: str | None = None
    slow: str | None = None
    connect_memory_bytes_per_rank: tuple[int, ...] = ()
    cold_s: dict[str, float] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    summary: Summary | None = None
    stability: Stability | None = None
    bottleneck_gb_per_s: float | None = None
    share_of_lower_bound: float | None = None
    wrong: tuple[WrongWeights, ...] = ()
    staging_bytes_per_rank: tuple[int, ...] = ()
    extra_memory_bytes_per_rank: tuple[int | None, ...] = ()
    forward: ForwardCheck | None = None
    trained: ForwardCheck | None = None
    profile: tuple[tuple[Activity, ...], ...] = ()
    served: Served | None = None
    written: WriteResult | None = None

    @property
    def num_compared(self) -> int:
        """Elements compared over all iterations, warm-up included."""
        return sum(sample.num_compared for sample in self.samples)

    @property
    def num_wrong(self) -> int:
        return sum(sample.num_wrong for sample in self.samples)

    @property
    def num_wrong_in_engine(self) -> int:
        return sum(sample.engine_wrong for sample in self.samples)

    @property
    def not_moved_bytes(self) -> int:
        return sum(each.nbytes for each in self.not_moved)

    @property
    def num_timed(self) -> int:
        """Measured refits, of every share."""
        return sum(not sample.warmup for sample in self.samples)

    @property
    def asked_shares(self) -> list[float | None]:
        """The shares of the weights that were changed before measured refits, in turn, the first one first."""
        return list(dict.fromkeys(each.delta.asked_share for each in self.samples if each.delta and not each.warmup))

    @property
    def measured_s(self) -> list[float]:
        """Seconds of the measured refits. Where several shares took turns: of the first."""
        asked = self.asked_shares
        timed = (sample for sample in self.samples if not sample.warmup)
        return [each.seconds for each in timed if each.delta is None or each.delta.asked_share == asked[0]]

    @property
    def warmup_s(self) -> list[float]:
        return [sample.seconds for sample in self.samples if sample.warmup]

    @property
    def sent_share(self) -> float | None:
        """What the measured refits sent, of what they could have sent; None where messages have a fixed length."""
        timed = [sample for sample in self.samples if not sample.warmup]
        most = sum(sample.most_sent_bytes or 0 for sample in timed)
        return sum(sample.sent_bytes or 0 for sample in timed) / most if most else None

    @property
    def is_partial(self) -> bool:
        """Whether some refits were measured, and the run has not ended with them: it was interrupted, or goes on."""
        return self.status is Status.RUNNING and bool(self.measured_s)

    @property
    def median_s(self) -> float | None:
        return self.summary.median_s if self.summary else None

    @property
    def cold_total_s(self) -> float:
        """Seconds of a cold refit: planning, preparing and the first refit together."""
        return sum(self.cold_s.values())

    @property
    def first_with_connections_s(self) -> float:
        """The first refit as a user meets it: connections, planning, preparing and the refit."""
        return self.cold_total_s + (self.connect_s or 0.0)

    @property
    def fault(self) -> str | None:
        """What is wrong with what the engine moved: elements, or what the models compute with them; None where nothing
        that was compared is."""
        found = [f"{self.num_wrong:,} of {self.num_compared:,} elements wrong"] if self.num_wrong else []
        found += [f"{self.num_wrong_in_engine:,} elements wrong in the engine"] if self.num_wrong_in_engine else []
        found += [self.written.fault] if self.written and self.written.fault else []
        return "; ".join([*found, *self.wrong_passes]) or None

    @property
    def wrong_passes(self) -> list[str]:
        """What is wrong with the forward passes that were compared."""
        found = [self.forward.fault] if self.forward and self.forward.fault else []
        served = self.served.check.fault if self.served and self.served.check else None
        found += [served] if served else []
        return [*found, *([f"{self.trained.fault} after training"] if self.trained and self.trained.fault else [])]

    @property
    def verdict(self) -> Status:
        """The judgement that every report, table and exit code goes by: WRONG_DATA where anything compared is wrong,
        else the status."""
        return Status.WRONG_DATA if self.fault else self.status

    @property
    def doubt(self) -> str | None:
        """Why its times are no result: `WRONG`, `interrupted`, the status, `unverified`, or `partial`: tensors were
        not moved.

        None where every element was moved and right.
        """
        if self.verdict is Status.WRONG_DATA:
            return "WRONG"
        if self.is_partial:
            return "interrupted"
        if self.verdict is not Status.OK:
            return self.verdict.text
        if not self.num_compared:
            return "unverified"
        return "partial" if self.not_moved else None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the destination holds: elements of all global tensors (buffers included), tensors, and their dtypes."""

    num_parameters: int
    num_tensors: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuantisedRefit:
    """How an FP8 destination was quantised: `block` is `128x128`; `rule_source` says who uses the rule.

    `num_tensors` became codes and scales, `num_kept` did not, among them those with one of `kept` in their keys. Blocks
    are counted over all destination ranks. `reasons` says why blocks were quantised at the destination, and of how many
    tensors.
    """

    dtype: str
    block: str
    rule: str
    rule_source: str
    kept: tuple[str, ...]
    num_tensors: int
    num_kept: int
    blocks_at_source: int
    blocks_at_destination: int
    reasons: dict[str, int]


@dataclass(frozen=True, slots=True)
class HostTraffic:
    """What the plan moves between hosts and within them, where there are several.

    `num_ranks` are those of each host, by its name. `relay` is how the plan relays: off, node or engine. `least_bytes`
    is what crosses between hosts in every plan, `direct_bytes` in that without a relay; None in files of versions that
    did not say it.
    """

    num_ranks: dict[str, int]
    relay: str
    between_bytes: int
    within_bytes: int
    least_bytes: int
    direct_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class RefitResult:
    """One plan and the result of each engine on it. `bound` is None without a cluster's speeds, and so is `floor`, the
    least bound of all plans. `estimate_s` is the bound with what relays take to fill and drain; None without a relay.
    `hosts` is None on a single host.

    `start_s` is the time from the start of the processes to the end of the first refit, by phase, each on the rank that
    took longest; empty where there was none, and in files of versions that did not measure it.
    `rearranged` are the refits after the destination placed its experts anew, None where it did not.
    """

    status: Status = Status.RUNNING
    model: ModelFacts | None = None
    plan: Cost | None = None
    bound: Bound | None = None
    estimate_s: float | None = None
    floor: Bound | None = None
    hosts: HostTraffic | None = None
    quantised: QuantisedRefit | None = None
    start_s: dict[str, float] = field(default_factory=dict)
    engines: dict[str, EngineResult] = field(default_factory=dict)
    rearranged: RefitResult | None = None

    @property
    def tested(self) -> EngineResult | None:
        """The engine that decides the exit code: ours, or a baseline that runs alone."""
        return self.engines.get(name) if (name := tested_engine(tuple(self.engines))) else None

    @property
    def baselines(self) -> dict[str, EngineResult]:
        """All engines but the tested one."""
        tested = tested_engine(tuple(self.engines))
        return {name: engine for name, engine in self.engines.items() if name != tested}


def speed_ratio(ours: EngineResult | None, theirs: EngineResult | None) -> float | None:
    """`theirs` median over that of `ours`. None unless both have times and neither result is in doubt."""
    if ours is None or theirs is None or ours.doubt or theirs.doubt or not ours.median_s or not theirs.median_s:
        return None
    return theirs.median_s / ours.median_s


def tested_engine(names: tuple[str, ...]) -> str | None:
    """Which of these engines decides the exit code: the first that is not a baseline, else the first."""
    ours = (name for name in names if name not in ENGINES or not ENGINES[name].is_baseline)
    return next(ours, names[0] if names else None)
