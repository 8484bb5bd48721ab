"""Random adapters as stock peft writes them, and logits to hold models against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from modules import examples
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def write_adapter(base: Path, directory: Path, targets: list[str], **lora: Any) -> Path:
    """A LoRA whose B is not zero, over the model directory `base`, which it names as its base."""
    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    knobs = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **lora}
    config = peft.LoraConfig(target_modules=targets, base_model_name_or_path=str(base), **knobs)
    peft.get_peft_model(module, config).save_pretrained(directory)
    return directory


def with_adapter(base: Path, adapter: Path) -> nn.Module:
    """Stock peft over what AutoModelForCausalLM makes of `base`, in fp32."""
    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model: nn.Module = peft.PeftModel.from_pretrained(module, str(adapter))
    return model


def logits(module: nn.Module) -> Tensor:
    """(1, T, V) of one conversation."""
    ids = torch.from_numpy(examples()[0].input_ids)[None]
    with torch.no_grad():
        found: Tensor = module.eval()(input_ids=ids).logits.float()
    return found
