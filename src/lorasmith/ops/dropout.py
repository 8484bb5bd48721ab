"""Dropout without a generator: the mask is a hash of (key, row, column), so there is no state to save.

Shapes: T = tokens of a flat row, D = features.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_LEVELS = 1 << 16  # keep-probabilities are multiples of 1 / 65,536


def dropout_key(seed: int, step: int, module: str) -> tuple[int, int]:
    """Two 32-bit words from (seed, step, module): equal arguments give equal masks on every machine."""
    digest = hashlib.blake2b(f"{seed}/{step}/{module}".encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest[:4], "little")), _signed(int.from_bytes(digest[4:], "little"))


def dropout(x_TD: Tensor, p: float, key: tuple[int, int], first_row: int = 0) -> Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p).

    Shapes: x (..., T, D); the mask of row t is that of row `first_row + t` of the step, however the step is
    cut into micro-batches.
    """
    rows, width = x_TD.numel() // x_TD.shape[-1], x_TD.shape[-1]
    keep = keep_mask(rows, width, p, key, first_row, x_TD.device).view(x_TD.shape)
    return x_TD * keep.to(x_TD.dtype).mul_(1 / (1 - p))


def keep_mask(
    rows: int, width: int, p: float, key: tuple[int, int], first_row: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Boolean (rows, width), True with probability 1 - p: two 16-bit draws from each 32-bit hash."""
    words = (width + 1) // 2
    start = first_row * words
    counter = torch.arange(start, start + rows * words, dtype=torch.int64, device=device)
    draws = _hash32(counter.to(torch.int32), key).view(rows, words).view(torch.int16)
    return draws[:, :width] >= round(p * _LEVELS) - _LEVELS // 2


def _hash32(x: Tensor, key: tuple[int, int]) -> Tensor:
    """Wellons' lowbias32 (github.com/skeeto/hash-prospector), keyed before and between its rounds.

    int32 arithmetic wraps; `>>` copies the sign, so the copied bits are masked off.
    """
    x = x ^ key[0]
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= key[1]
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
