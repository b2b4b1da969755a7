"""What Megatron-Core's import must not cost, and must not lose."""

from __future__ import annotations

import subprocess
import sys

IMPORTED = """
import sys, torch
eager = torch.compile
import refit.models.megatron.build
from megatron.core.fusions.fused_bias_swiglu import swiglu
assert torch.compile is eager
print("torch._inductor.compile_fx" in sys.modules)
gates = torch.randn(3, 8)
first, second = gates.chunk(2, -1)
assert torch.allclose(swiglu(gates), torch.nn.functional.silu(first) * second)
from torch._dynamo.utils import counters
print(sum(counters["frames"].values()) > 0)
"""


def test_the_compiler_is_imported_when_a_fused_function_is_called() -> None:
    """The first line: whether the import alone needed it. The second: whether the call was compiled."""
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr
