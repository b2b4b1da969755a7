"""Models too large for a GPU: both figures, and remedies that hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from refit.cli.parsing import parse
from refit.errors import UsageError
from refit.predict.dry_run import DryRun, dry_run
from refit.predict.memory import check_memory

KIMI_K2 = (
    "--model kimi_k2 --dry-run --tensor-model-parallel-size 8 --expert-model-parallel-size 8 "
    "--rl-inference-expert-model-parallel-size 4"
)
SOURCE_ETP_1 = "--expert-tensor-parallel-size 1"
DESTINATION_ETP_1 = "--rl-inference-expert-tensor-model-parallel-size 1"


FP8 = "--model kimi_k2 --dry-run --expert-model-parallel-size 64 --rl-inference-dtype fp8-block"
VLLM = f"{FP8} --rl-inference-format vllm --rl-inference-tensor-model-parallel-size 8 --destination-world-size 32"
LATE = (
    f"{FP8} --rl-inference-tensor-model-parallel-size 1 --rl-inference-expert-model-parallel-size 16 "
    "--quantise destination"
)


def planned(line: str) -> DryRun:
    request = parse(line.split())
    assert request.dry_run is not None
    return dry_run(request.scenario, request.dry_run)


def refusal(line: str) -> str:
    with pytest.raises(UsageError) as raised:
        check_memory(planned(line))
    return str(raised.value)


def test_what_fits_passes_and_so_does_what_cannot_be_judged() -> None:
    check_memory(planned(f"{KIMI_K2} --cluster h100_ib400"))
    check_memory(planned(f"{KIMI_K2} {SOURCE_ETP_1}"))


def test_etp_below_tp_is_named_with_what_fits() -> None:
    message = refusal(f"{KIMI_K2} {SOURCE_ETP_1} --cluster h100_ib400")
    assert message == (
        "the source needs 257.43 GB per GPU (256.89 GB of weights, 536.87 MB of staging), h100_ib400 has 80.00 GB: "
        "leave --expert-tensor-parallel-size at TP = 8, or "
        "raise --expert-model-parallel-size to 32 with --source-world-size 64"
    )
    assert "the destination needs" in refusal(f"{KIMI_K2} {DESTINATION_ETP_1} --cluster h100_ib400")


def test_quantising_is_counted_where_it_happens() -> None:
    """Codes and scales at the source; at the destination BF16 weights, beside codes that would fit alone."""
    assert "the source needs 123.39 GB per GPU (122.85 GB of weights and quantising, 536.87 MB of" in refusal(
        f"{VLLM} --expert-model-parallel-size 32 --cluster h100_ib400"
    )
    line = f"{LATE} --cluster h100_ib400"
    assert "the destination needs" in refusal(line)
    assert max(planned(line).destination_bytes.values()) < 80e9


def test_etp_is_not_named_where_it_is_not_the_cause() -> None:
    message = refusal(f"{KIMI_K2} --refit-mode collocated --cluster h100_ib400")
    assert message.startswith("both sides (TP8 EP8 -> TP8 EP4) need 102.11 GB per GPU")
    assert "expert-tensor" not in message
    # ETP 1 at the source, but even ETP 8 leaves too much.
    assert "expert-tensor" not in refusal(
        f"{KIMI_K2} {SOURCE_ETP_1} --expert-model-parallel-size 2 --cluster h100_ib400"
    )


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(f"{KIMI_K2} {SOURCE_ETP_1}", marks=pytest.mark.slow),
        pytest.param(f"{KIMI_K2} {DESTINATION_ETP_1}", marks=pytest.mark.slow),
        f"{KIMI_K2} --refit-mode collocated",
        pytest.param(f"{KIMI_K2} --staging-mib 30000", marks=pytest.mark.slow),
        f"{VLLM} --expert-model-parallel-size 32",
        LATE,
        f"{VLLM} --quantise source --expert-model-parallel-size 32",
    ],
)
def test_every_remedy_holds(line: str) -> None:
    remedies = refusal(f"{line} --cluster h100_ib400").split("80.00 GB: ")[1].split(", or ")
    assert remedies
    for remedy in remedies:
        # Of a flag given twice the last one counts.
        given = re.findall(r"(--[a-z-]+) (?:to|at TP =)? ?(\d+)", remedy)
        check_memory(planned(" ".join([line, *(f"{flag} {value}" for flag, value in given), "--cluster h100_ib400"])))


def test_gpus_too_small_for_any_layout(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("intra_node_gb_per_s: 1\ngpus_per_node: 8\ngpu_memory_gb: 0.001\n")
    assert refusal(f"--model tiny --dry-run --cluster {path}").endswith(
        "raise TP, EP or PP, or use GPUs with more memory"
    )


SHARED = "--model tiny --dry-run --staging-mib 16 --tensor-model-parallel-size 2 --ranks-per-gpu"


def test_a_gpu_holds_all_its_ranks_of_both_sides() -> None:
    """Source ranks 0 and 1, destination ranks 2 and 3: GPU 0 has the first of each, or all of them."""
    apart, paired, together = (planned(f"{SHARED} {ranks}") for ranks in (1, 2, 4))
    assert apart.memory_bytes == max(*apart.source_bytes.values(), *apart.destination_bytes.values()) + (16 << 20)
    both = [paired.source_bytes[rank] + paired.destination_bytes[2 + rank] for rank in (0, 1)]
    assert paired.held_bytes == {"both": dict(enumerate(both))}
    assert paired.memory_bytes == max(both) + (32 << 20)
    assert together.memory_bytes == sum(both) + (64 << 20)


def test_too_many_ranks_on_a_gpu_are_refused_with_the_number_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("intra_node_gb_per_s: 1\ngpus_per_node: 8\ngpu_memory_gb: 0.055\n")
    message = refusal(f"{SHARED} 4 --cluster {path}")
    assert message.startswith("4 ranks of a GPU (TP2 EP1 -> TP2 EP1) need 103.")
    assert message.endswith(": lower --staging-mib to 4, or lower --ranks-per-gpu to 3 (2 GPUs)")
    check_memory(planned(f"{SHARED} 3 --cluster {path}"))
    check_memory(planned(f"{SHARED} 4 --staging-mib 4 --cluster {path}"))
