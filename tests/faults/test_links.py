"""Nothing that we write follows a symbolic link out of the output directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.errors import LorasmithError, SetupError
from lorasmith.exporting.staging import staged
from lorasmith.files.links import refuse_links
from lorasmith.runs.progress import SilentReporter
from lorasmith.runs.run_dir import open_run_dir
from lorasmith.storage import Storage

NAMES = [
    "config.yaml",
    "chat_format.json",
    "metrics.jsonl",
    "loss.png",
    "adapter_config.json",
    "adapter_model.safetensors",
    "checkpoints",
]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    return elsewhere


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_run_directory_with_a_link_is_refused(
    tmp_path: Path, victim: Path, name: str, resume: bool, dangling: bool
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    target = victim if name == "checkpoints" else victim / "file"
    (run / name).symlink_to(victim / "nothing" if dangling else target)
    with pytest.raises(SetupError, match=f"{name} is a symbolic link"):
        open_run_dir(Storage(), run, resume=resume, reporter=SilentReporter())
    assert [path.name for path in victim.iterdir()] == ["file"]
    assert (victim / "file").read_text() == "mine"


def test_the_output_directory_itself_may_be_reached_by_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "run").symlink_to(victim)
    assert open_run_dir(Storage(), tmp_path / "run", resume=False, reporter=SilentReporter()) is None


def test_a_merge_replaces_no_link(tmp_path: Path, victim: Path) -> None:
    (victim / "file").unlink()
    (tmp_path / "merged").symlink_to(victim)
    with pytest.raises(LorasmithError, match="is a symbolic link"), staged(Storage(), tmp_path / "merged"):
        pass
    assert list(victim.iterdir()) == []


def test_names_that_are_no_links_pass(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1")
    refuse_links(tmp_path, ["config.yaml", "absent"])
