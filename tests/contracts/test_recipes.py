"""Every recipe is read and planned on a full-size config.json; there are no weights that could be read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece_factory
import tokenizers_factory

import lorasmith as ls
from lorasmith.config import load_run_config, to_yaml
from lorasmith.families import all_families

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
ROWS = [{"instruction": f"Question {n}?", "input": "", "output": f"Answer {n}."} for n in range(200)]

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
_LLAMA3_8B = {
    **_LLAMA,
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}
_DEEPSEEK_7B = {
    **_LLAMA,
    "vocab_size": 102400,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
_BAICHUAN2_7B = {
    "model_type": "baichuan",
    "architectures": ["BaichuanForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 125696,
    "max_position_embeddings": 4096,
    "model_max_length": 4096,
    "tie_word_embeddings": False,
}
_CHATGLM3_6B = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_layers": 28,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "padded_vocab_size": 65024,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
}
_TRANSNORMER = {"architectures": ["TransnormerForCausalLM"], "vocab_size": 64000}


def transnormer(width: int, layers: int, heads: int, glu: int) -> dict[str, Any]:
    """As the original files have it: no model_type, and no word about a tied head."""
    sizes = {"decoder_embed_dim": width, "hidden_dim": width, "glu_dim": glu}
    return {**_TRANSNORMER, **sizes, "decoder_layers": layers, "decoder_attention_heads": heads}


class FullSize(NamedTuple):
    family: str
    config: Mapping[str, Any]
    write_tokenizer: Callable[[Path], Path]
    trainable: int
    base: int


FULL_SIZES = {
    "llama3-8b-instruct": FullSize(
        "llama3", _LLAMA3_8B, tokenizers_factory.llama3_like, 20_971_520, 8_030_261_248
    ),
    "deepseek-7b-chat": FullSize(
        "deepseek", _DEEPSEEK_7B, tokenizers_factory.deepseek_like, 18_739_200, 6_910_365_696
    ),
    "baichuan2-7b-chat": FullSize(
        "baichuan2", _BAICHUAN2_7B, sentencepiece_factory.baichuan2_like, 17_891_328, 7_505_973_248
    ),
    "chatglm3-6b": FullSize(
        "chatglm3", _CHATGLM3_6B, sentencepiece_factory.chatglm3_like, 1_949_696, 6_243_584_000
    ),
    "transnormerllm-385m": FullSize(
        "transnormer",
        transnormer(1024, 24, 8, 2816),
        sentencepiece_factory.transnormer_like,
        3_588_096,
        398_984_192,
    ),
    "transnormerllm-1b": FullSize(
        "transnormer",
        transnormer(2048, 16, 16, 5632),
        sentencepiece_factory.transnormer_like,
        4_784_128,
        1_020_266_496,
    ),
    "transnormerllm-7b": FullSize(
        "transnormer",
        transnormer(4096, 30, 32, 11008),
        sentencepiece_factory.transnormer_like,
        17_756_160,
        6_836_719_616,
    ),
}


def write_rows(path: Path) -> Path:
    bad = {"instruction": "no answer"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, bad]), encoding="utf-8")
    return path


@pytest.fixture
def overrides(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The recipe's model, rows and run as they lie on this machine."""
    full_size = FULL_SIZES[request.node.callspec.params["name"]]
    model = full_size.write_tokenizer(tmp_path / "model")
    (model / "config.json").write_text(json.dumps(dict(full_size.config)))
    rows = write_rows(tmp_path / "rows.jsonl")
    return {
        "data.on_bad_row": "skip",
        "model.path": str(model),
        "data.train": str(rows),
        "train.output_dir": str(tmp_path / "run"),
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_read(recipe: Path) -> None:
    config = load_run_config(recipe, {})
    assert config.model.path
    assert config.data.train
    assert config.train.output_dir.startswith("runs/")


@pytest.mark.parametrize("recipe", [*RECIPES, None], ids=lambda recipe: recipe.stem if recipe else "defaults")
def test_a_recorded_config_reads_back_as_itself(recipe: Path | None, tmp_path: Path) -> None:
    """A run is resumed from its own config.yaml, and refused if one value differs, were it 32 for 32.0."""
    config = load_run_config(recipe, {})
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert repr(load_run_config(tmp_path / "config.yaml", {})) == repr(config)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_each_recipe_of_a_family_that_runs_is_planned_below(recipe: Path) -> None:
    known = {family.name for family in all_families()}
    runs = [name for name in known if recipe.stem.startswith(name)]
    assert recipe.stem in FULL_SIZES or not runs, f"give {recipe.name} a full-size config.json here"


@pytest.mark.parametrize("name", FULL_SIZES)
def test_a_recipe_is_planned_to_the_parameter_and_reads_no_weights(
    name: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    full_size = FULL_SIZES[name]
    if full_size.family not in {family.name for family in all_families()}:
        pytest.skip(f"the family {full_size.family} is not here yet")
    recipe = next(path for path in RECIPES if path.stem == name)
    config = load_run_config(recipe, {**overrides, "model.dtype": "bf16"})
    plan = ls.plan(config)
    assert plan.parameters.trainable == full_size.trainable
    assert plan.parameters.total - plan.parameters.trainable == full_size.base
    assert plan.family == full_size.family
    assert plan.num_examples + plan.num_held_out == len(ROWS)
    assert plan.total_steps == config.train.num_epochs * -(-plan.num_examples // config.train.batch_size)
    assert plan.memory.weights == 2 * full_size.base
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".bin")]
    assert not (tmp_path / "run").exists(), "a plan writes nothing"
