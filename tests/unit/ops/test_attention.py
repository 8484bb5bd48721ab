import numpy as np
import pytest
import torch

from lorasmith.ops.attention import layout_attention, layout_index, visible
from lorasmith.types import Layout


def layout(lengths, parents=None):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    parents = np.full(len(lengths), -1) if parents is None else np.array(parents)
    return Layout(starts, parents, np.concatenate([np.arange(n) for n in lengths]))


def textbook(q, k, v, seen, scale):
    """softmax(q k' * scale) v with a dense mask, in the dtype it is given."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def test_what_a_token_sees():
    seen = visible(layout([2, 3]))
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_a_child_sees_its_parent_and_its_parent_s_parent_but_no_sibling():
    seen = visible(layout([2, 1, 1, 1], parents=[-1, 0, 0, 1]))
    assert seen[2].tolist() == [True, True, True, False, False]
    assert seen[3].tolist() == [True, True, False, True, False]
    assert seen[4].tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("shape", [([1], None), ([5, 1, 9, 3], None), ([4, 2, 6], [-1, 0, 0])])
def test_attention_is_the_textbook_s(heads, shape):
    torch.manual_seed(0)
    of = layout(*shape)
    tokens = int(of.starts[-1])
    q, k, v = (
        torch.randn(h, tokens, 8, dtype=torch.float64, requires_grad=True)
        for h in (heads[0], *[heads[1]] * 2)
    )
    ours = layout_attention(q, k, v, layout_index(of), scale=0.3)
    theirs = textbook(q, k, v, visible(of), 0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, theirs)]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)
