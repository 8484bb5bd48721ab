"""rejects.jsonl is old or new, whole, and lasts; what a dead process left of it is swept by the next run."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_faults import FailingDisk, PowerCut, RecordingDisk
from test_refusing_disks import ERRNOS

from lorasmith.config import DataConfig
from lorasmith.data.dataset import load
from lorasmith.errors import StorageError
from lorasmith.families.opening import open_chat
from lorasmith.runs.progress import SilentReporter
from lorasmith.runs.run_dir import REJECTS_FILE, open_run_dir
from lorasmith.storage import Disk, Storage

TINY = Path(__file__).parents[2] / "src/lorasmith/assets/tiny"
OLD = b'{"rule": "of the run before"}\n'
Reject = Callable[[Disk, Path], None]


@pytest.fixture(scope="module")
def reject(tmp_path_factory: pytest.TempPathFactory) -> Reject:
    """Load rows of which two are bad, one of them with a surrogate that UTF-8 does not have."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text(
        '{"prompt": "q", "completion": "a"}\n{"prompt": "q", "completion": ""}\n{"prompt": "\\ud800"}\n'
    )
    config, chat_format = DataConfig(train=str(rows), on_bad_row="skip"), open_chat(TINY)[1]

    def act(disk: Disk, run_dir: Path) -> None:
        load(config, chat_format, rejects_path=run_dir / REJECTS_FILE, storage=Storage(disk))

    return act


def recorded(reject: Reject, run_dir: Path) -> tuple[RecordingDisk, bytes]:
    disk = RecordingDisk()
    reject(disk, run_dir)
    return disk, (run_dir / REJECTS_FILE).read_bytes()


def test_every_bad_row_is_a_line_of_json(reject: Reject, tmp_path: Path) -> None:
    _, written = recorded(reject, tmp_path / "run")
    assert [json.loads(line)["origin"][-1] for line in written.decode().splitlines()] == ["2", "3"]


def test_every_call_may_fail(reject: Reject, tmp_path: Path) -> None:
    """Old content or new content, the reason told with exit code 7, and nothing half-written beside it."""
    (tmp_path / REJECTS_FILE).write_bytes(OLD)
    disk, new = recorded(reject, tmp_path)
    assert disk.count >= 8
    for nth in range(1, disk.count + 1):
        (tmp_path / REJECTS_FILE).write_bytes(OLD)
        name = ERRNOS[nth % len(ERRNOS)]
        with pytest.raises(StorageError) as caught:
            reject(FailingDisk(nth, getattr(errno, name)), tmp_path)
        assert (caught.value.exit_code, caught.value.where is not None) == (7, True)
        assert (tmp_path / REJECTS_FILE).read_bytes() in (OLD, new), nth
        assert [path.name for path in tmp_path.iterdir()] == [REJECTS_FILE], nth


def test_no_power_cut_leaves_half_of_it(reject: Reject, tmp_path: Path) -> None:
    """After each call: no file or the whole file; after the last, the whole file whatever is lost."""
    root = tmp_path / "disk"
    root.mkdir()
    disk, new = recorded(reject, root / "run")
    outcomes = [("lost", 0), ("names", 0), *(("torn", seed) for seed in range(4))]
    for count in range(len(disk.calls) + 1):
        for outcome, seed in outcomes:
            medium = tmp_path / f"{outcome}-{seed}-{count}"
            medium.mkdir()
            PowerCut(disk.calls[:count], root, outcome, seed).write_out(medium)
            left = medium / "run" / REJECTS_FILE
            assert not left.exists() or left.read_bytes() == new, (outcome, seed, count)
            assert left.exists() or count < len(disk.calls), (outcome, seed)


def test_what_a_kill_left_is_swept_by_the_next_run(tmp_path: Path) -> None:
    (tmp_path / f".tmp-{REJECTS_FILE}-0123abcd").write_bytes(OLD[:5])
    open_run_dir(Storage(), tmp_path, resume=False, reporter=SilentReporter())
    assert list(tmp_path.iterdir()) == []
