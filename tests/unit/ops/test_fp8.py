"""Weights in fp8: what rounding costs, both products, and the contract of the GPU's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorasmith.ops.fp8 import CODES, Fp8Weight, fits_fp8, quantise_rows, quantised, scaled_product
from lorasmith.ops.gemm import linear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(left: Tensor, right: Tensor) -> float:
    difference = left.detach().double() - right.double()
    return float(difference.norm() / right.double().norm())


@DTYPES
@pytest.mark.parametrize("factored", [False, True])
def test_codes_are_within_a_sixteenth_of_each_value(dtype: torch.dtype, factored: bool) -> None:
    """Three bits of mantissa; below 2^-6 of e4m3 steps of 2^-9 at the row's scale."""
    x, factor = randn(7, 333, dtype=dtype) * torch.logspace(-6, 6, 7)[:, None].to(dtype), randn(333, seed=1)
    codes, scales = quantise_rows(x, factor if factored else None)
    true = x.double() * (factor if factored else 1)
    error = (codes.double() * scales - true).abs()
    assert (error <= torch.maximum(true.abs() / 16, scales.double() * 2**-10) * 1.001).all()
    assert (codes.float().abs().amax(1) == 448).all()


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    codes, scales = quantise_rows(torch.tensor([[0.0, 0.0], [1.0, torch.nan], [torch.inf, 1.0]]))
    product = scaled_product(codes, scales, codes[:1].t(), scales[:1].t(), torch.float32)
    assert product[0, 0] == 0
    assert not scales[1:].isfinite().any()
    weight = quantised(torch.eye(16))
    assert not F.linear(torch.full((2, 16), torch.nan), weight).isfinite().any()
    assert not F.linear(torch.full((2, 16), torch.inf), weight).isfinite().any()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 32), (5, 32), (2, 3, 32)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_both_products_read_the_same_weight(shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    """y = x W^T and dX = dY W against float64 over the weight's own numbers: only x and dY are rounded."""
    weight, bias = quantised(randn(48, 32, dtype=dtype)), randn(48, dtype=dtype) if biased else None
    x, dy = randn(*shape, dtype=dtype, seed=1).requires_grad_(), randn(*shape[:-1], 48, dtype=dtype, seed=2)
    y = F.linear(x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, dy)
    dense = (weight.codes_OD.double() * weight.scales_O[:, None].double()).detach()
    assert y.dtype == dx.dtype == dtype
    assert relative(y, F.linear(x.double(), dense, None if bias is None else bias.double())) < 0.035
    assert relative(dx, dy.double() @ dense) < 0.035


def test_products_are_those_of_the_codes() -> None:
    """To fp32's rounding; the same numbers come from torch's own scaled product, in bf16."""
    weight, x = quantised(randn(48, 32)), randn(5, 32, seed=1)
    codes, scales = quantise_rows(x)
    true = (codes.double() * scales) @ weight.dense().double().t()
    torch.testing.assert_close(F.linear(x, weight).double(), true, rtol=1e-5, atol=1e-5)
    theirs = torch._scaled_mm(
        codes, weight.codes_OD.t(), scales, weight.scales_O[None], out_dtype=torch.bfloat16
    )
    torch.testing.assert_close(theirs.double(), true, rtol=2**-8, atol=1e-5)


def test_scales_inside_of_the_sum_are_taken_into_dy() -> None:
    weight, dy = quantised(randn(48, 32) * torch.logspace(-2, 2, 48)[:, None]), randn(5, 48, seed=1)
    codes, scales = quantise_rows(dy, weight.scales_O)
    true = (codes.double() * scales) @ weight.codes_OD.double()
    torch.testing.assert_close((dy @ weight).double(), true, rtol=1e-5, atol=1e-5 * float(true.abs().max()))


@pytest.mark.parametrize("rows", [1, 17, 128])
def test_operands_lie_as_tensor_cores_ask(rows: int) -> None:
    """On the meta device torch checks strides, sides and scales of a scaled product as CUDA does."""
    codes, scales = torch.empty(48, 32, dtype=CODES, device="meta"), torch.empty(48, device="meta")
    weight = Fp8Weight(codes, scales, torch.bfloat16)
    x = torch.empty(rows, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y = F.linear(x, weight)
    (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert (y.shape, dx.shape, y.dtype, dx.dtype) == ((rows, 48), (rows, 32), torch.bfloat16, torch.bfloat16)
    with pytest.raises(RuntimeError, match="col_major"):
        scaled_product(codes, scales[:, None], codes.t().contiguous(), scales[None], torch.bfloat16)


def test_the_product_of_lora_linear_takes_it_in_both_directions() -> None:
    weight, x = quantised(randn(48, 32)), randn(4096, 32, seed=1)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(randn(9, 48), weight.t()), randn(9, 48) @ weight)


def test_everything_else_reads_numbers_and_nothing_writes() -> None:
    weight = quantised(randn(48, 32, dtype=torch.bfloat16))
    assert (weight.shape, weight.dtype, weight.numel()) == ((48, 32), torch.bfloat16, 48 * 32)
    assert isinstance(weight.t().t(), Fp8Weight)
    assert torch.equal((weight + 0).float().norm(dim=1), weight.dense().float().norm(dim=1))
    with pytest.raises(AssertionError, match="never changed"):
        weight.mul_(2)
    with pytest.raises(AssertionError, match="never changed"):
        torch.add(weight.dense(), 1, out=weight)
    copy = torch.zeros(48, 32, dtype=torch.bfloat16)
    assert torch.equal(copy.copy_(weight), weight.dense())
    assert torch.equal(copy.add_(weight), 2 * weight.dense())


@pytest.mark.parametrize(
    ("shape", "fits"), [((16, 32), True), ((16, 24), False), ((0, 16), False), ((16,), False)]
)
def test_sides_are_multiples_of_sixteen(shape: tuple[int, ...], fits: bool) -> None:
    assert fits_fp8(torch.empty(shape)) is fits
