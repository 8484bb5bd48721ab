"""Attention over a Layout is its definition, values and gradients; keeps inputs alone; leaks nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasmith.attention.alibi import alibi_slopes
from lorasmith.attention.layout import (
    LayoutIndex,
    attention_reference,
    layout_attention,
    layout_attention_interface,
    layout_index,
    visible,
    with_alibi,
)
from lorasmith.attention.tiles import TILE, blocks_of
from lorasmith.types import Layout

Shape = tuple[list[int], list[int]]
FLAT: Shape = ([5, 1, 9, 3], [-1] * 4)
PREFIX: Shape = ([4, 2, 6, 1, 6], [-1, 0, 0, 0, 0])
TREE: Shape = ([3, 5, 2, 7, 1, 4, 6], [-1, 0, 0, 1, 1, 3, -1])
LONG: Shape = ([9, 2 * TILE + 5, 3, TILE + 1, 30], [-1, 0, 1, 0, -1])
SHAPES = [([1], [-1]), FLAT, PREFIX, TREE, LONG, ([300, 260], [-1, -1])]


def layout(lengths: list[int], parents: list[int]) -> Layout:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions: list[np.ndarray] = []
    for length, parent in zip(lengths, parents, strict=True):
        first = 0 if parent < 0 else positions[parent][-1] + 1
        positions.append(np.arange(first, first + length))
    return Layout(starts, np.array(parents), np.concatenate(positions))


def inputs(
    of: Layout, heads: tuple[int, int], *, size: int = 8, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v as projections leave them: heads first, tokens outermost in memory."""
    generator, tokens = torch.Generator().manual_seed(0), int(of.starts[-1])
    made = (
        torch.randn(tokens, h, size, generator=generator, dtype=torch.float64)
        for h in (heads[0], *[heads[1]] * 2)
    )
    return [x.to(dtype).transpose(0, 1).requires_grad_() for x in made]


def indexed(of: Layout, heads: int, *, alibi: bool) -> LayoutIndex:
    index = layout_index(of)
    return with_alibi(index, torch.tensor(alibi_slopes(heads), dtype=torch.float64)) if alibi else index


def test_what_a_token_sees() -> None:
    assert visible(layout([2, 3], [-1, -1])).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_a_child_sees_its_parent_and_its_parent_s_parent_but_no_sibling() -> None:
    seen = visible(layout([2, 1, 1, 1], parents=[-1, 0, 0, 1]))
    assert seen[2].tolist() == [True, True, True, False, False]
    assert seen[3].tolist() == [True, True, False, True, False]
    assert seen[4].tolist() == [True, True, True, False, True]


def assert_is_the_reference(of: Layout, heads: tuple[int, int], *, alibi: bool) -> None:
    leaves, index = inputs(of, heads), indexed(of, heads[0], alibi=alibi)
    ours = layout_attention(*leaves, index, scale=0.3)
    theirs = attention_reference(*leaves, of, 0.3, index.slopes_H)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weight).sum(), leaves) for out in (ours, theirs)]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=["one", "flat", "prefix", "tree", "long", "all-long"])
def test_attention_is_its_definition(shape: Shape, heads: tuple[int, int], alibi: bool) -> None:
    assert_is_the_reference(layout(*shape), heads, alibi=alibi)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Forests: each segment continues an earlier one or none."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    return layout(lengths, [draw(st.integers(-1, segment - 1)) for segment in range(len(lengths))])


@settings(max_examples=40, deadline=None)
@given(of=layouts(), alibi=st.booleans())
def test_attention_is_its_definition_for_any_forest(of: Layout, alibi: bool) -> None:
    assert_is_the_reference(of, (4, 2), alibi=alibi)


@pytest.mark.parametrize("budget", [1, 100, 1000])
def test_however_small_the_slices_of_a_tile(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.attention.tiled._SCORES", budget)
    assert_is_the_reference(layout(*TREE), (6, 3), alibi=True)


@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize("shape", [([5], [-1]), ([2, 3, 1, 4], [-1, 0, 0, 1])])
def test_gradcheck(shape: Shape, alibi: bool) -> None:
    of = layout(*shape)
    index = indexed(of, 4, alibi=alibi)
    assert torch.autograd.gradcheck(
        lambda q, k, v: layout_attention(q, k, v, index, 0.5), inputs(of, (4, 2), size=3)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_multiplied_in_fp32(dtype: torch.dtype) -> None:
    of = layout(*PREFIX)
    leaves = inputs(of, (4, 2), dtype=dtype)
    out = layout_attention(*leaves, layout_index(of), 0.3)
    assert out.dtype == dtype
    expected = attention_reference(*leaves, of, 0.3)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=torch.finfo(dtype).eps)
    ours, theirs = (torch.autograd.grad(x.double().square().sum(), leaves) for x in (out, expected))
    for left, right in zip(ours, theirs, strict=True):
        assert left.dtype == dtype
        assert (left - right).abs().max() <= 4 * torch.finfo(dtype).eps * right.abs().max()


def test_nothing_leaks_between_segments() -> None:
    of = layout([6, 2, 5, 7], [-1, -1, 1, -1])
    q, k, v = (x.detach() for x in inputs(of, (2, 2)))
    grown = [x[:, 6:13].clone().requires_grad_() for x in (q, k, v)]

    def run(others: float) -> list[Tensor]:
        rows = [
            torch.full_like(x, others).index_copy(1, torch.arange(6, 13), g)
            for x, g in zip((q, k, v), grown, strict=True)
        ]
        out = layout_attention(*rows, layout_index(of), 0.3)[:, 6:13]
        return [out, *torch.autograd.grad(out.sum(), grown)]

    for before, after in zip(run(0.5), run(torch.nan), strict=True):
        assert torch.equal(before, after)


def test_the_interface_takes_and_gives_what_transformers_does() -> None:
    of = layout(*TREE)
    q, k, v = inputs(of, (4, 2))
    out, weights = layout_attention_interface(
        torch.nn.Module(), q[None], k[None], v[None], None, layout=layout_index(of)
    )
    assert weights is None
    assert out.is_contiguous()
    torch.testing.assert_close(
        out[0].transpose(0, 1), attention_reference(q, k, v, of, 8**-0.5), atol=1e-12, rtol=0
    )


def test_tiles_hold_each_token_once_and_little_else() -> None:
    of = layout([11, *range(20, 100, 5)], [-1, *[0] * 16])
    tiles = [tile for block in blocks_of(of) for tile in block.tiles]
    held = torch.cat([tile.tokens_NQ[tile.real_NQ] for tile in tiles])
    assert sorted(held.tolist()) == list(range(int(of.starts[-1])))
    scores = sum(tile.tokens_NQ.numel() * tile.num_keys for tile in tiles)
    assert len(tiles) < len(of.parents)
    assert scores <= 1.3 * (11 * 11 + sum(n * (n + 11) for n in of.lengths[1:]))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made, forward or backward, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.nbytes = max(self.nbytes, *[x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor)], 0)
        return result


@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
def test_memory_grows_with_the_tokens_and_not_with_their_square(alibi: bool) -> None:
    of = layout([8, 16 * TILE - 8], [-1, 0])
    leaves, index = inputs(of, (2, 2), size=16, dtype=torch.float32), indexed(of, 2, alibi=alibi)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = layout_attention(*leaves, index, 0.25)
        out.sum().backward()
    assert sum(kept.values()) == sum(x.nbytes for x in leaves), "inputs alone"
    assert largest.nbytes <= 2 * TILE * 16 * TILE * 4, "a tile of two heads' scores"
