"""Each recipe from rows to an answer: a tiny random model of its family, the real vocabulary, huanhuan."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from chat_texts import REAL
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lorasmith as ls
from lorasmith.cli.main import app
from lorasmith.model.load import read_model_config
from lorasmith.runs.manifest import list_checkpoints

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ROWS = 64
SETTINGS = {
    "data.eval": 0.1,  # 64 rows are too few for two in a hundred
    "model.dtype": "fp32",
    "train.batch_size": 4,
    "train.max_steps": 24,
    "train.learning_rate": "3e-2",  # the recipe's is for a model that knows something
    "train.logging_steps": 1,
    "train.save_steps": 4,
}

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "initializer_range": 0.3,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_TRANSNORMER: dict[str, Any] = {
    "architectures": ["TransnormerForCausalLM"],
    "vocab_size": 64000,
    "decoder_embed_dim": 32,
    "hidden_dim": 32,
    "glu_dim": 56,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "init_std": 0.3,
}
CONFIGS: dict[str, Mapping[str, Any]] = {
    "llama3-8b-instruct": {**_LLAMA, "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128009},
    "deepseek-7b-chat": {**_LLAMA, "vocab_size": 102400, "bos_token_id": 100000, "eos_token_id": 100001},
    "baichuan2-7b-chat": {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "vocab_size": 125696,
        "hidden_size": 32,
        "initializer_range": 0.3,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "model_max_length": 4096,
    },
    "chatglm3-6b": {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "padded_vocab_size": 65024,
        "hidden_size": 32,
        "initializer_range": 0.3,
        "ffn_hidden_size": 56,
        "num_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "multi_query_group_num": 2,
        "seq_length": 8192,
    },
    "transnormerllm-385m": _TRANSNORMER,
    "transnormerllm-1b": _TRANSNORMER,
    "transnormerllm-7b": {**_TRANSNORMER, "no_scale_embedding": True, "model_max_length": 8192},
}
"""Small, under the key names of the original files; vocabularies of full size, so that every id fits."""


def tiny_model(recipe: str, directory: Path, shared: Path) -> Path:
    """A random model directory as the authors publish theirs: their config.json, weights, tokenizer file."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(dict(CONFIGS[recipe])), encoding="utf-8")
    source = shared / "data/tokenizers" / REAL[next(name for name in REAL if recipe.startswith(name))]
    (directory / f"tokenizer{source.suffix}").symlink_to(source)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(read_model_config(directory))
    tied = {"lm_head.weight"} if module.config.tie_word_embeddings else set()
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name not in tied}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def first_rows(shared: Path, path: Path) -> Path:
    rows = json.loads((shared / "data/datasets/huanhuan.json").read_text(encoding="utf-8"))[:ROWS]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def train_command(recipe: str, base: Path, rows: Path, run: Path) -> list[str]:
    paths = ["--model", str(base), "--data", str(rows), "--output-dir", str(run)]
    sets = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "lorasmith", "train", str(RECIPES / f"{recipe}.yaml"), *paths, *sets]


def succeed(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_after_two_checkpoints(command: list[str], run: Path) -> None:
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list_checkpoints(run)) < 2 and training.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    training.kill()
    training.wait()
    assert not (run / "adapter_model.safetensors").exists(), "the kill came too late"


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line.get("loss") is not None]


def assert_stock_peft_agrees(run: Path, base: Path) -> None:
    """Our model of the run, and peft's own loading of the adapter over the bare module."""
    model = ls.load_model(str(run), dtype="fp32")
    asked = model.encode([ls.Message("user", "你是谁？")], for_generation=True)
    ids = torch.from_numpy(asked.input_ids)[None]
    stock = peft.PeftModel.from_pretrained(ls.load_module(str(base), dtype="fp32"), run).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.module(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)
        with stock.disable_adapter():
            assert not torch.allclose(model.module(ids).logits, stock(ids).logits, atol=1e-3)


def assert_merged_agrees(run: Path, merged: Path) -> None:
    """The merged directory needs no adapter and says what the run says."""
    ls.merge(run, output_dir=merged)
    tuned = ls.load_model(str(run), dtype="fp32")
    alone = ls.load_model(str(merged), family=tuned.family.name, dtype="fp32")
    ids = torch.from_numpy(tuned.encode([ls.Message("user", "你是谁？")], for_generation=True).input_ids)[
        None
    ]
    with torch.no_grad():
        ours, theirs = tuned.module(ids).logits, alone.module(ids).logits
    assert (ours - theirs).abs().max() <= 1e-3 * ours.abs().max()


@pytest.mark.parametrize("recipe", CONFIGS)
def test_a_recipe_is_trained_killed_resumed_loaded_and_talked_to(
    recipe: str, shared: Path, tmp_path: Path
) -> None:
    base, rows = tiny_model(recipe, tmp_path / "base", shared), first_rows(shared, tmp_path / "rows.json")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    succeed(train_command(recipe, base, rows, whole))
    assert losses(whole)[-1] < losses(whole)[0] - 0.5

    kill_after_two_checkpoints(train_command(recipe, base, rows, cut), cut)
    told = succeed([*train_command(recipe, base, rows, cut), "--resume"])
    assert "going on from step-" in told
    adapters = [(run / "adapter_model.safetensors").read_bytes() for run in (whole, cut)]
    assert adapters[0] == adapters[1]

    assert_stock_peft_agrees(cut, base)
    assert_merged_agrees(cut, tmp_path / "merged")
    flags = ["--prompt", "你是谁？", "--greedy", "--max-new-tokens", "8"]
    answer = CliRunner().invoke(app, ["chat", str(cut), *flags])
    assert answer.exit_code == 0, answer.output
    tuned, question = ls.load_model(str(cut)), [ls.Message("user", "你是谁？")]
    said = ls.chat(tuned, question, generate=ls.GenerateConfig(greedy=True, max_new_tokens=8))
    assert said.finish_reason == "stop" or said.num_completion_tokens == 8  # an end token may come first
    assert answer.output.strip() == said.content.strip()


def test_every_recipe_but_the_demo_is_trained_here() -> None:
    """The demo has a test of its own, on the model that it is for."""
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*CONFIGS, "demo"}
