"""Whether this machine computes what training relies on: one tiny random model, its step taken several ways.

In the dtype and on the device of a real run, so that a faulty kernel, driver or library shows here first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import attach_lora
from lorasmith.config import LoraConfig
from lorasmith.doctor.check import Check
from lorasmith.families.opening import open_family
from lorasmith.model.checkpointing import activation_checkpointing
from lorasmith.model.dtype import DTYPE_NAMES, resolve_device, resolve_dtype
from lorasmith.model.load import hidden_size
from lorasmith.model.plugin_classes import family_config
from lorasmith.testing.model_laws import LossAndGradients, Targets, packed_loss, plain_loss, step_rows
from lorasmith.testing.texts import random_examples
from lorasmith.types import Example

_VOCAB = 96
_TINY = {
    "vocab_size": _VOCAB,
    "padded_vocab_size": _VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "multi_query_group_num": 2,
    "head_dim": 16,
    "kv_channels": 16,
    "decoder_embed_dim": 64,
    "hidden_dim": 64,
    "glu_dim": 96,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Sizes by the names that config classes have for them; what a class does not have is left out."""
_LAYERS = ("num_hidden_layers", "num_layers", "decoder_layers")

_BOUNDS = {torch.float32: (1e-5, 0.9999), torch.float16: (2e-2, 0.98), torch.bfloat16: (2e-2, 0.98)}
"""Largest relative difference of the losses and smallest cosine of a gradient: 16-bit sums differ by order.
Measured on a dozen classes: 2e-7 and 1.00000 at most in fp32, 3e-3 and 0.9955 in bf16."""


@dataclass(frozen=True)
class Agreement:
    """Two ways to take one step."""

    loss: float
    """Relative difference of the losses."""
    cosine: float
    """The smallest over the trained tensors; 1 where both are zero."""
    worst: str
    """The name of that tensor."""


@dataclass(frozen=True)
class Subject:
    """A tiny random model under a random LoRA, and the conversations of its one step."""

    base: PreTrainedModel
    model: nn.Module
    clock: DropoutClock
    rows: Sequence[Example]
    dtype: torch.dtype


def numerics_checks(directory: Path | None, family: str) -> Iterator[Check]:
    """`directory` None: a tiny Llama. Raises: SetupError, FamilyError for one that cannot be opened."""
    config, targets, dtype, device = _chosen(directory, family)
    try:
        config = tiny_config(config)
        yield adapter_off_check(config, targets, dtype, device)
    except Exception as error:  # a class that cannot be shrunk says so in its own way, and is no fault
        reason = f"no tiny {config.model_type} could be made: {type(error).__name__}: {error}"[:200]
        yield Check("numerics", "warn", reason, "`lorasmith doctor` without MODEL tries a tiny Llama")
        return
    subject = tiny_subject(config, targets, dtype, device)
    whole = packed_loss(subject.model, subject.clock, step_rows(subject.model, subject.rows))
    for name, other in other_ways(subject):
        yield told(name, agreement(whole, other), dtype)


def other_ways(subject: Subject) -> Iterator[tuple[str, LossAndGradients]]:
    """The subject's step as no packed row takes it, by the name of the check."""
    model, clock, rows = subject.model, subject.clock, subject.rows
    yield "packed = one by one", plain_loss(model, rows)
    longest = max(len(row) for row in rows)
    yield "micro-batch cuts", packed_loss(model, clock, step_rows(model, rows, max_tokens=longest))
    with activation_checkpointing(model) as layers:
        layers.use(len(layers))
        yield "checkpointing", packed_loss(model, clock, step_rows(model, rows))


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same class, kind of attention and switches, in sizes that take milliseconds."""
    tree = config.to_dict()
    layers = {tree[name] for name in _LAYERS if name in tree}
    tree |= {name: size for name, size in _TINY.items() if name in tree}
    of_layers = [name for name, value in tree.items() if isinstance(value, list) and len(value) in layers]
    tree |= {name: tree[name][: _TINY["num_layers"]] for name in of_layers}
    tiny: PretrainedConfig = type(config).from_dict(tree)
    return tiny


def tiny_subject(
    config: PretrainedConfig, targets: Targets, dtype: torch.dtype, device: torch.device
) -> Subject:
    """Always the same weights. LoRA's own are fp32, as in training, and its B is not zero."""
    base = _random_module(config, dtype, device)
    clock = DropoutClock(seed=3)
    lora = LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False)
    model = attach_lora(base, lora, family_targets=targets, base_name="tiny", clock=clock)
    rows = random_examples(int(config.get_text_config().vocab_size), prefix=8)
    return Subject(base, model.train(), clock, rows, dtype)


def adapter_off_check(
    config: PretrainedConfig, targets: Targets, dtype: torch.dtype, device: torch.device
) -> Check:
    """The base under a switched-off adapter is the base."""
    subject = tiny_subject(config, targets, dtype, device)
    ids = torch.from_numpy(subject.rows[0].input_ids)[None].to(device)
    with torch.no_grad():
        alone = _random_module(config, dtype, device)(input_ids=ids).logits.float()
        with subject.model.eval().disable_adapter():  # type: ignore[operator]
            off = subject.model(input_ids=ids).logits.float()
        on = subject.model(input_ids=ids).logits.float()
    difference, moved = float((off - alone).abs().max()), float((on - alone).abs().max())
    found = f"logits differ by {difference:.1e}; the adapter moves them by {moved:.1e}"
    held = difference <= _BOUNDS[dtype][0] * float(alone.abs().max()) and moved > 0
    return _check("adapter off = base", held, found)


def agreement(one: LossAndGradients, other: LossAndGradients) -> Agreement:
    cosines = {name: _cosine(one[1][name], other[1][name]) for name in one[1]}
    worst = min(cosines, key=lambda name: cosines[name])
    return Agreement(abs(one[0] - other[0]) / abs(other[0]), cosines[worst], worst)


def told(name: str, found: Agreement, dtype: torch.dtype) -> Check:
    """Held to what the order of sums explains in this dtype; NaN is held to be wrong."""
    loss, cosine = _BOUNDS[dtype]
    line = (
        f"{DTYPE_NAMES[dtype]}: loss differs by {found.loss:.1e}, gradient cosine {found.cosine:.6f} or more"
    )
    held = found.loss <= loss and found.cosine >= cosine
    return _check(name, held, line if held else f"{line} ({found.worst})")


def _chosen(
    directory: Path | None, family: str
) -> tuple[PretrainedConfig, Targets, torch.dtype, torch.device]:
    """The config to shrink, what LoRA adapts in it, and the dtype and device of a run of this model."""
    device = resolve_device("auto")
    if directory is None:
        return LlamaConfig(), None, resolve_dtype("auto", device), device
    found = open_family(directory, family)
    config = family_config(directory, found)
    return config, found.target_modules, resolve_dtype("auto", device, hidden_size(config)), device


def _random_module(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        module: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return module.to(device=device, dtype=dtype).eval()


def _cosine(one: Tensor, other: Tensor) -> float:
    a, b = one.double().flatten(), other.double().flatten()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else float(bool((a == b).all()))


def _check(name: str, held: bool, found: str) -> Check:
    remedy = "" if held else "do not train here: try model.dtype fp32, other drivers or torch; then report it"
    return Check(name, "ok" if held else "fail", found, remedy)
