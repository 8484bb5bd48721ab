"""Examples -> flat rows without padding, each common prefix once per row.

Shapes: C = conversations, D = distinct conversations, N = nodes of the step's prefix tree, T = tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorasmith.batching.prefix_tree import PrefixTree, prefix_tree, separate
from lorasmith.types import Batch, Example, Floats, Ints, Layout


def pack(examples: Sequence[Example], max_tokens: int, *, share_prefixes: bool) -> tuple[Batch, ...]:
    """The conversations of a step as flat rows of at most `max_tokens`; a longer one has a row of its own.

    Tokens are numbered in the step's tree, before it is cut: a prefix that two rows repeat has the same
    numbers in both.
    """
    tree = prefix_tree(examples) if share_prefixes else separate(examples)
    step = _whole(examples, tree)
    return tuple(_cut(step, tree, row) for row in pack_rows(tree, max_tokens))


def lay_out(examples: Sequence[Example]) -> Batch:
    """One flat row (T,) in which nothing is shared: each conversation is a segment that continues none."""
    [row] = pack(examples, sum(len(example) for example in examples), share_prefixes=False)
    return row


def pack_rows(tree: PrefixTree, max_tokens: int) -> list[list[int]]:
    """The distinct conversations of each row, by best fit, the longest first.

    A conversation goes where it adds the fewest tokens, so those that share stay together; then where the
    least room is left. It opens a row only where no other has room: no two rows would fit into one.
    """
    lengths, leaves = tree.lengths, tree.leaves
    if lengths.sum() <= max_tokens:
        return [list(range(len(leaves)))]
    rows: list[list[int]] = []
    room_R = np.full(len(leaves), max_tokens)
    missing_RN = np.ones((len(leaves), len(lengths)), dtype=bool)
    for number in np.argsort(-tree.ends[leaves], kind="stable").tolist():
        path = tree.path(leaves[number])
        added_R = missing_RN[: len(rows) + 1, path] @ lengths[path]
        left_R = room_R[: len(rows) + 1] - added_R
        fits = np.flatnonzero(left_R[:-1] >= 0)
        row = int(fits[np.lexsort((left_R[fits], added_R[fits]))[0]]) if len(fits) else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        room_R[row] = left_R[row]
        missing_RN[row, path] = False
    return sorted(sorted(row) for row in rows)


def _whole(examples: Sequence[Example], tree: PrefixTree) -> tuple[Ints, Ints, Ints]:
    """input_ids, labels and position_ids (T,) of the tree's nodes, laid end to end."""
    pieces = [
        (examples[source], slice(begin, end))
        for source, begin, end in zip(
            tree.sources[tree.firsts].tolist(), tree.begins.tolist(), tree.ends.tolist(), strict=True
        )
    ]
    before_N = np.cumsum(tree.lengths) - tree.lengths
    return (
        np.concatenate([example.input_ids[piece] for example, piece in pieces]),
        np.concatenate([example.labels[piece] for example, piece in pieces]),
        np.arange(tree.lengths.sum()) - np.repeat(before_N - tree.begins, tree.lengths),
    )


def _cut(step: tuple[Ints, Ints, Ints], tree: PrefixTree, row: list[int]) -> Batch:
    """The row of these distinct conversations: the nodes above them, in the tree's order."""
    count_D = np.zeros_like(tree.counts)
    count_D[row] = tree.counts[row]
    up_to = np.concatenate(([0], np.cumsum(count_D)))
    below_N = up_to[tree.stops] - up_to[tree.firsts]
    numbers_T = np.flatnonzero(np.repeat(below_N > 0, tree.lengths))
    weights_T: Floats = np.repeat(below_N, tree.lengths)[numbers_T].astype(np.float32)
    input_ids, labels, position_ids = (whole[numbers_T] for whole in step)
    starts, parents = _segments(tree, np.flatnonzero(below_N))
    return Batch(input_ids, labels, weights_T, Layout(starts, parents, position_ids), numbers_T)


def _segments(tree: PrefixTree, nodes: Ints) -> tuple[Ints, Ints]:
    """Starts and parents of a row's segments. The only child of a node in this row, which stands right behind
    it, goes on with its segment."""
    parents = tree.parents[nodes]
    children = np.bincount(parents + 1, minlength=len(tree.parents) + 1)
    opens = (parents < 0) | (children[parents + 1] > 1)
    segment_of = np.full(len(tree.parents) + 1, -1)  # the last for parent -1
    segment_of[nodes] = np.cumsum(opens) - 1
    lengths = tree.lengths[nodes]
    starts = (np.cumsum(lengths) - lengths)[opens]
    return np.append(starts, lengths.sum()), segment_of[parents[opens]]
