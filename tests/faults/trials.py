"""What a fork of the server does in one trial: a short run, a resume, a merge, on a disk with a fault."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from disk_faults import DyingDisk, FailingDisk, RecordingDisk, SmallDisk
from modules import examples

import lorasmith as ls
import lorasmith.training.loop as loop
from lorasmith.data.dataset import Dataset
from lorasmith.runs import lock, manifest
from lorasmith.runs.progress import SilentReporter
from lorasmith.storage import Storage
from lorasmith.training import checkpoint

STEPS = 4
SAVE_STEPS = 2
_LOADED: dict[str, Any] = {}
"""What forks inherit: the base module and the examples."""


def warm_up(base: Path) -> None:
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    loop.draw_losses = _picture
    _LOADED["data"] = examples(6)
    _LOADED["base"] = base
    scratch = Path(tempfile.mkdtemp(dir=base.parent))
    _LOADED["module"] = ls.load_module(str(base), dtype="fp32")
    _fit(scratch / "run", Storage())
    ls.merge(scratch / "run", base=str(base), output_dir=scratch / "merged")
    shutil.rmtree(scratch)
    load_again()


def _picture(storage: Storage, run_dir: Path, metrics: Any) -> None:
    """Stands for loss.png: the same system calls, without the drawing."""
    storage.replace(run_dir / "loss.png", b"picture")


def _fit(
    run_dir: Path, storage: Storage, *, resume: bool = False, data: Dataset | None = None, **train: Any
) -> None:
    ls.train(
        _LOADED["module"],
        _LOADED["data"] if data is None else data,
        output_dir=run_dir,
        lora=ls.LoraConfig(r=2, lora_dropout=0.2),
        train=ls.TrainConfig(
            num_epochs=STEPS,
            max_steps=STEPS,
            batch_size=3,
            save_steps=SAVE_STEPS,
            save_total_limit=1,
            logging_steps=1,
            learning_rate=1e-2,
            **train,
        ),
        resume=resume,
        reporter=SilentReporter(),
        storage=storage,
    )


def load_again() -> None:
    """A base module without the adapter that a run has put into it."""
    _LOADED["module"] = ls.load_module(str(_LOADED["base"]), dtype="fp32")


def act(
    storage: Storage, run_dir: str, target: str | None = None, *, to: str | None = None, resume: bool = False
) -> None:
    """A merge where there is a target, with `to` a conversion of the adapter in `run_dir`; else a run."""
    if target is not None and to is not None:
        ls.convert_adapter(run_dir, to=to, output_dir=target, storage=storage)
    elif target is not None:
        ls.merge(run_dir, base=str(_LOADED["base"]), output_dir=target, storage=storage)
    else:
        _fit(Path(run_dir), storage, resume=resume)


class WrittenInPlace(Storage):
    """A checkpoint's files appear one by one under its own name."""

    def publish_dir(self, path: Path, files: Mapping[str, bytes]) -> None:
        self.make_dir(path)
        for name, data in files.items():
            self.create(path / name, data)


class DeletedInPlace(Storage):
    """A checkpoint's files disappear one by one under its own name."""

    def remove_dir(self, path: Path) -> None:
        self.delete_tree(path)


_PROTOCOLS = {"ours": Storage, "written_in_place": WrittenInPlace, "deleted_in_place": DeletedInPlace}


def plain(**what: Any) -> None:
    act(Storage(), **what)


def trusting(run_dir: str, *, resume: bool = False) -> None:
    """A resume that asks no manifest."""
    checkpoint.damage = manifest.damage = lambda path, **_: None
    act(Storage(), run_dir, resume=resume)


def clock_steps(run_dir: str, *, resume: bool = False) -> None:
    """The wall clock jumps at every look: an hour back, then a year forward."""
    real, jumps = time.time, itertools.cycle((-3600.0, 365 * 86400.0, -1e9))
    time.time = lambda: real() + next(jumps)
    act(Storage(), run_dir, resume=resume)


def limited(limit: str, value: int, **what: Any) -> None:
    """Under a real limit of the kernel, by its name in `resource`."""
    resource.setrlimit(getattr(resource, limit), (value, value))
    act(Storage(), **what)


def small_disk(run_dir: str, free: int, generous: int) -> None:
    act(Storage(SmallDisk(free, generous)), run_dir)


def unlocked(run_dir: str, *, resume: bool = False) -> None:
    """A run that asks for no lock."""
    lock.run_lock = lambda *_: contextlib.nullcontext()
    act(Storage(), run_dir, resume=resume)


def killed_at(nth: int, protocol: str = "ours", **what: Any) -> None:
    act(_PROTOCOLS[protocol](DyingDisk(nth)), **what)


def failing_at(nth: int, number: int, *, lasting: bool = False, **what: Any) -> bool:
    """Whether the fault came at all, if nothing was raised."""
    disk = FailingDisk(nth, number, lasting=lasting)
    act(Storage(disk), **what)
    return disk.count >= nth


def recorded(calls_file: str, *, unsynced: str | None = None, protocol: str = "ours", **what: Any) -> None:
    disk = RecordingDisk(unsynced)
    act(_PROTOCOLS[protocol](disk), **what)
    Path(calls_file).write_bytes(pickle.dumps(disk.calls))


def evaluated(run_dir: str, nth: int = 0, *, resume: bool = False) -> None:
    """A run with an evaluation before its first step and after each, killed in the `nth` of them."""
    rows, passes = examples(10), itertools.count()
    data = Dataset(tuple(rows[:6]), (), tuple(rows[6:]), (), report=None, config=ls.DataConfig())

    def kill(part: Any, inputs: Any, out: torch.Tensor) -> None:
        """Of the last layer's: what `packed` tries is shorter than any row."""
        if not part.training and out.shape[1] > 7 and next(passes) == nth - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    _LOADED["module"].model.layers[-1].register_forward_hook(kill)
    _fit(Path(run_dir), Storage(), resume=resume, data=data, eval_steps=1)


def as_nobody(run_dir: str, base: str, target: str | None = None) -> None:
    """By a user who owns nothing here."""
    os.setgroups([])
    os.setuid(65534)
    if target is None:
        act(Storage(), run_dir, None)
    else:
        ls.merge(run_dir, base=base, output_dir=target)


def from_nowhere(run_dir: str, target: str | None = None) -> None:
    """In a deleted working directory, with a home and a place for temporary files that never were."""
    gone = tempfile.mkdtemp()
    os.chdir(gone)
    os.rmdir(gone)
    os.environ |= {"HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
    tempfile.tempdir = None
    act(Storage(), run_dir, target)
