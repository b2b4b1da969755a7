"""Refits into a running vLLM beside vLLM's own update, trainer and engine on one GPU:

    python -m benchmarks.vllm_engine --engine-python ENVIRONMENT/bin/python --output-dir DIR

Each case is one `refit run`, verified in the engine's memory and by what it generates. The figures of the first are set
against what they should reach. With `--device cpu` the cases are small, and vLLM's reload stands beside.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from refit.errors import ExitCode
from refit.results.refit import EngineResult
from refit.results.result import read_result

RUN = ("--rl-inference-format", "vllm", "--num-benchmark-warmup", "2", "--num-benchmark-iterations", "7")
QWEN3_MOE = ("--model", "qwen3_30b_a3b", "--num-layers", "8", "--max-position-embeddings", "2048")
SMALL_MOE = ("--model", "tiny_qwen3_moe", "--check-forward")
DEEPSEEK = ("--model", "tiny_deepseek_v3", "--kv-lora-rank", "512", "--qk-pos-emb-head-dim", "64", "--check-forward")
FP8 = ("--rl-inference-dtype", "fp8-block", "--fp8-scale-rule", "pow2")
BOTH = ("--refit-engine", "refit,vllm-ipc")
THREE = ("--refit-engine", "refit,vllm-ipc,checkpoint-engine")
MLA_HEADS = ("--qk-head-dim", "128", "--v-head-dim", "128", "--num-attention-heads", "16")
CASES = {
    "cuda": {
        "qwen3_moe_8_layers": (*QWEN3_MOE, *THREE),
        "qwen3_moe_8_layers_fsdp2": (*QWEN3_MOE, "--source-format", "fsdp2", "--check-forward"),
        "qwen3_moe_8_layers_fp8": (*QWEN3_MOE, *FP8, *BOTH, "--check-forward"),
        "qwen3_moe_8_layers_asleep": (*QWEN3_MOE, "--rl-inference-engine-sleep", "2"),
        "qwen3_moe_2_layers_packed": (*QWEN3_MOE, "--num-layers", "2", *FP8, *BOTH, "--check-forward"),
        "small_qwen3_moe_asleep_2": (*SMALL_MOE, "--rl-inference-engine-sleep", "2"),
        "small_qwen3_moe_asleep": (*SMALL_MOE, "--rl-inference-engine-sleep", "1"),
        "small_qwen3_moe": (*SMALL_MOE, *BOTH),
        "small_deepseek_v3": (*DEEPSEEK, *MLA_HEADS, "--fp16"),  # in BF16, rounding alone changes it by a nat
    },
    "cpu": {
        "small_qwen3_moe": (*SMALL_MOE, "--refit-engine", "refit,vllm-reload"),
        "small_deepseek_v3": (*DEEPSEEK, "--fp32"),
    },
}
ENVIRONMENT = {"qwen3_moe_2_layers_packed": {"VLLM_TEST_FORCE_FP8_MARLIN": "1"}}
"""By case: variables of the engine. Marlin, which serves GPUs without FP8, repacks codes and scales."""

WAY = {
    "cuda": ("--refit-method", "cuda-ipc", "--refit-mode", "collocated"),
    "cpu": ("--refit-method", "shm", "--refit-mode", "collocated"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a refit of 11.2 GB in BF16 on one H200 should reach."""

    median_ms: float = 7.0
    ratio: float = 70.0
    pause_ms: float = 25.0
    extra_mib: float = 64.0

    def lines(self, ours: EngineResult, theirs: EngineResult | None) -> list[str]:
        """A line per figure: what was found, what it should be, and whether it is."""
        served, median_s = ours.served, ours.median_s
        if served is None or median_s is None:
            return ["no figures"]
        extra = max((nbytes for nbytes in ours.extra_memory_bytes_per_rank if nbytes is not None), default=0)
        found = [
            ("median of 7 refits, ms", 1e3 * median_s, self.median_ms, False),
            ("engine pause, ms", 1e3 * (served.pause_s or 0.0), self.pause_ms, False),
            ("memory beyond engine and trainer, MiB", extra / 2**20, self.extra_mib, False),
        ]
        if theirs is not None and theirs.measured_s:
            found.append(("vLLM's fastest update / our median", min(theirs.measured_s) / median_s, self.ratio, True))
        return [
            f"{name}: {value:.2f}, {'at least' if at_least else 'at most'} {limit:g} wanted: "
            f"{'reached' if (value >= limit) is at_least or value == limit else 'NOT reached'}"
            for name, value, limit, at_least in found
        ]


def main() -> int:
    """Run the cases. Returns the worst exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", type=Path, required=True, help="the Python of an environment with vLLM")
    parser.add_argument("--output-dir", type=Path, default=Path("benchmark_results/vllm"), help="folder of the results")
    parser.add_argument("--device", choices=sorted(CASES), default="cuda", help="where the weights are")
    parser.add_argument("--cases", nargs="*", help="the cases to run; default: all of the device")
    args = parser.parse_args()
    worst = 0
    for name, flags in CASES[args.device].items():
        if args.cases and name not in args.cases:
            continue
        print(f"\n== {name}", flush=True)
        own = ("--rl-inference-engine-python", str(args.engine_python), "--output-dir", str(args.output_dir))
        command = [sys.executable, "-m", "refit", "run", *RUN, *WAY[args.device], *own, "--run-name", name, *flags]
        environment = {**os.environ, **ENVIRONMENT.get(name, {})}
        code = subprocess.run(command, check=False, env=environment).returncode
        worst = max(worst, code)
        files = (*args.output_dir.glob(f"{name}.json"), *args.output_dir.glob(f"{name}-*.json"))
        file = max(files, key=lambda each: each.stat().st_mtime, default=None)
        if name == "qwen3_moe_8_layers" and file is not None and code in (ExitCode.OK, ExitCode.WRONG_DATA):
            refit = read_result(file).refit
            assert refit is not None
            engines = refit.engines
            print("\n".join(Target().lines(engines["refit"], engines.get("vllm-ipc"))), flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
