"""What the ports do beside the golden numbers: every way to generate, every dtype, memory, a trained head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from modules import examples, save_tiny, tiny_module
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import lorasmith as ls
from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import attach_lora
from lorasmith.batching.pack import lay_out
from lorasmith.errors import ConfigError
from lorasmith.model.checkpointing import activation_checkpointing
from lorasmith.model.packed import packed, to_device

PORTS = ("baichuan2", "baichuan2-13b", "chatglm3")
PADDED = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 9, 4, 3]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
ALONE = torch.tensor([[9, 4, 3]])


def answer(module: PreTrainedModel, prompt: Tensor = PADDED, mask: Tensor | None = MASK, **knobs) -> Tensor:  # type: ignore[no-untyped-def]
    knobs = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0, **knobs}
    mask = torch.ones_like(prompt) if mask is None else mask
    return module.generate(prompt, attention_mask=mask, **knobs)[:, prompt.shape[1] :]


@pytest.mark.parametrize("kind", PORTS)
@pytest.mark.parametrize(
    "knobs",
    [{"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}, {"repetition_penalty": 1.3}],
    ids=["beams", "no-cache", "static-cache", "penalty"],
)
def test_a_padded_row_is_answered_as_alone(kind: str, knobs: dict[str, object]) -> None:
    module = tiny_module(kind, torch.float32)
    together, alone = answer(module, **knobs), answer(module, ALONE, None, **knobs)
    if "repetition_penalty" not in knobs:  # which counts the padding as a token
        assert torch.equal(together[1:], alone)
    if knobs.keys() & {"use_cache", "cache_implementation"}:
        assert torch.equal(together, answer(module)), "the cache changes nothing"


@pytest.mark.parametrize("kind", PORTS)
def test_sampling_is_repeatable(kind: str) -> None:
    module = tiny_module(kind, torch.float32)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(answer(module, do_sample=True, top_p=0.9, temperature=0.8))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("kind", PORTS)
def test_streaming_gives_each_id_as_it_comes(kind: str) -> None:
    class Tokens(BaseStreamer):
        def __init__(self) -> None:
            self.parts: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.parts.append(value.flatten().tolist())

        def end(self) -> None:
            self.parts.append([])

    module, tokens = tiny_module(kind, torch.float32), Tokens()
    row = answer(module, ALONE, None, streamer=tokens)
    assert tokens.parts == [ALONE[0].tolist(), *([token] for token in row[0].tolist()), []]


@pytest.mark.parametrize("kind", PORTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_close_far_from_the_start(kind: str, dtype: torch.dtype) -> None:
    """Positions and biases in fp32: rounded to bf16, positions beyond 256 would fall together."""
    module = tiny_module(kind, torch.float32, max_positions=4096, initializer_range=0.1)
    ids, far = torch.randint(3, 90, (1, 12), generator=torch.manual_seed(0)), torch.arange(3000, 3012)[None]
    with torch.no_grad():
        exact = module(ids, position_ids=far).logits
        low = module.to(dtype)(ids, position_ids=far).logits
    assert torch.isfinite(low).all()
    assert (low.float() - exact).abs().max() < 12 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("kind", PORTS)
def test_rotations_and_slopes_are_fp32_in_a_bf16_model(kind: str) -> None:
    trunk = tiny_module(kind, torch.bfloat16).model
    x = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    turned = trunk.rotary_emb(x, torch.tensor([[3001]]))
    wide = [trunk._slopes_H(x)] if kind == "baichuan2-13b" else turned
    assert [tensor.dtype for tensor in wide] == [torch.float32] * len(wide)
    assert (turned is None) == (kind == "baichuan2-13b")


@pytest.mark.parametrize("kind", PORTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generation_in_sixteen_bits(kind: str, dtype: torch.dtype) -> None:
    module = tiny_module(kind, dtype)
    assert torch.equal(answer(module)[1:], answer(module, ALONE, None))


@pytest.mark.parametrize("kind", ["baichuan2", "chatglm3"])
def test_eager_and_sdpa_agree(kind: str) -> None:
    module = tiny_module(kind, torch.float32)
    assert module.config._attn_implementation == "sdpa"
    by_sdpa = module(PADDED, attention_mask=MASK).logits
    module.set_attn_implementation("eager")
    out = module(PADDED, attention_mask=MASK, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits[MASK.bool()], by_sdpa[MASK.bool()], atol=1e-5, rtol=0)
    assert (len(out.attentions), len(out.hidden_states)) == (3, 4)


def test_alibi_has_one_attention_and_says_so() -> None:
    module = tiny_module("baichuan2-13b", torch.float32)
    assert module.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="does not support"):
        module.set_attn_implementation("sdpa")


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Bytes allocated within and not freed at its end: after a forward pass, what backward needs."""
    kept: list[int] = []
    with torch.profiler.profile(profile_memory=True) as profile:
        yield kept
    kept.append(sum(event.self_cpu_memory_usage for event in profile.events()))


def test_the_measure_sees_what_is_kept() -> None:
    with kept_bytes() as kept:
        tensor = torch.ones(1000).exp() * 2
    assert kept == [tensor.untyped_storage().nbytes()]


@pytest.mark.parametrize("kind", PORTS)
def test_activation_checkpointing_saves_memory_and_changes_nothing(kind: str) -> None:
    module = tiny_module(kind, torch.float32, num_hidden_layers=8)
    clock = DropoutClock(seed=3)
    config = ls.LoraConfig(r=4, lora_dropout=0.2, init_lora_weights=False)
    model = attach_lora(module, config, family_targets=None, base_name=kind, clock=clock).train()
    batch = to_device(lay_out(examples(6)), torch.device("cpu"))
    results = []
    for wanted in (False, True):
        with activation_checkpointing(model) as layers, packed(model, clock) as rows:
            layers.use(len(layers) if wanted else 0)
            with kept_bytes() as kept:
                loss = rows.logits(batch).logsumexp(-1).sum()
            loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        results.append((kept[0], loss.item(), gradients))
    (all_kept, loss, gradients), (recomputed, loss_again, gradients_again) = results
    assert loss == loss_again
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert recomputed < all_kept / 3, (all_kept, recomputed)


def test_lora_on_a_norm_head_is_refused() -> None:
    """It could be trained but not merged: the norm of a sum is no sum of norms."""
    with pytest.raises(ConfigError, match="LoRA does not fit") as caught:
        attach_lora(
            tiny_module("baichuan2"),
            ls.LoraConfig(target_modules=["W_pack", "lm_head"]),
            family_targets=None,
            base_name="base",
            clock=DropoutClock(0),
        )
    assert "NormHead" in caught.value.why
    assert "modules_to_save" in caught.value.fix


def test_a_trained_head_goes_through_stock_peft_and_back(tmp_path: Path) -> None:
    """modules_to_save: [lm_head]: the raw head is trained, saved and loaded; its norm is taken anew."""
    base = save_tiny("baichuan2", tmp_path / "base")
    raw = load_file(base / "model.safetensors")["lm_head.weight"]
    module = ls.load_module(str(base), dtype="fp32")
    train = ls.TrainConfig(num_epochs=3, batch_size=3, learning_rate=1e-2, warmup_ratio=0.0)
    lora = ls.LoraConfig(r=4, modules_to_save=["lm_head"])
    ls.train(module, examples(), output_dir=tmp_path / "run", lora=lora, train=train)
    saved = load_file(tmp_path / "run/adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert (saved - raw).abs().max() > 1e-3, "the head was trained"
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "run").eval()
    ours = ls.load_module(str(base), dtype="fp32", adapter=str(tmp_path / "run"))
    with torch.no_grad():
        torch.testing.assert_close(ours(ALONE).logits, theirs(ALONE).logits, atol=1e-5, rtol=0)
        hidden = ours.get_base_model().model(ALONE).last_hidden_state
        expected = hidden @ torch.nn.functional.normalize(saved, dim=-1).T
        torch.testing.assert_close(ours(ALONE).logits, expected, atol=1e-5, rtol=0)
        merged = ours.merge_and_unload()
        torch.testing.assert_close(merged(ALONE).logits, expected, atol=1e-4, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")["lm_head.weight"], saved)
