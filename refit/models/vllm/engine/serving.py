"""A running engine as the ranks of its side use it: what comes before and after a refit, and what it then holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from refit.models.vllm.engine.inside.refit_worker import COPIED, LIVE, PACKED, digest
from refit.models.vllm.engine.process import EngineProcess

NUM_RUNNING = 4
"""Requests that are in flight when an engine is told to pause."""

PROMPT_TOKENS, GENERATED_TOKENS = 48, 8
"""More than a block of the cache, so that a prefix can be found there."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine is, and how it holds its weights: names of parameters, layers as `*`.

    `live` are written in the memory that the engine computes with. `copied` and `packed` are committed, `packed` ones
    into another order or a library's own.
    """

    version: str
    num_workers: int
    live: tuple[str, ...]
    copied: tuple[str, ...]
    packed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """What the engine's own processes found: elements compared, and those wrong by worker and parameter."""

    num_compared: int
    wrong: Mapping[tuple[int, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generated:
    """Greedy tokens and their log-probabilities, and those of the prompt from its second token on."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_logprobs: tuple[float, ...]


class Serving:
    """The engine of a side. `process` is None on all ranks but the one that has started it, whose calls do the work.

    `parameters` are this rank's, by the engine's names; empty on ranks outside the side. `sleep_level` is that of
    `VllmOptions.engine_sleep`.
    """

    def __init__(
        self,
        process: EngineProcess | None,
        facts: EngineFacts,
        prompt: Sequence[int],
        worker: int | None,
        parameters: Mapping[str, torch.Tensor],
        sleep_level: int = 0,
    ) -> None:
        self.process, self.facts, self.prompt, self.sleep_level = process, facts, list(prompt), sleep_level
        self._worker, self._parameters = worker, parameters
        self.generated: dict[str, dict[int, Generated]] = {}
        """What was generated after refits of each refit engine, by set of weights."""

    def sleep(self) -> dict[str, float]:
        """Put an engine that sleeps to sleep, as it does while a trainer uses the GPU. Returns seconds by phase."""
        if self.process is None or not self.sleep_level:
            return {}
        self.process.ask("serve", prompt=self.prompt, num_requests=NUM_RUNNING)
        return {"sleep": self.process.ask("sleep", level=self.sleep_level)}

    def begin(self) -> dict[str, float]:
        """Pause the engine while requests are in flight, or give one that sleeps its weights' memory again. Returns
        seconds by phase."""
        if self.process is None:
            return {}
        if self.sleep_level:
            return {"wake weights": self.process.ask("wake", tag="weights")}
        self.process.ask("serve", prompt=self.prompt, num_requests=NUM_RUNNING)
        return {"pause": self.process.ask("pause")}

    def finish(self, commits: bool) -> dict[str, float]:
        """Have the engine use the weights, drop cached prefixes and go on. Returns seconds by phase.

        Without `commits` it uses them already, and what it holds is copied to where the ranks see it, which does not
        count. All ranks have written when this is called.
        """
        if self.process is None:
            return {}
        seconds: dict[str, float] = {}
        if commits:
            seconds["commit"], self.commit_parts = self.process.ask("commit")
        else:
            self.process.ask("read_back")
        if self.sleep_level:
            seconds["wake cache"] = self.process.ask("wake", tag="kv_cache")
        seconds["cache reset"] = self.process.ask("reset_cache")
        seconds["resume"] = self.process.ask("resume")
        return seconds

    commit_parts: Sequence[Mapping[str, float]] = ()
    """Of the last commit: the seconds of every worker, by kind of layer."""

    def digests(self) -> tuple[int, dict[str, int]] | None:
        """This rank's worker, and the digests of its weights as this process sees them; None outside the side."""
        if self._worker is None:
            return None
        return self._worker, {name: digest(tensor) for name, tensor in self._parameters.items()}

    def verify(self, gathered: Sequence[tuple[int, dict[str, int]] | None]) -> Findings:
        """Compare what the engine's processes have with the digests of all ranks, and their live tensors with that."""
        if self.process is None:
            return Findings(0)
        expected = dict(each for each in gathered if each is not None)
        wrong: dict[tuple[int, str], int] = {}
        num_compared = 0
        for each in self.process.ask("verify"):
            rank, ours = each["rank"], expected[each["rank"]]
            num_compared += each["num_compared"]
            wrong |= {(rank, name): count for name, count in each["wrong"].items()}
            for name, found in each["digests"].items():
                if found != ours.get(name):
                    wrong[rank, f"{name} (shared memory)"] = 1
        return Findings(num_compared, wrong)

    def generate(self) -> Generated | None:
        """Collective in nothing: only the rank with the engine gets an answer."""
        if self.process is None:
            return None
        found = self.process.ask("generate", prompt=self.prompt, num_tokens=GENERATED_TOKENS)
        return Generated(*(tuple(found[name]) for name in ("tokens", "logprobs", "prompt_logprobs")))

    def close(self) -> None:
        if self.process is not None:
            self.process.close()


def any_layer(name: str) -> str:
    """`model.layers.*.mlp.gate.weight` of the name in any layer."""
    return re.sub(r"\.\d+\.", ".*.", name)


def facts_of(described: Mapping[str, Any], opened: Sequence[Mapping[str, Any]]) -> EngineFacts:
    """Of the answers of `Host.describe` and of every worker's `refit_open`."""
    held: dict[str, set[str]] = {LIVE: set(), COPIED: set(), PACKED: set()}
    for worker in opened:
        for name, how in worker["held"].items():
            held[how].add(any_layer(name))
    live, copied, packed = (tuple(sorted(held[how])) for how in (LIVE, COPIED, PACKED))
    return EngineFacts(described["version"], len(described["workers"]), live, copied, packed)
