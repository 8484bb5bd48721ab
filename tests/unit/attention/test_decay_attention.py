"""The chunked scan is the recurrence, in values, states and gradients, and costs O(T) memory."""

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

from lorasmith.attention.decay import (
    CHUNK,
    chunk_index,
    decay_attention,
    decay_attention_reference,
    decay_step,
    rows_index,
)
from lorasmith.attention.layout import layout_index
from lorasmith.types import Layout

DECAYS = torch.tensor([0.0, 0.07, 30.0], dtype=torch.float64)
"""No forgetting, slow, and a decay whose inverse overflows within a chunk."""


def make_layout(lengths: list[int], parents: list[int]) -> Layout:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Layout(starts, np.array(parents), np.arange(starts[-1]))


def inputs(
    length: int, *, size: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randn(2, length, len(DECAYS), 2 * size, generator=generator, dtype=torch.float64)
    v = torch.randn(length, len(DECAYS), size, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Forests: each segment continues an earlier one or none."""
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=7))
    return make_layout(lengths, [draw(st.integers(-1, segment - 1)) for segment in range(len(lengths))])


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), chunk=st.integers(1, 9))
def test_chunks_are_the_recurrence_for_any_layout(layout: Layout, chunk: int) -> None:
    q, k, v = inputs(int(layout.starts[-1]))
    out, states = decay_attention(q, k, v, DECAYS, chunk_index(layout, chunk=chunk))
    expected, expected_states = decay_attention_reference(q, k, v, DECAYS, layout)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(states, expected_states, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
def test_the_borders_of_the_standard_chunk(length: int) -> None:
    layout = make_layout([length, 3], [-1, 0])
    q, k, v = inputs(length + 3)
    out, _ = decay_attention(q, k, v, DECAYS, layout_index(layout).chunks)
    torch.testing.assert_close(out, decay_attention_reference(q, k, v, DECAYS, layout)[0], atol=1e-12, rtol=0)


def test_short_segments_are_cut_into_shorter_chunks() -> None:
    assert chunk_index(make_layout([CHUNK // 3] * 9, [-1] * 9)).tokens_NC.shape[1] < CHUNK
    assert chunk_index(make_layout([40 * CHUNK], [-1])).tokens_NC.shape[1] == CHUNK


def test_the_state_alone_has_a_gradient() -> None:
    leaves = [x.requires_grad_() for x in inputs(12)]
    layout = make_layout([5, 7], [-1, 0])
    ours = decay_attention(*leaves, DECAYS, chunk_index(layout, chunk=4))[1][1].sum()
    theirs = decay_attention_reference(*leaves, DECAYS, layout)[1][1].sum()
    for left, right in zip(
        torch.autograd.grad(ours, leaves[1:]), torch.autograd.grad(theirs, leaves[1:]), strict=True
    ):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


def test_the_reference_is_the_sum_of_the_definition() -> None:
    q, k, v = inputs(9)
    out, _ = decay_attention_reference(q, k, v, DECAYS, make_layout([9], [-1]))
    steps = torch.arange(9)[:, None] - torch.arange(9)
    fall_HTT = torch.exp(-DECAYS[:, None, None] * steps.clamp(min=0)) * (steps >= 0)
    scores_HTT = torch.einsum("ihd,jhd->hij", q, k) * fall_HTT
    torch.testing.assert_close(out, torch.einsum("hij,jhe->ihe", scores_HTT, v), atol=1e-13, rtol=0)


def test_gradients_are_those_of_the_recurrence() -> None:
    layout = make_layout([5, 7, 1, 9, 4], [-1, 0, 0, 1, -1])
    weights = torch.randn(26, 3, 3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in inputs(26)]
    ours = (decay_attention(*leaves, DECAYS, chunk_index(layout, chunk=4))[0] * weights).sum()
    theirs = (decay_attention_reference(*leaves, DECAYS, layout)[0] * weights).sum()
    for left, right in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("lengths", "parents"), [([7], [-1]), ([3, 4, 2], [-1, 0, 0])])
def test_gradcheck(lengths: list[int], parents: list[int]) -> None:
    layout = make_layout(lengths, parents)
    leaves = [x.requires_grad_() for x in inputs(sum(lengths), size=2)]
    roots = sum(parent < 0 for parent in parents)
    state = torch.randn(roots, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    index = chunk_index(layout, chunk=3)
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: decay_attention(q, k, v, DECAYS, index, s), (*leaves, state)
    )


def test_nothing_leaks_between_segments() -> None:
    layout = make_layout([6, 5, 7], [-1, -1, -1])
    q, k, v = inputs(18)
    index = chunk_index(layout, chunk=4)
    before = decay_attention(q, k, v, DECAYS, index)[0]
    k[:6], v[:6], k[11:], v[11:] = 1e6, -1e6, torch.inf, torch.nan
    after = decay_attention(q, k, v, DECAYS, index)[0]
    assert torch.equal(before[6:11], after[6:11])


def test_a_row_goes_on_from_its_state_by_chunks_as_by_steps() -> None:
    rows, length, head = 2, 11, 4
    q, k, v = inputs(rows * length)
    whole, _ = decay_attention(q, k, v, DECAYS, rows_index(rows, length, torch.device("cpu")))
    q, k, v, whole = (x.unflatten(0, (rows, length)) for x in (q, k, v, whole))
    prompt = [x[:, :head].flatten(0, 1) for x in (q, k, v)]
    _, state = decay_attention(*prompt, DECAYS, rows_index(rows, head, torch.device("cpu")))
    rest = [x[:, head:].flatten(0, 1) for x in (q, k, v)]
    chunked, end = decay_attention(
        *rest, DECAYS, rows_index(rows, length - head, torch.device("cpu"), chunk=3), state
    )
    torch.testing.assert_close(chunked.view_as(whole[:, head:]), whole[:, head:], atol=1e-12, rtol=0)
    for t in range(head, length):
        out, state = decay_step(q[:, t], k[:, t], v[:, t], DECAYS, state)
        torch.testing.assert_close(out, whole[:, t], atol=1e-12, rtol=0)
    torch.testing.assert_close(state, end, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_fp32(dtype: torch.dtype) -> None:
    layout = make_layout([700], [-1])
    q, k, v = inputs(700, dtype=dtype)
    out, states = decay_attention(q, k, v, DECAYS.float(), chunk_index(layout))
    expected, expected_states = decay_attention_reference(q, k, v, DECAYS, layout)
    assert out.dtype == states.dtype == torch.float32
    for ours, right in ((out, expected), (states, expected_states)):
        assert (ours - right).abs().max() <= 1e-6 * right.abs().max()


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made, forward or backward, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.nbytes = max(self.nbytes, *made, 0)
        return result


def memory(length: int) -> tuple[int, int]:
    """Bytes kept for backward, and of the largest tensor made on the way."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = [x.requires_grad_() for x in inputs(length, dtype=torch.float32)]
    index = layout_index(make_layout([length], [-1])).chunks
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out, _ = decay_attention(*leaves, DECAYS, index)
        out.sum().backward()
    assert leaves[0].grad is not None
    return sum(kept.values()), largest.nbytes


def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    small, large = memory(8 * CHUNK), memory(64 * CHUNK)
    assert large[0] <= 1.05 * sum(x.nbytes for x in inputs(64 * CHUNK, dtype=torch.float32)), "inputs alone"
    assert large[0] <= 8.1 * small[0]
    assert large[1] <= 8.1 * small[1]
