"""What a refit must not import, and what must still be compiled where it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REFITTED = """
import sys, torch
compiled = []
def spy(model=None, **options):
    compiled.append(model.__name__)
    return model
torch.compile = spy
from refit.cli.main import main
assert main(sys.argv[1:]) == 0
print("\\nREFITTED", compiled, "torch._dynamo" in sys.modules)
from megatron.core.fusions.fused_bias_swiglu import swiglu
gates = torch.randn(3, 8)
first, second = gates.chunk(2, -1)
for _ in range(2):
    assert torch.allclose(swiglu(gates), torch.nn.functional.silu(first) * second)
print("CALLED", compiled, torch.compile is spy)
"""


@pytest.mark.slow
def test_a_fused_function_is_compiled_when_it_is_called_and_a_refit_calls_none(tmp_path: Path) -> None:
    script = tmp_path / "refitted.py"
    script.write_text(REFITTED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc-per-node", "1"]
    flags = ["--model", "tiny", "--refit-mode", "collocated", "--refit-method", "gloo", "--output-dir", str(tmp_path)]
    command = [sys.executable, *launcher, str(script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert "REFITTED [] False" in lines, done.stdout + done.stderr
    assert "CALLED ['swiglu'] True" in lines, done.stderr
