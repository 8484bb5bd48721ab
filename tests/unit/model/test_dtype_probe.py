"""The probe of `dtype: auto` on a CPU: a machine without bf16 hardware must not be asked for a minute."""

from __future__ import annotations

import pytest
import torch

from lorasmith.model import dtype


def probe(monkeypatch: pytest.MonkeyPatch, bf16_seconds: float) -> tuple[bool, list[int]]:
    """What the probe says where fp32 takes one second, and the widths at which it timed bf16."""
    widths: list[int] = []

    def seconds(kind: torch.dtype, width: int) -> float:
        if kind == torch.bfloat16:
            widths.append(width)
        return bf16_seconds if kind == torch.bfloat16 else 1.0

    monkeypatch.setattr(dtype, "_seconds", seconds)
    return dtype.bf16_is_faster(4096), widths


def test_bf16_without_hardware_is_told_on_a_small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe(monkeypatch, 50.0) == (False, [256])


def test_bf16_must_win_at_the_width_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe(monkeypatch, 0.5) == (True, [256, 2048])
    assert probe(monkeypatch, 1.0) == (False, [256, 2048])
