"""Disks that fail, die, or forget: each puts one fault at the n-th system call that a run makes."""

from __future__ import annotations

import os
import random
import signal
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.storage import Disk


class WatchedDisk(Disk):
    """Counts system calls, from 1, and says each to `before` and `after`."""

    def __init__(self) -> None:
        self.count = 0

    def before(self, call: str, *args: Any) -> None:
        """May raise, or never come back."""

    def after(self, call: str, result: Any, *args: Any) -> None:
        """Told of calls that were done."""

    def _call(self, call: str, *args: Any) -> Any:
        self.count += 1
        self.before(call, *args)
        result = getattr(Disk, call)(self, *args)
        self.after(call, result, *args)
        return result

    def make_dir(self, path):
        self._call("make_dir", path)

    def open(self, path, flags):
        return self._call("open", path, flags)

    def write(self, descriptor, data):
        return self._call("write", descriptor, data)

    def sync(self, descriptor):
        self._call("sync", descriptor)

    def close(self, descriptor):
        self._call("close", descriptor)

    def rename(self, source, target):
        self._call("rename", source, target)

    def remove_file(self, path):
        self._call("remove_file", path)

    def remove_dir(self, path):
        self._call("remove_dir", path)

    def lock(self, descriptor):
        self._call("lock", descriptor)

    def free_bytes(self, path):
        return self._call("free_bytes", path)


class FailingDisk(WatchedDisk):
    """Answers the n-th call with an errno, or with `lasting` all from it on. A failed write is half done."""

    def __init__(self, nth: int, number: int, *, lasting: bool = False) -> None:
        super().__init__()
        self.nth, self.number, self.lasting = nth, number, lasting

    def before(self, call: str, *args: Any) -> None:
        if self.count == self.nth or (self.lasting and self.count > self.nth):
            if call == "write" and self.count == self.nth:
                os.write(args[0], args[1][: len(args[1]) // 2])
            if call == "close":
                os.close(args[0])
            raise OSError(self.number, os.strerror(self.number))


class DyingDisk(WatchedDisk):
    """The process is killed at the n-th call; a write is half done then."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.nth = nth

    def before(self, call: str, *args: Any) -> None:
        if self.count == self.nth:
            if call == "write":
                os.write(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)


Call = tuple[str, Any, tuple[Any, ...]]
"""A system call, its result, and its arguments; a path as text, data as bytes."""


class RecordingDisk(WatchedDisk):
    """Keeps what was done, for a power cut to be played after any part of it.

    `unsynced`: "files" or "directories" whose syncs it forgets.
    """

    def __init__(self, unsynced: str | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.unsynced = unsynced

    def after(self, call: str, result: Any, *args: Any) -> None:
        is_dir = call == "sync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
        if call != "sync" or self.unsynced != ("directories" if is_dir else "files"):
            plain = (
                bytes(a) if isinstance(a, memoryview) else str(a) if isinstance(a, Path) else a for a in args
            )
            self.calls.append((call, result, tuple(plain)))


@dataclass
class File:
    """What programs read, and what is on the medium."""

    data: bytes = b""
    synced: bytes = b""


@dataclass
class Directory:
    """What programs list; what is on the medium; and what was done since, in order."""

    now: dict[str, Node] = field(default_factory=dict)
    synced: dict[str, Node] = field(default_factory=dict)
    pending: list[tuple[str, str, Node | str | None]] = field(default_factory=list)

    def change(self, kind: str, name: str, node: Node | str | None = None) -> None:
        _change(self.now, kind, name, node)
        self.pending.append((kind, name, node))


Node = File | Directory


def _change(entries: dict[str, Node], kind: str, name: str, node: Node | str | None) -> None:
    if kind == "link":
        assert isinstance(node, File | Directory)
        entries[name] = node
    elif kind == "unlink":
        entries.pop(name, None)
    elif name in entries:
        assert isinstance(node, str)
        entries[node] = entries.pop(name)


class PowerCut:
    """The medium after the first calls of a recording, when all that was not synced may be lost.

    Synced data of a file and synced entries of a directory are there. Of the rest, by `outcome`: "lost",
    nothing; "names", all entries, but zeros for data; "torn", of each directory the first changes, of each
    file some data, drawn from `seed`.
    """

    def __init__(self, calls: list[Call], root: Path, outcome: str, seed: int = 0) -> None:
        self.root, self.outcome, self.chance = root, outcome, random.Random(seed)
        self.top, self.open_nodes = Directory(), {}
        for call, result, args in calls:
            self._play(call, result, args)

    def _play(self, call: str, result: Any, args: tuple[Any, ...]) -> None:
        if call == "make_dir":
            self._parent(args[0]).change("link", Path(args[0]).name, Directory())
        elif call == "open":
            parent, name = self._parent(args[0]), Path(args[0]).name
            if Path(args[0]) == self.root:
                self.open_nodes[result] = self.top
                return
            if name not in parent.now:
                parent.change("link", name, File())
            self.open_nodes[result] = parent.now[name]
        elif call == "write":
            self.open_nodes[args[0]].data += args[1][:result]
        elif call == "sync":
            node = self.open_nodes[args[0]]
            if isinstance(node, File):
                node.synced = node.data
            else:
                node.synced, node.pending = dict(node.now), []
        elif call == "rename":
            self._parent(args[0]).change("rename", Path(args[0]).name, Path(args[1]).name)
        elif call in ("remove_file", "remove_dir"):
            self._parent(args[0]).change("unlink", Path(args[0]).name)

    def _parent(self, path: str) -> Directory:
        node: Node = self.top
        if Path(path) != self.root:
            for part in Path(path).relative_to(self.root).parts[:-1]:
                assert isinstance(node, Directory)
                node = node.now[part]
        assert isinstance(node, Directory)
        return node

    def write_out(self, target: Path) -> None:
        """Put what is left into an existing, empty directory."""
        self._write(self.top, target)

    def _write(self, directory: Directory, target: Path) -> None:
        entries = dict(directory.synced)
        for kind, name, node in directory.pending[: self._kept(len(directory.pending))]:
            _change(entries, kind, name, node)
        for name, node in entries.items():
            if isinstance(node, File):
                (target / name).write_bytes(self._left_of(node))
            else:
                (target / name).mkdir()
                self._write(node, target / name)

    def _kept(self, count: int) -> int:
        return {"lost": 0, "names": count}.get(self.outcome, self.chance.randint(0, count))

    def _left_of(self, file: File) -> bytes:
        if self.outcome == "lost":
            return file.synced
        rest = len(file.data) - len(file.synced)
        kept = 0 if self.outcome == "names" else self.chance.randint(0, rest)
        zeros = rest - kept if self.outcome == "names" else self.chance.choice((0, rest - kept))
        return file.data[: len(file.synced) + kept] + bytes(zeros)


class SmallDisk(Disk):
    """Says that it has `free` bytes, after it has said a lot `generous` times."""

    def __init__(self, free: int, generous: int) -> None:
        self.free, self.generous = free, generous

    def free_bytes(self, path):
        self.generous -= 1
        return 1 << 50 if self.generous >= 0 else self.free
