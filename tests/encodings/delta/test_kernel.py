"""The kernels of deltas, in a process of their own."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.copies.interpreted import LIMIT_S, run_cases

CASES = Path(__file__).parent / "kernel_cases.py"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(LIMIT_S)
@pytest.mark.slow
def test_the_kernels_pack_and_apply_as_their_twins_do() -> None:
    run_cases(CASES)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_blocks_are_compared_in_words_of_16_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling needs no GPU; the interpreter takes kernels that the compiler refuses."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from refit.encodings.delta.gpu import TUNING
    from refit.encodings.delta.kernels.apply import apply_changes
    from refit.encodings.delta.kernels.pack import find_and_pack

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compiled(kernel: object, signature: dict[str, str], num_warps: int, **constants: object) -> str:
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constants, {(0,): [["tt.divisibility", 16]]})
        made = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": num_warps})
        assembly: str = made.asm["ptx"]
        return assembly

    pointers = {"table": "*i64", "payload": "*u8", "length": "*i64"}
    pointers |= {"counts": "*i32", "version": "i64", "base": "i64"}
    kinds = {"WIDE": True, "STRIDED": False, "FULL": False}
    assembly = compiled(find_and_pack, pointers, TUNING.num_warps, ITEM=tl.int16, SIZE=2, LANES=TUNING.lanes, **kinds)
    assert len(re.findall(r"ld\.global\S*v2\.b64", assembly)) == 8 * TUNING.lanes // (32 * TUNING.num_warps)
    pointers = {"table": "*i64", "payload": "*u8", "max_bytes": "i64", "version": "i64", "base": "i64", "flag": "*i32"}
    shape = {"BLOCK": TUNING.block, "LANES": TUNING.apply_lanes}
    compiled(apply_changes, pointers, TUNING.apply_warps, ITEM=tl.int16, SIZE=2, STRIDED=True, **shape)
