"""Laws 6 and 10: merged == adapter, save -> load -> save gives the same bytes, and stock peft reads what we
write as we read what it writes."""

from __future__ import annotations

import peft
import pytest
import torch
from modules import KINDS, examples, save_tiny, tiny_module, two_targets
from transformers import AutoModelForCausalLM

import lorasmith as ls
from lorasmith.adapters.lora import adapter_files
from lorasmith.model.packed import base_module

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head in full": {"modules_to_save": ["lm_head"]},
    "regex": {"target_modules": r".*\.(q_proj|down_proj)"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, fast, rslora": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
}


def trained(tmp_path, kind="llama3", **lora):
    directory = save_tiny(kind, tmp_path / "base")
    module = ls.load_module(str(directory), dtype="fp32")
    train = ls.TrainConfig(num_epochs=2, batch_size=3, learning_rate=1e-2, save_steps=100)
    ls.train(module, examples(), output_dir=tmp_path / "run", lora=ls.LoraConfig(r=4, **lora), train=train)
    return directory, tmp_path / "run"


def logits(module):
    ids = torch.from_numpy(examples()[0].input_ids)[None]
    with torch.no_grad():
        return module.eval()(input_ids=ids).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_peft_on_a_stock_model_gives_our_logits(tmp_path, variant):
    directory, run = trained(tmp_path, **VARIANTS[variant])
    stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = logits(peft.PeftModel.from_pretrained(stock, run))
    ours = logits(ls.load_module(str(directory), dtype="fp32", adapter=str(run)))
    base = logits(ls.load_module(str(directory), dtype="fp32"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - base).abs().max() > 1e-3, "training moved nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_what_stock_peft_writes_loads_here(tmp_path, kind):
    directory = save_tiny(kind, tmp_path / "base")
    stock = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=two_targets(kind), init_lora_weights=False)
    theirs = peft.get_peft_model(stock, config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = ls.load_module(str(directory), dtype="fp32", adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path):
    directory, run = trained(tmp_path)
    again = adapter_files(ls.load_module(str(directory), dtype="fp32", adapter=str(run)))
    assert again == {name: (run / name).read_bytes() for name in again}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_adapter(tmp_path, kind):
    directory, run = trained(tmp_path, kind)
    model = ls.load_module(str(directory), dtype="fp32", adapter=str(run))
    before = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, atol=1e-4, rtol=0)


def test_the_adapter_is_fp32_over_a_bf16_base(tmp_path):
    directory = save_tiny("llama3", tmp_path / "base")
    module = ls.load_module(str(directory), dtype="bf16")
    ls.train(module, examples(), output_dir=tmp_path / "run", train=ls.TrainConfig(max_steps=1))
    tensors = peft.utils.load_peft_weights(str(tmp_path / "run"))
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert base_module(module).model.embed_tokens.weight.dtype == torch.bfloat16


def test_tiny_modules_are_what_they_say():
    types = ["llama", "llama", "baichuan", "baichuan", "chatglm", "transnormer", "qwen2", "gemma2"]
    assert [tiny_module(kind).config.model_type for kind in KINDS] == types
