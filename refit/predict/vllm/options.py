"""VllmOptions: the settings that vLLM's engines alone have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refit.config import limits
from refit.config.layout import Layout
from refit.config.options import SideOptions, Sized, side_setting
from refit.config.placement import ExpertPlacement, read_placement
from refit.errors import UsageError


def _absolute(text: str) -> str:
    """A path, which this machine need not have. Links stay: the Python of an environment is one."""
    return str(Path(text).absolute())


@dataclass(frozen=True, slots=True)
class VllmOptions(SideOptions):
    """Equal engines of vLLM, each on TP x DP x PP ranks.

    `data_parallel_size` is the number of ranks with the same dense weights (attention data parallelism); experts are
    divided over all ranks of a stage, whole ones with expert parallelism (EP = TP x DP), else slices of each.
    `replicas` is the number of engines. `num_redundant_experts` are the second copies of a layer in an engine; None is
    0, or what the placement's file has. `placement_next` replaces `placement` between two refits. `engine_python` is
    the Python of an environment with vLLM, which then serves the side; None: tensors as vLLM has them, without it.
    `engine_sleep` is the level at which it sleeps before each refit: 1 keeps its weights in host memory, 2 drops them.
    """

    data_parallel_size: int = side_setting(
        1,
        destination="rl-inference-data-parallel-size",
        metavar="N",
        most=limits.MAX_RANKS,
        help="ranks of an engine with the same dense weights; default: 1",
    )
    replicas: int = side_setting(
        1,
        destination="rl-inference-replicas",
        metavar="N",
        most=limits.MAX_RANKS,
        help="equal engines, each on ranks of its own; default: 1",
    )
    num_redundant_experts: int | None = side_setting(
        None,
        destination="rl-inference-num-redundant-experts",
        metavar="N",
        most=limits.MAX_EXPERTS,
        help="second copies of experts in each layer of an engine; default: none",
    )
    placement: ExpertPlacement = side_setting(
        ExpertPlacement,
        destination="rl-inference-expert-placement",
        metavar="PLACEMENT",
        parse=read_placement,
        help="experts on ranks: linear, round_robin or a JSON file with a physical_to_logical_map; default: linear",
    )
    placement_next: ExpertPlacement | None = side_setting(
        None,
        destination="rl-inference-expert-placement-next",
        metavar="PLACEMENT",
        parse=read_placement,
        help="the placement that an engine changes to between two refits; default: none",
    )
    engine_python: str | None = side_setting(
        None,
        destination="rl-inference-engine-python",
        metavar="PYTHON",
        parse=_absolute,
        help="refit into a running vLLM: the python of its environment (make vllm); default: tensors without vLLM",
    )
    engine_sleep: int = side_setting(
        0,
        destination="rl-inference-engine-sleep",
        metavar="LEVEL",
        most=2,
        help="a running vLLM sleeps before each refit, at level 1 or 2, and wakes for it; default: it does not",
    )

    def title(self, layout: Layout) -> str:
        """`TP2 DP4 EP8`, and what is not the default: `PP2 round_robin +8 x2` has 8 redundant experts, 2 engines;
        `running` has a vLLM that runs."""
        words = [f"TP{layout.tp}", f"EP{layout.ep}"]
        if self.data_parallel_size > 1:
            words.insert(1, f"DP{self.data_parallel_size}")
        if layout.pp > 1:
            words.append(f"PP{layout.pp}")
        if self.placement != ExpertPlacement():
            words.append("placed" if self.placement.is_file else self.placement.name)
        if self.num_redundant_experts:
            words.append(f"+{self.num_redundant_experts}")
        if self.replicas > 1:
            words.append(f"x{self.replicas}")
        if self.engine_python is not None:
            words.append("running")
        return " ".join(words)

    @classmethod
    def complete(
        cls, name: str, options: Mapping[str, Any], sizes: Mapping[str, int], given: Mapping[str, int | None]
    ) -> Sized:
        """Where ranks are given and DP is not, DP is what fills them. Experts are whole where the source has EP."""
        tp, pp, world = sizes["tp"], sizes["pp"], given["world_size"]
        replicas = options.get("replicas", 1)
        dp = options.get("data_parallel_size", world // (tp * pp * replicas) or 1 if world else 1)
        ranks = tp * dp * pp * replicas
        if world not in (None, ranks):
            raise UsageError(
                f"{world} ranks are no TP x DP x PP x engines = {tp} x {dp} x {pp} x {replicas} = {ranks}: "
                f"give {ranks}, or leave them out"
            )
        ep = given["ep"] or (tp * dp if sizes["ep"] > 1 else 1)
        if ep not in (1, tp * dp):
            raise UsageError(
                f"EP size {ep} of an engine with TP x DP = {tp} x {dp}: vLLM has whole experts on all {tp * dp} ranks "
                f"or slices of each, give EP {f'{tp * dp} or 1' if tp * dp > 1 else 1}, or raise DP"
            )
        return Sized(cls(**{**options, "data_parallel_size": dp}), {**sizes, "ep": ep, "world_size": ranks})

    @property
    def rearranged(self) -> VllmOptions | None:
        if self.placement_next is None:
            return None
        return dataclasses.replace(self, placement=self.placement_next, placement_next=None)

    @property
    def places_experts(self) -> bool:
        return True

    @property
    def linear(self) -> VllmOptions | None:
        if self.placement == ExpertPlacement() and not self.num_redundant_experts:
            return None
        return VllmOptions(self.data_parallel_size, self.replicas)

    @property
    def running_engine(self) -> str | None:
        return self.engine_python
