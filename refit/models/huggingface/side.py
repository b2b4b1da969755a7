"""A side of a refit with a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from refit.config.side import SideSpec
from refit.errors import RefitError
from refit.memory.weights import LocalWeights
from refit.models.float32 import computing_in_float32
from refit.models.forward_pass import ForwardPass, Trace
from refit.models.huggingface.autocast import autocast
from refit.models.huggingface.tracing import plain_kernels, traced
from refit.models.huggingface.training import TransformersTrainer
from refit.models.micro_batches import replica_part
from refit.models.sharded_model import LiveSettings


class TransformersSide:
    """The `ShardedModel` of a transformers model. `module` is None on ranks outside the side."""

    def __init__(
        self,
        spec: SideSpec,
        module: Any = None,
        weights: LocalWeights | None = None,
        trainer: TransformersTrainer | None = None,
    ) -> None:
        self.module, self.weights, self.trainer = module, weights, trainer
        self._spec = spec

    @property
    def settings(self) -> LiveSettings:
        """The model's config, as transformers writes it into `config.json`."""
        if self.module is None:
            return LiveSettings()
        values: dict[str, Any] = self.module.config.to_dict()
        values["attn_implementation"] = self.module.config._attn_implementation  # which config.json does not have
        return LiveSettings(config={name: str(value) for name, value in sorted(values.items())})

    def check_forward(self) -> None:
        """All models of the families run forward on any ranks."""

    def forward(self, tokens: torch.Tensor, replayed: Mapping[int, torch.Tensor] | None = None) -> ForwardPass:
        if self.module is None:
            return ForwardPass()
        trace = Trace(replayed)
        with (
            computing_in_float32([self.module]),
            plain_kernels(self.module.config),
            traced(self.module, trace, tokens.shape),
        ):
            logits = self._run(tokens)
        return trace.ended(self._all_columns(logits) if logits is not None else None)

    def prepare_infer(self) -> None:
        """Passes compute with the weights themselves."""

    def infer(self, tokens: torch.Tensor) -> None:
        if self.module is not None and self.weights is not None:
            with autocast(self._spec, self.weights.device):
                self._run(replica_part(tokens, self._spec.layout))

    def _run(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The logits that this rank's module gives; None on ranks outside the side."""
        if self.module is None or self.weights is None:
            return None
        try:
            with torch.no_grad():
                logits: torch.Tensor = self.module(input_ids=tokens.to(self.weights.device)).logits
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise RefitError(f"the forward pass failed: {type(error).__name__}: {error}") from error
        return logits

    def _all_columns(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of all of the vocabulary, from what this rank's module gives."""
        return logits
