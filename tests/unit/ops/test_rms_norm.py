"""RMSNorm against its definition and against transformers' LlamaRMSNorm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorasmith.ops.rms_norm import reference_rms_norm, rms_norm


def example(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, cotangent = torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)
    weight = (torch.rand(shape[-1]) + 0.5).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), cotangent


@pytest.mark.parametrize("shape", [(1, 8), (7, 8), (2, 3, 16), (8,)])
def test_it_is_its_definition(shape: tuple[int, ...]) -> None:
    x, weight, cotangent = example(*shape)
    ours, theirs = rms_norm(x, weight, 1e-6), reference_rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    mine, other = (torch.autograd.grad(y, (x, weight), cotangent) for y in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


def test_gradcheck() -> None:
    x, weight, _ = example(3, 6)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


def test_non_contiguous_inputs() -> None:
    x, weight, cotangent = example(6, 8)
    strided = x.detach().T.contiguous().T.requires_grad_()
    ours, theirs = rms_norm(strided, weight, 1e-6), rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    mine = torch.autograd.grad(ours, strided, cotangent.T.contiguous().T)
    torch.testing.assert_close(mine, torch.autograd.grad(theirs, x, cotangent), atol=1e-12, rtol=0)


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(x, torch.ones(8, dtype=torch.float64), 1e-6).sum(), x)
    torch.testing.assert_close(grad, torch.full_like(grad, 1e3))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_transformers(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight, cotangent = example(50, 64, dtype=dtype)
    module = LlamaRMSNorm(64, eps=1e-5)
    module.weight = torch.nn.Parameter(weight.detach().to(weight_dtype))
    ours, theirs = rms_norm(x, module.weight, 1e-5), module(x)
    rounding = 2 * torch.finfo(torch.bfloat16 if torch.bfloat16 in (dtype, weight_dtype) else dtype).eps
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=rounding, rtol=rounding)
    cotangent = cotangent.to(ours.dtype)
    mine, other = (torch.autograd.grad(y, (x, module.weight), cotangent) for y in (ours, theirs))
    assert [g.dtype for g in mine] == [g.dtype for g in other]
    for left, right in zip(mine, other, strict=True):
        torch.testing.assert_close(left, right, atol=20 * rounding, rtol=2 * rounding)


def test_a_16_bit_gradient_is_nearer_to_the_truth_than_autograd_s() -> None:
    x, weight, cotangent = example(50, 64, dtype=torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = torch.autograd.grad(reference_rms_norm(*wide, 1e-5), wide[0], cotangent.double())[0]
    errors = [
        (torch.autograd.grad(norm(x, weight, 1e-5), x, cotangent)[0] - exact).square().mean()
        for norm in (rms_norm, reference_rms_norm)
    ]
    assert errors[0] <= errors[1]


def test_a_frozen_weight_gets_no_gradient_and_only_x_and_a_number_per_row_are_kept() -> None:
    x, weight, cotangent = example(10, 64)
    weight = weight.detach()
    y = rms_norm(x, weight, 1e-6)
    saved = y.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert sorted(t.numel() for t in saved) == [10, 64, 640]
    y.backward(cotangent)
    assert weight.grad is None
