"""How the twins see their tensors: as rows of any distance, each row in one piece, and cut into blocks.

Shapes: N = rows, D = elements of a row.
"""

from __future__ import annotations

import triton
from torch import Tensor

_WIDEST = 1 << 16
"""Elements of one block of a whole row; triton allows sixteen times as many."""


def rows_of(x: Tensor) -> Tensor:
    """x (..., D) as (N, D) whose rows are each contiguous; copied only if its strides say so."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 or x_ND.shape[1] == 1 else x_ND.contiguous()


def whole_row(width: int) -> int:
    """Block that holds a whole row."""
    assert width <= _WIDEST, f"rows of {width} elements are too wide for one block"
    return int(triton.next_power_of_2(width))


def part_of_row(width: int, at_most: int = 2048) -> int:
    """Block for element-wise work, of which a row takes one or more."""
    return min(int(triton.next_power_of_2(width)), at_most)


def warps(block: int) -> int:
    """Warps of 32 threads that share a block: about 16 elements for each thread."""
    return min(max(block // 512, 1), 16)
