"""Retention, metrics.jsonl and the first look at a run directory: what needs no model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lorasmith.errors import SetupError, StorageError
from lorasmith.runs.lock import refuse_if_locked, run_lock
from lorasmith.runs.manifest import list_checkpoints
from lorasmith.runs.metrics import MetricsLog, read_metrics
from lorasmith.runs.progress import SilentReporter
from lorasmith.runs.run_dir import open_run_dir
from lorasmith.storage import Storage
from lorasmith.training.checkpoint import prune


def checkpoints(run_dir: Path, *steps: int) -> None:
    for age, step in enumerate(steps):
        path = run_dir / f"checkpoints/step-{step:06d}"
        path.mkdir(parents=True)
        (path / "state.json").touch()
        os.utime(path, (1e9 - age, 1e9 - age))  # the newest step looks oldest


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, None, [1000000, 40]), (2, 20, [1000000, 40, 20]), (1, 1000000, [1000000]), (9, None, None)],
)
def test_the_newest_by_step_and_the_best_stay(
    tmp_path: Path, keep: int, best: int | None, left: list[int] | None
) -> None:
    steps = [10, 20, 30, 40, 1000000]
    checkpoints(tmp_path, *steps)
    prune(Storage(), tmp_path, keep, best)
    there = [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path)]
    assert there == sorted(left or steps)
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(there)


def log_lines(run_dir: Path, *lines: bytes) -> None:
    (run_dir / "metrics.jsonl").write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 3, "lo', b"\0\0\0\0", b'{"step": 3}\n\xff\xfe', b"4711\n[]\n"]
)
def test_a_resume_goes_on_after_the_checkpoint_s_step(tmp_path: Path, torn: bytes) -> None:
    log_lines(tmp_path, b'{"step": 1}\n{"step": 2}\n', torn)
    MetricsLog(Storage(), tmp_path, resumed_at=2).write(step=3, loss=float("nan"))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": null}\n'


def test_a_run_from_step_0_begins_a_new_log(tmp_path: Path) -> None:
    """Killed before its first checkpoint: the resume takes the same steps again."""
    log_lines(tmp_path, b'{"step": 1}\n{"step": 2}\n')
    MetricsLog(Storage(), tmp_path, resumed_at=None).write(step=1)
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_files_of_a_run_are_never_begun_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(SetupError, match="a run in this directory already"):
        open_run_dir(Storage(), tmp_path, resume=False, reporter=SilentReporter())
    assert (tmp_path / name).read_text() == "mine"


def test_a_log_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(StorageError, match="remove it"):
        Storage().append(tmp_path / "metrics.jsonl", json.dumps({"step": 1}))
    assert victim.read_text() == "untouched"


def test_a_first_look_tells_a_run_under_way_and_changes_nothing(tmp_path: Path) -> None:
    refuse_if_locked(tmp_path / "nowhere")
    with run_lock(Storage(), tmp_path, SilentReporter()):
        with pytest.raises(SetupError, match="another run is writing") as caught:
            refuse_if_locked(tmp_path)
        assert f"process {os.getpid()} on" in str(caught.value)
    (tmp_path / "run.lock").write_text("of a dead one")
    refuse_if_locked(tmp_path)
    assert (tmp_path / "run.lock").read_text() == "of a dead one"
    assert not (tmp_path / "nowhere").exists()
