"""The laws of the plan: every conversation is in the rows once, whatever is shared and however it is cut."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
from chat_texts import real_format
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.batching.loader import Loader
from lorasmith.batching.pack import lay_out, pack, pack_rows
from lorasmith.batching.prefix_tree import MIN_SAVED_TOKENS, PrefixTree, prefix_tree, separate
from lorasmith.config import DataConfig
from lorasmith.data.dataset import load
from lorasmith.types import IGNORE_INDEX, Batch, Example

Pairs = tuple[tuple[int, int], ...]
EVERYTHING = 10**6

_pair = st.tuples(st.integers(0, 2), st.sampled_from([IGNORE_INDEX, 1]))
_heads = st.lists(st.lists(_pair, max_size=25), min_size=1, max_size=3)


@st.composite
def steps(draw: st.DrawFn) -> list[Example]:
    """Few words and a few heads, so that conversations begin, repeat and contain each other."""
    heads = draw(_heads)
    tails = st.lists(_pair, min_size=1, max_size=8)
    rows = draw(
        st.lists(st.tuples(st.lists(st.sampled_from(heads), max_size=2), tails), min_size=1, max_size=16)
    )
    return [conversation([*(pair for head in above for pair in head), *tail]) for above, tail in rows]


def conversation(pairs: list[tuple[int, int]]) -> Example:
    ids, labels = np.array(pairs, dtype=np.int64).T
    return Example(ids, labels)


def pairs_of(example: Example) -> Pairs:
    return tuple(zip(example.input_ids.tolist(), example.labels.tolist(), strict=True))


def walk(batch: Batch) -> Counter[tuple[Pairs, tuple[int, ...]]]:
    """(pairs, token numbers) of every conversation: each segment that none continues, and those above it."""
    layout, found = batch.layout, Counter[tuple[Pairs, tuple[int, ...]]]()
    assert (layout.parents < np.arange(len(layout.parents))).all(), "a parent stands before its children"
    assert (layout.lengths > 0).all()
    assert layout.starts[-1] == len(batch.input_ids)
    for segment in set(range(len(layout.parents))) - set(layout.parents.tolist()):
        tokens: list[int] = []
        above = segment
        while above >= 0:
            tokens = [*range(layout.starts[above], layout.starts[above + 1]), *tokens]
            above = int(layout.parents[above])
        assert layout.position_ids[tokens].tolist() == list(range(len(tokens)))
        whole = Example(batch.input_ids[tokens], batch.labels[tokens])
        found[pairs_of(whole), tuple(batch.token_numbers[tokens].tolist())] += int(batch.weights[tokens[-1]])
    return found


def conversations(rows: tuple[Batch, ...]) -> Counter[Pairs]:
    found = Counter[Pairs]()
    for row in rows:
        for (pairs, _), count in walk(row).items():
            found[pairs] += count
    return found


@settings(max_examples=200, deadline=None)
@given(steps(), st.integers(1, 120), st.booleans())
def test_every_conversation_is_there_by_walking_up_its_segments(
    examples: list[Example], max_tokens: int, share_prefixes: bool
) -> None:
    rows = pack(examples, max_tokens, share_prefixes=share_prefixes)
    assert conversations(rows) == Counter(map(pairs_of, examples))
    for row in rows:
        assert len(row.input_ids) <= max_tokens or len(walk(row)) == 1
        assert row.weights.dtype == np.float32


@settings(max_examples=100, deadline=None)
@given(steps(), st.integers(1, 120), st.booleans())
def test_weights_count_each_token_of_each_conversation(
    examples: list[Example], max_tokens: int, share_prefixes: bool
) -> None:
    rows = pack(examples, max_tokens, share_prefixes=share_prefixes)
    counted = Counter[tuple[int, int, int]]()
    for row in rows:
        tokens = zip(
            row.input_ids.tolist(), row.labels.tolist(), row.layout.position_ids.tolist(), strict=True
        )
        for token, weight in zip(tokens, row.weights.tolist(), strict=True):
            counted[token] += int(weight)
    wanted = [(i, label, t) for example in examples for t, (i, label) in enumerate(pairs_of(example))]
    assert counted == Counter(wanted)
    assert sum(row.num_targets for row in rows) == sum(example.num_targets for example in examples)
    assert sum(row.num_tokens for row in rows) == sum(map(len, examples))


@settings(max_examples=100, deadline=None)
@given(steps(), st.integers(1, 120), st.booleans())
def test_a_token_has_its_number_however_the_step_is_cut(
    examples: list[Example], max_tokens: int, share_prefixes: bool
) -> None:
    [whole] = pack(examples, EVERYTHING, share_prefixes=share_prefixes)
    assert whole.token_numbers.tolist() == list(range(len(whole.input_ids)))
    cut = Counter[tuple[Pairs, tuple[int, ...]]]()
    for row in pack(examples, max_tokens, share_prefixes=share_prefixes):
        cut += walk(row)
    assert cut == walk(whole)


@settings(max_examples=100, deadline=None)
@given(steps(), st.integers(1, 120), st.randoms(use_true_random=False))
def test_shared_rows_do_not_depend_on_the_order_of_the_conversations(
    examples: list[Example], max_tokens: int, dice: random.Random
) -> None:
    mixed = dice.sample(examples, len(examples))
    there, back = (pack(step, max_tokens, share_prefixes=True) for step in (examples, mixed))
    assert [contents(row) for row in there] == [contents(row) for row in back]


def contents(row: Batch) -> list[list[float]]:
    layout = row.layout
    arrays = (row.input_ids, row.labels, row.weights, row.token_numbers)
    return [array.tolist() for array in (*arrays, layout.starts, layout.parents, layout.position_ids)]


@settings(max_examples=100, deadline=None)
@given(steps(), st.integers(1, 120), st.booleans())
def test_no_two_rows_would_fit_into_one(
    examples: list[Example], max_tokens: int, share_prefixes: bool
) -> None:
    tree = prefix_tree(examples) if share_prefixes else separate(examples)
    for left, right in combinations(pack_rows(tree, max_tokens), 2):
        assert num_computed(tree, [*left, *right]) > max_tokens


def num_computed(tree: PrefixTree, row: list[int]) -> int:
    nodes = {node for number in row for node in tree.path(int(tree.leaves[number]))}
    return int(tree.lengths[sorted(nodes)].sum())


@settings(max_examples=100, deadline=None)
@given(steps())
def test_a_node_of_the_tree_pays_for_itself(examples: list[Example]) -> None:
    tree = prefix_tree(examples)
    below = tree.stops - tree.firsts
    shared = below > 1
    assert (tree.lengths[shared] * (below[shared] - 1) >= MIN_SAVED_TOKENS).all()
    assert (tree.lengths > 0).all()
    whole = prefix_tree(examples, min_saved=1)
    distinct = {pairs_of(example) for example in examples}
    assert len(whole.leaves) == len(tree.leaves) == len(distinct)
    # All that may be shared: every different beginning once, and a last token for each conversation.
    beginnings = {pairs[:t] for pairs in distinct for t in range(1, len(pairs))}
    assert whole.lengths.sum() == len(beginnings) + len(distinct)


def test_two_heads_with_one_beginning_make_two_levels() -> None:
    start, heads = range(10), (range(20, 30), range(40, 50))
    examples = [labelled([*start, *heads[n % 2], 100 + n], answer=1) for n in range(6)]
    [row] = pack(examples, EVERYTHING, share_prefixes=True)
    assert row.layout.parents.tolist() == [-1, 0, 1, 1, 1, 0, 5, 5, 5]
    assert row.layout.starts.tolist() == [0, 10, 20, 21, 22, 23, 33, 34, 35, 36]
    assert row.weights.tolist() == [6] * 10 + [3] * 10 + [1] * 3 + [3] * 10 + [1] * 3
    rows = pack(examples, 25, share_prefixes=True)
    assert [row.token_numbers.tolist() for row in rows] == [
        [*range(23)],
        [*range(10), *range(23, 36)],
    ], "each row has one head, which goes on with the beginning's segment"
    assert [row.layout.parents.tolist() for row in rows] == [[-1, 0, 0, 0]] * 2


def labelled(ids: list[int], answer: int) -> Example:
    """The last `answer` positions have a label."""
    labels = [IGNORE_INDEX] * (len(ids) - answer) + list(range(answer))
    return Example(np.array(ids), np.array(labels))


def test_equal_ids_with_other_labels_are_not_shared() -> None:
    ids = list(range(30))
    [row] = pack([labelled(ids, 1), labelled(ids, 30), labelled(ids, 30)], EVERYTHING, share_prefixes=True)
    assert row.layout.parents.tolist() == [-1, -1]
    assert sorted(row.weights[row.layout.starts[:-1]].tolist()) == [1, 2], "equal conversations are one"
    assert row.num_targets == 61


def test_a_conversation_in_a_row_of_its_own_is_one_segment() -> None:
    examples = [labelled([*range(20), n], answer=1) for n in (50, 60)]
    rows = pack(examples, 21, share_prefixes=True)
    assert [row.layout.parents.tolist() for row in rows] == [[-1], [-1]]
    assert [row.weights.tolist() for row in rows] == [[1] * 21] * 2


def test_best_fit_takes_the_longest_first() -> None:
    examples = [
        labelled(list(range(100 * n, 100 * n + length)), 1) for n, length in enumerate([4, 4, 2, 9, 1, 30, 6])
    ]
    assert pack_rows(separate(examples), 10) == [[0, 6], [1, 2], [3, 4], [5]]


def test_conversations_that_share_stay_together() -> None:
    heads = [list(range(100 * n, 100 * n + 20)) for n in (1, 2)]
    examples = [labelled([*heads[n % 2], 1000 + n], 1) for n in range(8)]
    rows = pack(examples, 24, share_prefixes=True)
    assert [len(row.input_ids) for row in rows] == [24, 24]


def test_a_laid_out_row_keeps_the_order_and_shares_nothing() -> None:
    batch = lay_out([labelled([7, 8, 9], 1), labelled([7, 8], 2), labelled([7, 8, 9], 1)])
    assert batch.input_ids.tolist() == [7, 8, 9, 7, 8, 7, 8, 9]
    assert batch.layout.starts.tolist() == [0, 3, 5, 8]
    assert batch.layout.parents.tolist() == [-1, -1, -1]
    assert batch.layout.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.token_numbers.tolist() == list(range(8))
    assert batch.num_targets == 4


def test_huanhuan_s_system_prompt_is_computed_once_a_row(shared: Path, tmp_path: Path) -> None:
    chat_format = real_format(shared, tmp_path, "deepseek", "official")
    rows = str(shared / "data/datasets/huanhuan.json")
    data = load(DataConfig(train=rows, system="现在你要扮演皇帝身边的女人--甄嬛"), chat_format)
    for max_tokens, rows_per_step in ((1024, 1.1), (4096, 1.0)):
        source = Loader(data.examples, batch_size=16, max_tokens=max_tokens, seed=0, shuffle=True)
        packed = list(source.epoch())
        assert len(packed) <= rows_per_step * source.steps_per_epoch
        assert sum(row.num_tokens for row in packed) == source.num_tokens
        assert sum(row.num_targets for row in packed) == source.num_targets
        computed = sum(len(row.input_ids) for row in packed)
        assert 0.78 < computed / source.num_tokens < 0.80
