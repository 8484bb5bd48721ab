"""The reference cases merged by our verb: logits of the reference implementations with their adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorasmith as ls

NATIVE = ("baichuan2_7b_a", "baichuan2_7b_b", "chatglm3_a", "chatglm3_b")
ORIGINAL = (*NATIVE, "baichuan2_13b_alibi", "llama3_a", "deepseek_a", "transnormer_1b", "transnormer_7b")


@pytest.mark.parametrize(
    ("case", "layout"), [*((c, "original") for c in ORIGINAL), *((c, "native") for c in NATIVE)]
)
def test_merged_logits(shared: Path, tmp_path: Path, case: str, layout: str) -> None:
    base = shared / "golden/models" / case
    merged = ls.merge(
        base / "lora", output_dir=tmp_path / "merged", layout=layout, base=str(base), dtype="fp32"
    )
    inputs, expected = load_file(base / "inputs.safetensors"), load_file(base / "lora/expected.safetensors")
    if layout == "native":
        module = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    else:
        module = ls.load_module(str(merged), dtype="fp32")
    real_BT = inputs["attention_mask"].bool()
    with torch.no_grad():
        found = module(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    atol = 4e-4 if "transnormer" in case else 5e-5  # of the README beside the reference data
    torch.testing.assert_close(found[real_BT], expected["logits_merged"][real_BT], atol=atol, rtol=0)
