"""Weights as a file has them begin anywhere; those of a run begin at a cache line's border."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from modules import examples, save_tiny, tiny_module
from transformers import LlamaConfig, LlamaForCausalLM

import lorasmith as ls
from lorasmith.model.load import align_weights
from lorasmith.runs.progress import SilentReporter


def shifted(weight: torch.Tensor) -> torch.Tensor:
    """The same values eight bytes beyond a border."""
    room = torch.empty(weight.nbytes + 8, dtype=torch.uint8)
    moved = room[8:].view(weight.dtype).view(weight.shape)
    return moved.copy_(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_ties_stay(dtype: torch.dtype) -> None:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    module = LlamaForCausalLM(config).to(dtype)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    for weight in module.parameters():
        weight.data = shifted(weight.data)
        assert weight.data_ptr() % 64 == 8
    align_weights(module)
    assert module.lm_head.weight is module.get_input_embeddings().weight
    for name, weight in module.named_parameters():
        assert weight.data_ptr() % 64 == 0
        assert torch.equal(weight, before[name])


def test_weights_that_lie_well_are_not_copied() -> None:
    module = tiny_module("llama3", torch.float32)
    places = [weight.data_ptr() for weight in module.parameters()]
    align_weights(module)
    assert [weight.data_ptr() for weight in module.parameters()] == places


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_a_run_lets_go_of_a_file_whose_weights_lie_badly(tmp_path: Path) -> None:
    base = save_tiny("llama3", tmp_path / "base")
    file = base / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    spaces = 8 + (-(8 + length) % 64)  # headers may end in spaces: the weights begin 8 bytes beyond a border
    file.write_bytes(
        (length + spaces).to_bytes(8, "little") + data[8 : 8 + length] + b" " * spaces + data[8 + length :]
    )
    module = ls.load_module(str(base), dtype="fp32")
    assert {weight.data_ptr() % 64 for weight in module.parameters()} != {0}
    assert str(file) in Path("/proc/self/maps").read_text()
    train = ls.TrainConfig(max_steps=1, batch_size=2)
    ls.train(module, examples(), output_dir=tmp_path / "run", train=train, reporter=SilentReporter())
    assert {weight.data_ptr() % 64 for weight in module.parameters() if not weight.requires_grad} == {0}
    assert str(file) not in Path("/proc/self/maps").read_text()
