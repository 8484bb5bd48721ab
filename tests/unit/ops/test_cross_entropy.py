"""The loss without logits: against the loss with logits, for frozen and trained heads, in bounded memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.native.norm_head import NormHead
from lorasmith.ops.cross_entropy import cross_entropy_sum, linear_cross_entropy


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation made, views of its arguments left out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return out


def problem(n=7, d=5, v=23, dtype=torch.float64, spread=1.0):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d, dtype=dtype) * spread, torch.randn(v, d, dtype=dtype)
    labels, weights = torch.randint(v, (n,)), torch.randint(1, 4, (n,))
    labels[0], labels[-1] = v - 1, 0
    return hidden, weight, labels, weights


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss / 3, of)


CHUNKS = [None, 8, 8 * 23, 8 * 7 * 4, 8 * 3 * 23, 8 * 7 * 22]
"""The whole; one logit at a time; by rows; by columns; by both, with a last tile of one column."""


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_loss_of_the_logits(chunk_bytes: int | None, with_bias: bool) -> None:
    hidden, weight, labels, weights = problem()
    bias = torch.randn(23, dtype=torch.float64) if with_bias else None
    inputs = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    ours = linear_cross_entropy(hidden, weight, labels, weights, bias=bias, chunk_bytes=chunk_bytes)
    theirs = cross_entropy_sum(F.linear(hidden, weight, bias), labels, weights)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    for mine, other in zip(gradients(ours, *inputs), gradients(theirs, *inputs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, labels, weights = problem(3, 3, 5)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, weights, bias=bias, chunk_bytes=8 * 2 * 3)

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_(), bias))


@pytest.mark.parametrize(("n", "v"), [(1, 23), (1, 1), (3, 1), (3, 2), (0, 23)])
def test_few_rows_and_few_words(n: int, v: int) -> None:
    hidden, weight, labels, weights = problem(max(n, 1), v=v)
    hidden, labels, weights = hidden[:n].requires_grad_(), labels[:n], weights[:n]
    ours = linear_cross_entropy(hidden, weight, labels, weights)
    theirs = cross_entropy_sum(F.linear(hidden, weight), labels, weights)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients(ours, hidden), gradients(theirs, hidden), atol=1e-12, rtol=1e-12)


def test_non_contiguous_inputs() -> None:
    hidden, weight, labels, weights = problem()
    strided = (hidden.T.contiguous().T, weight.T.contiguous().T, labels.repeat_interleave(2)[::2], weights)
    ours, theirs = linear_cross_entropy(*strided), linear_cross_entropy(hidden, weight, labels, weights)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision_are_as_near_to_the_truth_as_with_logits(dtype: torch.dtype) -> None:
    hidden, weight, labels, weights = problem(64, 16, 500, dtype)
    wide = hidden.double().requires_grad_()
    exact = cross_entropy_sum(wide @ weight.double().T, labels, weights)
    hidden.requires_grad_()
    ours = linear_cross_entropy(hidden, weight, labels, weights, chunk_bytes=64 * 130 * 4)
    theirs = cross_entropy_sum(F.linear(hidden, weight), labels, weights)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=0, rtol=torch.finfo(dtype).eps)
    (right,) = gradients(exact, wide)
    (mine,), (other,) = gradients(ours, hidden), gradients(theirs, hidden)
    assert mine.dtype == dtype
    assert (mine - right).norm() <= 1.3 * (other - right).norm()


def test_a_confident_row_keeps_the_digits_of_its_small_gradient() -> None:
    """p - 1 is -1e-5 here: rounded from p in 16 bits it would be 0 or -0.004."""
    weight = torch.eye(8).bfloat16()
    hidden = (torch.eye(8)[:1] * 13.5).bfloat16().requires_grad_()
    labels, weights = torch.tensor([0]), torch.tensor([1])
    (ours,) = gradients(linear_cross_entropy(hidden, weight, labels, weights, chunk_bytes=12), hidden)
    wide = hidden.detach().double().requires_grad_()
    (exact,) = gradients(cross_entropy_sum(wide @ weight.double().T, labels, weights), wide)
    torch.testing.assert_close(ours.double(), exact, atol=0, rtol=2e-2)


@pytest.mark.parametrize("spread", [1e3, 1e6])
def test_large_logits_neither_overflow_nor_lose_the_loss(spread: float) -> None:
    hidden, weight, labels, weights = problem(dtype=torch.float32, spread=spread)
    ours = linear_cross_entropy(hidden.requires_grad_(), weight, labels, weights, chunk_bytes=100)
    theirs = cross_entropy_sum(F.linear(hidden, weight), labels, weights)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, hidden), gradients(theirs, hidden))


def test_a_frozen_norm_head_is_a_scale_of_the_rows() -> None:
    hidden, weight, labels, weights = problem()
    head = NormHead(5, 23).double().requires_grad_(False)
    head.weight.copy_(weight * torch.linspace(0.4, 4, 23, dtype=torch.float64)[:, None])
    scale = torch.linalg.vector_norm(head.weight, dim=-1).reciprocal()
    hidden.requires_grad_()
    ours = linear_cross_entropy(hidden, head.weight, labels, weights, weight_scale=scale, chunk_bytes=200)
    theirs = cross_entropy_sum(head(hidden), labels, weights)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradients(ours, hidden), gradients(theirs, hidden), atol=1e-12, rtol=1e-12)


def test_a_trained_norm_head_passes_its_normalised_rows() -> None:
    hidden, weight, labels, weights = problem()
    head = NormHead(5, 23).double()
    head.weight.data.copy_(weight)
    ours = linear_cross_entropy(hidden, F.normalize(head.weight, dim=-1), labels, weights, chunk_bytes=200)
    theirs = cross_entropy_sum(head(hidden), labels, weights)
    mine, other = gradients(ours, head.weight), gradients(theirs, head.weight)
    torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("trained_head", [False, True])
def test_no_tensor_is_as_large_as_the_logits(trained_head: bool) -> None:
    hidden, weight, labels, weights = problem(60, 8, 4096, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_(trained_head)
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, labels, weights, chunk_bytes=64 << 10).backward()
    assert seen.elements <= max(16 << 10, weight.numel() if trained_head else 0)
    with LargestTensor() as plain:
        cross_entropy_sum(F.linear(hidden, weight), labels, weights)
    assert plain.elements >= 60 * 4096, "the measure sees what it is to forbid"


def test_by_default_too_no_tensor_is_as_large_as_the_logits() -> None:
    hidden, weight, labels, weights = problem(300, 4, 32_000, torch.float32)
    with LargestTensor() as seen:
        linear_cross_entropy(hidden.requires_grad_(), weight, labels, weights).backward()
    assert seen.elements <= 6 << 18 < 300 * 32_000 / 6


def test_evaluation_makes_no_gradient() -> None:
    hidden, weight, labels, weights = problem()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, weights)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, cross_entropy_sum(F.linear(hidden, weight), labels, weights).detach())


def test_the_same_bits_again() -> None:
    hidden, weight, labels, weights = problem(40, 16, 300, torch.float32)
    hidden.requires_grad_()
    losses = [linear_cross_entropy(hidden, weight, labels, weights, chunk_bytes=4000) for _ in range(2)]
    assert torch.equal(*losses)
    assert torch.equal(*(gradients(loss, hidden)[0] for loss in losses))


@pytest.mark.parametrize("label", [-100, 23])
def test_a_label_outside_the_vocabulary_is_never_a_small_loss(label: int) -> None:
    hidden, weight, labels, weights = problem()
    labels[2] = label
    assert linear_cross_entropy(hidden, weight, labels, weights).isinf()
    with pytest.raises(IndexError):
        linear_cross_entropy(hidden.requires_grad_(), weight, labels, weights)


def test_nan_comes_through() -> None:
    hidden, weight, labels, weights = problem()
    hidden[1, 1] = torch.nan
    assert linear_cross_entropy(hidden, weight, labels, weights, chunk_bytes=100).isnan()
