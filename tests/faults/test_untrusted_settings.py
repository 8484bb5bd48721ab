"""Settings as a stranger could write them, as YAML and as trees: read, or refused by key and place, at once
(reliability table, rows 11, 36, 37 and 60)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from untrusted_files import VALUES, nothing_outside, reads_or_refuses

from lorasmith.config import RunConfig, load_run_config, parse_override, read_yaml, to_yaml, validate
from lorasmith.errors import ConfigError

HARDLY = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
KEYS = [f"{section}.{key}" for section, keys in RunConfig().model_dump().items() for key in keys]
NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**64, -(2**64), 10**400, 0.0, -0.0, 1e308, float("nan"), float("inf")]
)
GOOD = to_yaml(RunConfig())
SCRAPS = st.sampled_from(
    [
        *("a: &x [1]\nb: *x", "a: !!python/object/apply:os.system [ls]", "!!binary x", "? [a]\n: b", "<<: 5"),
        *("a: 2001-99-99", "a: !!int x", "a: !!float x", "a: !!timestamp x", "a: 1:99:99", "1: 2", "null: 1"),
        *(
            "[" * 5000,
            "{a: " * 5000,
            "- " * 5000,
            "a: " + "9" * 5000,
            "%YAML 9.9\n---\na: 1",
            "a: 1\n---\nb: 2",
        ),
        *(
            "a: \x00",
            "\ufeffa: 1",
            "a: \ud800",
            "\ta: 1",
            "train: 5",
            "train: {1: 2}",
            "train: {[a]: 1}",
            "~: {}",
        ),
    ]
)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """A good recipe that is cut or has something put in; or scraps."""
    if draw(st.booleans()):
        return draw(SCRAPS | st.text(max_size=30))
    start, end = sorted((draw(st.integers(0, len(GOOD))), draw(st.integers(0, len(GOOD)))))
    return GOOD[:start] + draw(SCRAPS | st.text(max_size=5)) + GOOD[end:]


def try_texts(tmp_path: Path, count: int) -> None:
    path = tmp_path / "run.yaml"

    @settings(max_examples=count, **HARDLY)
    @given(text=texts())
    def one(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with nothing_outside(tmp_path):
            assert reads_or_refuses(lambda: load_run_config(path, {})) in ("read", "ConfigError")
            assert reads_or_refuses(lambda: parse_override(f"train.seed={text}")) in ("read", "ConfigError")

    one()


def try_trees(count: int) -> None:
    @settings(max_examples=count, **HARDLY)
    @given(key=st.sampled_from(KEYS), value=NUMBERS | VALUES, more=VALUES)
    def one(key: str, value: Any, more: Any) -> None:
        section, _, name = key.partition(".")
        for tree in ({section: {name: value}}, {section: more}, more):
            assert reads_or_refuses(lambda tree=tree: validate(RunConfig, tree, where="x")) in (
                "read",
                "ConfigError",
            )

    one()


def test_hundreds_of_texts(tmp_path: Path) -> None:
    try_texts(tmp_path, 60)


@pytest.mark.slow
def test_thousands_of_texts(tmp_path: Path) -> None:
    try_texts(tmp_path, 2000)


def test_hundreds_of_values() -> None:
    try_trees(150)


@pytest.mark.slow
def test_thousands_of_values() -> None:
    try_trees(2000)


@settings(max_examples=100, **HARDLY)
@given(key=st.sampled_from(KEYS), value=NUMBERS)
def test_what_is_taken_is_written_and_read_again(tmp_path: Path, key: str, value: float) -> None:
    """A number is in range or refused, and never becomes another one on its way through config.yaml."""
    section, _, name = key.partition(".")
    try:
        config = validate(RunConfig, {section: {name: value}}, where="x")
    except ConfigError:
        return
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path / "config.yaml", {}) == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 5000, "nested too deep"),
        ("? [a]\n: b", "a key must be a word"),
        ("a: 2001-99-99", "month must be in"),
        ("a: " + "9" * 5000, "4300"),
        ("a: !!timestamp x", "tags (!!name) are not allowed"),
        ("a: !!bool x", "tags (!!name) are not allowed"),
    ],
)
def test_traps_of_yaml_are_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "run.yaml")
    assert told in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "large"])
def test_what_is_no_settings_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(2**36)
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(path)


def test_the_harness_finds_a_loader_that_is_not_ours() -> None:
    """Negative control: PyYAML's own safe loader ends in other errors."""
    with pytest.raises(ValueError, match="month"):
        reads_or_refuses(lambda: yaml.safe_load("a: 2001-99-99"))
