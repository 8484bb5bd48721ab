"""The laws of numbers, on a tiny random module in float64: packing, no leak, decoding, saving.

Each takes a function that makes the module anew, and the family's target modules; raises LawBroken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import attach_lora, trainable_parameters
from lorasmith.batching.loader import Loader
from lorasmith.config import LoraConfig
from lorasmith.model.load import load_base, read_model_config
from lorasmith.model.packed import packed, takes_layout, to_device
from lorasmith.testing.law import require
from lorasmith.testing.texts import random_examples
from lorasmith.training.step import accumulate_gradients
from lorasmith.types import IGNORE_INDEX, Batch, Example

Make: TypeAlias = Callable[[], PreTrainedModel]
Targets: TypeAlias = tuple[str, ...] | None
LossAndGradients: TypeAlias = tuple[float, dict[str, Tensor]]
_CPU = torch.device("cpu")


def packed_is_one_by_one(make: Make, targets: Targets) -> None:
    """Laws 1 and 2: conversations in one row, their common beginning shared, give the loss and the LoRA
    gradients that they give alone."""
    law = "a packed row is its conversations one by one"
    model, clock = tuned(make(), targets)
    rows = random_examples(_vocab_size(make()), prefix=8)
    packed, apart = packed_loss(model, clock, step_rows(model, rows)), plain_loss(model, rows)
    require(abs(packed[0] - apart[0]) < 1e-9, law, f"the loss is {packed[0]}, one by one {apart[0]}")
    for name, gradient in packed[1].items():
        error = float((gradient - apart[1][name]).abs().max() / (apart[1][name].abs().max() + 1e-12))
        require(error < 1e-6, law, f"the gradient of {name} is off by {error:.1e} of its largest value")


def nothing_leaks(make: Make, targets: Targets) -> None:
    """Law 2: no token's output moves when another conversation in the row changes."""
    law = "no conversation sees another"
    module = make()
    rows, others = (random_examples(_vocab_size(module), 3, seed=seed) for seed in (0, 1))
    with torch.no_grad(), packed(module) as rows_module:
        before, after = (
            torch.cat([rows_module.logits(to_device(row, _CPU)) for row in step_rows(module, pair, False)])
            for pair in ([rows[0], rows[1]], [others[0], rows[1]])
        )
    count = rows[1].num_targets
    moved = float((before[-count:] - after[-count:]).abs().max())
    require(moved < 1e-10, law, f"logits move by {moved:.1e} when the conversation before them changes")


def decoding_is_one_forward_pass(make: Make, targets: Targets) -> None:
    """Law 6: greedy ids, made step by step with a cache, are the argmax of one forward pass over them all."""
    law = "step-by-step decoding is one forward pass"
    module = make().eval()
    prompt = torch.from_numpy(random_examples(_vocab_size(module), 1)[0].input_ids)[None]
    row = module.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.no_grad():
        wanted = module(input_ids=row).logits[0].argmax(-1)[prompt.shape[1] - 1 : -1]
    got = row[0, prompt.shape[1] :]
    require(torch.equal(got, wanted), law, f"{got.tolist()} instead of {wanted.tolist()}")


def saved_is_loaded(make: Make, targets: Targets) -> None:
    """Law 6: a saved module loads as the same module, config.json alone telling what it is."""
    law = "save -> load gives the same model"
    module = make().eval()
    ids = torch.from_numpy(random_examples(_vocab_size(module), 1)[0].input_ids)[None]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        module.save_pretrained(folder)
        loaded = load_base(Path(folder), read_model_config(Path(folder)), torch.float64, _CPU)
        error = float((loaded(input_ids=ids).logits - module(input_ids=ids).logits).abs().max())
    require(error < 1e-9, law, f"logits differ by {error:.1e}")


MODEL_LAWS = (packed_is_one_by_one, nothing_leaks, decoding_is_one_forward_pass, saved_is_loaded)


def tuned(
    module: PreTrainedModel, targets: Targets, *, dropout: float = 0.0, name: str = "tiny"
) -> tuple[peft.PeftModel, DropoutClock]:
    """The module under a random LoRA whose B is not zero, in training mode."""
    clock = DropoutClock(seed=3)
    config = LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False)
    model = attach_lora(module, config, family_targets=targets, base_name=name, clock=clock)
    return model.double().train(), clock


def step_rows(
    module: nn.Module, rows: Sequence[Example], share_prefixes: bool = True, max_tokens: int = 10**6
) -> tuple[Batch, ...]:
    """The conversations of one step as training lays them out for this module."""
    loader = Loader(
        rows,
        batch_size=len(rows),
        max_tokens=max_tokens,
        seed=0,
        shuffle=False,
        share_prefixes=share_prefixes,
        packed=takes_layout(module),
    )
    return loader.step(0)


def packed_loss(model: nn.Module, clock: DropoutClock, batches: Sequence[Batch]) -> LossAndGradients:
    """Loss and gradients as training takes them, over the rows of one step."""
    num_targets = sum(batch.num_targets for batch in batches)
    with packed(model, clock) as rows:
        loss = accumulate_gradients(rows, batches, num_targets)
    return loss, _taken_gradients(model)


def plain_loss(model: nn.Module, rows: Sequence[Example]) -> LossAndGradients:
    """Both as a textbook has them: one conversation at a time through the stock module, no Layout."""
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for row in rows:
        logits_TV = model(input_ids=torch.from_numpy(row.input_ids)[None].to(device)).logits[0].double()
        labels = torch.from_numpy(row.labels).to(device)
        keep = labels != IGNORE_INDEX
        total = total + nn.functional.cross_entropy(logits_TV[keep], labels[keep], reduction="sum")
        count += int(keep.sum())
    loss = total / count
    if loss.requires_grad:
        loss.backward()
    return loss.item(), _taken_gradients(model)


def _taken_gradients(model: nn.Module) -> dict[str, Tensor]:
    trained = trainable_parameters(model).items() if isinstance(model, peft.PeftModel) else ()
    gradients = {name: p.grad.clone() for name, p in trained if p.grad is not None}
    model.zero_grad()
    return gradients


def _vocab_size(module: PreTrainedModel) -> int:
    return int(module.config.get_text_config().vocab_size)
