"""Examples -> flat rows without padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorasmith.types import Batch, Example, Layout


def pack_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the conversations of each row: in their order, a new row where `max_tokens` would be passed.

    A conversation longer than `max_tokens` has a row of its own. Order is kept, so that a step's token keeps
    its number however the step is cut into rows.
    """
    rows: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not rows or length > room:
            rows.append([])
            room = max_tokens
        rows[-1].append(index)
        room -= length
    return rows


def lay_out(examples: Sequence[Example], first_number: int = 0) -> Batch:
    """One flat row (T,): each conversation is a segment that continues none, with positions from 0, and the
    tokens are numbered from `first_number`."""
    lengths = [len(example) for example in examples]
    layout = Layout(
        starts=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))),
        parents=np.full(len(examples), -1, dtype=np.int64),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
    )
    return Batch(
        input_ids=np.concatenate([example.input_ids for example in examples]),
        labels=np.concatenate([example.labels for example in examples]),
        weights=np.ones(sum(lengths), dtype=np.float32),
        layout=layout,
        token_numbers=np.arange(first_number, first_number + sum(lengths)),
    )
