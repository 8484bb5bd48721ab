"""Dropout without a generator: a mask is a hash of (key, token number, column), so there is no state to save.

A word for each two columns: hash(token) xor hash(column), mixed once more, gives two 16-bit draws. All
modules of a step share their tokens' hashes; a module's key lies in those of its columns. Every pass over a
block is in place and of one dtype, which torch vectorises: a comparison into bool takes it five times as
long, a choice by bool thirty times.

Shapes: T = tokens of a flat row, N = rows of one block of them, D = features, W = words = ceil(D / 2).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lorasmith.kernels.twins import triton_twin

_LEVELS = 1 << 16  # keep-probabilities are multiples of 1 / 65,536
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)  # the multipliers of lowbias32, as int32


def dropout_key(seed: int, step: int, module: str) -> tuple[int, int]:
    """Two 32-bit words from (seed, step, module): equal arguments give equal words on every machine."""
    digest = hashlib.blake2b(f"{seed}/{step}/{module}".encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest[:4], "little")), _signed(int.from_bytes(digest[4:], "little"))


@dataclass(frozen=True)
class DropoutMask:
    """Which elements of a (T, D) tensor stay, for any D: known by its key, drawn when needed.

    `tokens_T` are `token_hashes` of the tokens' numbers in their step, so a token's mask is the same however
    the step is cut into micro-batches.
    """

    p: float
    key: tuple[int, int]
    tokens_T: Tensor

    @property
    def scale(self) -> float:
        """What the elements that stay are multiplied by."""
        return 1 / (1 - self.p)

    def factors(self, width: int, dtype: torch.dtype) -> Tensor:
        """(T, width): 1 with probability 1 - p, else 0."""
        if twin := triton_twin("dropout", self.tokens_T.new_empty(0, dtype=dtype)):
            factor_TD: Tensor = twin.draw(*mask_hashes(self, width), width, dtype)
            return factor_TD
        return MaskRows(self, width, dtype, block=len(self.tokens_T)).draw(0, len(self.tokens_T))


class MaskHashes(NamedTuple):
    """What all draws of a mask of one width are made of; the Triton twin takes them in this order."""

    tokens_T: Tensor  # int32
    columns_W: Tensor  # int32
    least: int
    """The least 16-bit draw, as int16, that stays."""
    mixers: tuple[int, int] = (_FIRST, _SECOND)


def token_hashes(numbers_T: Tensor, key: tuple[int, int]) -> Tensor:
    """int32 (T,): what all masks of a step are drawn from, by the step's own key."""
    return _hash32(numbers_T.to(torch.int32), *key)


def mask_hashes(mask: DropoutMask, width: int) -> MaskHashes:
    first, second = mask.key
    columns_W = _column_hashes((width + 1) // 2, mask.tokens_T.device) ^ first
    columns_W *= _SECOND
    columns_W ^= second
    least = min(round(mask.p * _LEVELS), _LEVELS - 1) - _LEVELS // 2
    return MaskHashes(mask.tokens_T, columns_W, least)


@lru_cache(maxsize=32)
def _column_hashes(words: int, device: torch.device) -> Tensor:
    """A table: what every module of a width starts from. Nobody writes to it."""
    return _hash32(torch.arange(words, device=device, dtype=torch.int32), 0, 0)


class MaskRows:
    """Draws a mask of one width a block of rows at a time, into memory that it keeps."""

    def __init__(self, mask: DropoutMask, width: int, dtype: torch.dtype, *, block: int) -> None:
        words, device = (width + 1) // 2, mask.tokens_T.device
        tokens_T, self._columns_W, self._least, _ = mask_hashes(mask, width)
        self._tokens_T1 = tokens_T[:, None]
        self._word_NW = torch.empty(block, words, device=device, dtype=torch.int32)
        self._shifted_NW = torch.empty_like(self._word_NW)
        self._factor_ND = torch.empty(block, width, device=device, dtype=dtype)

    def draw(self, start: int, stop: int) -> Tensor:
        """(stop - start, D) ones and zeros of rows start to stop, at most a block; valid until the next call.

        The shift copies the sign, which folds two words into one: the draws stay uniform.
        """
        word_NW, shifted_NW = self._word_NW[: stop - start], self._shifted_NW[: stop - start]
        torch.bitwise_xor(self._tokens_T1[start:stop], self._columns_W, out=word_NW)
        word_NW *= _FIRST
        word_NW ^= torch.bitwise_right_shift(word_NW, 15, out=shifted_NW)
        word_NW *= _SECOND
        draw_ND = word_NW.view(torch.int16).ge_(self._least)
        factor_ND = self._factor_ND[: stop - start]
        return factor_ND.copy_(draw_ND[:, : factor_ND.shape[1]])


def dropout(x: Tensor, mask: DropoutMask) -> Tensor:
    """Zero each element of x (..., D), of T tokens, with probability p; scale the others by 1 / (1 - p)."""
    return x * mask.factors(x.shape[-1], x.dtype).mul_(mask.scale).view(x.shape)


def keep_mask(numbers_T: Tensor, width: int, p: float, key: tuple[int, int]) -> Tensor:
    """Boolean (T, width), True with probability 1 - p, of tokens hashed by the same key."""
    return DropoutMask(p, key, token_hashes(numbers_T, key)).factors(width, torch.float32).bool()


def _hash32(x: Tensor, first: int, second: int) -> Tensor:
    """Wellons' lowbias32 (github.com/skeeto/hash-prospector), keyed before and between its rounds.

    int32 arithmetic wraps; `>>` copies the sign, so the copied bits are masked off.
    """
    x = x ^ first
    x ^= (x >> 16) & 0xFFFF
    x *= _FIRST
    x ^= second
    x ^= (x >> 15) & 0x1FFFF
    x *= _SECOND
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
