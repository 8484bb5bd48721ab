"""Classes of transformers that nobody here ported: our ops only where they agree, and what they do alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import examples, tiny_module
from torch.autograd.graph import saved_tensors_hooks
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import attach_lora, trainable_parameters
from lorasmith.batching.pack import pack
from lorasmith.config import LoraConfig
from lorasmith.model.checkpointing import activation_checkpointing
from lorasmith.model.packed import packed, takes_layout
from lorasmith.types import Example

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}  # which drops by default


def adapted(kind: str, *, dropout: float = 0.0, targets: Any = "all-linear", **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES, **sizes)
    module = AutoModelForCausalLM.from_config(config).double()
    for parameter in module.parameters():
        if parameter.ndim == 1:  # some start as zeros, which hide what they do
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    lora = LoraConfig(r=4, lora_dropout=dropout, target_modules=targets)
    model = attach_lora(module, lora, family_targets=None, base_name="b", clock=DropoutClock(1)).double()
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(
    model: Any, rows: list[Example], *, together: bool, recompute: bool = False
) -> list[torch.Tensor]:
    parameters = list(trainable_parameters(model).values())
    parts = [rows] if together else [[row] for row in rows]
    steps = [batch for part in parts for batch in pack(part, 4096, share_prefixes=True)]
    with packed(model, DropoutClock(1)) as packed_rows, activation_checkpointing(model) as layers:
        layers.use(len(layers) if recompute else 0)
        losses = [packed_rows.loss_sum(packed_rows.to_device(batch)) for batch in steps]
        found = torch.autograd.grad(torch.stack(losses).sum(), parameters)
    return [torch.stack(losses).sum().detach(), *found]


@pytest.mark.parametrize("kind", ["gpt_neox", "persimmon"])
def test_a_plain_feed_forward_is_no_swiglu_whatever_its_names(kind: str) -> None:
    model = adapted(kind)
    assert takes_layout(model)
    for one, other in zip(*(gradients(model, examples(3), together=t) for t in (True, False)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["nemotron", "doge"])
def test_attention_that_does_not_go_by_the_layout_takes_one_conversation_a_row(kind: str) -> None:
    model = adapted(kind)
    assert not takes_layout(model)
    loss, *found = gradients(model, examples(3), together=False)
    assert loss.isfinite()
    assert any(gradient.abs().max() > 0 for gradient in found)


def test_a_base_that_drops_draws_the_same_again_and_leaves_the_generator_alone() -> None:
    model, before = adapted("opt", **OPT), torch.get_rng_state()
    kept = gradients(model, examples(3), together=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    for one, other in zip(kept, gradients(model, examples(3), together=True, recompute=True), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_an_adapted_head_drops_what_its_tokens_drop() -> None:
    model = adapted("llama", dropout=0.3, targets=["q_proj", "lm_head"])
    loss, *found = gradients(model, examples(3), together=True)
    assert loss.isfinite()
    assert all(gradient.abs().max() > 0 for gradient in found)


@pytest.mark.parametrize("in_place", [False, True])
def test_who_writes_into_a_norm_s_output_is_heard(in_place: bool) -> None:
    """The output is made again in the backward only as long as it is what the norm gave."""
    model = tiny_module("llama3", torch.float32)
    lora = LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear")
    model = attach_lora(model, lora, family_targets=None, base_name="b", clock=DropoutClock(1)).train()
    norm = model.get_base_model().model.layers[0].input_layernorm
    norm.register_forward_hook(lambda _, __, out: out.mul_(2.0) if in_place else out * 2.0)
    loss, *found = gradients(model, examples(3), together=True)
    loss_by_hand, *by_hand = _with_doubled_norm(lora)
    torch.testing.assert_close(loss, loss_by_hand, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, by_hand, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def _with_doubled_norm(lora: LoraConfig) -> list[torch.Tensor]:
    module = tiny_module("llama3", torch.float32)
    model = attach_lora(module, lora, family_targets=None, base_name="b", clock=DropoutClock(1)).train()
    with torch.no_grad():
        model.get_base_model().model.layers[0].input_layernorm.weight.mul_(2.0)
    return gradients(model, examples(3), together=True)


def test_no_norm_s_output_is_kept() -> None:
    module = tiny_module("llama3", torch.float32)
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    model = attach_lora(module, lora, family_targets=None, base_name="b", clock=DropoutClock(1)).train()
    outputs: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    norms = [layer.post_attention_layernorm for layer in model.get_base_model().model.layers[:-1]]
    for norm in norms:
        norm.register_forward_hook(lambda _, __, out: outputs.append(out))
    [batch] = pack(examples(3), 4096, share_prefixes=True)
    with packed(model, DropoutClock(1)) as rows:
        outputs.clear()  # of the trials by which `packed` chooses its ops
        with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = rows.loss_sum(rows.to_device(batch))
    assert loss.isfinite()
    assert len(outputs) == len(norms) > 0
    assert not {t.data_ptr() for t in kept} & {t.data_ptr() for t in outputs}
