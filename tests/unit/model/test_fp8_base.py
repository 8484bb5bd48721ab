"""A base in fp8 while a run trains: near the base it was made of, gone afterwards, never in a file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
from modules import examples, save_tiny, tiny_module
from safetensors.torch import load_file

import lorasmith as ls
from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import attach_lora
from lorasmith.errors import CheckpointError, ConfigError
from lorasmith.model.checkpointing import activation_checkpointing
from lorasmith.model.fp8 import fp8_base, frozen_linears, require_capability, require_fp8
from lorasmith.model.packed import packed
from lorasmith.ops.fp8 import Fp8Weight
from lorasmith.runs.metrics import read_metrics
from lorasmith.runs.progress import SilentReporter
from lorasmith.testing import model_laws
from lorasmith.testing.model_laws import packed_loss, step_rows
from lorasmith.testing.texts import random_examples

ASSETS = Path(str(resources.files("lorasmith") / "assets"))
KINDS = ["llama3", "deepseek", "baichuan2", "chatglm3", "qwen2", "gemma2"]
"""Those whose sides are multiples of 16."""
TRAIN = {"num_epochs": 2, "batch_size": 3, "save_steps": 3, "logging_steps": 1, "learning_rate": 1e-2}


def tuned(kind, **options):
    """A base in fp32 under an adapter that is not zero, both of the size that trained weights have: of wide
    random ones three layers make noise."""
    module = tiny_module(kind, initializer_range=0.1)
    model, clock = model_laws.tuned(module, None, name=kind, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.1 if "lora_" in name else 1)
    return model.float(), clock


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_near_that_of_the_base_itself(kind):
    model, clock = tuned(kind)
    rows = step_rows(model, examples(6))
    loss, gradients = packed_loss(model, clock, rows)
    with fp8_base(model, enabled=True):
        rounded_loss, rounded = packed_loss(model, clock, rows)
    assert loss != rounded_loss
    assert rounded_loss == pytest.approx(loss, rel=0.03)
    ours, true = (torch.cat([g[name].flatten() for name in gradients]) for g in (rounded, gradients))
    assert torch.cosine_similarity(ours, true, dim=0) > 0.9


def test_logits_of_the_embedded_model_are_near():
    """A model that was trained: benchmarks/fp8.py has the numbers of this and of whole runs."""
    model = ls.load_module(str(ASSETS / "tiny"), dtype="fp32").requires_grad_(False)
    rows = step_rows(model, random_examples(3584, 4, longest=60))
    with torch.no_grad(), packed(model) as module:
        own = module.logits(module.to_device(rows[0]))
        with fp8_base(model, enabled=True):
            rounded = module.logits(module.to_device(rows[0]))
    assert 0.01 < (own - rounded).norm() / own.norm() < 0.2


def test_recomputed_layers_see_the_same_weights():
    model, clock = tuned("llama3", dropout=0.3)
    rows = step_rows(model, examples(6))
    with fp8_base(model, enabled=True), activation_checkpointing(model) as layers:
        loss, kept = packed_loss(model, clock, rows)
        layers.use(len(layers))
        again, recomputed = packed_loss(model, clock, rows)
    assert loss == again
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_what_is_in_fp8_and_what_is_not():
    model, _ = tuned("llama3")
    with fp8_base(model, enabled=True):
        quantised = {name for name, p in model.named_parameters() if isinstance(p, Fp8Weight)}
        assert len(quantised) == 3 * 7
        assert all("proj" in name and "lora_" not in name for name in quantised)
    with fp8_base(model, enabled=False):
        assert not any(isinstance(p, Fp8Weight) for p in model.parameters())


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama3", "qwen2"])  # with a head of its own, and a tied one
def test_neither_head_nor_embedding_is_in_fp8_however_adapted(kind, lora):
    module = tiny_module(kind, torch.float32)
    config, clock = ls.LoraConfig(r=4, **lora), DropoutClock(seed=0)
    model = attach_lora(module, config, family_targets=None, base_name="b", clock=clock)
    names = {part: name for name, part in model.named_modules()}
    linears = [names[part] for part in frozen_linears(model)]
    assert len(linears) == 3 * 7
    assert all("layers" in name for name in linears)


def test_the_own_weights_come_back_even_after_an_error():
    model, _ = tuned("llama3")
    linears = frozen_linears(model)
    linears[0].weight = linears[1].weight  # shared
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(KeyError), fp8_base(model, enabled=True):
        _fails_over_a_shared_weight(*linears[:2])
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p and torch.equal(p, value) for name, (p, value) in before.items())


def _fails_over_a_shared_weight(one, other):
    assert one.weight is other.weight
    raise KeyError("in training")


def fit(base, run, **changes):
    module = ls.load_module(str(base), dtype="fp32")
    options = {"resume": changes.pop("resume", False), "allow_changes": changes.pop("allow", ())}
    lora = changes.pop("lora", ls.LoraConfig(r=4, lora_dropout=0.2))
    train = ls.TrainConfig(**TRAIN | changes)
    ls.train(
        module, examples(9), output_dir=run, lora=lora, train=train, reporter=SilentReporter(), **options
    )
    return module


def test_a_run_in_fp8_writes_the_files_of_any_run_and_leaves_the_base_alone(tmp_path):
    base = save_tiny("llama3", tmp_path / "base")
    plain, rounded = tmp_path / "plain", tmp_path / "rounded"
    fit(base, plain)
    module = fit(base, rounded, fp8_base=True)
    stored = load_file(base / "model.safetensors")
    assert all(
        torch.equal(p, stored[name.replace(".base_layer", "")])
        for name, p in module.named_parameters()
        if "lora_" not in name
    )
    left, right = (load_file(run / "adapter_model.safetensors") for run in (plain, rounded))
    shapes = [{name: (t.shape, t.dtype) for name, t in side.items()} for side in (left, right)]
    assert shapes[0] == shapes[1]
    assert any(not torch.equal(left[name], right[name]) for name in left)
    assert (plain / "adapter_config.json").read_bytes() == (rounded / "adapter_config.json").read_bytes()
    losses = [[line["loss"] for line in read_metrics(run) if "loss" in line] for run in (plain, rounded)]
    assert losses[0] == pytest.approx(losses[1], rel=0.3)


def test_a_merge_reads_the_base_s_own_weights(tmp_path):
    """The merged weights are W + s B A of the stored W, to the last bit but one rounding."""
    base, run = save_tiny("llama3", tmp_path / "base"), tmp_path / "run"
    fit(base, run, fp8_base=True)
    ls.merge(run, output_dir=tmp_path / "merged", base=str(base))
    stored, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    adapter = load_file(run / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    expected = stored[f"{name}.weight"] + 8 * b @ a
    torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-6, atol=1e-6)
    assert b.any()
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(merged[norm], stored[norm])


def test_a_resumed_run_in_fp8_is_the_uninterrupted_run(tmp_path):
    base = save_tiny("llama3", tmp_path / "base")
    fit(base, tmp_path / "cut", fp8_base=True, num_epochs=1, lr_scheduler="constant", warmup_ratio=0.0)
    fit(base, tmp_path / "long", fp8_base=True, lr_scheduler="constant", warmup_ratio=0.0)
    again = {"resume": True, "allow": ("train.num_epochs",), "lr_scheduler": "constant", "warmup_ratio": 0.0}
    fit(base, tmp_path / "cut", fp8_base=True, **again)
    left, right = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("cut", "long"))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_resume_refuses_the_other_base(tmp_path):
    base, run = save_tiny("llama3", tmp_path / "base"), tmp_path / "run"
    fit(base, run, num_epochs=1)
    with pytest.raises(CheckpointError, match=r"train\.fp8_base  false  true"):
        fit(base, run, num_epochs=1, fp8_base=True, resume=True)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_peft_s_own_variants_run_over_it(tmp_path, lora):
    base = save_tiny("llama3", tmp_path / "base")
    fit(base, tmp_path / "run", fp8_base=True, num_epochs=1, lora=ls.LoraConfig(r=4, **lora))
    assert (tmp_path / "run/adapter_model.safetensors").exists()


def test_what_cannot_be_done_is_said_before_anything_is_written(tmp_path):
    require_fp8(tiny_module("llama3", torch.bfloat16))
    with pytest.raises(ConfigError, match="made from bf16 or fp32 weights"):
        require_fp8(tiny_module("llama3", torch.float16))
    with pytest.raises(ConfigError, match="no linear layer"):
        require_fp8(tiny_module("llama3", torch.float32, hidden_size=40, intermediate_size=24))
    with pytest.raises(ConfigError, match=r"NVIDIA A10 does not multiply.*\n.*\n.*8\.6; fp8 begins at 8\.9"):
        require_capability("NVIDIA A10", (8, 6))
    require_capability("NVIDIA L4", (8, 9))
    odd = tiny_module("llama3", torch.float32, hidden_size=40, intermediate_size=24)
    odd.save_pretrained(tmp_path / "odd")
    with pytest.raises(ConfigError, match="no linear layer"):
        fit(tmp_path / "odd", tmp_path / "run", fp8_base=True)
    assert not Path(tmp_path / "run").exists()
