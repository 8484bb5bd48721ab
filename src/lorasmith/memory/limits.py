"""Memory while a run goes: what is free, and what running out of it looks like."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import psutil
import torch

from lorasmith.errors import LorasmithError
from lorasmith.ops.gemm import NO_PRIMITIVE

_CGROUP = Path("/sys/fs/cgroup")
"""Of version 2: a container's own limit, which the machine's free memory does not show."""


_SAID_OF_IT = ("allocate memory", NO_PRIMITIVE)
"""By torch's allocator on a CPU, and by oneDNN, which needs memory for a product of a new shape."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of torch on a GPU, of its CPU allocator, or of Python; not an error of ours that says so."""
    if isinstance(error, LorasmithError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID_OF_IT)


def release_caches(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Let glibc give back the pages that malloc keeps for later; with another libc nothing happens.

    Rows of changing length leave holes, so a long run's resident memory would grow though what it uses does
    not; and oneDNN, which maps memory for the code of its products, finds none where malloc holds it all.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a run may still take; None where nobody can tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type == "cpu":
        return min(int(psutil.virtual_memory().available), _left_in_cgroup(_CGROUP))
    return None


def _left_in_cgroup(directory: Path) -> int:
    """What a container's limit leaves, file cache counted as free; without one, more than any machine has."""
    try:
        limit = int((directory / "memory.max").read_text())
        used = int((directory / "memory.current").read_text())
        told = (directory / "memory.stat").read_text()
    except (OSError, ValueError):  # no cgroup, or "max"
        return 1 << 62
    cache = sum(int(line.split()[1]) for line in told.splitlines() if line.startswith("inactive_file "))
    return max(0, limit - used + cache)
