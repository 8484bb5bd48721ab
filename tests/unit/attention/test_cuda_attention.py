"""What CUDA's kernels are told about a Layout, through FlexAttention's eager path on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

from lorasmith.attention.alibi import alibi_slopes
from lorasmith.attention.cuda import FlexIndex, fits_flex, flex
from lorasmith.attention.layout import attention_reference, layout_attention, layout_index, visible
from lorasmith.types import Layout


def flex_index(lengths: list[int], parents: list[int], device: str = "cpu") -> FlexIndex:
    starts, positions = np.concatenate([[0], np.cumsum(lengths)]), []
    for length, parent in zip(lengths, parents, strict=True):
        first = 0 if parent < 0 else positions[parent][-1] + 1
        positions.append(np.arange(first, first + length))
    return FlexIndex(Layout(starts, np.array(parents), np.concatenate(positions)), torch.device(device))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_mask_is_the_definition(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=9))
    index = flex_index(lengths, [data.draw(st.integers(-1, s - 1)) for s in range(len(lengths))])
    tokens, none = torch.arange(sum(lengths)), torch.zeros((), dtype=torch.long)
    assert torch.equal(index.sees(none, none, tokens[:, None], tokens), visible(index.layout))


def test_blocks_in_which_nobody_sees_anybody_are_left_out() -> None:
    """Block row by block row of 128: a prefix, two children of it, and a stranger."""
    index = flex_index([128, 256, 128, 128], [-1, 0, 0, -1])
    sparse = index.block_mask.to_dense()[0, 0]
    assert sparse.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_of_a_forest_is_the_reference(heads: tuple[int, int], alibi: bool) -> None:
    index = flex_index([40, 70, 30, 90, 60], [-1, 0, 0, 1, -1])
    q, k, v = (torch.randn(h, 290, 16, dtype=torch.float64) for h in (heads[0], *[heads[1]] * 2))
    slopes = torch.tensor(alibi_slopes(heads[0]), dtype=torch.float64) if alibi else None
    out = flex(flex_attention, q, k, v, index, 0.25, slopes)
    # the eager path multiplies in fp32
    torch.testing.assert_close(
        out, attention_reference(q, k, v, index.layout, 0.25, slopes), atol=1e-5, rtol=0
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_rows_of_all_lengths_share_a_compilation() -> None:
    """As torch's tracer sees it: one block of a mask is one case, any number of them another."""
    counter = CompileCounterWithBackend("eager")
    kernel = torch.compile(flex_attention, dynamic=True, backend=counter)
    with torch.no_grad():
        for blocks in (3, 1, 2, 8, 5, 16):
            q, k = (torch.randn(heads, 128 * blocks, 16) for heads in (4, 2))
            out = flex(kernel, q, k, k, flex_index([7, 128 * blocks - 7], [-1, -1]), 0.25, None)
            assert out.shape == q.shape
    assert counter.frame_count <= 2


def test_a_cpu_goes_by_tiles() -> None:
    assert not fits_flex(torch.zeros(1, 2, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("parents", [[-1, -1, -1, -1], [-1, 0, 0, 1]], ids=["flat", "tree"])
def test_a_gpu_agrees_with_the_reference(parents: list[int]) -> None:
    layout = flex_index([40, 170, 30, 144], parents).layout
    leaves = [torch.randn(h, 384, 64, device="cuda", requires_grad=True) for h in (4, 2, 2)]
    out = layout_attention(*leaves, layout_index(layout, "cuda"), 0.125)
    on_cpu = [x.detach().cpu().double().requires_grad_() for x in leaves]
    expected = attention_reference(*on_cpu, layout, 0.125)
    torch.testing.assert_close(out.cpu().double(), expected, atol=5e-3, rtol=0)
    ours, theirs = (torch.autograd.grad(x.sum(), y) for x, y in ((out, leaves), (expected, on_cpu)))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left.cpu().double(), right, atol=2e-2, rtol=0)
