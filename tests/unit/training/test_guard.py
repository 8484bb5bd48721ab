"""The guards' arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.errors import DivergedError
from lorasmith.training.guard import RECENT, is_spike, not_finite, require_finite_adapter, require_moving_loss

losses = st.floats(0.1, 10, allow_subnormal=False)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "told"),
    [
        (1.0, 2.0, None),
        (math.nan, math.nan, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (1.0, math.inf, "the gradient norm is inf"),
        (0.0, 0.0, None),
    ],
)
def test_what_is_not_finite(loss: float, grad_norm: float, told: str | None) -> None:
    assert not_finite(loss, grad_norm) == told


@given(st.lists(losses, max_size=RECENT), losses)
def test_no_spike_without_enough_to_compare_and_never_at_or_below_the_median(
    recent: list[float], loss: float
) -> None:
    if len(recent) < 20 or loss <= np.median(recent):
        assert not is_spike(recent, loss)


@given(st.lists(losses, min_size=20, max_size=RECENT))
def test_the_bound_is_six_median_absolute_deviations(recent: list[float]) -> None:
    middle = float(np.median(recent))
    mad = max(float(np.median(np.abs(np.array(recent) - middle))), 1e-3 * middle)
    assert is_spike(recent, middle + 6.001 * mad)
    assert not is_spike(recent, middle + 5.999 * mad)


def test_ordinary_noise_makes_few_spikes_and_a_leap_makes_one() -> None:
    noise = np.random.default_rng(0).normal(2.0, 0.3, 10_000)
    found = sum(is_spike(noise[n - RECENT : n].tolist(), noise[n]) for n in range(RECENT, 5000))
    assert found <= 5
    assert is_spike(noise[:RECENT].tolist(), 4.5)


def test_an_adapter_that_is_not_finite_is_refused() -> None:
    whole, broken = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.tensor([0.0, math.inf]))
    require_finite_adapter([whole], 1)
    with pytest.raises(DivergedError, match="step 7: the adapter holds values that are not finite"):
        require_finite_adapter([whole, broken], 7)


def test_a_loss_is_dead_after_fifty_equal_values_unless_all_is_learnt() -> None:
    require_moving_loss([1.5] * (RECENT - 1), 49)
    require_moving_loss([0.0] * RECENT, 50)
    require_moving_loss([1.5] * (RECENT - 1) + [math.nextafter(1.5, 2)], 50)
    with pytest.raises(DivergedError, match=r"1\.5, to the last digit, for 50 steps"):
        require_moving_loss([1.5] * RECENT, 50)
