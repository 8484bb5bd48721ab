"""The fused LoRA linear against autograd over its formula, in values, gradients, dtypes and memory."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lorasmith.ops import lora_linear as room
from lorasmith.ops.dropout import DropoutMask, dropout_key, token_hashes
from lorasmith.ops.lora_linear import lora_linear, lora_linear_reference, swiglu_lora_linear
from lorasmith.ops.rms_norm import traced_rms_norm
from lorasmith.ops.swiglu import reference_swiglu, swiglu

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
    key = dropout_key(0, 3, "q")
    return DropoutMask(p, key, token_hashes(torch.arange(100, 100 + tokens), key)) if p else None


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


def gated(trained="guab"):
    """gate and up in the place of x, and the rest of `make`'s operands."""
    _, *rest = make(trained=trained)
    generator = torch.Generator().manual_seed(1)
    halves = torch.randn(2, 1, TOKENS, INPUTS, generator=generator, dtype=torch.float64)
    gate, up = (half.clone().requires_grad_(name in trained) for half, name in zip(halves, "gu", strict=True))
    return [gate, up, *rest]


@pytest.mark.parametrize("p", [0, 0.4])
@pytest.mark.parametrize("trained", ["guab", "gab", "uab", "ab", "gu"])
def test_over_swiglu_it_is_the_formula(p, trained):
    def formula(gate, up, *rest):
        return lora_linear_reference(reference_swiglu(gate, up), *rest)

    ours, textbook = (outcome(f, gated(trained), mask(p)) for f in (swiglu_lora_linear, formula))
    for left, right in zip(ours, textbook, strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


def test_over_swiglu_gradients_are_the_differences():
    gate, up, w, bias, a, b, scaling = gated()
    drawn = mask()
    torch.autograd.gradcheck(
        lambda gate, up, a, b: swiglu_lora_linear(gate, up, w, bias, a, b, scaling, drawn), (gate, up, a, b)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_swiglu_no_bit_differs_from_one_after_the_other(dtype):
    operands = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in gated()[:-1]]
    apart = outcome(lambda gate, up, *rest: lora_linear(swiglu(gate, up), *rest), [*operands, 1.7], mask())
    for left, right in zip(outcome(swiglu_lora_linear, [*operands, 1.7], mask()), apart, strict=True):
        assert torch.equal(left, right)


def test_over_swiglu_nothing_of_the_product_s_size_is_kept():
    gate, up, *rest = gated()
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        swiglu_lora_linear(gate, up, *rest, mask())
    large = [x for x in kept if x.numel() >= gate.numel() and x is not rest[0]]
    assert {x.data_ptr() for x in large} <= {gate.data_ptr(), up.data_ptr(), rest[0].data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_behind_a_norm_no_bit_differs_and_nothing_is_kept_but_the_norm_s_own(dtype):
    x, _, _, *pair = (t.detach().to(dtype) if isinstance(t, torch.Tensor) else t for t in make(bias=False))
    weights, gain = [torch.randn(OUTPUTS, INPUTS).to(dtype) for _ in range(3)], torch.randn(INPUTS).to(dtype)
    found = []
    for remade in (False, True):
        leaf, a, b = (t.clone().requires_grad_() for t in (x, *pair[:2]))
        kept = []
        with saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            out, normed = traced_rms_norm(leaf, gain, 1e-6)
            origin = normed if remade else None
            ys = [lora_linear(out, w, None, a, b, 1.7, mask(), origin) for w in weights]
        assert any(t.data_ptr() == out.data_ptr() for t in kept) is not remade
        torch.stack(ys).float().square().sum().backward()
        found.append([torch.stack(ys), leaf.grad, a.grad, b.grad])
        assert normed.remade._made is None, "the last of the three has dropped it"
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


def test_the_mask_is_the_one_drawn_elsewhere():
    """With A and B that pass one feature through, y shows the mask itself."""
    drawn, eye = mask(), torch.eye(INPUTS, dtype=torch.float64)
    ones = torch.ones(TOKENS, INPUTS, dtype=torch.float64)
    y = lora_linear(ones, torch.zeros_like(eye), None, eye, eye, 1.0, drawn)
    assert torch.equal(y != 0, drawn.factors(INPUTS, torch.float64) != 0)
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
