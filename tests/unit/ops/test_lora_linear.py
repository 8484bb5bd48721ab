"""The fused LoRA linear against autograd over its formula, in values, gradients, dtypes and memory."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lorasmith.ops import lora_linear as room
from lorasmith.ops.dropout import DropoutMask, dropout_key, keep_mask
from lorasmith.ops.lora_linear import lora_linear, lora_linear_reference

TOKENS, INPUTS, OUTPUTS, RANK = 11, 7, 5, 3


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(room, "_BLOCK", 4 * INPUTS)


def make(shape=(TOKENS, INPUTS), *, dtype=torch.float64, bias=True, trained="xab"):
    generator = torch.Generator().manual_seed(0)

    def random(*size, name=""):
        values = torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
        return values.requires_grad_(name in trained and bool(name))

    x = random(*shape, name="x")
    w, bias_O = random(OUTPUTS, INPUTS), random(OUTPUTS) if bias else None
    return x, w, bias_O, random(RANK, INPUTS, name="a"), random(OUTPUTS, RANK, name="b"), 1.7


def mask(p=0.4, tokens=TOKENS):
    return DropoutMask(p, dropout_key(0, 3, "q"), torch.arange(100, 100 + tokens)) if p else None


def outcome(function, inputs, drawn):
    """Output and gradients for a fixed, uneven weight of each output."""
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    y = function(*inputs, drawn)
    weight = torch.arange(y.numel()).view(y.shape).cos().to(y.dtype)
    return [y, *torch.autograd.grad((y * weight).sum(), leaves)]


@pytest.mark.parametrize("p", [0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", ["xab", "ab", "x", "xa", "xb"])
@pytest.mark.parametrize("shape", [(TOKENS, INPUTS), (1, TOKENS, INPUTS)], ids=["2-D", "3-D"])
def test_it_is_the_formula(p, bias, trained, shape):
    inputs = make(shape, bias=bias, trained=trained)
    ours, textbook = (outcome(f, inputs, mask(p)) for f in (lora_linear, lora_linear_reference))
    for left, right in zip(ours, textbook, strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


@pytest.mark.parametrize("p", [0, 0.4])
@pytest.mark.parametrize("trained", ["xab", "ab"])
def test_gradients_are_the_differences(p, trained):
    x, w, bias, a, b, scaling = make((1, TOKENS, INPUTS), trained=trained)
    drawn = mask(p)
    torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, w, bias, a, b, scaling, drawn), (x, a, b))


def test_the_mask_is_keep_mask_s():
    """With A and B that pass one feature through, y shows the mask itself."""
    drawn, eye = mask(), torch.eye(INPUTS, dtype=torch.float64)
    ones = torch.ones(TOKENS, INPUTS, dtype=torch.float64)
    y = lora_linear(ones, torch.zeros_like(eye), None, eye, eye, 1.0, drawn)
    assert torch.equal(y != 0, keep_mask(drawn.numbers_T, INPUTS, drawn.p, drawn.key))
    torch.testing.assert_close(y.max().item(), 1 / 0.6)


def test_strided_inputs_and_a_spread_gradient():
    _, w, bias, a, b, scaling = make(trained="ab")
    wide = torch.randn(1, 2 * TOKENS, INPUTS, dtype=torch.float64, requires_grad=True)
    for function in (lora_linear, lora_linear_reference):
        function(wide[:, ::2], w, bias, a, b, scaling, mask()).sum().backward()
    ours_and_textbook = wide.grad.clone()
    wide.grad = None
    lora_linear(wide[:, ::2], w, bias, a, b, scaling, mask()).sum().backward()
    torch.testing.assert_close(2 * wide.grad, ours_and_textbook, atol=1e-12, rtol=0)


@pytest.mark.parametrize("p", [0, 0.4])
def test_over_a_bf16_base_the_branch_is_bf16_and_the_adapter_s_gradients_are_fp32(p):
    x, w, bias, a, b, scaling = make(dtype=torch.bfloat16)
    a, b = (t.detach().float().requires_grad_() for t in (a, b))
    ours = outcome(lora_linear, (x, w, bias, a, b, scaling), mask(p))
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, w, bias, a, b)]
    exact = outcome(lora_linear_reference, (*wide, scaling), mask(p))
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for left, right in zip(ours, exact, strict=True):
        assert (left.double() - right).abs().max() < 2**-6 * right.abs().max()


def test_it_keeps_x_and_its_projection_only():
    x, w, bias, a, b, scaling = make()
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_linear(x, w, bias, a, b, scaling, mask())
    frozen_or_parameters = {t.data_ptr() for t in (w, a, b)}
    shapes = [tuple(t.shape) for t in kept if t.data_ptr() not in frozen_or_parameters]
    assert sorted(shapes) == [(TOKENS, RANK), (TOKENS, INPUTS)]


def test_without_gradients_nothing_is_kept():
    inputs = make(trained="")
    assert not lora_linear(*inputs, mask()).requires_grad


def test_no_rows():
    x, w, bias, a, b, scaling = make((0, INPUTS))
    y = lora_linear(x, w, bias, a, b, scaling, mask(tokens=0))
    y.sum().backward()
    assert y.shape == (0, OUTPUTS)
    assert a.grad.abs().max() == 0
