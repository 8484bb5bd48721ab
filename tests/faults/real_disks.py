"""Trials on disks of the kernel's own: a small tmpfs that fills up, or becomes read-only, on the way.

Each has mounts of its own, in a namespace that ends with its process: nothing is left behind.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trials
from arena import faults_at_rest
from disk_faults import WatchedDisk

import lorasmith as ls
from lorasmith.errors import StorageError
from lorasmith.files.adapter_dir import ADAPTER_WEIGHTS
from lorasmith.runs.manifest import damage, list_checkpoints
from lorasmith.runs.run_dir import is_run_dir
from lorasmith.storage import Storage

_NEW_MOUNTS, _NEW_USER = 0x0002_0000, 0x1000_0000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE, _DETACH = 1, 1 << 5, 1 << 12, 1 << 14, 1 << 18, 2
_SIZE = "size=16m"


def why_no_mounts() -> str:
    """Empty where this machine lets a test mount."""
    try:
        _own_mounts()
        _mount(Path("/dev/shm"), _SIZE)
    except (OSError, AttributeError) as error:
        return str(error)
    return ""


def refused(
    mount: str,
    trouble: str,
    nth: int,
    action: str,
    whole: str,
    source: str | None = None,
) -> dict[str, Any]:
    """An action on a small disk, "full" or "read_only" from its n-th system call on; then, mended, again.

    `action`: "run" or "resume" (of a copy of `source`), to become `whole` byte for byte; "merge" or "convert"
    of `source` into a copy of the directory `whole`. Returns: what was told, and the faults.
    """
    _own_mounts()
    disk, target = Path(mount), Path(mount) / "output"
    disk.mkdir(parents=True, exist_ok=True)
    _mount(disk, _SIZE)
    if action == "resume":
        shutil.copytree(str(source), target)
    before = [path.name for path in list_checkpoints(target)]
    begin, mend = {"full": (_fill, _empty), "read_only": (_lock, _unlock)}[trouble]
    told = _told(action, target, source, Storage(TroubledDisk(nth, lambda: begin(disk))))
    faults = faults_at_rest(target, 0) + [f"{name} is gone" for name in _lost(before, target)]
    mend(disk)
    again = _told(action, target, source, Storage()) if _unfinished(action, target, told) else None
    if again is not None:
        faults.append(f"after it was mended: {again}")
    return {"told": told, "faults": faults + _differing(action, target, Path(whole))}


class TroubledDisk(WatchedDisk):
    """Something happens to the disk before the n-th call."""

    def __init__(self, nth: int, trouble: Callable[[], None]) -> None:
        super().__init__()
        self.nth, self.trouble = nth, trouble

    def before(self, call: str, *args: Any) -> None:
        if self.count == self.nth:
            self.trouble()


def _told(action: str, target: Path, source: str | None, storage: Storage) -> list[Any] | None:
    try:
        if action == "convert":
            ls.convert_adapter(str(source), to="split", output_dir=target, storage=storage)
        elif action == "merge":
            trials.act(storage, str(source), str(target))
        else:
            trials.load_again()  # the last try left its adapter on the module
            trials.act(storage, str(target), None, resume=is_run_dir(target))
    except StorageError as error:
        return [str(error), error.exit_code]
    return None


def _unfinished(action: str, target: Path, told: Any) -> bool:
    """A merge that was refused after its rename stands whole, and a second one would be refused for it."""
    return told is not None and (action in ("run", "resume") or not target.exists())


def _lost(before: list[str], run_dir: Path) -> list[str]:
    """Checkpoints that retention did not have to delete: the newest of them."""
    left = {path.name for path in list_checkpoints(run_dir) if damage(path) is None}
    return [name for name in before[-1:] if name not in left]


def _differing(action: str, target: Path, whole: Path) -> list[str]:
    if action in ("run", "resume"):
        same = (target / ADAPTER_WEIGHTS).read_bytes() == (whole / ADAPTER_WEIGHTS).read_bytes()
        return [] if same else ["the adapter differs from that of the uninterrupted run"]
    found = [] if _content(target) == _content(whole) else ["the output differs"]
    left = {path.name for path in target.parent.iterdir()} - {target.name}
    return found + ([f"left beside it: {sorted(left)}"] if left else [])


def _content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def _fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def _empty(disk: Path) -> None:
    (disk / "ballast").unlink(missing_ok=True)


def _lock(disk: Path) -> None:
    """By a read-only mount on top: the file system itself is busy with the run's lock."""
    _system("mount", os.fsencode(disk), os.fsencode(disk), None, _BIND, None)
    _system("mount", None, os.fsencode(disk), None, _REMOUNT | _BIND | _READ_ONLY, None)


def _unlock(disk: Path) -> None:
    if os.statvfs(disk).f_flag & os.ST_RDONLY:
        _system("umount2", os.fsencode(disk), _DETACH)


def _own_mounts() -> None:
    """Mounts that only this process sees: as root, else as the root of a user namespace of its own."""
    try:
        _system("unshare", _NEW_MOUNTS)
    except PermissionError:
        user, group = os.getuid(), os.getgid()
        _system("unshare", _NEW_USER | _NEW_MOUNTS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _system("mount", None, b"/", None, _RECURSIVE | _PRIVATE, None)


def _mount(path: Path, options: str) -> None:
    _system("mount", b"tmpfs", os.fsencode(path), b"tmpfs", 0, options.encode())


def _system(call: str, *args: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
