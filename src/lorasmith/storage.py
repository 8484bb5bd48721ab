"""The one seam through which the house writes what must last: every operation of it can be made to fail.

`Disk` is the system calls, one method each; `Storage` the protocols made of them: what it has written or
published survives a kill and a power cut, and what it has not is never mistaken for it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lorasmith.errors import StorageError

AGAIN = "then run the same command again"
_REMEDIES = {
    errno.ENOSPC: f"make room on this disk, {AGAIN}",
    errno.EDQUOT: f"your quota is used up: delete files or ask for more, {AGAIN}",
    errno.EFBIG: f"raise the limit of file sizes (ulimit -f), {AGAIN}",
    errno.EIO: f"the disk or the way to it fails: look into dmesg, copy the directory elsewhere, {AGAIN}",
    errno.EROFS: f"the file system is read-only: remount it or choose another directory, {AGAIN}",
    errno.EACCES: f"get the right to write there (chmod u+rwx) or choose another directory, {AGAIN}",
    errno.EPERM: f"get the right to write there or choose another directory, {AGAIN}",
    errno.EMFILE: f"raise the limit of open files (ulimit -n 4096), {AGAIN}",
    errno.ENFILE: f"close other programs: the machine has no open files left, {AGAIN}",
    errno.ENAMETOOLONG: "choose a shorter output directory",
    errno.ELOOP: "a symbolic link lies where a file shall be written: remove it",
}
_UNSYNCED_KINDS = {errno.EINVAL, errno.ENOTSUP}
"""What file systems say that cannot sync a directory (some network and FUSE mounts)."""


class Disk:
    """System calls that change a disk or make a change last. Raises: OSError."""

    def make_dir(self, path: Path) -> None:
        os.mkdir(path)

    def open(self, path: Path, flags: int) -> int:
        """A file descriptor; a symbolic link as the last part of `path` is refused."""
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """The number of bytes taken, perhaps fewer than given."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def remove_file(self, path: Path) -> None:
        os.unlink(path)

    def remove_dir(self, path: Path) -> None:
        os.rmdir(path)

    def lock(self, descriptor: int) -> None:
        """Until the descriptor is closed, or the process ends in whatever way. Raises: BlockingIOError."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def free_bytes(self, path: Path) -> int | None:
        """For this user; None where the file system does not say (some FUSE mounts report no blocks)."""
        stat = os.statvfs(path)
        return stat.f_bavail * stat.f_frsize if stat.f_blocks else None


class Storage:
    """Durable protocols over a `Disk`. Raises everywhere: StorageError."""

    def __init__(self, disk: Disk | None = None) -> None:
        self.disk = disk or Disk()

    def make_dir(self, path: Path) -> None:
        """With its parents, each synced into the directory that lists it."""
        with told(path):
            missing = [p for p in (path, *path.parents) if not p.is_dir()]
            for directory in reversed(missing):
                with suppress(FileExistsError):  # another process was quicker
                    self.disk.make_dir(directory)
                self.sync_dir(directory.parent)
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def create(self, path: Path, data: bytes) -> None:
        """Write a new file and sync it. A symlink in its place is not followed."""
        with told(path, needed=len(data)):
            self._create(path, data)

    def append(self, path: Path, line: str) -> None:
        """A line at the end, synced; after a crash it is there, not there, or cut short."""
        data = f"{line}\n".encode()
        with told(path, needed=len(data)):
            is_new = not path.exists()
            with self._opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
                self._write(file, data)
                self.disk.sync(file)
            if is_new:
                self.sync_dir(path.parent)

    def rename(self, source: Path, target: Path) -> None:
        with told(target):
            self.disk.rename(source, target)

    def sync_file(self, path: Path) -> None:
        with told(path), self._opened(path, os.O_RDONLY) as file:
            self.disk.sync(file)

    def sync_dir(self, path: Path) -> None:
        """What the directory lists, not what the files hold."""
        with told(path), self._opened(path, os.O_RDONLY | os.O_DIRECTORY) as directory:
            try:
                self.disk.sync(directory)
            except OSError as error:
                if error.errno not in _UNSYNCED_KINDS:
                    raise

    def sync_tree(self, path: Path) -> None:
        """Files that others wrote below `path`, and the directories that list them."""
        for directory, _, names in os.walk(path, topdown=False):
            for name in names:
                self.sync_file(Path(directory, name))
            self.sync_dir(Path(directory))

    def delete_tree(self, path: Path) -> None:
        """Links are removed, not followed."""
        with told(path):
            if path.is_symlink() or not path.is_dir():
                self.disk.remove_file(path)
                return
            for directory, subdirs, names in os.walk(path, topdown=False):
                for name in [*names, *(d for d in subdirs if Path(directory, d).is_symlink())]:
                    self.disk.remove_file(Path(directory, name))
                self.disk.remove_dir(Path(directory))

    def replace(self, path: Path, data: bytes) -> None:
        """Old content or new content, never a mixture."""
        temporary = hidden_name("tmp", path)
        with told(path, needed=len(data)), self._cleaned_up(temporary):
            self._create(temporary, data)
            self.rename(temporary, path)
        self.sync_dir(path.parent)

    def publish_dir(self, path: Path, files: Mapping[str, bytes]) -> None:
        """A directory that appears whole or not at all: one rename shows it."""
        self.require_free(path, sum(len(data) for data in files.values()))
        temporary = hidden_name("tmp", path)
        with self._cleaned_up(temporary):
            with told(temporary):
                self.disk.make_dir(temporary)
            for name, data in files.items():
                self.create(temporary / name, data)
            self.sync_dir(temporary)
            self.show_dir(temporary, path)

    def show_dir(self, temporary: Path, path: Path) -> None:
        """The one rename; what lay there before goes out of sight first, and is deleted last."""
        trash = hidden_name("trash", path) if path.exists() else None
        if trash is not None:
            self.rename(path, trash)
        self.rename(temporary, path)
        self.sync_dir(path.parent)
        if trash is not None:
            self.delete_tree(trash)

    def remove_dir(self, path: Path) -> None:
        """Out of sight by one rename, then deleted: a half-deleted directory is never listed."""
        trash = hidden_name("trash", path)
        self.rename(path, trash)
        self.sync_dir(path.parent)
        self.delete_tree(trash)

    def remove_leftovers(self, directory: Path, of: str) -> None:
        """What a dead process left half-written or half-deleted of files whose names match the regex `of`."""
        ours = re.compile(rf"\.(tmp|trash)-({of})-[0-9a-f]{{8}}")
        with told(directory):
            names = sorted(os.listdir(directory)) if directory.is_dir() else []
        for name in names:
            if ours.fullmatch(name):
                self.delete_tree(directory / name)

    def require_free(self, path: Path, needed: int) -> None:
        """Raises: StorageError if the file system of `path` has fewer than `needed` bytes for this user."""
        with told(path):
            free = self.disk.free_bytes(_nearest(path))
        if free is not None and free < needed:
            raise StorageError(
                f"there is not enough room for {path.name}",
                where=str(path),
                why=f"{_size(needed)} needed, {_size(free)} free",
                fix=_REMEDIES[errno.ENOSPC],
            )

    @contextmanager
    def _opened(self, path: Path, flags: int) -> Iterator[int]:
        descriptor = self.disk.open(path, flags)
        try:
            yield descriptor
        finally:
            self.disk.close(descriptor)

    def _create(self, path: Path, data: bytes) -> None:
        with self._opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
            self._write(file, data)
            self.disk.sync(file)

    def _write(self, descriptor: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self.disk.write(descriptor, rest) :]

    @contextmanager
    def _cleaned_up(self, temporary: Path) -> Iterator[None]:
        """A failed write leaves nothing, as far as the disk lets us: the next start sweeps the rest."""
        try:
            yield
        except BaseException:
            with suppress(OSError):
                self.delete_tree(temporary)
            raise


@contextmanager
def told(path: Path, *, needed: int = 0) -> Iterator[None]:
    """An OSError of the block as a StorageError that names `path`, the room there is, and a remedy.

    `needed`: bytes that the block wants to write, where it is known.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(path, error, needed=needed) from error


def storage_error(path: Path, error: OSError, *, needed: int = 0) -> StorageError:
    return StorageError(
        f"cannot write {path.name}",
        where=str(path),
        why=f"{error.strerror or error}{_room(path, needed)}",
        fix=_REMEDIES.get(error.errno or 0, f"look at this path, {AGAIN}"),
    )


def _room(path: Path, needed: int) -> str:
    wanted = f"{_size(needed)} needed, " if needed else ""
    try:
        stat = os.statvfs(_nearest(path))
    except OSError:  # the error being told is the better one
        return ""
    return f" ({wanted}{_size(stat.f_bavail * stat.f_frsize)} free)"


def _nearest(path: Path) -> Path:
    """The longest part of the path that is there."""
    return next((p for p in (path, *path.parents) if os.path.exists(p)), Path("/"))


def hidden_name(kind: str, path: Path) -> Path:
    """A name beside `path` that no list shows; see `remove_leftovers`."""
    return path.with_name(f".{kind}-{path.name}-{uuid.uuid4().hex[:8]}")


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"
