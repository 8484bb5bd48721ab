""" "auto" for device and dtype, resolved once into a value."""

from __future__ import annotations

import time

import torch

from lorasmith.config import Dtype
from lorasmith.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def resolve_device(device: str) -> torch.device:
    """auto: cuda where there is one, else cpu. Raises: ConfigError for a device this machine lacks."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used here",
            why=str(error).splitlines()[0].partition(", ")[0].partition(": ")[0],
        ) from None
    return resolved


def resolve_dtype(dtype: Dtype, device: torch.device, hidden_size: int = 1024) -> torch.dtype:
    """auto: bf16 where it is fast, else fp16 on a GPU and fp32 on a CPU.

    Raises: ConfigError for fp16 on a CPU, where its matrix products are slow and its gradients underflow.
    """
    if dtype == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 needs a GPU", where="model.dtype", fix="use bf16, fp32 or auto on a CPU")
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if bf16_is_faster(hidden_size) else torch.float32
    return torch.float32


def bf16_is_faster(hidden_size: int) -> bool:
    """Time the model's kind of matrix product in both: without hardware for it bf16 is up to 500x slower."""
    if _seconds(torch.bfloat16, 256) > 4 * _seconds(torch.float32, 256):
        return False  # told in a fifth of a second; at full width this would take a minute
    width = min(hidden_size, 2048)
    return _seconds(torch.bfloat16, width) * 1.15 < _seconds(torch.float32, width)


def _seconds(dtype: torch.dtype, width: int, rows: int = 256, repeats: int = 5) -> float:
    x, w = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    x @ w
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        x @ w
        best = min(best, time.perf_counter() - start)
    return best
