"""The parameters of vLLM's own model classes are those that are predicted: names, fusions, shapes and dtypes.

One process of vLLM's environment builds every family's model. Nothing is computed, so that families are compared too
whose forward pass vLLM does not run on CPUs (MiniMax-M2 in 0.32.0).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from refit.models.vllm.engine.process import ENVIRONMENT, ON_DEVICE, without_ranks
from refit.models.vllm.engine.side import config_of
from refit.predict.vllm.engine import Place
from refit.predict.vllm.names import followed_name
from refit.predict.vllm.parameters import Engines
from tests.models.huggingface.sides import FAMILY
from tests.models.vllm.engine.running import PYTHON, needs_vllm
from tests.predict.test_vllm import preset, side

pytestmark = needs_vllm
PROGRAM = Path(__file__).with_name("named_parameters.py")


@pytest.fixture(scope="module")
def of_vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Preset -> the parameters of vLLM's model, or why it has none."""
    first_routed = sorted(FAMILY, key=lambda family: not family.experts)
    folders = {FAMILY[family]: tmp_path_factory.mktemp(FAMILY[family]) for family in first_routed}
    for name, folder in folders.items():
        (folder / "config.json").write_text(json.dumps(config_of(preset(name), side())))
    command = [str(PYTHON), str(PROGRAM), *map(str, folders.values())]
    environment = {**without_ranks(os.environ), **ENVIRONMENT, **ON_DEVICE["cpu"], "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    return {name: found[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("model", FAMILY.values())
def test_vllms_own_parameters_are_those_that_are_predicted(of_vllm: dict[str, Any], model: str) -> None:
    predicted = {
        f"{block.block.prefix}{parameter.name}": [list(parameter.engine_shape), parameter.dtype]
        for block in Engines(preset(model), side()).blocks_of(Place(0, 0, 0, 0))
        for parameter in block.parameters
    }
    assert isinstance(of_vllm[model], dict), of_vllm[model]
    assert {followed_name(name): stated for name, stated in of_vllm[model].items()} == predicted
