"""lorasmith merge and convert, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapters import write_adapter
from modules import examples, save_tiny
from typer.testing import CliRunner, Result

import lorasmith as ls
from lorasmith.cli.main import app
from lorasmith.errors import ConfigError


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_merge_of_a_checkpoint_says_what_it_proved(tmp_path: Path) -> None:
    base = save_tiny("llama3", tmp_path / "base")
    train = ls.TrainConfig(max_steps=2, save_steps=1, learning_rate=1e-2)
    ls.train(ls.load_module(str(base), dtype="fp32"), examples(), output_dir=tmp_path / "run", train=train)
    arguments = ("merge", tmp_path / "run", "--base", base, "--checkpoint", 1, "--output-dir")
    told = invoke(*arguments, tmp_path / "merged")
    assert told.exit_code == 0
    assert "LlamaForCausalLM, fp32, tokenizer none" in told.stdout
    assert "its logits differ from the adapter's by" in told.stdout
    record = json.loads(invoke(*arguments, tmp_path / "again", "--json").stdout)
    assert record["adapter"].endswith("step-000001")
    assert record["max_logit_difference"] <= record["allowed_difference"]


def test_convert_there(tmp_path: Path) -> None:
    base = save_tiny("baichuan2", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", ["W_pack"])
    told = invoke("convert", adapter, "--to", "split", "--output-dir", tmp_path / "split", "--new-base", "x")
    assert told.stdout == f"wrote {tmp_path / 'split'}\n"
    assert json.loads((tmp_path / "split/adapter_config.json").read_text())["base_model_name_or_path"] == "x"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("merge", "run", "--layout", "gguf"), "no layout 'gguf'"),
        (("merge", "run", "--dtype", "int8"), "dtype"),
        (("convert", "run", "--to", "joined"), "no form 'joined'"),
    ],
)
def test_a_typo_is_told_before_anything_is_read(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    error = invoke(*arguments, "--output-dir", tmp_path / "out").exception
    assert isinstance(error, ConfigError)
    assert said in str(error)
