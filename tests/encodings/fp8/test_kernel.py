"""The quantising kernel, in a process of its own."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.copies.interpreted import LIMIT_S, run_cases

CASES = Path(__file__).parent / "kernel_cases.py"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(LIMIT_S)
def test_the_kernel_quantises_as_plain_torch_does() -> None:
    run_cases(CASES)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("rule", ["amax", "pow2", "ceil", "ocp-floor"])
def test_the_kernel_compiles_for_gpus_with_and_without_fp8(
    rule: str, aligned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling needs no GPU; the interpreter takes kernels that the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from refit.encodings.fp8 import kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    group = 32 if rule in ("ceil", "ocp-floor") else 0
    constants: dict[str, object] = {"ALIGNED": aligned, "RULE": rule, "GROUP": group}
    constants |= {"RECIPROCAL": kernel.RECIPROCAL_BITS, "TILE": kernel.TILE}
    for capability in (80, 90):
        converts = divmod(capability, 10) >= kernel.CONVERTS_FROM
        constants["CONVERTS"] = converts
        signature = {"table": "*i64"} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel._quantise_tiles, signature, constants, {(0,): [["tt.divisibility", 16]]})
        assembly = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 8}).asm["ptx"]
        # A fused multiply-add or an approximate division would round differently.
        assert "fma.rn.f32" not in assembly
        assert "div.full" not in assembly
        assert "div.approx" not in assembly
        assert ".ftz" not in assembly, "subnormal factors and weights would be zeros"
        assert ("cvt.rn.satfinite.e4m3x2.f32" in assembly) == converts
        accesses = re.findall(r"(?:ld|st)\.global\.(?:v4\.b32|b16)\b", assembly)
        assert set(accesses) == ({"ld.global.v4.b32", "st.global.v4.b32"} if aligned else {"ld.global.b16"})
