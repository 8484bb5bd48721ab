"""The disk that a run will write to, tried through the same calls that training makes."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from huggingface_hub import constants

from lorasmith.doctor.check import Check
from lorasmith.storage import Storage

_FEW_BYTES = 200e6
"""Below this not even a few checkpoints of an adapter fit."""
_SMALL = 2e9
_PROBE = 16 * 2**20
_SLOW = 20e6  # bytes a second
_MOVE = "choose another disk with --output-dir"


def space_check(output_dir: Path) -> Check:
    """Free bytes where the run directory will be."""
    return space_told(shutil.disk_usage(nearest(output_dir)).free, str(output_dir))


def space_told(free: float, where: str) -> Check:
    told = f"{free / 1e9:,.1f} GB free for {where}"
    if free < _FEW_BYTES:
        return Check("disk space", "fail", told, f"make room, or {_MOVE}")
    if free < _SMALL:
        return Check("disk space", "warn", told, f"checkpoints add up: train.save_total_limit, or {_MOVE}")
    return Check("disk space", "ok", told)


def write_check(output_dir: Path) -> Check:
    """Publish a directory as a checkpoint is published, with every byte synced, and remove it again.

    Raises: StorageError if the disk refuses.
    """
    storage, there = Storage(), nearest(output_dir)
    probe = there / f".lorasmith-doctor-{uuid.uuid4().hex[:8]}"
    data = os.urandom(_PROBE)
    start = time.perf_counter()
    try:
        storage.publish_dir(probe, {"probe": data})
        seconds = time.perf_counter() - start
        if (probe / "probe").read_bytes() != data:
            return Check("disk writes", "fail", f"{there} gives back other bytes than it was given", _MOVE)
    finally:
        _remove(there, probe.name)
    return speed_told(_PROBE / seconds, str(there))


def speed_told(rate: float, where: str) -> Check:
    told = f"{rate / 1e6:,.0f} MB/s with fsync in {where}"
    if rate < _SLOW:
        return Check("disk writes", "warn", told, f"raise train.save_steps, or {_MOVE}")
    return Check("disk writes", "ok", told)


def cache_check() -> Check:
    """Where hub models lie, and whether there is room for one."""
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(nearest(cache)).free
    offline = ", HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    kept = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    told = f"{cache}: {kept} models, {free / 1e9:,.1f} GB free{offline}"
    if not os.access(nearest(cache), os.W_OK):
        return Check("hub cache", "warn", f"{told}, not writable", "set HF_HOME to a directory of your own")
    if free < 16e9:
        remedy = "a 7B model has 14 GB: make room, or set HF_HOME to another disk"
        return Check("hub cache", "warn", told, remedy)
    return Check("hub cache", "ok", told)


def nearest(path: Path) -> Path:
    """The directory itself, or the one in which it would be made."""
    whole = path.expanduser().absolute()
    return next(p for p in (whole, *whole.parents) if p.exists())


def _remove(there: Path, name: str) -> None:
    """The probe, and what a refused write left of it."""
    left = [p for p in there.glob(f"*{name}*") if p.is_dir()] if there.is_dir() else []
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
