"""Stateless dropout: masks against plain integers, their statistics, and what they are a function of."""

import pytest
import torch

from lorasmith.ops.dropout import DropoutMask, MaskRows, dropout, dropout_key, keep_mask, token_hashes

WORD = (1 << 32) - 1


def lowbias32(x, first, second):
    """The published hash in unsigned integers, keyed."""
    x ^= first
    x = ((x ^ x >> 16) * 0x7FEB352D & WORD) ^ second
    x = (x ^ x >> 15) * 0x846CA68B & WORD
    return x ^ x >> 16


def textbook_mask(numbers, width, p, key):
    """Element by element, as the mask is defined."""
    first, second = (word & WORD for word in key)
    rows = []
    for number in numbers:
        row = []
        for column in range(width):
            keyed = (lowbias32(column // 2, 0, 0) ^ first) * 0x846CA68B & WORD ^ second
            word = lowbias32(number & WORD, first, second) ^ keyed
            word = word * 0x7FEB352D & WORD
            signed = word - (1 << 32) if word >> 31 else word
            word = (word ^ signed >> 15 & WORD) * 0x846CA68B & WORD
            draw = word >> 16 if column % 2 else word & 0xFFFF
            row.append((draw - (1 << 16) if draw >> 15 else draw) >= round(p * (1 << 16)) - (1 << 15))
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_share_of_zeros_is_p(p, width):
    mask = keep_mask(torch.arange(20_000), width, p, dropout_key(0, 1, "layer"))
    draws = mask.numel()
    assert abs(mask.float().mean().item() - (1 - p)) < 5 * (p * (1 - p) / draws) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_the_definition_s(p):
    key, numbers = dropout_key(1, 2, "layer"), [0, 1, 5, 70_000, 2**31 + 3]
    assert torch.equal(keep_mask(torch.tensor(numbers), 33, p, key), textbook_mask(numbers, 33, p, key))


def test_rows_keep_their_masks_however_the_step_is_cut():
    key = dropout_key(3, 5, "layer")
    whole = keep_mask(torch.arange(50), 33, 0.3, key)
    cut = torch.cat(
        [keep_mask(torch.arange(20), 33, 0.3, key), keep_mask(torch.arange(20, 50), 33, 0.3, key)]
    )
    assert torch.equal(whole, cut)


@pytest.mark.parametrize("block", [1, 16, 50])
def test_blocks_of_rows_are_the_whole_mask(block):
    key = dropout_key(3, 5, "layer")
    mask = DropoutMask(0.3, key, token_hashes(torch.arange(50), key))
    rows = MaskRows(mask, 33, torch.float32, block=block)
    parts = [rows.draw(start, min(start + block, 50)).clone() for start in range(0, 50, block)]
    assert torch.equal(torch.cat(parts).bool(), keep_mask(torch.arange(50), 33, 0.3, key))


def test_seed_step_and_module_each_give_other_masks():
    keys = [dropout_key(0, 0, "a"), dropout_key(1, 0, "a"), dropout_key(0, 1, "a"), dropout_key(0, 0, "b")]
    masks = [keep_mask(torch.arange(400), 64, 0.5, key).float() - 0.5 for key in keys]
    for i, left in enumerate(masks):
        for right in masks[:i]:
            assert abs((left * right).mean().item()) < 0.01, "two masks go together"


@pytest.mark.parametrize("seed", range(3))
def test_no_two_tokens_and_no_two_columns_go_together(seed):
    """Every pair, not the neighbours only: all words share the hashes of their token and their column.

    512 x 512 pairs: the largest correlation of independent coins lies near 4.9 sigma, and beyond 6.5 once in
    10,000 masks; a mixing step that adds instead of xors shows 15.
    """
    coins = 2 * keep_mask(torch.arange(512), 512, 0.5, dropout_key(seed, 0, "a")).float() - 1
    for rows in (coins, coins.t()):
        sigmas = (rows @ rows.t() / 512**0.5).fill_diagonal_(0)
        assert sigmas.abs().max() < 6.5
        assert abs(sigmas.square().mean().item() - 511 / 512) < 0.02


def test_modules_of_a_step_share_tokens_but_no_columns():
    """Every column of one module against every column of the other, over the same hashed tokens."""
    tokens = token_hashes(torch.arange(512), dropout_key(0, 7, ""))
    left, right = (
        2 * DropoutMask(0.5, dropout_key(0, 7, name), tokens).factors(512, torch.float32) - 1 for name in "qk"
    )
    sigmas = left.t() @ right / 512**0.5
    assert sigmas.abs().max() < 6.5
    assert abs(sigmas.square().mean().item() - 1) < 0.02


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rectangles_of_four_are_independent(p):
    """token ^ column cancels over the corners of a rectangle: what is mixed from it must not."""
    generator = torch.Generator().manual_seed(0)
    mask = keep_mask(torch.arange(1_000), 256, p, dropout_key(0, 0, "a")).float()
    coins = (mask - (1 - p)) / (p * (1 - p)) ** 0.5
    s, t = torch.randint(1_000, (2, 400_000), generator=generator)
    c, d = torch.randint(256, (2, 400_000), generator=generator)
    product = (coins[s, c] * coins[t, c] * coins[s, d] * coins[t, d])[(s != t) & (c != d)]
    assert abs(product.mean() / product.std() * len(product) ** 0.5) < 4.5


def test_masks_never_change_between_releases():
    """A resumed run draws the masks it would have drawn: this pins them."""
    mask = keep_mask(torch.arange(2), 12, 0.5, dropout_key(0, 0, "q_proj"))
    assert mask.int().tolist() == PINNED


PINNED = [[0, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0]]


def test_values_are_scaled_and_the_gradient_takes_the_same_mask():
    x = torch.ones(100, 32, dtype=torch.float64, requires_grad=True)
    key = dropout_key(0, 0, "a")
    y = dropout(x, DropoutMask(0.25, key, token_hashes(torch.arange(100), key)))
    y.sum().backward()
    assert set(y.detach().flatten().tolist()) == {0.0, 1 / 0.75}
    assert torch.equal(x.grad, y.detach())
