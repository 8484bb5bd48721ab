"""Adapters across the two layouts: equal logits with stock peft on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import logits, with_adapter, write_adapter
from modules import save_tiny
from safetensors.torch import load_file

import lorasmith as ls
from lorasmith.errors import ConfigError, SetupError

KINDS = ("baichuan2", "chatglm3")
FUSED = {
    "baichuan2": ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "chatglm3": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
SPLIT = {
    "baichuan2": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
    "chatglm3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}}


def both_layouts(tmp_path: Path, kind: str) -> tuple[Path, Path]:
    original = save_tiny(kind, tmp_path / "original")
    return original, ls.merge(original, output_dir=tmp_path / "native", layout="native")


def equal(left: torch.nn.Module, right: torch.nn.Module) -> None:
    torch.testing.assert_close(logits(left), logits(right), atol=1e-4, rtol=1e-4)


def config_of(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_to_split(tmp_path: Path, kind: str, variant: str) -> None:
    original, native = both_layouts(tmp_path, kind)
    adapter = write_adapter(original, tmp_path / "fused", FUSED[kind], **VARIANTS[variant])
    split = ls.convert_adapter(adapter, to="split", output_dir=tmp_path / "split", new_base=str(native))
    equal(with_adapter(original, adapter), with_adapter(native, split))
    found = config_of(split)
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"} <= set(found["target_modules"])
    assert (found["r"], found["rank_pattern"], found["base_model_name_or_path"]) == (4, {}, str(native))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_split_to_fused_has_three_times_the_rank(tmp_path: Path, kind: str, variant: str) -> None:
    original, native = both_layouts(tmp_path, kind)
    adapter = write_adapter(native, tmp_path / "split", SPLIT[kind], **VARIANTS[variant])
    fused = ls.convert_adapter(adapter, to="fused", output_dir=tmp_path / "fused", new_base=str(original))
    equal(with_adapter(native, adapter), with_adapter(original, fused))
    found, name = config_of(fused), FUSED[kind][0]
    assert (found["r"], found["rank_pattern"]) == (4, {name: 12})
    assert set(found["target_modules"]) <= set(FUSED[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same_adapter(tmp_path: Path, kind: str) -> None:
    original, native = both_layouts(tmp_path, kind)
    adapter = write_adapter(original, tmp_path / "fused", FUSED[kind])
    split = ls.convert_adapter(adapter, to="split", output_dir=tmp_path / "split", new_base=str(native))
    back = ls.convert_adapter(split, to="fused", output_dir=tmp_path / "back", new_base=str(original))
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, back))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "base_model_name_or_path"):
        assert config_of(back)[key] == config_of(adapter)[key]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("targets", "knobs"),
    [
        (["q_proj", "v_proj"], {}),
        (["q_proj", "k_proj", "v_proj"], {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        (["q_proj", "v_proj", "o_proj"], {"layers_to_transform": [0, 2]}),
        (r".*layers\.1\..*(q_proj|k_proj|o_proj)", {}),
    ],
    ids=["two of three", "other ranks and scales", "some layers", "a regex"],
)
def test_uneven_adapters(tmp_path: Path, kind: str, targets: Any, knobs: dict[str, Any]) -> None:
    original, native = both_layouts(tmp_path, kind)
    adapter = write_adapter(native, tmp_path / "split", targets, **knobs)
    fused = ls.convert_adapter(adapter, to="fused", output_dir=tmp_path / "fused")
    equal(with_adapter(native, adapter), with_adapter(original, fused))
    again = ls.convert_adapter(fused, to="split", output_dir=tmp_path / "again", base=str(original))
    equal(with_adapter(native, adapter), with_adapter(native, again))


@pytest.mark.parametrize(("kind", "head"), [("baichuan2", "lm_head"), ("chatglm3", "output_layer")])
def test_a_head_trained_in_full_goes_with_it(tmp_path: Path, kind: str, head: str) -> None:
    original, native = both_layouts(tmp_path, kind)
    adapter = write_adapter(original, tmp_path / "fused", FUSED[kind], modules_to_save=[head])
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith(f"{head}.weight"))
    split = ls.convert_adapter(adapter, to="split", output_dir=tmp_path / "split")
    equal(with_adapter(original, adapter), with_adapter(native, split))
    assert config_of(split)["modules_to_save"] == ["lm_head"], name


@pytest.mark.parametrize(
    ("kind", "targets", "knobs", "to", "said"),
    [
        ("baichuan2", ["W_pack"], {"use_dora": True}, "split", "use_dora"),
        ("baichuan2", ["W_pack"], {}, "fused", "cannot be made fused"),
        ("llama3", ["q_proj"], {}, "split", "cannot be made split"),
        ("transnormer", ["qkvu_proj"], {}, "split", "no native layout"),
        ("baichuan2-13b", ["W_pack"], {}, "split", "ALiBi"),
        ("llama3", ["q_proj", "embed_tokens"], {}, "fused", "not of a linear layer"),
        ("deepseek", ["q_proj"], {"modules_to_save": ["lm_head"]}, "fused", "trained in full"),
        ("deepseek", ["q_proj", "lm_head"], {}, "fused", "NormHead"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    tmp_path: Path, kind: str, targets: list[str], knobs: dict[str, Any], to: Any, said: str
) -> None:
    base = save_tiny(kind, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", targets, **knobs)
    with pytest.raises(ConfigError) as caught:
        ls.convert_adapter(adapter, to=to, output_dir=tmp_path / "out")
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_base_is_told_by_its_shapes(tmp_path: Path) -> None:
    original, native = both_layouts(tmp_path, "chatglm3")
    adapter = write_adapter(native, tmp_path / "adapter", ["q_proj", "k_proj"])
    other = save_tiny("deepseek", tmp_path / "other")
    with pytest.raises(SetupError, match=r"k_proj.lora_B.weight \(24, 4\) instead of \(32, 4\)"):
        ls.convert_adapter(adapter, to="fused", output_dir=tmp_path / "out", base=str(other))
    with pytest.raises(ConfigError, match="to is 'joined'"):
        ls.convert_adapter(adapter, to="joined", output_dir=tmp_path / "out")  # type: ignore[arg-type]
    assert original.exists()
