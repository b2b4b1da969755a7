"""`--source-weights` and `--write-weights`: what they need, and what they are refused with before ranks are started."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from refit.checkpoints import write
from refit.checkpoints.layout import config_of, partial_of, plan_folder
from refit.cli.output import check_output, discard_partial
from refit.cli.parsing import parse
from refit.config.scenario import Scenario
from refit.config.shape import Dtype
from refit.errors import UsageError
from refit.predict.families.config_json import config_values
from refit.predict.sides import predict_side

TINY = "--model=tiny_qwen3_moe"


def scenario(*flags: str) -> Scenario:
    return parse(["--refit-method=gloo", *flags]).scenario


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of zeros."""
    run, folder = scenario(TINY), tmp_path_factory.mktemp("saved") / "made"
    assert run.model is not None
    planned, _ = plan_folder(folder, run.model, Dtype.BF16, predict_side(run.model, run.source).tensors)
    write.create(planned, config_of(config_values(run.model), Dtype.BF16), [])
    write.finish(planned)
    return folder


def test_a_folder_describes_its_model_and_is_loaded_first(saved: Path) -> None:
    run = scenario(f"--source-weights={saved}", "--rl-inference-tensor-model-parallel-size=2")
    assert run.model is not None
    assert replace(run.model, make_vocab_size_divisible_by=128) == scenario(TINY).model
    assert run.measurements == ("load", "refit")
    assert (run.source_weights, run.write_weights) == (saved, None)
    assert scenario(f"--source-weights={saved}", TINY).model == scenario(TINY).model


def test_loading_alone_needs_no_destination(saved: Path) -> None:
    run = scenario(f"--source-weights={saved}", "--measure=load", "--tensor-model-parallel-size=2")
    assert run.measurements == ("load",)
    assert run.num_ranks == 2


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((TINY, "--measure=load"), "--measure load fills the source from a checkpoint: give --source-weights"),
        ((TINY, "--source-weights=/none/such"), "/none/such is not there"),
        (("--model=tiny_qwen3", "--source-weights={saved}"), r"lacks \d+ of the \d+ tensors of the model"),
        (("--source-weights={saved}", "--vocab-size=4000"), r"embed_tokens.weight is \[4096, 256\] .*\[4000, 256\]"),
        (("--source-weights={saved}", "--num-layers=1"), r"has \d+ tensors that the model has not: model.layers.1"),
        (("--model-provider=a:b", "--write-weights=out"), "--write-weights needs the names of the model's tensors"),
        (("--model=tiny", "--write-weights=out"), "the model is none of those with names of Hugging Face"),
        (
            (TINY, "--write-weights=out", "--rl-inference-dtype=mxfp8"),
            "--write-weights writes weights and block FP8, no mxfp8: leave one of them out",
        ),
        ((TINY, "--write-weights=out", "--source-weights={saved}", "--measure=load"), "add refit to --measure"),
    ],
)
def test_what_cannot_be_read_or_written_is_told_in_one_line(saved: Path, flags: tuple[str, ...], told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        scenario(*(flag.format(saved=saved) for flag in flags))
    assert "\n" not in str(caught.value)


def test_an_index_that_is_damaged_is_told_before_ranks_start(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"it": "none.safetensors"}}))
    with pytest.raises(UsageError, match=r"index.json names none.safetensors, which is not there: it should have it"):
        scenario(f"--source-weights={folder}")


def test_a_config_of_other_heads_is_told_though_all_shapes_fit(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))
    with pytest.raises(UsageError, match=r"config.json has num query groups 2, the model has 4: leave the flags"):
        scenario(TINY, f"--source-weights={folder}")


def writing(tmp_path: Path) -> Scenario:
    return scenario(TINY, f"--write-weights={tmp_path / 'out'}", f"--output-dir={tmp_path / 'results'}")


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_output(writing(tmp_path), {})
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(UsageError, match="out is there already"):
        check_output(writing(tmp_path), {})


def test_what_another_run_has_left_is_told_and_what_this_one_leaves_is_removed(tmp_path: Path) -> None:
    run = writing(tmp_path)
    assert run.write_weights is not None
    partial_of(run.write_weights).mkdir()
    with pytest.raises(UsageError, match=r"\.out\.partial is left of a run"):
        check_output(run, {})
    discard_partial(run)
    check_output(run, {})
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_told_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(UsageError, match=r"out needs 9\.\d+ MB, .* has 5\.00 kB free"):
        check_output(writing(tmp_path), {})


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = scenario(TINY, f"--write-weights={tmp_path / 'file/out'}", f"--output-dir={tmp_path / 'results'}")
    with pytest.raises(UsageError, match="file/out cannot be written: "):
        check_output(run, {})
