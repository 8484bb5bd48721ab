"""Rotary embedding against its definition and against transformers' Llama and Glm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from lorasmith.attention.rotary import reference_rotary, rotary

THEIRS = {False: llama_rotary, True: glm_rotary}


def example(
    tokens: int = 5, *, turning: int = 8, dtype: torch.dtype = torch.float64, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k as a projection leaves them, (B, T, H, D) in memory; heads 4 and 2 of size 8."""
    torch.manual_seed(0)
    q, k = (torch.randn(batch, tokens, heads, 8, dtype=dtype).transpose(1, 2) for heads in (4, 2))
    angles = torch.randn(batch, tokens, turning // 2, dtype=torch.float64).repeat(1, 1, 2)
    return q.requires_grad_(), k.requires_grad_(), angles.cos().to(dtype), angles.sin().to(dtype)


def gradients(turned: tuple[Tensor, Tensor], *of: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(turned, of, [torch.randn(y.shape).to(y.dtype) for y in turned])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [1, 5])
def test_it_is_transformers(interleaved: bool, batch: int, tokens: int) -> None:
    q, k, cos, sin = example(tokens, turning=4 if interleaved else 8, batch=batch)
    ours, theirs = rotary(q, k, cos, sin, interleaved=interleaved), THEIRS[interleaved](q, k, cos, sin)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradients(ours, q, k), gradients(theirs, q, k), atol=1e-12, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turning", [4, 8])
def test_it_is_its_definition(interleaved: bool, turning: int) -> None:
    q, k, cos, sin = example(turning=turning)
    ours = rotary(q, k, cos, sin, interleaved=interleaved)
    theirs = tuple(reference_rotary(x, cos, sin, interleaved=interleaved) for x in (q, k))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_with_halves_that_differ(interleaved: bool) -> None:
    q, k, *_ = example(3)
    cos, sin = torch.randn(2, 1, 3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin, interleaved=interleaved), (q, k))


def test_outputs_and_gradients_keep_the_memory_order_of_a_projection() -> None:
    q, k, cos, sin = example()
    turned = rotary(q, k, cos, sin)
    assert all(y.transpose(1, 2).is_contiguous() for y in turned)
    scattered = [torch.randn(y.shape, dtype=y.dtype) for y in turned]
    grads = torch.autograd.grad(turned, (q, k), scattered)
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)


def test_inputs_of_any_strides() -> None:
    q, k, cos, sin = example()
    packed = rotary(q.contiguous(), k[..., ::1].clone(memory_format=torch.contiguous_format), cos, sin)
    torch.testing.assert_close(packed, rotary(q, k, cos, sin), atol=1e-12, rtol=0)
    rows = torch.randn(1, 5, 3, 16, dtype=torch.float64).transpose(1, 2)
    strided, plain = (
        rotary(rows[..., ::2], rows[..., :8], cos, sin),
        llama_rotary(rows[..., ::2], rows[..., :8], cos, sin),
    )
    torch.testing.assert_close(strided, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_single_and_half_precision(dtype: torch.dtype, interleaved: bool) -> None:
    q, k, cos, sin = example(40, dtype=dtype)
    ours, theirs = rotary(q, k, cos, sin, interleaved=interleaved), THEIRS[interleaved](q, k, cos, sin)
    rounding = 4 * torch.finfo(dtype).eps
    assert [y.dtype for y in ours] == [dtype, dtype]
    torch.testing.assert_close(ours, theirs, atol=rounding, rtol=rounding)
    torch.testing.assert_close(gradients(ours, q, k), gradients(theirs, q, k), atol=rounding, rtol=rounding)


@pytest.mark.parametrize("interleaved", [False, True])
def test_cosines_wider_than_the_queries_are_rounded_once(interleaved: bool) -> None:
    q, k, cos, sin = example(40, turning=4, dtype=torch.bfloat16)
    cos, sin = cos.float(), sin.float()
    ours = rotary(q, k, cos, sin, interleaved=interleaved)
    theirs = tuple(reference_rotary(x, cos, sin, interleaved=interleaved) for x in (q, k))
    assert [y.dtype for y in ours] == [torch.bfloat16] * 2
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=torch.finfo(torch.bfloat16).eps)


def test_nothing_of_the_queries_is_kept() -> None:
    q, k, cos, sin = example()
    saved = rotary(q, k, cos, sin)[0].grad_fn.saved_tensors  # type: ignore[union-attr]
    assert {t.untyped_storage().data_ptr() for t in saved} <= {
        t.untyped_storage().data_ptr() for t in (cos, sin)
    }
