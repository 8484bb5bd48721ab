"""A packed step on CUDA: rows padded to tiles, attention and ops by CUDA's kernels, against a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from modules import examples, tiny_module

from lorasmith.model.fp8 import fp8_base
from lorasmith.model.packed import packed
from lorasmith.ops.transfer import on_device
from lorasmith.testing import model_laws
from lorasmith.testing.model_laws import packed_loss, step_rows

needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs fp8"
)
FAMILIES = ["llama3", "baichuan2", "baichuan2-13b", "chatglm3", "transnormer", "qwen2"]


def loss_and_gradients(kind, device, dtype, dropout=0.0, fp8=False):
    """Heads of size 16 and more, which FlexAttention takes; as in training the adapter stays in fp32."""
    changes = {} if kind == "baichuan2-13b" else {"hidden_size": 64}
    model, clock = model_laws.tuned(tiny_module(kind, **changes), None, dropout=dropout, name=kind)
    model.to(device, torch.float32)
    for parameter in model.parameters():  # not buffers: angles of bf16 would be another model's
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    rows = step_rows(model, examples(6, prefix=12))
    with fp8_base(model, enabled=fp8):
        loss, gradients = packed_loss(model, clock, rows)
    return loss, {name: gradient.cpu().double() for name, gradient in gradients.items()}


def relative_error(left, right):
    return max(float((g - right[n]).abs().max() / right[n].abs().max()) for n, g in left.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_in_fp32_is_that_of_a_cpu(kind, dropout):
    (loss, gradients), (true_loss, true) = (
        loss_and_gradients(kind, device, torch.float32, dropout) for device in ("cuda", "cpu")
    )
    assert loss == pytest.approx(true_loss, rel=1e-5)
    assert relative_error(gradients, true) < 1e-3


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_in_bf16_is_near(kind):
    loss, _ = loss_and_gradients(kind, "cuda", torch.bfloat16)
    true_loss, _ = loss_and_gradients(kind, "cpu", torch.float32)
    assert loss == pytest.approx(true_loss, rel=3e-2)


@pytest.mark.parametrize(("row_length", "length"), [(None, 128), (1000, 1024), (2048, 2048)])
def test_rows_are_padded_to_whole_tiles_or_to_one_length(row_length, length):
    module = tiny_module("llama3", torch.float32).to("cuda")
    [batch] = step_rows(module, examples(4))
    with packed(module) as rows:
        rows.row_length = row_length
        on_device = rows.to_device(batch)
    assert on_device.input_ids.shape[1] == length
    assert len(on_device.rows) == (batch.labels >= 0).sum()


def test_copies_through_pinned_memory_do_not_overtake_each_other():
    arrays = [np.full(100_000, number) for number in range(50)]
    tensors = [on_device(array, "cuda") for array in arrays]
    assert [int(tensor.sum()) for tensor in tensors] == [100_000 * number for number in range(50)]


@needs_fp8
@pytest.mark.parametrize("kind", ["llama3", "deepseek", "qwen2"])
def test_a_step_in_fp8_is_that_of_its_definition(kind):
    """A CPU multiplies the same codes in fp32; the GPU's own rounding moves a few of them."""
    loss, gradients = loss_and_gradients(kind, "cuda", torch.bfloat16, fp8=True)
    true_loss, true = loss_and_gradients(kind, "cpu", torch.bfloat16, fp8=True)
    assert loss == pytest.approx(true_loss, rel=3e-2)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients.keys() == true.keys()
