"""Which adapter a person means by a path, an adapter and a checkpoint; nothing of it is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.errors import CheckpointError, ConfigError
from lorasmith.runs.run_dir import adapter_asked


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").touch()
    return directory


def test_a_run_brings_its_own_adapter(run: Path) -> None:
    assert adapter_asked(run, None, None) == str(run)


def test_a_base_model_has_the_adapter_that_is_named(tmp_path: Path) -> None:
    assert adapter_asked(tmp_path, "elsewhere", None) == "elsewhere"
    assert adapter_asked(tmp_path, None, None) is None


def test_an_adapter_beside_a_run_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="a run brings its own adapter"):
        adapter_asked(run, "elsewhere", None)


def test_a_checkpoint_of_a_base_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only a run has checkpoints"):
        adapter_asked(tmp_path, None, 5)


def test_a_checkpoint_that_is_not_there_is_named(run: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
        adapter_asked(run, None, 5)
