"""What is counted of a side, rank by rank, against its whole sharding."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.config.registry import FORMATS, load
from refit.config.scenario import Scenario
from refit.predict.serving.layout import Served
from refit.predict.sides import predict_side

MOE = ("--model=tiny_qwen3_moe",)
FP8 = ("--kv-channels=128", "--hidden-size=512", "--ffn-hidden-size=2048", "--moe-ffn-hidden-size=256")
FP8 += ("--rl-inference-dtype=fp8-block",)


def scenario_of(model: str, layout: str, *flags: str) -> Scenario:
    return parse([f"--model={model}", "--source=TP1", f"--destination={layout}", *flags, "--dry-run"]).scenario


def served(scenario: Scenario) -> Served:
    side = scenario.destination
    found: Served = load(FORMATS[side.format].serving or "")(scenario.model, side)
    return found


@pytest.mark.parametrize(
    ("model", "layout", "flags"),
    [
        ("tiny", "TP2 EP4 ETP1 DP4 PP2", ()),
        ("tiny", "TP4 EP2 ETP2", ()),
        ("tiny_deepseek_v3", "TP2 EP2 PP2", ("--rl-inference-decoder-last-pipeline-num-layers=1",)),
        ("tiny_qwen2", "TP2 PP2", ()),
        ("tiny_qwen3_moe", "vllm TP2 DP2 EP4 PP2", ()),
        ("tiny_qwen3_moe", "vllm TP1 DP3 EP3 x2", ()),
        ("tiny_qwen3_moe", "vllm TP2 DP2 EP4 x2 +4", ()),
        ("tiny_qwen3_moe", "vllm TP4", ()),
        ("tiny_qwen3_moe", "vllm TP2 DP2 EP4", FP8),
        ("tiny_qwen3_moe", "TP2 EP2", FP8),
        ("tiny_glm4_moe", "vllm TP2 EP2", ()),
        ("tiny_qwen2", "vllm TP2 PP2", ()),
        ("tiny_deepseek_v2", "vllm TP2 DP2 EP4", ()),
    ],
)
def test_every_rank_has_the_bytes_of_its_sharding(model: str, layout: str, flags: tuple[str, ...]) -> None:
    scenario = scenario_of(model, layout, *flags)
    assert scenario.model is not None
    found = served(scenario)
    assert found.bytes_by_rank == list(predict_side(scenario.model, scenario.destination).bytes_per_rank.values())
    assert found.dtypes() == (("bf16", "fp8") if flags == FP8 else ("bf16",))


def test_multi_token_prediction_is_held_and_decodes_nothing() -> None:
    from refit.predict.serving.held import parts_of

    scenario = scenario_of("tiny", "TP2 EP2", "--mtp-num-layers=1")
    plain = scenario_of("tiny", "TP2 EP2")
    assert scenario.model is not None
    found, without = served(scenario), served(plain)
    assert found.bytes_by_rank == list(predict_side(scenario.model, scenario.destination).bytes_per_rank.values())
    assert sum(found.bytes_by_rank) > sum(without.bytes_by_rank)
    assert parts_of(found.stages[0], 3, False) == parts_of(without.stages[0], 3, False)
