"""NormHead against F.normalize written out, frozen and trained."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from lorasmith.native import norm_head
from lorasmith.native.norm_head import NormHead


def make_head(dtype: torch.dtype = torch.float64) -> NormHead:
    head = NormHead(8, 12)
    with torch.no_grad():
        head.weight.copy_(torch.randn(12, 8) * torch.linspace(0.4, 4, 12)[:, None])
        head.weight[3] = 0  # an unused row must not become NaN
    return head.to(dtype)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time that the rows are measured."""
    measured: list[int] = []
    original = norm_head._inverse_norms
    monkeypatch.setattr(norm_head, "_inverse_norms", lambda w: (measured.append(1), original(w))[1])
    return measured


@pytest.mark.parametrize("trained", [False, True])
def test_logits_are_those_of_normalised_rows(trained: bool) -> None:
    head, x = make_head().requires_grad_(trained), torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(head(x), x @ F.normalize(head.weight, dim=-1).T)


def test_the_gradient_flows_through_the_norm() -> None:
    head, x = make_head(), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(5, 12, dtype=torch.float64)
    ours = torch.autograd.grad(head(x), [x, head.weight], cotangent)
    theirs = torch.autograd.grad(x @ F.normalize(head.weight, dim=-1).T, [x, head.weight], cotangent)
    used = torch.arange(12) != 3  # where F.normalize itself has a gradient of 1e12
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1][used], theirs[1][used])
    assert torch.isfinite(ours[1]).all()


def test_a_frozen_head_is_measured_once_and_kept_raw(monkeypatch: pytest.MonkeyPatch) -> None:
    head, measured = make_head().requires_grad_(False), counted(monkeypatch)
    raw = head.weight.clone()
    for _ in range(3):
        head(torch.randn(2, 8, dtype=torch.float64))
    assert len(measured) == 1
    assert torch.equal(head.weight, raw)
    assert list(head.state_dict()) == ["weight"]


def test_another_weight_is_measured_again() -> None:
    head, x = make_head(torch.float32).requires_grad_(False), torch.randn(4, 8)

    def right() -> bool:
        expected = x.to(head.weight.dtype) @ F.normalize(head.weight, dim=-1).T
        return torch.allclose(head(x).double(), expected.double(), atol=1e-6)

    assert right()
    head.weight.mul_(torch.rand(12, 1) + 0.5)
    assert right(), "changed in place"
    head.weight = torch.nn.Parameter(torch.randn(12, 8), requires_grad=False)
    assert right(), "replaced"
    head.load_state_dict({"weight": torch.randn(12, 8)})
    assert right(), "loaded"
    head.double()
    assert right(), "another dtype"


def test_a_trained_head_is_measured_at_each_forward_also_without_gradients() -> None:
    head, x = make_head(torch.float32), torch.randn(4, 8)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    for _ in range(3):
        head(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(head(x), x @ F.normalize(head.weight, dim=-1).T)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_a_copy_measures_its_own_weight(clone) -> None:  # type: ignore[no-untyped-def]
    head, x = make_head().requires_grad_(False), torch.randn(4, 8, dtype=torch.float64)
    before = head(x)
    other = clone(head)
    other.weight.mul_(-1)
    torch.testing.assert_close(other(x), -before)
    torch.testing.assert_close(head(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_scaled_in_fp32(dtype: torch.dtype) -> None:
    head = make_head(torch.float32).to(dtype)
    x = torch.randn(4, 8).to(dtype)
    exact = x.double() @ F.normalize(head.weight.double(), dim=-1).T
    assert head(x).dtype == torch.float32
    torch.testing.assert_close(head(x).double(), exact, atol=torch.finfo(dtype).eps * 4, rtol=0)


def test_inside_inference_mode() -> None:
    x = torch.randn(4, 8)
    with torch.inference_mode():
        head = make_head(torch.float32)
        torch.testing.assert_close(head(x), x @ F.normalize(head.weight, dim=-1).T)
