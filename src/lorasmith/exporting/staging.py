"""A directory that appears whole or not at all, for files too large to pass through memory."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorasmith.errors import SetupError, StorageError
from lorasmith.hub.adapter_dir import GOLDEN_FILE


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty directory beside `target`, which becomes it by one rename when the block ends well.

    Raises: SetupError, before anything is written, if `target` has content; StorageError if the disk refuses.
    """
    refuse_content(target)
    temporary = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _publish(temporary, target)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write {target.name}", where=str(target), why=error.strerror or str(error)
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_content(target: Path) -> None:
    """Raises: SetupError if `target` is a file, or a directory that is not empty."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        fix = "choose another output directory, or remove this one"
        raise SetupError("there are files in the output directory already", where=str(target), fix=fix)


def keep_golden(source: Path, folder: Path) -> None:
    """What an adapter said at the end of its training goes along, so that `lorasmith verify` can ask again.
    A checkpoint has none: it is another adapter."""
    if (source / GOLDEN_FILE).exists():
        shutil.copyfile(source / GOLDEN_FILE, folder / GOLDEN_FILE)


def _publish(temporary: Path, target: Path) -> None:
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    os.rename(temporary, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
