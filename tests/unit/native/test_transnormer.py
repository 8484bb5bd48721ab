"""The module beside its parity: files, sizes, dtypes, generation from a constant state, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import VOCAB, save_tiny, tiny_module
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.streamers import BaseStreamer

import lorasmith as ls
from lorasmith.attention.layout import LAYOUT_ATTENTION
from lorasmith.errors import FamilyError, SetupError
from lorasmith.memory.estimate import adapted_on_meta, count_parameters
from lorasmith.model.checkpointing import activation_checkpointing
from lorasmith.model.load import empty_module, read_model_config
from lorasmith.model.packed import packed, takes_layout
from lorasmith.native.transnormer import TransNormerConfig, layer_decays

TARGETS = ("qkvu_proj", "out_proj", "l1", "l2", "l3")
SIZES = {
    "385M": {},
    "1B": {
        "decoder_embed_dim": 2048,
        "decoder_layers": 16,
        "decoder_attention_heads": 16,
        "hidden_dim": 2048,
        "glu_dim": 5632,
    },
    "7B": {
        "decoder_embed_dim": 4096,
        "decoder_layers": 30,
        "decoder_attention_heads": 32,
        "hidden_dim": 4096,
        "glu_dim": 11008,
        "no_scale_embedding": True,
        "model_max_length": 8192,
    },
}


def original_config(**changes: Any) -> dict[str, Any]:
    """As the authors publish it: without model_type and without a word on tying."""
    tree = {
        "architectures": ["TransnormerForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM"},
        "torch_dtype": "bfloat16",
        "norm_type": "simplermsnorm",
        "linear_act_fun": "swish",
        "bias": False,
    }
    return {**tree, **changes}


def write_config(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(original_config(**changes)))
    return directory


@pytest.mark.parametrize(
    ("size", "parameters"), [("385M", 398_984_192), ("1B", 1_020_266_496), ("7B", 6_836_719_616)]
)
def test_published_sizes(tmp_path: Path, size: str, parameters: int) -> None:
    config = read_model_config(write_config(tmp_path, **SIZES[size]))
    assert sum(p.numel() for p in empty_module(config).parameters()) == parameters
    untied = read_model_config(write_config(tmp_path, **SIZES[size], tie_word_embeddings=False))
    head = config.vocab_size * config.hidden_size
    assert sum(p.numel() for p in empty_module(untied).parameters()) == parameters + head


def test_lora_of_the_tutorial_on_1b(tmp_path: Path) -> None:
    config = read_model_config(write_config(tmp_path, **SIZES["1B"]))
    count = count_parameters(adapted_on_meta(config, ls.LoraConfig(r=8), TARGETS))
    assert (count.trainable, count.total) == (4_784_128, 1_020_266_496 + 4_784_128)


def test_the_published_configs_as_they_are(shared: Path, tmp_path: Path) -> None:
    for size in ("1B", "7B"):
        text = (shared / f"data/configs/TransNormerLLM-{size}.config.json").read_text()
        (tmp_path / "config.json").write_text(text)
        theirs, ours = read_model_config(tmp_path), TransNormerConfig(**SIZES[size])
        assert layer_decays(theirs) == layer_decays(ours)
        assert theirs.glu_dim == ours.glu_dim
        assert theirs.max_position_embeddings == ours.max_position_embeddings


@pytest.mark.parametrize(
    "change",
    [
        {"linear_act_fun": "relu"},
        {"norm_type": "layernorm"},
        {"bias": True},
        {"linear_use_lrpe_list": [1]},
        {"hidden_dim": 30},
    ],
)
def test_variants_that_nobody_published_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(FamilyError):
        read_model_config(write_config(tmp_path, **change))


def loaded(directory: Path, **options: Any) -> Any:
    return ls.load_module(str(directory), **{"dtype": "fp32", **options})


def logits(module: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(input_ids=ids, **options).logits
    return result


def some_ids(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_files_keep_the_original_names_and_bytes(tmp_path: Path) -> None:
    save_tiny("transnormer", tmp_path / "one")
    names = set(load_file(tmp_path / "one/model.safetensors"))
    layer_names = {f"token_mixer.{name}.weight" for name in ("qkvu_proj", "out_proj")}
    layer_names |= {f"channel_mixer.{name}.weight" for name in ("l1", "l2", "l3")}
    expected = {f"model.layers.{layer}.{name}" for layer in range(3) for name in layer_names}
    expected |= {"model.embed_tokens.weight", "model.layers.0.token_mixer.lrpe.theta"}
    assert names == expected
    loaded(tmp_path / "one").save_pretrained(tmp_path / "two")
    files = [(tmp_path / copy / "model.safetensors").read_bytes() for copy in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_the_file_counts_only_when_untied(tmp_path: Path, tied: bool) -> None:
    directory = save_tiny("transnormer", tmp_path)
    weights = load_file(directory / "model.safetensors")
    head = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file({**weights, "lm_head.weight": head}, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    module = loaded(directory)
    assert (module.lm_head.weight is module.model.embed_tokens.weight) == tied
    assert torch.equal(module.lm_head.weight, weights["model.embed_tokens.weight"] if tied else head)


def test_theta_is_loaded_and_everything_else_is_accounted_for(tmp_path: Path) -> None:
    directory = save_tiny("transnormer", tmp_path)
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.0.token_mixer.lrpe.theta"
    first = 10000.0 ** (-2 * torch.arange(24).view(6, 1, 4) / 24)
    torch.testing.assert_close(weights[name], first)
    changed = {**weights, name: weights[name] * 1.05}
    save_file(changed, directory / "model.safetensors", {"format": "pt"})
    for dtype in ("fp32", "bf16"):
        theta = loaded(directory, dtype=dtype).get_parameter(name)
        assert torch.equal(theta, changed[name]), "phases stay fp32 in every dtype"
    save_file({**changed, "model.stray": torch.zeros(2)}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(SetupError, match=r"unknown: model\.stray"):
        loaded(directory)


def test_a_module_loaded_through_meta_computes_as_the_one_that_was_saved(tmp_path: Path) -> None:
    module = tiny_module("transnormer", torch.float32)
    module.save_pretrained(tmp_path)
    assert not list(module.buffers()), "nothing that loading could leave without values"
    assert torch.equal(logits(loaded(tmp_path), some_ids()), logits(module, some_ids()))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(stock, some_ids()), logits(module, some_ids()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    exact = logits(tiny_module("transnormer", torch.float32), some_ids(1, 300))
    module = tiny_module("transnormer", dtype)
    half = logits(module, some_ids(1, 300))
    assert half.dtype == dtype
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()
    new = module.generate(some_ids(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert new.shape == (2, 13)


def test_bf16_tells_far_positions_apart() -> None:
    """What counts is how far apart two tokens are, also where bf16 has no integers any more."""
    module = tiny_module("transnormer", torch.bfloat16)
    module.model.layers[0].token_mixer.lrpe.float()
    ids, positions = some_ids(1, 40), torch.arange(40)[None]
    near, far = (logits(module, ids, position_ids=positions + first) for first in (0, 2000))
    assert (near - far).abs().max() < 0.02 * near.abs().max()


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_generation_from_the_state_is_generation_without_it(settings: str) -> None:
    module = tiny_module("transnormer")
    ids = some_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    answers = []
    for use_cache in (True, False, True):
        torch.manual_seed(5)
        options = {**SETTINGS[settings], "max_new_tokens": 10, "eos_token_id": None, "use_cache": use_cache}
        answers.append(module.generate(ids, attention_mask=mask, **options))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2]), "a new prompt starts afresh"
    assert len(answers[0][:, 9:].unique()) > 3


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ids.append(-1)


def test_streaming() -> None:
    module, listener, ids = tiny_module("transnormer"), Listener(), some_ids(1, 5)
    result = module.generate(
        ids, max_new_tokens=7, do_sample=False, eos_token_id=None, streamer=listener, pad_token_id=0
    )
    assert listener.ids == [*result[0].tolist(), -1]


def test_the_state_never_grows() -> None:
    module = tiny_module("transnormer")
    cache = module(input_ids=some_ids(2, 5)).past_key_values
    size = sum(state.nbytes for state in cache.states)
    for _ in range(3):
        module(input_ids=some_ids(2, 1), past_key_values=cache)
    module(input_ids=some_ids(2, 100), past_key_values=cache)
    assert sum(state.nbytes for state in cache.states) == size
    assert cache.get_seq_length() == 108
    assert [tuple(state.shape) for state in cache.states] == [(2, 6, 8, 4), (2, 6, 4, 4), (2, 6, 4, 4)]


def test_a_conversation_goes_on_from_its_cache() -> None:
    module = tiny_module("transnormer")
    first = module.generate(
        some_ids(1, 6), max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    row = torch.cat([first.sequences, some_ids(1, 4, seed=1)], dim=1)
    mask = torch.ones_like(row)  # without one, transformers takes an answered pad id for padding
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    gone_on = module.generate(row, past_key_values=first.past_key_values, **options)
    assert torch.equal(gone_on, module.generate(row, **options))


def test_what_the_module_cannot_take_is_refused() -> None:
    module, ids = tiny_module("transnormer"), some_ids()
    with pytest.raises(ValueError, match="RecurrentCache"):
        module(input_ids=ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask"):
        module(input_ids=ids, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match="either"):
        module()
    cache = module(input_ids=ids).past_key_values
    with pytest.raises(NotImplementedError, match="start again"):
        cache.crop(1)


def test_embeddings_may_be_given_and_few_logits_asked_for() -> None:
    module, ids = tiny_module("transnormer"), some_ids()
    whole = logits(module, ids)
    assert torch.equal(logits(module, ids, logits_to_keep=3), whole[:, -3:])
    assert torch.equal(logits(module, ids, logits_to_keep=torch.tensor([5, 1])), whole[:, [5, 1]])
    with torch.no_grad():
        given = module(inputs_embeds=module.model.embed_tokens(ids), return_dict=False)[0]
    assert torch.equal(given, whole)


def test_within_packed_a_plain_forward_pass_stays_what_it_is() -> None:
    module = tiny_module("transnormer")
    before = logits(module, some_ids())
    assert takes_layout(module)
    with packed(module):
        assert module.config._attn_implementation == LAYOUT_ATTENTION, "or rows would go one by one"
        assert torch.equal(logits(module, some_ids()), before)
    assert torch.equal(logits(module, some_ids()), before)


def kept_bytes(module: Any, ids: Tensor, recompute: bool) -> tuple[int, Tensor]:
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    module.zero_grad()
    with activation_checkpointing(module) as layers:
        layers.use(len(layers) if recompute else 0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    gradient = module.model.layers[0].channel_mixer.l1.weight.grad.clone()
    return sum(nbytes for pointer, nbytes in kept.items() if pointer not in weights), gradient


def test_activation_checkpointing_saves_memory_and_changes_no_gradient() -> None:
    module = tiny_module("transnormer").train()
    all_kept, gradient = kept_bytes(module, some_ids(1, 400), recompute=False)
    inputs_kept, same = kept_bytes(module, some_ids(1, 400), recompute=True)
    head_and_loss = 3 * 400 * VOCAB * 8
    assert inputs_kept - head_and_loss < 0.25 * (all_kept - head_and_loss)
    assert torch.equal(gradient, same)
