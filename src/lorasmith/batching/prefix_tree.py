"""What the conversations of a step have in common: a radix tree over their (input_ids, labels) pairs.

Shapes: C = conversations, D = distinct conversations, N = nodes, T = tokens of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from lorasmith.types import Example, Ints

MIN_SAVED_TOKENS = 16
"""A prefix is shared where that saves so many tokens of the step: its segment costs every layer a gather and
an attention call of its own, less than 16 tokens cost its linear layers from some 100M parameters on."""


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Nodes in depth-first order, so that a node stands before those that continue it.

    Node n holds tokens begins[n]:ends[n] of every distinct conversation firsts[n]:stops[n]. Each distinct
    conversation ends in a leaf of its own, and the leaves stand in the order of the distinct conversations.
    """

    parents: Ints  # (N,) the node that this one continues, or -1
    begins: Ints  # (N,)
    ends: Ints  # (N,)
    firsts: Ints  # (N,)
    stops: Ints  # (N,)
    sources: Ints  # (D,) which of the step's conversations it is: the first, where some are equal
    counts: Ints  # (D,) how many of the step's conversations are equal to it

    @property
    def lengths(self) -> Ints:
        """(N,) tokens of each node."""
        return self.ends - self.begins

    @property
    def leaves(self) -> Ints:
        """(D,) the node in which each distinct conversation ends."""
        return np.flatnonzero(self.stops - self.firsts == 1)

    def path(self, node: int) -> list[int]:
        """The node and those that it continues, the nearest first."""
        path = []
        while node >= 0:
            path.append(node)
            node = int(self.parents[node])
        return path


def separate(examples: Sequence[Example]) -> PrefixTree:
    """The tree in which nothing is shared: a node for each conversation, in their order."""
    order = np.arange(len(examples))
    ends = np.array([len(example) for example in examples], dtype=np.int64)
    alone = np.full_like(order, -1)
    return PrefixTree(alone, np.zeros_like(order), ends, order, order + 1, order, np.ones_like(order))


def prefix_tree(examples: Sequence[Example], min_saved: int = MIN_SAVED_TOKENS) -> PrefixTree:
    """The tree in which equal conversations are one, and common beginnings too where it saves `min_saved`
    tokens; a conversation that is the beginning of another keeps at least its last token to itself.

    It depends on the contents of the conversations, not on their order.
    """
    keys = [_key(example) for example in examples]
    in_order = sorted(range(len(keys)), key=keys.__getitem__)
    equal = [list(same) for _, same in groupby(in_order, key=keys.__getitem__)]
    sources = [same[0] for same in equal]
    numbers = [np.frombuffer(keys[source], dtype="<i8") for source in sources]
    common = [0, *(_num_common(left, right) for left, right in pairwise(numbers))]
    parents, begins, ends, firsts, stops = np.array(
        _nodes([len(examples[source]) for source in sources], common, min_saved), dtype=np.int64
    ).T
    counts = [len(same) for same in equal]
    return PrefixTree(parents, begins, ends, firsts, stops, np.array(sources), np.array(counts))


def _nodes(lengths: list[int], common: list[int], min_saved: int) -> list[tuple[int, int, int, int, int]]:
    """(parent, begin, end, first, stop) of each node. Conversations are sorted, and common[i] is how many
    tokens i shares with i - 1; so the least of a range is what the whole range shares."""
    nodes: list[tuple[int, int, int, int, int]] = []
    groups = [(-1, 0, 0, len(lengths))]
    while groups:
        parent, begin, first, stop = groups.pop()
        if stop - first == 1:
            nodes.append((parent, begin, lengths[first], first, stop))
            continue
        end = min(common[first + 1 : stop])
        edges = [first, *(i for i in range(first + 1, stop) if common[i] == end), stop]
        if (end - begin) * (stop - first - 1) >= min_saved:
            nodes.append((parent, begin, end, first, stop))
            parent, begin = len(nodes) - 1, end
        groups.extend((parent, begin, *group) for group in reversed(list(pairwise(edges))))
    return nodes


def _key(example: Example) -> bytes:
    """(id, label) after (id, label), 16 bytes a token: equal bytes are equal pairs, on every machine."""
    return np.array((example.input_ids, example.labels), dtype="<i8").tobytes(order="F")


def _num_common(left: Ints, right: Ints) -> int:
    """How many tokens two distinct conversations share: not all, even where one begins the other."""
    shorter = min(len(left), len(right))
    differs = left[:shorter] != right[:shorter]
    first = int(differs.argmax())
    return first // 2 if differs[first] else shorter // 2 - 1
