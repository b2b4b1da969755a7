"""Runs in vLLM's own environment: writes the parameters of vLLM's models for the folders that it is given, as JSON.

Each model is built on the meta device, on one rank, from the folder's config.json; the first one has experts, for which
vLLM makes the group that all of them get. What vLLM says against one is written
in place of its parameters.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.model_loader.utils import initialize_model


def parameters_of(folder: str) -> dict[str, Any]:
    """Name -> shape and dtype."""
    model_config = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="bfloat16")
    chosen = VllmConfig(model_config=model_config)
    torch.set_default_dtype(model_config.dtype)
    with set_current_vllm_config(chosen):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, backend="gloo")
            initialize_model_parallel()
        with torch.device("meta"):
            model = initialize_model(chosen)
    return {
        name: [list(parameter.shape), str(parameter.dtype).removeprefix("torch.")]
        for name, parameter in model.named_parameters()
    }


def main(folders: list[str]) -> None:
    found: dict[str, Any] = {}
    for folder in folders:
        try:
            found[folder] = parameters_of(folder)
        except Exception as error:
            found[folder] = f"{type(error).__name__}: {error}"
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
