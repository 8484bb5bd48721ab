"""The laws of the loader: a step is a pure function of its number, and packing cuts no conversation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.data.loader import Loader
from lorasmith.data.pack import lay_out, pack_rows
from lorasmith.errors import DataError
from lorasmith.types import IGNORE_INDEX, Batch, Example


def example(number: int, length: int) -> Example:
    ids = np.arange(length) + 1000 * number
    labels = np.where(np.arange(length) < length // 2, IGNORE_INDEX, ids + 1)
    return Example(ids, labels, f"f:{number}")


def loader(
    lengths: list[int], *, max_tokens: int = 50, seed: int = 0, shuffle: bool = True, size: int = 4
) -> Loader:
    examples = [example(number, length) for number, length in enumerate(lengths)]
    return Loader(examples, batch_size=size, max_tokens=max_tokens, seed=seed, shuffle=shuffle)


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


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 100), st.integers(0, 2**63 - 1))
def test_packing_keeps_each_conversation_whole_and_in_order(
    lengths: list[int], max_tokens: int, seed: int
) -> None:
    source = loader(lengths, max_tokens=max_tokens, seed=seed, size=7)
    batches = source.step(0)
    expected = [(e.input_ids.tolist(), e.labels.tolist()) for e in source.examples(0)]
    assert conversations(batches) == expected
    sizes = [len(batch.input_ids) for batch in batches]
    assert np.concatenate([batch.token_numbers for batch in batches]).tolist() == list(range(sum(sizes)))
    assert all(
        size <= max_tokens or len(batch.layout.parents) == 1
        for size, batch in zip(sizes, batches, strict=True)
    )


def test_a_row_starts_every_conversation_at_position_0_and_counts_each_target_once() -> None:
    batch = lay_out([example(0, 3), example(1, 2)], first_number=7)
    assert batch.layout.starts.tolist() == [0, 3, 5]
    assert batch.layout.parents.tolist() == [-1, -1]
    assert batch.layout.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.weights.dtype == np.float32
    assert batch.num_targets == example(0, 3).num_targets + example(1, 2).num_targets
    assert batch.token_numbers.tolist() == [7, 8, 9, 10, 11]


def test_a_row_is_filled_before_the_next_begins() -> None:
    assert pack_rows([4, 4, 2, 9, 1, 30, 1], 10) == [[0, 1, 2], [3, 4], [5], [6]]


def test_totals() -> None:
    source = loader(LENGTHS)
    assert source.num_tokens == sum(LENGTHS)
    assert source.num_targets == sum(batch.num_targets for n in range(3) for batch in source.step(n))


def test_fewer_rows_than_a_batch_are_one_step_and_none_are_an_error() -> None:
    assert loader([5], size=16).steps_per_epoch == 1
    with pytest.raises(DataError, match="no rows"):
        loader([])
