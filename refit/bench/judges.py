"""Who says whether a running engine generates what it should after a refit: a reference, or another way to refit it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from refit.bench.generated import NEAR_TIE, ROUNDINGS, TOLERANCE, compared, rounding_of
from refit.bench.initial_weights import spread
from refit.bench.sides import Side
from refit.config.shape import Dtype, ModelShape
from refit.models.vllm.engine.serving import Generated, Serving
from refit.results.serving import ServedCheck

if TYPE_CHECKING:
    from refit.models.huggingface.whole import WholeModel, WholePass


class Judge(Protocol):
    """On the rank that has the engine."""

    skipped: str | None
    """Why nothing is to be generated."""

    def add(self, number: int, generated: Generated) -> None:
        """What the engine generates with the `number`th set of weights."""
        ...

    def verdict(self) -> ServedCheck: ...


def judge_of(
    shape: ModelShape, source: Side, destination: Side, serving: Serving, name: str, device: torch.device
) -> Judge:
    """For the refits that `name` makes."""
    dtype = destination.spec.dtype
    assert dtype is not None
    if destination.spec.quantisation is not None:
        return OtherWay(name, serving.generated)
    try:
        from refit.models.huggingface.whole import WholeModel
    except ImportError as error:
        return Nobody(f"the reference needs transformers: {error}: pip install 'refit-benchmark[hf]'")
    exact = WholeModel(shape, Dtype.FP32, device)
    rounded = WholeModel(shape, dtype, device) if dtype is not Dtype.FP32 else None
    return Reference(exact, rounded, dtype, serving.prompt, source, destination)


class Nobody:
    def __init__(self, reason: str) -> None:
        self.skipped: str | None = reason

    def add(self, number: int, generated: Generated) -> None: ...

    def verdict(self) -> ServedCheck:
        return ServedCheck(passed=True, skipped=self.skipped)


class Reference:
    """transformers, in float32 and in the engine's dtype, which shows what rounding alone changes."""

    skipped: str | None = None

    def __init__(
        self,
        exact: WholeModel,
        rounded: WholeModel | None,
        dtype: Dtype,
        prompt: Sequence[int],
        source: Side,
        destination: Side,
    ) -> None:
        self._exact, self._rounded, self._dtype, self._prompt = exact, rounded, dtype, prompt
        self._tensors = source.sharding.tensors, destination.sharding.tensors
        self._found: list[tuple[Generated, WholePass]] = []
        self._rounding = 0.0

    def add(self, number: int, generated: Generated) -> None:
        tokens = [*self._prompt, *generated.tokens]
        after = self._pass_of(self._exact, number, tokens)
        if self._rounded is not None:
            rounded = self._pass_of(self._rounded, number, tokens)
            self._rounding = max(self._rounding, rounding_of(tokens, after, rounded, NEAR_TIE[self._dtype]))
        self._found.append((generated, after))

    def verdict(self) -> ServedCheck:
        title = f"{self._exact.title} in float32, the engine in {self._dtype.value}"
        tolerance = max(TOLERANCE[self._dtype], ROUNDINGS * self._rounding)
        return compared(self._prompt, self._found, tolerance, NEAR_TIE[self._dtype], title)

    def _pass_of(self, model: WholeModel, number: int, tokens: Sequence[int]) -> WholePass:
        spread(model.weights, number, *self._tensors)
        return model.pass_of(tokens)


class OtherWay:
    """Another of the run's refit engines, after which the same engine generates the same, to the bit.

    For weights with which transformers computes otherwise.
    """

    skipped: str | None = None

    def __init__(self, name: str, known: dict[str, dict[int, Generated]]) -> None:
        """`known` are what each way's refits have led to, by set of weights; this one's are added."""
        self._title = next(iter(known), None)
        self._others = known[self._title] if self._title is not None else {}
        self._mine = known.setdefault(name, {})

    def add(self, number: int, generated: Generated) -> None:
        self._mine[number] = generated

    def verdict(self) -> ServedCheck:
        if self._title is None:
            why = "in FP8 an engine is compared with itself after another way to refit it: see the next refit engine's"
            return ServedCheck(passed=True, skipped=why)
        differing = [number for number, mine in self._mine.items() if mine != self._others[number]]
        return ServedCheck(
            passed=not differing,
            reference=f"the same engine after {self._title}",
            num_sets=len(self._mine),
            num_tokens=_num_tokens(self._mine),
            num_wrong=_num_differing(self._mine, self._others),
            difference=_largest_difference(self._mine, self._others),
            tolerance=0.0,
            first_wrong=f"weights {differing[0]}" if differing else None,
        )


def _num_tokens(sets: Mapping[int, Generated]) -> int:
    return sum(len(each.logprobs) + len(each.prompt_logprobs) for each in sets.values())


def _largest_difference(sets: Mapping[int, Generated], others: Mapping[int, Generated]) -> float | None:
    """In nats, of log-probabilities in the same place. None where one is not finite."""
    found = [
        abs(mine - other)
        for number, each in sets.items()
        for mine, other in zip(
            (*each.prompt_logprobs, *each.logprobs),
            (*others[number].prompt_logprobs, *others[number].logprobs),
            strict=True,
        )
    ]
    return max(found, default=0.0) if all(map(math.isfinite, found)) else None


def _num_differing(sets: Mapping[int, Generated], others: Mapping[int, Generated]) -> int:
    def values(each: Generated) -> list[object]:
        return [*each.prompt_logprobs, *zip(each.tokens, each.logprobs, strict=True)]

    return sum(
        mine != other
        for number, each in sets.items()
        for mine, other in zip(values(each), values(others[number]), strict=True)
    )
