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


def dropout(x_TD: Tensor, p: float, key: tuple[int, int], numbers_T: Tensor) -> Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p).

    Shapes: x (..., T, D); `numbers_T` (T,) int64 are the tokens' numbers in their step, so a token's mask is
    the same however the step is cut into micro-batches.
    """
    keep = keep_mask(numbers_T, x_TD.shape[-1], p, key).view(x_TD.shape)
    return x_TD * keep.to(x_TD.dtype).mul_(1 / (1 - p))


def keep_mask(numbers_T: Tensor, width: int, p: float, key: tuple[int, int]) -> Tensor:
    """Boolean (T, width), True with probability 1 - p: two 16-bit draws from each 32-bit hash."""
    words = (width + 1) // 2
    counter_TW = numbers_T[:, None] * words + torch.arange(words, device=numbers_T.device)
    draws = _hash32(counter_TW.to(torch.int32), key).view(torch.int16)
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
