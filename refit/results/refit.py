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
    """One refit. Its phases are those of the slowest rank."""

    iteration: int
    warmup: bool
    """Summaries leave it out."""
    seconds_per_rank: tuple[float, ...]
    """Of every rank of the job, in rank order."""
    slowest_rank: int
    phases_s: dict[str, float]
    """Of the slowest rank's main thread, by name."""
    unattributed_s: float
    """That rank's time outside all phases; with them it adds up to the refit's time."""
    num_compared: int
    """Elements, on all ranks."""
    num_wrong: int
    beside_s: dict[str, float] = field(default_factory=dict)
    """The GPU's work that was hidden beside the phases, by name; empty without any."""
    sent_bytes: int | None = None
    """Of all ranks, headers included; None where messages are as long as their weights, whose bytes the plan has."""
    most_sent_bytes: int | None = None
    """What they could have sent; None likewise."""
    around_s: dict[str, float] = field(default_factory=dict)
    """Of a running engine: the phases before and after the refit, which its requests wait for too: `pause`, `commit`,
    `cache reset`, `resume`."""
    engine_compared: int = 0
    """Elements that the engine's own processes compared, of what they compute with."""
    engine_wrong: int = 0
    """Wrong ones of these, or of the memory that they share with the ranks."""
    apart_s: dict[str, float] = field(default_factory=dict)
    """Of an update of the engine's own: what it takes while it still serves, such as converting weights."""
    delta: DeltaSample | None = None
    """What a refit that sends changes counted; None of others."""

    @property
    def seconds(self) -> float:
        return max(self.seconds_per_rank)

    @property
    def pause_s(self) -> float | None:
        """How long a running engine served nothing: the refit and all phases around it; None without one."""
        return self.seconds + sum(self.around_s.values()) if self.around_s else None


@dataclass(frozen=True, slots=True)
class WrongWeights:
    """Elements of one tensor found wrong on one rank in one iteration, and the first of them."""

    iteration: int
    rank: int
    key: str
    num_wrong: int
    first_index: tuple[int, ...]
    """The logical index in the global tensor."""
    expected: float | None
    """None for NaN, which JSON does not have."""
    found: float | None
    """None for NaN."""


@dataclass(frozen=True, slots=True)
class ForwardCheck:
    """Whether both sides' models compute the same for the same tokens, in float32, layer by layer. Else data are
    wrong."""

    passed: bool
    skipped: str | None = None
    """Why there is no verdict: no pass ran, or too little was left to compare."""
    agreement: float | None = None
    """Share of the tokens that agree in every layer and in the logits: all must."""
    max_difference: float | None = None
    """Of the logits."""
    max_logit: float | None = None
    """The largest."""
    tolerance: float | None = None
    """Values agree where they differ by at most this share of the largest."""
    num_tokens: int | None = None
    num_layers: int | None = None
    num_excluded: int | None = None
    """Results of a token in a layer that were left out, since a near tie sent it to other experts."""
    layer_difference: float | None = None
    """The largest of what a layer adds, as a share of the largest value."""
    router_difference: float | None = None
    """The largest of routers' scores, as a share of the largest."""
    first_wrong: str | None = None
    """Where a token first disagrees: `layer 5`, `the router of layer 5`."""
    num_experts: int | None = None
    """Of all layers."""
    num_reached: int | None = None
    """Experts that some token chose."""

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
    """The work of one kind on one stream of a GPU in a profiled refit."""

    stream: int
    kind: str
    num_launches: int
    busy_s: float
    """Length of the union of its launches."""
    first_s: float
    """Start of the first launch, counted from the first activity on any stream."""
    last_s: float
    """End of the last launch, counted likewise."""


@dataclass(frozen=True, slots=True)
class NotMoved:
    """Destination tensors that an engine left as they were, for one reason."""

    reason: str
    num_tensors: int
    num_elements: int
    """Of all ranks of the destination, as the payload counts them."""
    nbytes: int
    """Of all ranks of the destination."""
    first_keys: tuple[str, ...]
    """Of the first of these tensors."""


@dataclass(frozen=True, slots=True)
class EngineResult:
    """The result of one engine."""

    status: Status = Status.RUNNING
    reason: str | None = None
    """Why it was waived or failed."""
    transport: str | None = None
    """What moved its bytes: a baseline's may be another than the scenario's method. None where it is not known."""
    not_moved: tuple[NotMoved, ...] = ()
    """Tensors left as they were. The others were timed and compared, and nothing is set against the plan's bytes."""
    connect_s: float | None = None
    """Connections, once per process and before a cold refit: communicators, connections, libraries and kernels."""
    connected: str | None = None
    """What was connected, where there was a choice."""
    slow: str | None = None
    """What of it is slower than it need be, and why."""
    connect_memory_bytes_per_rank: tuple[int, ...] = ()
    """Taken by connections, NVSHMEM's first heap included."""
    cold_s: dict[str, float] = field(default_factory=dict)
    """Of the slowest rank: `plan`, `prepare` and `first`, the first refit."""
    samples: tuple[Sample, ...] = ()
    summary: Summary | None = None
    """Over the measured refits."""
    stability: Stability | None = None
    """None without `--repeat-until-stable`."""
    bottleneck_gb_per_s: float | None = None
    """Most wire bytes of a rank in one direction over the median. None where an encoding sends other bytes than the
    plan has."""
    share_of_lower_bound: float | None = None
    """Lower bound over median: 1 where a refit is as fast as the plan allows. None without a bound, and
    where an encoding sends other bytes than the plan has."""
    wrong: tuple[WrongWeights, ...] = ()
    staging_bytes_per_rank: tuple[int, ...] = ()
    """Allocated beyond both models, at most `--staging-mib`."""
    extra_memory_bytes_per_rank: tuple[int | None, ...] = ()
    """Peak of torch's allocator plus device memory outside it, on CPUs of resident memory, above the level after
    connecting; None where it cannot be measured. Where ranks share a GPU, that of all its ranks."""
    forward: ForwardCheck | None = None
    """None without `--check-forward`."""
    trained: ForwardCheck | None = None
    """The same after one more refit, of the weights that training steps left."""
    profile: tuple[tuple[Activity, ...], ...] = ()
    """With `--profile-refit`: what each rank's GPU did in one more refit."""
    served: Served | None = None
    """The running engine of the destination; None without one."""
    written: WriteResult | None = None
    """What the destination held behind it as a checkpoint; None without `--write-weights`."""

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
    """What the destination holds."""

    num_parameters: int
    """Elements of all global tensors, buffers included."""
    num_tensors: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuantisedRefit:
    """How an FP8 destination was quantised. Blocks are counted over all destination ranks."""

    dtype: str
    block: str
    """`128x128`, rows by columns."""
    rule: str
    rule_source: str
    """Who uses the rule."""
    kept: tuple[str, ...]
    """Tensors with one of these in their keys stayed as they are."""
    num_tensors: int
    """Tensors that became codes and scales."""
    num_kept: int
    """Tensors that did not."""
    blocks_at_source: int
    blocks_at_destination: int
    reasons: dict[str, int]
    """Why blocks were quantised at the destination, and of how many tensors."""


@dataclass(frozen=True, slots=True)
class HostTraffic:
    """What the plan moves between hosts and within them, where there are several."""

    num_ranks: dict[str, int]
    """Of each host, by its name."""
    relay: str
    """How the plan relays: `off`, `node` or `engine`."""
    between_bytes: int
    within_bytes: int
    least_bytes: int
    """What crosses between hosts in every plan."""
    direct_bytes: int | None = None
    """What crosses in the plan without a relay; None in older files."""


@dataclass(frozen=True, slots=True)
class RefitResult:
    """One plan and the result of each engine on it."""

    status: Status = Status.RUNNING
    model: ModelFacts | None = None
    plan: Cost | None = None
    bound: Bound | None = None
    """None without a cluster's speeds."""
    estimate_s: float | None = None
    """The bound with what relays take to fill and drain; None without a relay."""
    floor: Bound | None = None
    """The least bound of all plans; None without a cluster's speeds."""
    hosts: HostTraffic | None = None
    """None on a single host."""
    quantised: QuantisedRefit | None = None
    """None without an FP8 destination."""
    start_s: dict[str, float] = field(default_factory=dict)
    """From the start of the processes (under `refit run`, of that which forks the ranks) to the end of the first refit,
    by phase (`imports`, `process group`, `build`, `check`, `plan`, `connect`, `prepare`, `fill`, `first refit`), each
    on the rank that took longest; empty without a refit, and in older files."""
    engines: dict[str, EngineResult] = field(default_factory=dict)
    """By name: `refit`, `megatron`, `nccl-m2n`, `full`, ..."""
    rearranged: RefitResult | None = None
    """The refits after the destination placed its experts anew (`--rl-inference-expert-placement-next`); None where it
    did not."""

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
