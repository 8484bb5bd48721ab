"""Adapters from elsewhere: what is refused, in words, before peft allocates, matches or unpickles it."""

from __future__ import annotations

import codecs
import json
import os
import shlex
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter
from modules import save_tiny, tiny_module
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.adapters.lora import load_adapter
from lorasmith.errors import SetupError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    return write_adapter(save_tiny("llama3", root / "base"), root / "adapter", ["q_proj", "down_proj"])


@pytest.fixture
def adapter(written: Path, tmp_path: Path) -> Path:
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((written / name).read_bytes())
    return tmp_path


def base() -> Any:
    return tiny_module("llama3", torch.float32)


def refused(adapter: Path, what: str) -> SetupError:
    began = time.process_time()
    with pytest.raises(SetupError, match=what) as caught:
        load_adapter(base(), adapter)
    assert time.process_time() - began < 2
    return caught.value


def edit(adapter: Path, **changes: Any) -> None:
    tree = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(tree | changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 10**9),
        ("r", True),
        ("r", "8"),
        ("r", None),
        ("lora_alpha", "a"),
        ("lora_alpha", 10**400),
        ("lora_dropout", 1.5),
        ("layer_replication", [[0, 2]] * 1000),
        ("rank_pattern", {"q_proj": 10**9}),
        ("rank_pattern", {f"m{i}": 4 for i in range(5000)}),
        ("alpha_pattern", [1]),
        ("target_modules", ["a"] * 5000),
        ("target_modules", 5),
        ("trainable_token_indices", [-1]),
        ("modules_to_save", "lm_head"),
        ("megatron_config", {"a": 1}),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"cache_file": "/etc/passwd"}),
        ("loftq_config", {"loftq_bits": 4}),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "pissa_niter_999999999"),
        ("a_key_of_the_future", {"runs": "code"}),
        ("task_type", "SEQ_CLS"),
    ],
)
def test_settings_out_of_range_are_named(adapter: Path, key: str, value: Any) -> None:
    edit(adapter, **{key: value})
    error = refused(adapter, "asks for what is refused here")
    assert f"{key}" in error.why
    assert error.where.endswith(CONFIG)
    assert error.exit_code == 4


def test_a_rank_that_the_file_does_not_have_is_refused_without_memory(adapter: Path) -> None:
    edit(adapter, r=60_000)
    assert "rank 60,000" in refused(adapter, "does not fit").why
    edit(adapter, r=16)
    assert f"{A} (4, 32) instead of (16, 32)" in refused(adapter, "does not fit").why


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", r"(.*)*\.(\w+_?)+(q_proj|down_proj)+!"),
        ("exclude_modules", r"(\w+\.?)+!"),
        ("rank_pattern", {r"(\w+\.?)+!": 4}),
        ("modules_to_save", [r"(\w+\.?)+!"]),
    ],
)
def test_a_pattern_that_never_ends_is_stopped(adapter: Path, key: str, value: Any) -> None:
    edit(adapter, **{key: value})
    assert "seconds to match" in refused(adapter, "patterns are refused").why


def test_a_pattern_that_is_none_is_named(adapter: Path) -> None:
    edit(adapter, target_modules="(q_proj")
    assert "is no regex" in refused(adapter, "patterns are refused").why


def test_empty_keys_of_a_later_peft_are_passed_over(adapter: Path) -> None:
    edit(adapter, new_thing=None, other_thing=False, third={}, target_modules=r".*\.(q_proj|down_proj)")
    edit(adapter, auto_mapping={"base_model_class": "Evil", "parent_library": "os"})
    assert load_adapter(base(), adapter).peft_config["default"].r == 4


@pytest.mark.parametrize("kind", ["EVIL", "IA3", None, 5, "x" * 1000])
def test_other_kinds_of_adapters_are_refused(adapter: Path, kind: Any) -> None:
    edit(adapter, peft_type=kind)
    assert len(refused(adapter, "is not read here").what) < 150


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"peft_type": "LORA", "r": 1, "r": 2}', "stands twice"),
        ('{"peft_type": "LORA", "r": 8, "lora_alpha": NaN}', "NaN is no JSON number"),
        ('{"a":' * 100_000, "nested too deep"),
        ('{"a": "' + "x" * 2**21 + '"}', "no such file needs more"),
        ("[]", "it is a list"),
        ("\udcff", "invalid"),
    ],
)
def test_json_that_is_none(adapter: Path, text: str, why: str) -> None:
    (adapter / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert why in refused(adapter, CONFIG).why


def test_a_pipe_is_no_file(adapter: Path) -> None:
    (adapter / CONFIG).unlink()
    os.mkfifo(adapter / CONFIG)
    refused(adapter, "not a regular file")


def as_int(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32)


@pytest.mark.parametrize(
    ("change", "what", "why"),
    [
        (lambda t: t.pop(A.replace("_A", "_B")), "does not fit", "missing: " + A.replace("_A", "_B")),
        (lambda t: t.update({"evil": torch.zeros(1)}), "does not fit", "unknown: evil"),
        (lambda t: t.update({A: t[A][:, :31].clone()}), "does not fit", "(4, 31) instead of (4, 32)"),
        (lambda t: t.update({A: t[A][:0].clone()}), "does not fit", "(0, 32) instead of (4, 32)"),
        (lambda t: t.clear(), "does not fit", "and 7 more"),
        (lambda t: t.update({A: t[A] * float("nan")}), "NaN or infinity", A),
        (lambda t: t.update({A: t[A] / 0}), "NaN or infinity", A),
        (lambda t: t.update({A: as_int(t[A])}), "no plain floats", f"{A} is I32"),
    ],
)
def test_tensors_that_do_not_fit(adapter: Path, change: Callable[[Any], Any], what: str, why: str) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)
    assert why in refused(adapter, what).why


def test_the_wrong_base_is_told_with_the_name_of_the_right_one(adapter: Path, written: Path) -> None:
    with pytest.raises(SetupError, match="does not fit") as caught:
        load_adapter(tiny_module("llama3", torch.float32, hidden_size=64), adapter)
    assert str(written.parent / "base") in caught.value.fix


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 70) + b'{"a":{"dtype":"F32","shape":[1000000000,1000],"data_offsets":[0,4]}}   ',
    ],
)
def test_a_header_that_lies(adapter: Path, data: bytes) -> None:
    (adapter / WEIGHTS).write_bytes(data)
    refused(adapter, "cannot be read")


def test_no_weights_at_all_asks_no_hub(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    refused(adapter, "there is no adapter_model.safetensors")


def pickled(adapter: Path) -> Path:
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    return adapter / "adapter_model.bin"


def test_pickled_tensors_are_read(adapter: Path) -> None:
    wanted = load_file(adapter / WEIGHTS)[A]
    pickled(adapter)
    model = load_adapter(base(), adapter)
    assert torch.equal(model.get_submodule(A.rpartition(".lora_A")[0]).lora_A["default"].weight, wanted)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_with_code_is_not_run(adapter: Path, tmp_path: Path) -> None:
    weights = pickled(adapter)
    torch.save({"a": Evil(tmp_path / "ran")}, weights)
    assert "nothing of it was run" in refused(adapter, "is refused").why
    assert not (tmp_path / "ran").exists()


def test_an_archive_that_swells_is_refused(adapter: Path) -> None:
    weights = pickled(adapter)
    with zipfile.ZipFile(weights) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(weights, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data + b"\0" * 10**7)
    assert "compressed" in refused(adapter, "is refused").why


def test_a_tensor_without_memory_of_its_own_is_not_filled(adapter: Path) -> None:
    weights = pickled(adapter)
    torch.save({A: torch.zeros(1).expand(10**11)}, weights)
    refused(adapter, "does not fit")


def test_the_format_before_torch_1_6_is_named_and_saved_again_as_told(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load_file(adapter / WEIGHTS)
    weights = pickled(adapter)
    torch.save(wanted, weights, _use_new_zipfile_serialization=False)
    told = refused(adapter, "of the format before torch 1.6").fix
    python, dash_c, code = shlex.split(told[told.index("python -c") :])
    assert (python, dash_c) == ("python", "-c")
    monkeypatch.chdir(adapter)
    exec(code, {})
    assert load_file(adapter / WEIGHTS).keys() == wanted.keys()
    assert load_adapter(base(), adapter).peft_config["default"].r == 4


def test_a_byte_order_mark_is_passed_over(adapter: Path) -> None:
    (adapter / CONFIG).write_bytes(codecs.BOM_UTF8 + (adapter / CONFIG).read_bytes())
    assert load_adapter(base(), adapter).peft_config["default"].r == 4
