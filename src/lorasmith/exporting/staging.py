"""A directory that appears whole or not at all, for files too large to pass through memory."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lorasmith.errors import SetupError
from lorasmith.files.adapter_dir import GOLDEN_FILE
from lorasmith.files.links import refuse_links
from lorasmith.json_file import LARGEST_JSON
from lorasmith.storage import Storage, hidden_name, told

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def staged(storage: Storage, target: Path, *, needed: int = 0) -> Iterator[Path]:
    """An empty directory beside `target`, which becomes it by one rename when the block ends well.

    `needed`: bytes that the block will write. What a killed process left beside `target` is removed first.

    Raises: SetupError, before anything is written, if `target` has content; StorageError if the disk refuses.
    """
    refuse_content(target)
    storage.make_dir(target.parent)
    with told(target):
        _remove_abandoned(storage, target)
    storage.require_free(target, needed)
    temporary = hidden_name("tmp", target)
    with told(target):
        storage.disk.make_dir(temporary)
    try:
        with told(target), _held(temporary), _io_errors():
            yield temporary
            _apply_umask(temporary)
            storage.sync_tree(temporary)
            storage.rename(temporary, target)
        storage.sync_dir(target.parent)
    except BaseException:
        with suppress(OSError):  # the error on its way is the better one; the next merge sweeps the rest
            if temporary.exists():
                storage.delete_tree(temporary)
        raise


def refuse_content(target: Path) -> None:
    """Raises: SetupError if `target` is a file, a link, or a directory that is not empty."""
    refuse_links(target.parent, [target.name])
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        fix = "choose another output directory, or remove this one"
        raise SetupError("there are files in the output directory already", where=str(target), fix=fix)


def keep_golden(storage: Storage, source: Path, folder: Path) -> None:
    """What an adapter said at the end of its training goes along, so that `lorasmith verify` can ask again.
    A checkpoint has none: it is another adapter."""
    path = source / GOLDEN_FILE
    if path.is_file() and path.stat().st_size <= LARGEST_JSON:
        storage.create(folder / GOLDEN_FILE, path.read_bytes())


def _apply_umask(directory: Path) -> None:
    """safetensors writes for the owner alone, as temporary files are; the umask, which the directory shows,
    says who else may read."""
    allowed = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(allowed)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """A lock says that the directory has a living owner; the kernel gives it back with the process."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # no locks here: the directory may be taken for an abandoned one
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(storage: Storage, target: Path) -> None:
    ours = re.compile(rf"\.tmp-{re.escape(target.name)}-[0-9a-f]{{8}}")
    for name in sorted(os.listdir(target.parent)):
        path = target.with_name(name)
        if ours.fullmatch(name) and path.is_dir() and not path.is_symlink() and not _is_held(path):
            storage.delete_tree(path)


def _is_held(directory: Path) -> bool:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _io_errors() -> Iterator[None]:
    """safetensors tells a full disk in words; as the OSError that it was."""
    try:
        yield
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error
