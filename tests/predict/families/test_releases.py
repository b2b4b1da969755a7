"""Which release of transformers a prediction follows, and what that one keeps in float32."""

from __future__ import annotations

import pytest

from refit.cli.parsing import parse
from refit.config.shape import Dtype
from refit.errors import UsageError
from refit.predict.dry_run import DryRunOptions, dry_run
from refit.predict.families import releases
from refit.predict.families.deepseek_v3 import DEEPSEEK_V3
from refit.predict.families.qwen3_moe import QWEN3_MOE
from refit.predict.families.tables import Release
from refit.predict.sides import predict_side

ROUTER = "decoder.layers.1.mlp.router.weight"
BIAS = "decoder.layers.1.mlp.router.expert_bias"


def router_dtypes(*flags: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The dtypes of a router and its bias at the source, and the notes."""
    scenario = parse(["--dry-run", "--model=tiny_deepseek_v3", "--source-world-size=2", *flags]).scenario
    assert scenario.model is not None
    tensors = predict_side(scenario.model, scenario.source).tensors
    return {key: tensors[key].dtype for key in (ROUTER, BIAS)}, scenario.notes


def test_releases_that_keep_routers_in_float32() -> None:
    assert releases.kept_in_float32(DEEPSEEK_V3, (5, 23)) == ()
    assert [row.name for row in releases.kept_in_float32(DEEPSEEK_V3, (5, 24))] == ["mlp.gate.weight"]
    assert [row.name for row in releases.kept_in_float32(DEEPSEEK_V3, (6, 0))] == ["mlp.gate.weight"]
    assert releases.kept_in_float32(QWEN3_MOE, (6, 0)) == ()


@pytest.mark.parametrize(
    ("release", "dtype", "said"),
    [
        ((5, 17), "bfloat16", None),
        ((5, 24), "float32", "source: transformers 5.24 keeps mlp.gate.weight in float32"),
        (None, "float32", "source: transformers is not installed here: mlp.gate.weight is taken as float32, as 5.24"),
    ],
)
def test_a_prediction_follows_the_installed_release(
    release: Release | None, dtype: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "installed", lambda: release)
    dtypes, notes = router_dtypes("--source-format=fsdp2")
    assert dtypes == {ROUTER: dtype, BIAS: "float32"}
    assert [note for note in notes if "transformers" in note and not note.startswith(said or " ")] == []
    assert bool(notes) is (said is not None)


def test_deepspeed_casts_what_transformers_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "installed", lambda: (5, 24))
    dtypes, notes = router_dtypes("--source-format=autotp")
    assert dtypes == {ROUTER: "bfloat16", BIAS: "float32"}
    assert notes == ("source: DeepSpeed casts mlp.gate.weight to bfloat16, transformers 5.24 keeps it in float32",)


@pytest.mark.parametrize("flags", [["--fp32"], ["--model=tiny_qwen3_moe"], ["--model=tiny_qwen3"]])
def test_nothing_is_said_where_all_parameters_have_one_dtype(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "installed", lambda: (5, 24))
    for library in ("fsdp2", "autotp"):
        argv = ["--dry-run", "--model=tiny_deepseek_v3", *flags, f"--source-format={library}", "--source-world-size=2"]
        scenario = parse(argv).scenario
        assert scenario.notes == ()
        assert scenario.model is not None
        dtypes = {tensor.dtype for tensor in predict_side(scenario.model, scenario.source).tensors.values()}
        assert dtypes == {"float32"} if scenario.source.dtype is Dtype.FP32 else {"bfloat16"}


@pytest.mark.parametrize(("version", "release"), [("5.24.0", (5, 24)), ("5.25.0.dev0", (5, 25)), ("6.0rc1", (6, 0))])
def test_the_release_of_a_version(version: str, release: Release) -> None:
    assert releases.release_of(version) == release


def test_a_float32_router_is_not_quantised_and_the_remedy_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "installed", lambda: (5, 24))
    flags = ["--dry-run", "--model=tiny_deepseek_v3", "--source-format=fsdp2", "--rl-inference-dtype=mxfp8"]
    kept = "--fp8-keep-bf16=word_embeddings,output_layer,norm"
    with pytest.raises(
        UsageError,
        match=rf"^mxfp8 .* the source has {ROUTER} in float32: .*--fp8-keep-bf16 word_embeddings,\S+,router",
    ):
        dry_run(parse([*flags, kept]).scenario, DryRunOptions())
    planned = dry_run(parse([*flags, f"{kept},router"]).scenario, DryRunOptions())
    assert planned.cost.casts[ROUTER] == ("float32", "bfloat16")
