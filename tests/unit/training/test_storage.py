import os

import pytest

from lorasmith.errors import StorageError
from lorasmith.storage import Storage


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    class Breaks(Storage):
        def create(self, path, data):
            if path.name == "second":
                raise OSError("no")
            super().create(path, data)

    files = {"first": b"1", "second": b"2"}
    with pytest.raises(OSError, match="no"):
        Breaks().publish_dir(tmp_path / "step", files)
    assert not (tmp_path / "step").exists()
    Storage().publish_dir(tmp_path / "step", files)
    assert {p.name: p.read_bytes() for p in (tmp_path / "step").iterdir()} == files


def test_a_directory_is_replaced_by_renames(tmp_path):
    Storage().publish_dir(tmp_path / "step", {"old": b"1"})
    Storage().publish_dir(tmp_path / "step", {"new": b"2"})
    assert [p.name for p in tmp_path.rglob("*")] == ["step", "new"]


def test_a_file_keeps_its_old_content_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "config.yaml"
    Storage().replace(target, b"old")

    class NoRename(Storage):
        def rename(self, source, target):
            raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        NoRename().replace(target, b"new")
    assert target.read_bytes() == b"old"


def test_every_byte_is_synced_before_it_is_shown(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("sync"), real_fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), real_rename(a, b)))
    Storage().publish_dir(tmp_path / "step", {"a": b"1", "b": b"2"})
    assert calls == ["sync", "sync", "sync", "rename", "sync"]


def test_a_symlink_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    (tmp_path / "link").symlink_to(victim)
    with pytest.raises(StorageError):
        Storage().create(tmp_path / "link", b"x")
    Storage().replace(tmp_path / "link", b"x")
    assert victim.read_bytes() == b"untouched"


def test_a_full_disk_is_told_with_the_room_there_is():
    with pytest.raises(StorageError, match=r"cannot write full") as caught:
        Storage().append(__import__("pathlib").Path("/dev/full"), "line")
    assert "No space left" in str(caught.value)
    assert caught.value.exit_code == 7
