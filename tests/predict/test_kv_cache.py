"""The key-value cache of a token."""

from refit.cli.parsing import parse
from refit.predict.kv_cache import cache_bytes_of_sequence, kv_bytes_per_token


def bytes_per_token(*flags: str) -> int:
    scenario = parse(["--dry-run", *flags]).scenario
    assert scenario.model is not None
    return kv_bytes_per_token(scenario.model, scenario.destination.layout)


def test_kimi_k2_caches_576_numbers_per_layer_on_every_tp_rank() -> None:
    for tp in (1, 8):
        assert bytes_per_token("--model=kimi_k2", f"--tensor-model-parallel-size={tp}") == 61 * (512 + 64) * 2


def test_query_groups_are_divided_over_tp_and_repeated_beyond_them() -> None:
    # Qwen3-30B-A3B: 48 layers, 4 query groups of 128 channels.
    whole = 48 * 2 * 4 * 128 * 2
    for tp, share in ((1, 1), (2, 2), (4, 4), (8, 4)):
        assert bytes_per_token("--model=qwen3_30b_a3b", f"--tensor-model-parallel-size={tp}") == whole // share


def test_the_stage_with_the_most_layers_counts() -> None:
    flags = ("--pipeline-model-parallel-size=4", "--decoder-last-pipeline-num-layers=13")
    flags += tuple(flag.replace("--", "--rl-inference-") for flag in flags)
    assert bytes_per_token("--model=kimi_k2", *flags) == 16 * (512 + 64) * 2


def test_delta_nets_keep_a_state_and_no_cache() -> None:
    """Qwen3-Next: 12 of 48 layers have attention, with 2 query groups of 256 channels; the others 32 states of
    128 x 128."""
    assert bytes_per_token("--model=qwen3_next_80b_a3b") == 12 * 2 * 2 * 256 * 2
    stages = ("--rl-inference-pipeline-model-parallel-size=4", "--rl-inference-tensor-model-parallel-size=2")
    assert bytes_per_token("--model=qwen3_next_80b_a3b", *stages) == 3 * 2 * 256 * 2
    scenario = parse(["--dry-run", "--model=qwen3_next_80b_a3b"]).scenario
    assert scenario.model is not None
    found = cache_bytes_of_sequence(scenario.model, scenario.destination.layout, 4096)
    assert found == 4096 * 12 * 2 * 2 * 256 * 2 + 36 * 32 * 128 * 128 * 2
