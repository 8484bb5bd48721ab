"""The one seam through which training touches the disk, so that every operation of it can be made to fail."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lorasmith.errors import StorageError


class Storage:
    """Durable primitives: a file that was written, a directory that was published, survives a power cut."""

    def make_dir(self, path: Path) -> None:
        with _told(path):
            path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path, data: bytes) -> None:
        """Write a new file and sync it. A symlink in its place is not followed."""
        with _told(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def append(self, path: Path, line: str) -> None:
        with _told(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rename(self, source: Path, target: Path) -> None:
        with _told(target):
            os.rename(source, target)

    def sync_dir(self, path: Path) -> None:
        with _told(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def delete_tree(self, path: Path) -> None:
        with _told(path):
            shutil.rmtree(path)

    def replace(self, path: Path, data: bytes) -> None:
        """Old content or new content, never a mixture."""
        temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
        self.create(temporary, data)
        self.rename(temporary, path)
        self.sync_dir(path.parent)

    def publish_dir(self, path: Path, files: Mapping[str, bytes]) -> None:
        """A directory that appears whole or not at all: one rename shows it."""
        temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
        self.make_dir(temporary)
        for name, data in files.items():
            self.create(temporary / name, data)
        self.sync_dir(temporary)
        if path.exists():
            self.remove_dir(path)
        self.rename(temporary, path)
        self.sync_dir(path.parent)

    def remove_dir(self, path: Path) -> None:
        """Out of sight by one rename, then deleted: a half-deleted directory is never listed."""
        trash = path.with_name(f".trash-{path.name}-{uuid.uuid4().hex[:8]}")
        self.rename(path, trash)
        self.delete_tree(trash)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path.name}",
            where=str(path),
            why=f"{error.strerror or error}{_free_space(path)}",
            fix="make room, then go on with --resume: earlier checkpoints stand",
        ) from error


def _free_space(path: Path) -> str:
    there = next((p for p in (path, *path.parents) if p.exists()), None)
    return f" ({shutil.disk_usage(there).free / 1e6:,.0f} MB free)" if there else ""
