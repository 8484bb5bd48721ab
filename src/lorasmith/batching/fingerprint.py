"""What training data is, as a few digits: a resume compares them with those that its run has kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from zlib import crc32

import numpy as np

from lorasmith.batching.columns import blocks_of, offsets_of, spread
from lorasmith.types import Example


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 of the ids and labels, in order: equal for equal training data, on any machine."""
    digest = hashlib.sha256()
    for ids, labels, lengths in blocks_of(examples):
        # Of each row its length, its ids, its labels: 1 + T + T numbers.
        starts = offsets_of(2 * lengths + 1)
        numbers = np.empty(starts[-1], "<i8")
        numbers[starts[:-1]] = lengths
        numbers[spread(starts[:-1] + 1, lengths)] = ids
        numbers[spread(starts[:-1] + 1 + lengths, lengths)] = labels
        digest.update(numbers.data)
    return digest.hexdigest()


def row_hashes(examples: Iterable[Example]) -> tuple[str, ...]:
    """CRC-32 of the ids and labels of each, as 8 hexadecimal digits: to name the row that changed."""
    crcs = (
        crc32(e.labels.astype("<i8").tobytes(), crc32(e.input_ids.astype("<i8").tobytes())) for e in examples
    )
    return tuple(f"{crc:08x}" for crc in crcs)
