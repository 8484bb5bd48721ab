import pytest
import torch

from lorasmith.ops.dropout import dropout, dropout_key, keep_mask


@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_of_zeros_is_p(p, width):
    mask = keep_mask(torch.arange(20_000), width, p, dropout_key(0, 1, "layer"))
    draws = mask.numel()
    assert abs(mask.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / draws) ** 0.5


def test_rows_keep_their_masks_however_the_step_is_cut():
    key = dropout_key(3, 5, "layer")
    whole = keep_mask(torch.arange(50), 33, 0.3, key)
    cut = torch.cat(
        [keep_mask(torch.arange(20), 33, 0.3, key), keep_mask(torch.arange(20, 50), 33, 0.3, key)]
    )
    assert torch.equal(whole, cut)


def test_seed_step_and_module_each_give_other_masks():
    keys = [dropout_key(0, 0, "a"), dropout_key(1, 0, "a"), dropout_key(0, 1, "a"), dropout_key(0, 0, "b")]
    masks = [keep_mask(torch.arange(400), 64, 0.5, key).float() - 0.5 for key in keys]
    for i, left in enumerate(masks):
        for right in masks[:i]:
            assert abs((left * right).mean().item()) < 0.01, "two masks go together"


def test_neighbours_are_independent():
    mask = keep_mask(torch.arange(2_000), 128, 0.5, dropout_key(0, 0, "a")).float() - 0.5
    assert abs((mask[:, 1:] * mask[:, :-1]).mean().item()) < 2e-3
    assert abs((mask[1:] * mask[:-1]).mean().item()) < 2e-3


def test_masks_never_change_between_releases():
    """A resumed run draws the masks it would have drawn: this pins them."""
    mask = keep_mask(torch.arange(2), 12, 0.5, dropout_key(0, 0, "q_proj"))
    assert mask.int().tolist() == PINNED


PINNED = [[1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0]]


def test_values_are_scaled_and_the_gradient_takes_the_same_mask():
    x = torch.ones(100, 32, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.25, dropout_key(0, 0, "a"), torch.arange(100))
    y.sum().backward()
    assert set(y.detach().flatten().tolist()) == {0.0, 1 / 0.75}
    assert torch.equal(x.grad, y.detach())
