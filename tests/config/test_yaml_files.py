"""What is read of YAML and what is refused, with line and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from refit.config import yaml_files
from refit.config.clusters import load_cluster
from refit.errors import UsageError

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
"""Seven lines that stand for two million values."""


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("a: &x\n  k: 1\n  l: 2\nb:\n  l: 3\n  <<: *x", {"a": {"k": 1, "l": 2}, "b": {"k": 1, "l": 3}}),
        ("a: 2020-01-01", {"a": "2020-01-01"}),
        ("a: 010\nb: 1:30\nc: 0x10", {"a": "010", "b": "1:30", "c": "0x10"}),
        ("a: 1_000\nb: -3\nc: 1e-5\nd: .5", {"a": 1000, "b": -3, "c": 1e-5, "d": 0.5}),
        ("a: yes\nb: False\nc:\nd: ~", {"a": True, "b": False, "c": None, "d": None}),
        ("12: x\nyes: y", {"12": "x", "yes": "y"}),
        ("a: .nan\nb: -.inf", {"a": ".nan", "b": "-.inf"}),
    ],
)
def test_values(tmp_path: Path, text: str, content: object) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert yaml_files.read_mapping(path) == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: !!int 'abc'", "at line 2, column 4: 'abc' is not of the type tag:yaml.org,2002:int"),
        ("a: " + "9" * 5000, "at line 1, column 4: a whole number of 5,000 digits, 18 are the most"),
        ("a: " + "[" * 500, "lists and mappings are nested more than 16 deep"),
        ("a: " + "[" * 3000, "nest"),  # libyaml looks ahead and has a limit of its own, 1000 deep since PyYAML 6.0.4
        ("a: 1e999", "at line 1, column 4: '1e999' is too large for a number"),
        ("a: 1\n\na: 2", "at line 3, column 1: key 'a' is given twice, it is in line 1 already"),
        ("a: &x [*x]", "its aliases written out have more than 16 levels"),
        (BOMB, "its aliases written out have more than 100,000 values"),
        ("a: &x [1]\nb:\n  <<: *x", "<< takes a mapping"),
        ("a: !!binary aGk=", "values of type tag:yaml.org,2002:binary are not read"),
        ("a: !!timestamp 2020-01-01", "values of type tag:yaml.org,2002:timestamp are not read"),
        ("a: !!python/object:os.system x", "values of type tag:yaml.org,2002:python/object:os.system are not read"),
        ("? [1]\n: 2", "a key must be text"),
        ('a: "\\U00110000"', "is not valid YAML"),
        ("a: \x01", "is not valid YAML"),
        ("a: b\n---\nc: d", "is not valid YAML at line 2"),
        ("a: " + "x" * yaml_files.MAX_FILE_BYTES, "has more than 262,144 bytes"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        yaml_files.read_mapping(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 250


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inter_node_gb_per_s: .nan", "inter_node_gb_per_s must be a positive number, not '.nan'"),
        ("inter_node_gb_per_s: .inf", "inter_node_gb_per_s must be a positive number, not '.inf'"),
        ("inter_node_gb_per_s: 1e-300", "inter_node_gb_per_s must be from 1e-06 to 1,000,000, not 1e-300"),
        ("gpu: [H200]", "gpu must be text, not ['H200']"),
    ],
)
def test_a_link_speed_is_finite(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"intra_node_gb_per_s: 1\ngpus_per_node: 8\n{line}\n")
    with pytest.raises(UsageError) as caught:
        load_cluster(str(path))
    assert message in str(caught.value)
