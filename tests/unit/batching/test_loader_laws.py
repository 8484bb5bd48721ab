"""The laws of the loader: a step is a pure function of its number, and its rows are its conversations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import overload

import numpy as np
import pytest

from lorasmith.batching.loader import Loader
from lorasmith.errors import DataError
from lorasmith.types import IGNORE_INDEX, Batch, Example


def example(number: int, length: int) -> Example:
    ids = np.arange(length) + 1000 * number
    labels = np.where(np.arange(length) < length // 2, IGNORE_INDEX, ids + 1)
    return Example(ids, labels, f"f:{number}")


def loader(
    lengths: list[int],
    *,
    max_tokens: int = 50,
    seed: int = 0,
    shuffle: bool = True,
    size: int = 4,
    share_prefixes: bool = True,
) -> Loader:
    examples = [example(number, length) for number, length in enumerate(lengths)]
    return Loader(
        examples,
        batch_size=size,
        max_tokens=max_tokens,
        seed=seed,
        shuffle=shuffle,
        share_prefixes=share_prefixes,
    )


LENGTHS = [3, 20, 7, 7, 60, 1, 12, 9, 30, 5]


def conversations(batches: tuple[Batch, ...]) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of every segment of every row."""
    cut = []
    for batch in batches:
        edges = batch.layout.starts.tolist()
        for start, end in pairwise(edges):
            cut.append((batch.input_ids[start:end].tolist(), batch.labels[start:end].tolist()))
    return cut


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    forwards, backwards = loader(LENGTHS), loader(LENGTHS)
    steps = range(3 * forwards.steps_per_epoch)
    one = {n: forwards.origins(n) for n in steps}
    other = {n: backwards.origins(n) for n in reversed(steps)}
    assert one == other


def test_each_epoch_visits_every_example_once_in_an_order_of_its_own() -> None:
    source = loader(LENGTHS)
    assert source.steps_per_epoch == 3
    epochs = [
        [origin for n in range(3 * epoch, 3 * epoch + 3) for origin in source.origins(n)]
        for epoch in range(4)
    ]
    assert all(sorted(epoch) == sorted(f"f:{n}" for n in range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [source.epoch_of(n) for n in (0, 2, 3, 8)] == [0, 0, 1, 2]
    assert [len(source.origins(n)) for n in range(3)] == [4, 4, 2]


def test_the_order_hangs_on_the_seed_and_on_nothing_else() -> None:
    assert loader(LENGTHS, seed=1).origins(0) != loader(LENGTHS, seed=2).origins(0)
    assert loader(LENGTHS, max_tokens=8).origins(0) == loader(LENGTHS, max_tokens=800).origins(0)


def test_the_order_is_the_same_for_ever() -> None:
    # A resume after an update must go on in the order in which the run began.
    expected = ("f:0", "f:2", "f:1", "f:5", "f:4", "f:3", "f:6", "f:7")
    assert loader([1] * 8, size=8, seed=0).origins(0) == expected


def test_without_shuffle_rows_come_as_they_stand() -> None:
    source = loader(LENGTHS, shuffle=False)
    assert source.origins(0) == source.origins(3) == ("f:0", "f:1", "f:2", "f:3")


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_the_rows_of_a_step_are_its_conversations_however_it_is_packed(share_prefixes: bool) -> None:
    for max_tokens in (1, 20, 50, 4096):
        source = loader(LENGTHS, max_tokens=max_tokens, share_prefixes=share_prefixes)
        for n in range(2 * source.steps_per_epoch):
            expected = [(e.input_ids.tolist(), e.labels.tolist()) for e in source.examples(n)]
            assert sorted(conversations(source.step(n))) == sorted(expected)


def test_unpacked_each_conversation_has_a_row_of_its_own_in_order() -> None:
    twice = [example(1, 9), example(2, 4), example(1, 9), example(3, 1)]
    source = Loader(twice, batch_size=4, max_tokens=4096, seed=0, shuffle=False, packed=False)
    rows = source.step(0)
    assert [row.input_ids.tolist() for row in rows] == [e.input_ids.tolist() for e in twice]
    assert [row.layout.parents.tolist() for row in rows] == [[-1]] * 4
    assert np.concatenate([row.token_numbers for row in rows]).tolist() == list(range(23))


def test_an_epoch_is_all_its_steps() -> None:
    source = loader(LENGTHS)
    steps = [row.input_ids.tolist() for n in range(3, 6) for row in source.step(n)]
    assert [row.input_ids.tolist() for row in source.epoch(1)] == steps


class Counted(Sequence[Example]):
    """A data set that lies elsewhere."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.asked = lengths, list[int]()

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        assert isinstance(index, int), f"asked for {index}"
        self.asked.append(index)
        return example(index, self.lengths[index])


def test_a_step_reads_its_own_examples_by_index_and_no_others() -> None:
    far = Counted([5] * 1000)
    source = Loader(far, batch_size=4, max_tokens=50, seed=0, shuffle=False)
    assert far.asked == []
    source.step(2)
    assert far.asked == [8, 9, 10, 11]


def test_totals() -> None:
    source = loader(LENGTHS)
    assert source.num_tokens == sum(LENGTHS)
    assert source.num_targets == sum(batch.num_targets for n in range(3) for batch in source.step(n))


def test_fewer_rows_than_a_batch_are_one_step_and_none_are_an_error() -> None:
    assert loader([5], size=16).steps_per_epoch == 1
    with pytest.raises(DataError, match="no rows"):
        loader([])
