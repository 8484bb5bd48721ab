"""SwiGLU against its definition and against the activation of transformers' LlamaMLP."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from lorasmith.ops.swiglu import reference_swiglu, swiglu


def example(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    gate, up, cotangent = (3 * torch.randn(*shape, dtype=dtype) for _ in range(3))
    return gate.requires_grad_(), up.requires_grad_(), cotangent


@pytest.mark.parametrize("shape", [(1, 8), (7, 8), (2, 3, 16)])
def test_it_is_its_definition(shape: tuple[int, ...]) -> None:
    gate, up, cotangent = example(*shape)
    ours, theirs = swiglu(gate, up), reference_swiglu(gate, up)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    mine, other = (torch.autograd.grad(y, (gate, up), cotangent) for y in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


def test_gradcheck() -> None:
    gate, up, _ = example(3, 6)
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_transformers_bit_by_bit(dtype: torch.dtype) -> None:
    gate, up, cotangent = example(50, 64, dtype=dtype)
    ours, theirs = swiglu(gate, up), ACT2FN["silu"](gate) * up
    mine, other = (torch.autograd.grad(y, (gate, up), cotangent) for y in (ours, theirs))
    assert torch.equal(ours, theirs)
    assert all(torch.equal(left, right) for left, right in zip(mine, other, strict=True))


def test_the_halves_of_one_fused_projection() -> None:
    """Neither half is contiguous, and the gradient of the projection is whole."""
    packed, _, cotangent = example(6, 16)
    ours, theirs = swiglu(*packed.chunk(2, -1)), reference_swiglu(*packed.chunk(2, -1))
    mine, other = (torch.autograd.grad(y, packed, cotangent[:, 8:]) for y in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


def test_transposed_inputs_and_an_expanded_gradient() -> None:
    gate, up, _ = example(6, 8)
    ours, theirs = swiglu(gate.T, up.T), reference_swiglu(gate.T, up.T)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    mine, other = (torch.autograd.grad(y.sum(), (gate, up)) for y in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_input_may_be_frozen(frozen: int) -> None:
    inputs = list(example(3, 6)[:2])
    inputs[frozen] = inputs[frozen].detach()
    swiglu(inputs[0], inputs[1]).sum().backward()
    assert inputs[frozen].grad is None
    assert inputs[1 - frozen].grad is not None


def test_only_its_two_inputs_are_kept() -> None:
    gate, up, _ = example(3, 6)
    saved = swiglu(gate, up).grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]
