"""A packed step on CUDA: rows padded to tiles, attention and ops by CUDA's kernels, against a CPU."""

from __future__ import annotations

import pytest
import torch
from modules import examples, tiny_module

from lorasmith.model.packed import packed
from lorasmith.testing import model_laws
from lorasmith.testing.model_laws import packed_loss, step_rows

FAMILIES = ["llama3", "baichuan2", "baichuan2-13b", "chatglm3", "transnormer", "qwen2"]


def loss_and_gradients(kind, device, dtype, dropout=0.0):
    """Heads of size 16 and more, which FlexAttention takes."""
    changes = {} if kind == "baichuan2-13b" else {"hidden_size": 64}
    model, clock = model_laws.tuned(tiny_module(kind, **changes), None, dropout=dropout, name=kind)
    model.to(device, dtype)
    loss, gradients = packed_loss(model, clock, step_rows(model, examples(6, prefix=12)))
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


def test_rows_are_padded_to_whole_tiles():
    module = tiny_module("llama3", torch.float32).to("cuda")
    [batch] = step_rows(module, examples(4))
    with packed(module) as rows:
        on_device = rows.to_device(batch)
    assert on_device.input_ids.shape[1] % 128 == 0
    assert len(on_device.rows) == (batch.labels >= 0).sum()
