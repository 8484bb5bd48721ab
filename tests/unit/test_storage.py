import errno
import os
import re
import stat

import pytest

from lorasmith.errors import StorageError
from lorasmith.storage import Disk, Storage


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


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("ENOSPC", "make room"),
        ("EDQUOT", "your quota is used up"),
        ("EFBIG", "ulimit -f"),
        ("EIO", "dmesg"),
        ("EROFS", "read-only"),
        ("EACCES", "chmod u+rwx"),
        ("EMFILE", "ulimit -n"),
        ("ENAMETOOLONG", "shorter output directory"),
        ("EBUSY", "look at this path"),
    ],
)
def test_every_refusal_has_its_remedy(tmp_path, name, remedy):
    class Refuses(Disk):
        def sync(self, descriptor):
            raise OSError(getattr(errno, name), "refused")

    with pytest.raises(StorageError, match=re.escape(remedy)) as caught:
        Storage(Refuses()).replace(tmp_path / "file", b"12345678" * 100_000)
    assert f"where: {tmp_path / 'file'}\n" in str(caught.value)
    assert "refused (0.8 MB needed, " in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_path_too_long_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(StorageError, match="shorter output directory"):
        Storage().make_dir(tmp_path / ("x" * 300) / "run")


def test_room_is_asked_for_where_the_directory_will_be(tmp_path):
    Storage().require_free(tmp_path / "not/there/yet", 1)
    with pytest.raises(StorageError, match="not enough room for yet") as caught:
        Storage().require_free(tmp_path / "not/there/yet", 1 << 60)
    assert "1,152,921,504,606.8 MB needed, " in str(caught.value)


def test_a_file_system_that_does_not_say_its_room_is_believed(tmp_path):
    class Silent(Disk):
        def free_bytes(self, path):
            return None

    Storage(Silent()).require_free(tmp_path, 1 << 60)


def test_a_file_system_that_cannot_sync_directories_is_written_to(tmp_path):
    class FilesOnly(Disk):
        def sync(self, descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")
            super().sync(descriptor)

    Storage(FilesOnly()).publish_dir(tmp_path / "step", {"a": b"1"})
    assert (tmp_path / "step/a").read_bytes() == b"1"


def test_a_short_write_is_gone_on_with(tmp_path):
    class Slow(Disk):
        def write(self, descriptor, data):
            return super().write(descriptor, data[:3])

    Storage(Slow()).create(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_links_in_a_deleted_tree_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("untouched")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "directory").symlink_to(victim, target_is_directory=True)
    (tree / "file").symlink_to(victim / "file")
    Storage().delete_tree(tree)
    assert not tree.exists()
    assert (victim / "file").read_text() == "untouched"
