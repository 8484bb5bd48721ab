"""Original checkpoints in, original checkpoints out: configs, names, shapes, counts and shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import save_tiny, tiny_module
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import lorasmith as ls
from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import attach_lora
from lorasmith.errors import FamilyError, SetupError
from lorasmith.model.load import empty_module, read_model_config
from lorasmith.native.registry import native_model_type, register_native

PORTS = ("baichuan2", "baichuan2-13b", "chatglm3")

BAICHUAN2_7B = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "tokenizer_class": "BaichuanTokenizer",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_max_length": 4096,
    "model_type": "baichuan",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 125696,
}
BAICHUAN2_13B = {
    **{key: value for key, value in BAICHUAN2_7B.items() if key != "max_position_embeddings"},
    "hidden_size": 5120,
    "intermediate_size": 13696,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "gradient_checkpointing": [False],
    "z_loss_weight": 0,
}
CHATGLM3_6B = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "ffn_hidden_size": 13696,
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "rmsnorm": True,
    "seq_length": 8192,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FULL_SIZE = {"baichuan2": BAICHUAN2_7B, "baichuan2-13b": BAICHUAN2_13B, "chatglm3": CHATGLM3_6B}
LORA_NAMES = {
    "baichuan2": ("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "chatglm3": ("query_key_value",),
}


def written(directory: Path, tree: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(tree))
    return directory


def full_size(kind: str, tmp_path: Path) -> Any:
    return empty_module(read_model_config(written(tmp_path, FULL_SIZE[kind])))


@pytest.mark.parametrize(
    ("kind", "parameters", "lora"),
    [("baichuan2", 7_505_973_248, 17_891_328), ("chatglm3", 6_243_584_000, 1_949_696)],
)
def test_the_full_size_has_exactly_the_parameters_of_the_paper_and_the_tutorial(
    tmp_path: Path, kind: str, parameters: int, lora: int
) -> None:
    module = full_size(kind, tmp_path)
    assert sum(p.numel() for p in module.parameters()) == parameters
    with torch.device("meta"):
        config = ls.LoraConfig(r=8)
        tuned = attach_lora(
            module, config, family_targets=LORA_NAMES[kind], base_name=kind, clock=DropoutClock(0)
        )
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == lora


def shapes_of_chatglm3() -> dict[str, tuple[int, ...]]:
    """The published tensors, as their configuration gives them."""
    hidden, mlp, packed, vocab = 4096, 13696, 4096 + 2 * 2 * 128, 65024
    block = {
        "input_layernorm.weight": (hidden,),
        "self_attention.query_key_value.weight": (packed, hidden),
        "self_attention.query_key_value.bias": (packed,),
        "self_attention.dense.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.dense_h_to_4h.weight": (2 * mlp, hidden),
        "mlp.dense_4h_to_h.weight": (hidden, mlp),
    }
    layers = {
        f"transformer.encoder.layers.{n}.{name}": shape for n in range(28) for name, shape in block.items()
    }
    return {
        "transformer.embedding.word_embeddings.weight": (vocab, hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocab, hidden),
        **layers,
    }


def test_every_tensor_of_chatglm3(tmp_path: Path) -> None:
    module = full_size("chatglm3", tmp_path)
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == shapes_of_chatglm3()


@pytest.mark.parametrize(
    ("kind", "index", "stray"),
    [
        ("chatglm3", "ChatGLM3-6B.index.json", {"transformer.rotary_pos_emb.inv_freq": 32}),
        ("baichuan2-13b", "Baichuan2-13B-Chat.index.json", {}),
    ],
)
def test_every_name_of_the_published_index(
    tmp_path: Path, shared: Path, kind: str, index: str, stray: dict[str, int]
) -> None:
    published = json.loads((shared / "data/configs" / index).read_text())
    tensors = full_size(kind, tmp_path).state_dict()
    assert tensors.keys() | stray.keys() == published["weight_map"].keys()
    numbers = sum(t.numel() for t in tensors.values()) + sum(stray.values())
    assert 2 * numbers == published["metadata"]["total_size"]


def test_positions_in_the_config_tell_rope_from_alibi(tmp_path: Path) -> None:
    configs = [read_model_config(written(tmp_path, tree)) for tree in (BAICHUAN2_7B, BAICHUAN2_13B)]
    assert [config.uses_alibi for config in configs] == [False, True]
    assert not configs[1].gradient_checkpointing


def test_chatglm3_answers_to_the_names_of_transformers(tmp_path: Path) -> None:
    config = read_model_config(written(tmp_path, CHATGLM3_6B))
    names = ("num_hidden_layers", "vocab_size", "intermediate_size", "head_dim", "num_key_value_heads")
    assert [getattr(config, name) for name in names] == [28, 65024, 13696, 128, 2]
    assert (config.max_position_embeddings, config.rms_norm_eps) == (8192, 1e-5)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({**BAICHUAN2_7B, "vocab_size": 64000}, "Baichuan 1"),
        ({**BAICHUAN2_7B, "z_loss_weight": 0.1}, "z_loss_weight"),
        ({**CHATGLM3_6B, "rope_ratio": 50}, "rope_ratio 50"),
        ({**CHATGLM3_6B, "pre_seq_len": 128}, "pre_seq_len"),
        ({**CHATGLM3_6B, "multi_query_attention": False}, "multi_query_attention"),
    ],
)
def test_a_relative_that_would_compute_something_else_is_refused(
    tmp_path: Path, tree: dict[str, Any], said: str
) -> None:
    with pytest.raises(FamilyError, match=said):
        read_model_config(written(tmp_path, tree))


def test_a_model_is_known_by_its_type_or_else_by_its_architecture() -> None:
    register_native()
    register_native()
    assert native_model_type({"model_type": "baichuan"}) == "baichuan"
    assert native_model_type({"architectures": ["ChatGLMModel"]}) == "chatglm"
    assert native_model_type({"model_type": "llama", "architectures": ["ChatGLMModel"]}) is None
    assert native_model_type({}) is None
    assert type(AutoConfig.for_model("chatglm")).__name__ == "ChatGLM3Config"


@pytest.mark.parametrize("kind", PORTS)
@pytest.mark.parametrize("max_shard_size", ["50GB", "40KB"], ids=["one-file", "shards"])
def test_load_save_load_keeps_every_tensor_and_every_name(
    tmp_path: Path, kind: str, max_shard_size: str
) -> None:
    source = save_tiny(kind, tmp_path / "a")
    module = ls.load_module(str(source), dtype="fp32")
    module(torch.tensor([[5, 6, 7]]))
    module.save_pretrained(tmp_path / "b", max_shard_size=max_shard_size)
    again = ls.load_module(str(tmp_path / "b"), dtype="fp32")
    assert_equal(module.state_dict(), again.state_dict())
    assert_equal(all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b"))
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 1 or max_shard_size == "40KB"


def test_a_saved_config_names_the_class_of_the_original(tmp_path: Path) -> None:
    trees = [json.loads((save_tiny(kind, tmp_path / kind) / "config.json").read_text()) for kind in PORTS]
    assert [tree["architectures"] for tree in trees] == [
        *[["BaichuanForCausalLM"]] * 2,
        ["ChatGLMModel"],
    ]
    assert ["max_position_embeddings" in tree for tree in trees] == [True, False, False]
    assert {"num_layers", "padded_vocab_size", "kv_channels"} <= trees[2].keys()


@pytest.mark.parametrize("kind", PORTS)
def test_bin_shards_and_stray_buffers_load(tmp_path: Path, kind: str) -> None:
    """As the authors published them: pickled, cut in two, with the frequencies of RoPE beside the weights."""
    directory = save_tiny(kind, tmp_path / "base")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    stray = "transformer.rotary_pos_emb" if kind == "chatglm3" else "model.layers.0.self_attn.rotary_emb"
    shards = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    shards[0][f"{stray}.inv_freq"] = torch.full((4,), 7.0)
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    for name, shard in zip(names, shards, strict=True):
        torch.save(shard, directory / name)
    index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "pytorch_model.bin.index.json").write_text(text)
    assert_equal(tensors, ls.load_module(str(directory), dtype="fp32").state_dict())


@pytest.mark.parametrize("kind", PORTS)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tensors: tensors.pop(next(n for n in tensors if "layers.1" in n)), "missing: .*layers.1"),
        (
            lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}),
            "unknown: model.extra.weight",
        ),
    ],
)
def test_other_gaps_are_refused_by_name(
    tmp_path: Path, kind: str, damage: Callable[[dict[str, Tensor]], Any], said: str
) -> None:
    directory = save_tiny(kind, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    damage(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SetupError, match=said):
        ls.load_module(str(directory), dtype="fp32")


@pytest.mark.parametrize("kind", PORTS)
def test_tied_heads(tmp_path: Path, kind: str) -> None:
    """One tensor in the file, one in memory; with NormHead the embedding stays raw."""
    config = tiny_module(kind).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    module = ls.load_module(str(tmp_path), dtype="fp32")
    embedding = module.get_input_embeddings().weight
    assert module.get_output_embeddings().weight is embedding
    assert_equal(
        all_tensors(tmp_path),
        {n: t for n, t in module.state_dict().items() if "head" not in n and "output_layer" not in n},
    )
    hidden = module.base_model(torch.tensor([[5, 6]])).last_hidden_state
    rows = embedding if kind == "chatglm3" else torch.nn.functional.normalize(embedding, dim=-1)
    torch.testing.assert_close(module(torch.tensor([[5, 6]])).logits, hidden @ rows.T)


def all_tensors(directory: Path) -> dict[str, Tensor]:
    return {k: t for file in sorted(directory.glob("*.safetensors")) for k, t in load_file(file).items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
