"""ALiBi's slopes as published, and its mask against a loop over every pair."""

from __future__ import annotations

import pytest
import torch

from lorasmith.attention.alibi import alibi_mask, alibi_slopes

MASKED = torch.finfo(torch.float32).min


def test_slopes_of_a_power_of_two() -> None:
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]


def test_slopes_of_other_numbers_go_on_with_every_second_of_the_next_power() -> None:
    assert alibi_slopes(5) == [*alibi_slopes(4), alibi_slopes(8)[0]]
    assert alibi_slopes(6) == [*alibi_slopes(4), *alibi_slopes(8)[0:4:2]]
    assert alibi_slopes(40) == [*alibi_slopes(32), *alibi_slopes(64)[0:16:2]]


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("spare", [0, 3], ids=["growing-cache", "preallocated-cache"])
def test_each_pair(past: int, spare: int) -> None:
    slopes_H, padding_B, queries = torch.tensor(alibi_slopes(3)), [0, 2], 5
    mask_BK = (torch.arange(past + queries) >= torch.tensor(padding_B)[:, None]).long()
    keys = past + queries + spare
    got = alibi_mask(slopes_H, mask_BK, num_queries=queries, num_keys=keys, past=past)
    assert got.shape == (2, 3, queries, keys)
    for row, head, i, j in (
        (b, h, i, j) for b in range(2) for h in range(3) for i in range(5) for j in range(keys)
    ):
        sees = padding_B[row] <= j <= i + past
        assert got[row, head, i, j] == (slopes_H[head] * (j - i - past) if sees else MASKED)


def test_without_padding_one_row_serves_the_batch() -> None:
    slopes_H = torch.tensor(alibi_slopes(2))
    whole = alibi_mask(slopes_H, None, num_queries=3, num_keys=3, past=0)
    assert whole.shape == (1, 2, 3, 3)
    seen = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    for given in (seen, torch.where(seen, 0.0, MASKED)):
        torch.testing.assert_close(alibi_mask(slopes_H, given, num_queries=3, num_keys=3, past=0), whole)


def test_distances_stay_exact_far_out() -> None:
    """In bf16 a distance of 4095 would be 4096, and its neighbours the same."""
    slopes_H = torch.tensor(alibi_slopes(1))
    row = alibi_mask(slopes_H, None, num_queries=1, num_keys=4096, past=4095)[0, 0, 0]
    assert len(row.unique()) == 4096
