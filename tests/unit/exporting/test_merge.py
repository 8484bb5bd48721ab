"""A merged directory: whole, named as its base is, loaded by stock transformers, equal to its adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import sentencepiece_factory
import torch
from adapters import logits, with_adapter, write_adapter
from modules import KINDS, save_tiny, tiny_module, two_targets
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM, LlamaForCausalLM

import lorasmith as ls
from lorasmith.errors import ConfigError, SetupError, StorageError
from lorasmith.exporting import merge as merge_module

NATIVE = {"baichuan2": LlamaForCausalLM, "chatglm3": GlmForCausalLM}


def base_and_adapter(
    tmp_path: Path, kind: str, dtype: torch.dtype = torch.float32, **lora: object
) -> tuple[Path, Path]:
    base = save_tiny(kind, tmp_path / "base", dtype)
    return base, write_adapter(base, tmp_path / "adapter", two_targets(kind), **lora)


def record(directory: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((directory / "merge.json").read_text())
    return found


def stock(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_original_layout_is_the_base_with_other_numbers(tmp_path: Path, kind: str) -> None:
    base, adapter = base_and_adapter(tmp_path, kind)
    (base / "tokenizer_config.json").write_text('{"a":  1}')
    merged = ls.merge(adapter, output_dir=tmp_path / "merged")
    torch.testing.assert_close(
        logits(stock(merged)), logits(with_adapter(base, adapter)), atol=1e-4, rtol=1e-4
    )
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        assert not (base / name).exists() or (merged / name).read_bytes() == (base / name).read_bytes()
    before, after = (load_file(path / "model.safetensors") for path in (base, merged))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == set(two_targets(kind))
    assert record(merged)["max_logit_difference"] < 1e-3 < record(merged)["moved"]  # type: ignore[operator]


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"]
)
def test_native_layout_is_a_stock_class_with_equal_logits(
    tmp_path: Path, kind: str, lora: dict[str, bool]
) -> None:
    base, adapter = base_and_adapter(tmp_path, kind, **lora)
    merged = ls.merge(adapter, output_dir=tmp_path / "merged", layout="native")
    module = stock(merged)
    assert type(module) is NATIVE[kind]
    torch.testing.assert_close(logits(module), logits(with_adapter(base, adapter)), atol=1e-4, rtol=1e-4)
    assert record(merged)["architecture"] == NATIVE[kind].__name__


@pytest.mark.parametrize("kind", NATIVE)
def test_a_bare_base_model_becomes_native(tmp_path: Path, kind: str) -> None:
    base = save_tiny(kind, tmp_path / "base")
    merged = ls.merge(base, output_dir=tmp_path / "native", layout="native")
    torch.testing.assert_close(logits(stock(merged)), logits(stock(base)), atol=1e-4, rtol=1e-4)


def test_native_of_a_stock_class_is_the_original(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path, "llama3")
    merged = ls.merge(adapter, output_dir=tmp_path / "merged", layout="native")
    assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert record(merged)["layout"] == "original"


def test_a_norm_head_is_stored_raw_in_the_original_and_at_length_one_in_the_native(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path, "baichuan2")
    raw = load_file(base / "model.safetensors")["lm_head.weight"]
    heads = [
        load_file(ls.merge(adapter, output_dir=tmp_path / layout, layout=layout) / "model.safetensors")[
            "lm_head.weight"
        ]
        for layout in ("original", "native")
    ]
    assert torch.equal(heads[0], raw)
    torch.testing.assert_close(heads[1], raw / raw.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_sum_is_taken_in_fp32_and_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapter = base_and_adapter(tmp_path, "baichuan2", dtype)
    merged = ls.merge(adapter, output_dir=tmp_path / "merged")
    name = "model.layers.0.self_attn.W_pack"
    lora = load_file(adapter / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    before, after = (load_file(path / "model.safetensors")[f"{name}.weight"] for path in (base, merged))
    assert after.dtype == dtype
    torch.testing.assert_close(after, (before.float() + 2 * (b @ a)).to(dtype), atol=0, rtol=0)


def test_another_dtype_is_written_into_the_config(tmp_path: Path) -> None:
    _, adapter = base_and_adapter(tmp_path, "llama3")
    merged = ls.merge(adapter, output_dir=tmp_path / "merged", dtype="bf16")
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert record(merged)["dtype"] == "bf16"
    assert {t.dtype for t in load_file(merged / "model.safetensors").values()} == {torch.bfloat16}


def test_a_head_trained_in_full_is_merged(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path, "baichuan2", modules_to_save=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = next(name for name in tensors if name.endswith("lm_head.weight"))
    for layout in ("original", "native"):
        merged = ls.merge(adapter, output_dir=tmp_path / layout, layout=layout)
        torch.testing.assert_close(
            logits(stock(merged)), logits(with_adapter(base, adapter)), atol=1e-4, rtol=1e-4
        )
    assert torch.equal(
        load_file(tmp_path / "original" / "model.safetensors")["lm_head.weight"], tensors[head]
    )


@pytest.mark.parametrize(
    ("kind", "said"), [("baichuan2-13b", "ALiBi"), ("transnormer", "no class of transformers")]
)
def test_a_model_without_a_native_class_is_refused(tmp_path: Path, kind: str, said: str) -> None:
    _, adapter = base_and_adapter(tmp_path, kind)
    with pytest.raises(ConfigError, match=said):
        ls.merge(adapter, output_dir=tmp_path / "merged", layout="native")
    assert not (tmp_path / "merged").exists()


def test_what_lies_in_the_way_is_kept(tmp_path: Path) -> None:
    _, adapter = base_and_adapter(tmp_path, "llama3")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("mine")
    with pytest.raises(SetupError, match="files in the output directory"):
        ls.merge(adapter, output_dir=tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["thesis.txt"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    _, adapter = base_and_adapter(tmp_path, "llama3")
    (tmp_path / "merged").mkdir()
    assert (ls.merge(adapter, output_dir=tmp_path / "merged") / "config.json").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_all_files_are_open_to_whom_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    _, adapter = base_and_adapter(tmp_path, "llama3")
    before = os.umask(umask)
    try:
        merged = ls.merge(adapter, output_dir=tmp_path / "merged")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in merged.iterdir()} == {
        path.name: mode for path in merged.iterdir()
    }


def test_a_merge_that_went_wrong_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof is held against files on the disk: here, weights that lost the adapter."""
    _, adapter = base_and_adapter(tmp_path, "llama3")
    monkeypatch.setattr(merge_module, "merge_weights", lambda model, dtype: model.unload())
    with pytest.raises(SetupError, match="does not answer as the adapter does"):
        ls.merge(adapter, output_dir=tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    _, adapter = base_and_adapter(tmp_path, "llama3")
    monkeypatch.setattr(merge_module, "_save_weights", no_room)
    with pytest.raises(StorageError, match="No space left"):
        ls.merge(adapter, output_dir=tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_base_model_alone_has_nothing_to_merge(tmp_path: Path) -> None:
    base = save_tiny("llama3", tmp_path / "base")
    with pytest.raises(ConfigError, match="nothing to merge"):
        ls.merge(base, output_dir=tmp_path / "merged")


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="original, native"):
        ls.merge("run", output_dir=tmp_path / "merged", layout="gguf")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", NATIVE)
def test_a_native_directory_brings_tokenizer_and_template(tmp_path: Path, kind: str) -> None:
    write = {
        "baichuan2": sentencepiece_factory.baichuan2_like,
        "chatglm3": sentencepiece_factory.chatglm3_like,
    }[kind]
    base = write(tmp_path / "base")
    tiny_module(kind, torch.float32, vocab_size=600).save_pretrained(base)
    merged = ls.merge(base, output_dir=tmp_path / "native", layout="native")
    assert record(merged)["tokenizer"] == "converted"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    talk = [{"role": "user", "content": "Hello <world>\n你好  "}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    ours = ls.load_model(str(base), dtype="fp32")
    prompt = ours.encode([ls.Message("user", talk[0]["content"])], for_generation=True)
    assert ids == prompt.input_ids.tolist()
    stops = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert {stops} if isinstance(stops, int) else set(stops) == set(ours.chat_format.stop_ids)


@pytest.mark.parametrize("chat_format", ["official", "tutorial"])
def test_only_a_run_in_the_official_format_gets_its_template(tmp_path: Path, chat_format: str) -> None:
    base = sentencepiece_factory.chatglm3_like(tmp_path / "base")
    tiny_module("chatglm3", torch.float32, vocab_size=600).save_pretrained(base)
    adapter = write_adapter(base, tmp_path / "adapter", ["query_key_value"])
    settings = {"base": str(base), "family": "chatglm3", "chat_format": chat_format, "system": None}
    (adapter / "chat_format.json").write_text(json.dumps(settings))
    merged = ls.merge(adapter, output_dir=tmp_path / "native", layout="native")
    assert (merged / "tokenizer.json").exists()
    assert (merged / "chat_template.jinja").exists() == (chat_format == "official")


@pytest.mark.parametrize("kind", NATIVE)
def test_the_same_merge_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    _, adapter = base_and_adapter(tmp_path, kind)
    merged = ls.merge(adapter, output_dir=tmp_path / "merged", layout="native")
    again = ls.merge(adapter, output_dir=tmp_path / "again", layout="native")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in merged.iterdir()
    }


def test_large_weights_go_out_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = base_and_adapter(tmp_path, "chatglm3")
    monkeypatch.setattr(merge_module, "_SHARD", "40KB")
    merged = ls.merge(adapter, output_dir=tmp_path / "merged")
    assert len(list(merged.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(
        logits(stock(merged)), logits(with_adapter(base, adapter)), atol=1e-4, rtol=1e-4
    )


def test_the_proof_of_16_bit_weights_is_not_blurred_by_16_bit_sums(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path, "baichuan2", torch.bfloat16, use_dora=True)
    found = record(ls.merge(adapter, output_dir=tmp_path / "merged"))
    assert 0 < found["max_logit_difference"] < 0.05 * found["moved"]  # type: ignore[operator]
    assert {t.dtype for t in load_file(base / "model.safetensors").values()} == {torch.bfloat16}
