"""What this machine computes with: instructions, cores and who else uses them, matrix products, the GPU."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lorasmith.doctor.check import Check
from lorasmith.model.dtype import DTYPE_NAMES, resolve_device, resolve_dtype

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CPU_INFO = Path("/proc/cpuinfo")
_FAST_BF16 = ("amx_bf16", "avx512_bf16")
_SECONDS = 0.3
"""Time given to one matrix product: enough to pass a core's ramp-up, short enough to wait for."""


def cpu_check() -> Check:
    """Which instructions torch uses."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = _cpu_flags()
    fast = [name for name in _FAST_BF16 if name in flags]
    told = f"{capability}, {f'bf16 by {fast[0]}' if fast else 'no bf16 instructions'}"
    if capability == "DEFAULT":
        return Check("cpu", "warn", told, "a CPU without AVX2 trains many times slower: use another machine")
    return Check("cpu", "ok", told)


def threads_check(threads: int, cores: float, load: float) -> Check:
    """torch's threads wait for the slowest of them: one core that is taken slows all, up to ten times.

    `cores` may be used by this process (a container's share may be a fraction); `load` is of the last minute.
    """
    free = max(1, int(cores - load + 0.5))
    told = f"{threads} threads, {cores:g} cores, load {load:.1f}"
    if threads > max(1, int(cores)):
        return Check("threads", "warn", f"{told}: more threads than cores", f"set OMP_NUM_THREADS={free}")
    if threads > free:
        return Check(
            "threads",
            "warn",
            f"{told}: other programs take cores, and threads wait for the slowest",
            f"set OMP_NUM_THREADS={free}, or let the other programs end first",
        )
    if load > 1.5 * cores:
        return Check("threads", "warn", f"{told}: the machine is taken", "let the other programs end first")
    return Check("threads", "ok", told)


def own_threads_check() -> Check:
    return threads_check(torch.get_num_threads(), usable_cores(), _load())


def usable_cores() -> float:
    """Cores that this process may run on: its affinity, or less where a container has a quota."""
    affinity = len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return min(float(affinity), int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return float(affinity)


def product_check() -> Check:
    """GFLOP/s of matrix products in fp32 and bf16, and the dtype that `auto` takes for a model."""
    device = resolve_device("auto")
    width = 4096 if device.type == "cuda" else 512
    rates = {
        name: product_rate(dtype, device, width) for dtype, name in DTYPE_NAMES.items() if name != "fp16"
    }
    chosen = DTYPE_NAMES[resolve_dtype("auto", device)]
    told = ", ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in rates.items())
    return Check("products", "ok", f"{told} on {device.type}; dtype auto is {chosen}")


def product_rate(dtype: torch.dtype, device: torch.device, width: int) -> float:
    """The best of a few products of (256, width) by (width, width), in 10^9 operations a second."""
    x = torch.ones(256, width, dtype=dtype, device=device)
    w = torch.ones(width, width, dtype=dtype, device=device)
    best, begun = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begun < _SECONDS:
        start = time.perf_counter()
        x @ w
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * 256 * width * width / best / 1e9


def gpu_checks() -> Iterator[Check]:
    """Each GPU with its memory; or why there is none although the machine seems to have one."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _gpu(index)
    elif shutil.which("nvidia-smi"):
        build = "is built without CUDA" if torch.version.cuda is None else "cannot reach the driver"
        remedy = "install a torch build with CUDA that fits the driver (nvidia-smi shows its version)"
        yield Check(
            "gpu", "warn", f"there is an NVIDIA driver, but torch {torch.__version__} {build}", remedy
        )
    else:
        yield Check("gpu", "ok", "none: training runs on the CPU")


def _gpu(index: int) -> Check:
    free, total = torch.cuda.mem_get_info(index)
    told = f"{torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < total / 2:
        return Check(f"gpu {index}", "warn", told, "another program holds its memory: nvidia-smi shows which")
    return Check(f"gpu {index}", "ok", told)


def _cpu_flags() -> frozenset[str]:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:  # not Linux
        return frozenset()
    return frozenset(word for line in lines if line.startswith("flags") for word in line.split())


def _load() -> float:
    """Programs that ran or waited for a core, over the last minute; torch itself has not begun yet."""
    return os.getloadavg()[0]
