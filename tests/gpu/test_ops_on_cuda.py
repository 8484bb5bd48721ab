"""Each op on CUDA, by its Triton twin, against the same op on a CPU in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorasmith.attention.rotary import rotary
from lorasmith.kernels.twins import triton_twin
from lorasmith.ops.cross_entropy import linear_cross_entropy
from lorasmith.ops.dropout import DropoutMask, dropout_key, keep_mask, token_hashes
from lorasmith.ops.fp8 import quantise_rows, quantised
from lorasmith.ops.lora_linear import lora_linear
from lorasmith.ops.rms_norm import rms_norm
from lorasmith.ops.swiglu import swiglu

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def compare(op: Function, dtype: torch.dtype, *inputs: Tensor) -> None:
    """Outputs and the gradients of all inputs, relative to the largest of each."""
    rounded = [x.to(dtype) for x in inputs]
    sides = [
        _values_and_gradients(op, [x.to(**where).requires_grad_() for x in rounded])
        for where in ({"device": "cuda"}, {"dtype": torch.float64})
    ]
    for got, true in zip(*sides, strict=True):
        assert (got.cpu().double() - true).abs().max() <= TOLERANCES[dtype] * max(true.abs().max(), 1)


def _values_and_gradients(op: Function, inputs: list[Tensor]) -> list[Tensor]:
    out = op(*inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    cotangents = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y) for y in outs]
    return outs + list(torch.autograd.grad(outs, inputs, cotangents))


def test_triton_is_there_and_chosen() -> None:
    assert triton_twin("rms_norm", torch.empty(1, device="cuda")) is not None


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (1, 300, 4096)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(lambda x, w: rms_norm(x, w, 1e-5), dtype, torch.randn(shape), torch.rand(shape[-1]))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 2), (3, 66), (1, 300, 28672)], ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(lambda x: swiglu(*x.chunk(2, -1)), dtype, torch.randn(shape))


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "turning"), [(128, 128), (128, 64), (10, 6)])
def test_rotary(size: int, turning: int, interleaved: bool, dtype: torch.dtype) -> None:
    cos, sin = (torch.randn(1, 7, turning).to(dtype) for _ in range(2))

    def op(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(*(q.transpose(1, 2), k.transpose(1, 2), cos.to(q), sin.to(q)), interleaved=interleaved)

    compare(op, dtype, torch.randn(2, 7, 9, size), torch.randn(2, 7, 2, size))


@pytest.mark.parametrize("width", [1, 77, 4096])
def test_masks_are_those_of_a_cpu(width: int) -> None:
    numbers, key = torch.arange(50) * 977, dropout_key(1, 2, "q_proj")
    masks = [keep_mask(numbers.to(device), width, 0.1, key).cpu() for device in ("cpu", "cuda")]
    assert torch.equal(*masks)


@DTYPES
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_linear(p: float, dtype: torch.dtype) -> None:
    w = torch.randn(96, 130).to(dtype) / 11

    def op(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        key = dropout_key(1, 2, "q_proj")
        mask = DropoutMask(p, key, token_hashes(torch.arange(70, device=x.device), key))
        return lora_linear(x, w.to(x), None, a, b, 2.0, mask if p else None)

    compare(op, dtype, torch.randn(2, 35, 130), torch.randn(8, 130) / 11, torch.randn(96, 8) / 8)


@DTYPES
@pytest.mark.parametrize("chunk_bytes", [None, 1 << 16])
def test_linear_cross_entropy(chunk_bytes: int | None, dtype: torch.dtype) -> None:
    labels, weights = torch.randint(5003, (40,)), torch.rand(40) + 0.5

    def op(hidden: Tensor, head: Tensor) -> Tensor:
        told = labels.to(hidden.device), weights.to(hidden.device)
        return linear_cross_entropy(hidden, head, *told, chunk_bytes=chunk_bytes)

    compare(op, dtype, torch.randn(40, 64), torch.randn(5003, 64) / 8)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs fp8"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 128, 1024, 1100])
def test_both_products_of_fp8_are_those_of_their_codes(rows: int, dtype: torch.dtype) -> None:
    """Against float64 of what the same kernel made of x and of dY; the result is rounded to bf16."""
    weight = quantised((torch.randn(272, 528) / 20).to(dtype).cuda())
    x = torch.randn(rows, 528, dtype=dtype, device="cuda", requires_grad=True)
    dy = torch.randn(rows, 272, dtype=dtype, device="cuda")
    y = torch.nn.functional.linear(x, weight)
    (dx,) = torch.autograd.grad(y, x, dy)
    codes, scales = quantise_rows(x.detach())
    dense = weight.codes_OD.double() * weight.scales_O[:, None]
    _near(y, (codes.double() * scales) @ dense.t())
    codes, scales = quantise_rows(dy, weight.scales_O)
    _near(dx, (codes.double() * scales) @ weight.codes_OD.double())


def _near(got: Tensor, true: Tensor) -> None:
    assert (got.double() - true).norm() <= 2**-7 * true.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_codes_of_fp8_are_those_of_a_cpu(dtype: torch.dtype) -> None:
    """In every bit: the twin divides and rounds as torch does."""
    x, factor = torch.randn(9, 5001).to(dtype), torch.rand(5001)
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs fp8")
    for given in (None, factor):
        codes, scales = quantise_rows(x.cuda(), None if given is None else given.cuda())
        true, true_scales = quantise_rows(x, given)
        assert torch.equal(scales.cpu(), true_scales)
        assert torch.equal(codes.cpu().view(torch.uint8), true.view(torch.uint8))
