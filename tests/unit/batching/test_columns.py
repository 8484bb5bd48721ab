"""Flat rows are the rows: every question to them is answered as by a plain list of examples."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.batching.columns import (
    Conversations,
    Examples,
    Texts,
    largest_id,
    lengths_of,
    target_counts_of,
)
from lorasmith.batching.fingerprint import fingerprint
from lorasmith.batching.loader import Loader
from lorasmith.data.encode import fit_length
from lorasmith.rows.findings import find, prompt_of
from lorasmith.types import IGNORE_INDEX, Conversation, Example, Message

ids = st.integers(0, 200_000)
one_row = st.lists(st.tuples(ids, st.one_of(st.just(IGNORE_INDEX), ids)), min_size=1, max_size=9)


@st.composite
def some_examples(draw: st.DrawFn) -> list[Example]:
    rows = draw(st.lists(one_row, max_size=8))
    return [
        Example(np.array([a for a, _ in row]), np.array([b for _, b in row]), f"数据.json:{n}")
        for n, row in enumerate(rows)
    ]


def told(examples: Sequence[Example]) -> list[tuple[list[int], list[int], str]]:
    return [(e.input_ids.tolist(), e.labels.tolist(), e.origin) for e in examples]


@given(some_examples(), st.data())
@settings(deadline=None)
def test_flat_examples_are_the_examples(plain: list[Example], data: st.DataObject) -> None:
    flat = Examples.of(plain)
    assert told(list(flat)) == told(plain)
    assert told(flat[1:5:2]) == told(plain[1:5:2])
    assert told(list(reversed(flat))) == told(plain[::-1])
    assert lengths_of(flat).tolist() == lengths_of(plain).tolist() == [len(e) for e in plain]
    assert target_counts_of(flat).tolist() == target_counts_of(plain).tolist()
    assert largest_id(flat) == largest_id(plain)
    rows = data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=5)) if plain else []
    assert told(flat.take(np.array(rows, np.int64))) == told([plain[row] for row in rows])


@given(some_examples(), st.integers(1, 9))
@settings(deadline=None)
def test_a_cut_counts_its_labels_anew(plain: list[Example], limit: int) -> None:
    cut = Examples.of(plain).cut(limit)
    assert told(cut) == [(a[:limit], b[:limit], origin) for a, b, origin in told(plain)]
    assert cut.target_counts.tolist() == [e.num_targets for e in cut]
    fitted = fit_length(Examples.of(plain), limit, "drop")
    assert told(fitted.examples) == told([e for e in plain if len(e) <= limit])
    assert fitted.kept.tolist() == [n for n, e in enumerate(plain) if len(e) <= limit]


@given(some_examples())
@settings(deadline=None)
def test_the_fingerprint_is_that_of_row_after_row(plain: list[Example]) -> None:
    """The numbers that runs have recorded so far: a resume must know them again."""
    digest = hashlib.sha256()
    for example in plain:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.input_ids.astype("<i8").tobytes() + example.labels.astype("<i8").tobytes())
    assert fingerprint(Examples.of(plain)) == fingerprint(plain) == digest.hexdigest()


def test_the_fingerprint_of_many_blocks_is_that_of_one_list() -> None:
    rows = [Example(np.arange(n % 7 + 1), np.arange(n % 7 + 1) + n) for n in range(9_000)]
    flat = Examples.of(rows)
    assert fingerprint(flat) == fingerprint(iter(rows)) == fingerprint(flat.take(np.arange(9_000)))


def test_the_loader_gives_the_same_steps_from_flat_rows() -> None:
    rows = [Example(np.arange(n % 9 + 1), np.arange(n % 9 + 1) + n, f"f:{n}") for n in range(100)]
    loaders = [
        Loader(examples, batch_size=8, max_tokens=20, seed=3, shuffle=True)
        for examples in (rows, Examples.of(rows))
    ]
    for n in (0, 5, 12, 20):
        plain, flat = (loader.step(n) for loader in loaders)
        assert [batch.input_ids.tolist() for batch in plain] == [batch.input_ids.tolist() for batch in flat]
        assert [batch.labels.tolist() for batch in plain] == [batch.labels.tolist() for batch in flat]


@pytest.mark.parametrize("row", [3, -4])
def test_a_row_that_is_not_there_is_an_index_error(row: int) -> None:
    with pytest.raises(IndexError, match="of 3"):
        Texts.of(["a", "b", "c"])[row]


short_text = st.text(alphabet="ab你", min_size=1, max_size=2)


@st.composite
def some_talks(draw: st.DrawFn) -> list[Conversation]:
    rows = draw(st.lists(st.lists(st.tuples(short_text, short_text), min_size=1, max_size=2), max_size=12))
    return [
        Conversation(
            tuple(
                message
                for question, answer in row
                for message in (Message("user", question), Message("assistant", answer))
            ),
            f"f:{n}",
        )
        for n, row in enumerate(rows)
    ]


@given(some_talks())
@settings(deadline=None)
def test_flat_conversations_are_the_conversations(talks: list[Conversation]) -> None:
    flat = Conversations.of(talks)
    assert list(flat) == talks
    assert list(flat[::-2]) == talks[::-2]


@given(some_talks())
@settings(deadline=None)
def test_findings_by_digest_are_findings_by_text(talks: list[Conversation]) -> None:
    found = find(Conversations.of(talks), (), ())
    first: dict[tuple[Message, ...], str] = {}
    pairs = [(c.origin, first.setdefault(c.messages, c.origin)) for c in talks]
    assert found.duplicates == tuple((row, earlier) for row, earlier in pairs if row != earlier)
    groups: dict[tuple[Message, ...], list[Conversation]] = defaultdict(list)
    for talk in talks:
        groups[prompt_of(talk)].append(talk)
    assert found.repeated_prompts == len(talks) - len(groups)
    answered = [
        (len({c.messages[-1] for c in group}), tuple(c.origin for c in group)) for group in groups.values()
    ]
    assert [(c.answers, c.origins) for c in found.conflicts] == [each for each in answered if each[0] > 1]
