"""One run per directory: a lock that the kernel gives back when its process ends, in whatever way.

flock(2) on `run.lock`; what the file says is for people, and stale content is harmless. On NFS older than
Linux 2.6.12, or mounted without locks, two machines do not see each other's lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from lorasmith.errors import ConfigError, SetupError
from lorasmith.runs.progress import Reporter
from lorasmith.storage import Storage, told

LOCK_FILE = "run.lock"
_A_LOOK = 0.05
"""Seconds, longer than `lock_holder` takes: its look is no owner."""
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def run_lock(storage: Storage, run_dir: Path, reporter: Reporter) -> Iterator[None]:
    """Hold the directory for the block, and make it. For what writes there, not for what reads.

    Raises: SetupError naming the process that holds it, or the number of processes of a launcher; ConfigError
    if it is a file; StorageError.
    """
    _refuse_ranks()
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError("train.output_dir is a file", where=str(run_dir), fix="name a directory")
    is_new = not run_dir.exists()
    storage.make_dir(run_dir)
    path = run_dir / LOCK_FILE
    with told(path):
        descriptor = _locked(storage, path, reporter)
    try:
        with told(path):
            os.ftruncate(descriptor, 0)
            storage.disk.write(descriptor, memoryview(_about_us()))
        yield
    finally:
        with suppress(OSError):  # the lock goes with the descriptor; the file alone means nothing
            storage.disk.remove_file(path)
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # a run that was refused leaves no empty directory behind
                run_dir.rmdir()


def refuse_if_locked(run_dir: Path) -> None:
    """For a first look, before anything is read or loaded. Raises: SetupError as `run_lock`."""
    _refuse_ranks()
    holder = lock_holder(run_dir)
    if holder is not None:
        raise _held_by(holder, run_dir / LOCK_FILE)


def _refuse_ranks() -> None:
    """Each would train alone, on the same rows: in a directory of its own, or in the way of the others."""
    launched = os.environ.get("WORLD_SIZE", "")
    if launched.isdecimal() and int(launched) > 1:
        raise SetupError(
            f"started as one of {launched} processes, and a run is one process on one device",
            where="WORLD_SIZE, which torchrun, accelerate and deepspeed set",
            why="there is no data-parallel training: every process would train the whole run by itself",
            fix="start it without the launcher; for several runs at once, each in its own train.output_dir, "
            "unset WORLD_SIZE",
        )


def lock_holder(run_dir: Path) -> bytes | None:
    """What the process that holds the lock wrote about itself; None: nobody holds it."""
    path = run_dir / LOCK_FILE
    if not path.is_file():
        return None
    with told(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.pread(descriptor, 4096, 0)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
        finally:
            os.close(descriptor)
    return None


def _locked(storage: Storage, path: Path, reporter: Reporter) -> int:
    while True:
        descriptor = storage.disk.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            _lock(storage, descriptor, path, reporter)
            if _is_still(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder ended and removed it while we asked


def _lock(storage: Storage, descriptor: int, path: Path, reporter: Reporter) -> None:
    try:
        try:
            storage.disk.lock(descriptor)
        except BlockingIOError:
            time.sleep(_A_LOOK)
            storage.disk.lock(descriptor)
    except BlockingIOError:
        raise _held_by(os.pread(descriptor, 4096, 0), path) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        reporter.note(f"no locks on this file system: nothing keeps a second run out of {path.parent}")


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def holder_told(content: bytes) -> tuple[str, str]:
    """The holder of a lock in words, and " on HOST" or nothing."""
    with suppress(ValueError, KeyError, TypeError):
        tree = json.loads(content)
        pid, where = int(tree["pid"]), f" on {tree['host']}"
        return f"process {pid}{where}, since {tree['started']}", where
    return "a process that has not said its name yet", ""


def _held_by(content: bytes, path: Path) -> SetupError:
    holder, where = holder_told(content)
    return SetupError(
        "another run is writing in this directory",
        where=str(path.parent),
        why=f"it is locked by {holder}",
        fix=f"wait for it, stop it{where}, or choose another train.output_dir",
    )


def _about_us() -> bytes:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}).encode()
