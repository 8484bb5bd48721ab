"""An adapter from elsewhere, through every verb that reads one: refused in words, in no time, nothing written
(reliability table, rows 11, 29, 31 and 32)."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import write_adapter
from chat_models import chat_model
from modules import examples, save_tiny
from safetensors.torch import load_file, save_file

import lorasmith as ls
from lorasmith.cli import main as cli
from lorasmith.doctor.adapter_files import adapter_checks
from lorasmith.doctor.check import guarded
from lorasmith.errors import SetupError
from lorasmith.runs.progress import SilentReporter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def settings(**changes: object) -> Callable[[Path], object]:
    def change(adapter: Path) -> None:
        tree = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps(tree | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def changed(adapter: Path) -> None:
        found = load_file(adapter / WEIGHTS)
        change(found)
        save_file(found, adapter / WEIGHTS)

    return changed


def twice(adapter: Path) -> None:
    text = (adapter / CONFIG).read_text().strip().removeprefix("{")
    (adapter / CONFIG).write_text('{"r": 4,' + text)


def pickle_only(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    torch.save({"a": _Touch(adapter / "ran")}, adapter / "adapter_model.bin")


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def lying(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def pipe(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    os.mkfifo(adapter / WEIGHTS)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a regex that never ends": (settings(target_modules=r"(\w+\.?)+!"), "name patterns are refused"),
    "a huge rank": (settings(r=10**9), "a whole number from 1 to"),
    "a rank that the file does not have": (settings(r=60_000), "does not fit"),
    "copies of layers": (settings(layer_replication=[[0, 2]] * 1000), "layer_replication"),
    "another kind": (settings(peft_type="IA3"), "is not read here"),
    "a key twice": (twice, "stands twice"),
    "NaN": (tensors(lambda t: t[A].fill_(float("nan"))), "NaN or infinity"),
    "a missing pair": (tensors(lambda t: t.pop(A.replace("_A", "_B"))), "does not fit"),
    "a wrong shape": (tensors(lambda t: t.update({A: t[A][:, :31].clone()})), "does not fit"),
    "integers": (tensors(lambda t: t.update({A: t[A].to(torch.int32)})), "no plain floats"),
    "a header that lies": (lying, "cannot be read"),
    "code": (pickle_only, "nothing of it was run"),
    "a pipe": (pipe, "not a regular file"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that can be talked to, an adapter over it, and an adapter over another base."""
    root = tmp_path_factory.mktemp("hostile")
    base = chat_model("generic", root / "base")
    ls.train(
        ls.load_module(str(base), dtype="fp32"),
        examples(),
        output_dir=root / "run",
        train=ls.TrainConfig(max_steps=1),
        reporter=SilentReporter(),
    )
    for name, over in (("adapter", base), ("other", save_tiny("deepseek", root / "other-base"))):
        write_adapter(over, root / name, ["q_proj", "k_proj"])
        settings(base_model_name_or_path=str(base))(root / name)
        shutil.copy(root / "run/golden.json", root / name / "golden.json")
    return root


def convert(base: Path, adapter: Path) -> list[str]:
    return ["convert", str(adapter), "--to", "fused", "--output-dir", str(adapter.parent / "out")]


def merge(base: Path, adapter: Path) -> list[str]:
    return ["merge", str(adapter), "--output-dir", str(adapter.parent / "out")]


def verify(base: Path, adapter: Path) -> list[str]:
    return ["verify", str(adapter)]


def chat(base: Path, adapter: Path) -> list[str]:
    return ["chat", str(base), "--adapter", str(adapter), "--prompt", "hi"]


VERBS = (convert, merge, verify, chat)
QUICK = ("a missing pair", "NaN")
CELLS = [
    pytest.param(verb, kind, marks=[] if verb is convert or kind in QUICK else pytest.mark.slow)
    for verb in VERBS
    for kind in HOSTILE
]


def run_verb(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["lorasmith", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(("verb", "kind"), CELLS)
def test_every_verb_refuses_it_kindly(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    verb: Callable[[Path, Path], list[str]],
    kind: str,
) -> None:
    adapter = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    change, said = HOSTILE[kind]
    change(adapter)
    before = sorted(tmp_path.rglob("*"))
    began = time.process_time()
    assert run_verb(verb(place / "base", adapter), monkeypatch) == SetupError.exit_code
    assert time.process_time() - began < 5
    told = capfd.readouterr()
    assert told.err.splitlines()[0].startswith("error: ")
    assert said in " ".join(told.err.split())
    assert "  where:" in told.err
    assert "Traceback" not in told.out + told.err
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written, and nothing of it was run"


@pytest.mark.parametrize("verb", VERBS)
def test_an_adapter_of_another_base_is_told(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    verb: Callable[[Path, Path], list[str]],
) -> None:
    assert run_verb(verb(place / "base", place / "other"), monkeypatch) == SetupError.exit_code
    told = capfd.readouterr()
    assert "does not fit this base model" in told.out + told.err
    assert "instead of" in told.out + told.err
    assert not (place / "out").exists()


@pytest.mark.parametrize("kind", HOSTILE)
def test_doctor_tells_it_in_one_line(place: Path, tmp_path: Path, kind: str) -> None:
    adapter = Path(shutil.copytree(place / "adapter", tmp_path / "adapter"))
    change, said = HOSTILE[kind]
    change(adapter)
    *_, last = guarded("adapter", lambda: adapter_checks(adapter, place / "base"))
    assert last.remedy
    words = {"NaN": "not finite", "code": "nothing of it was read"}.get(kind, said)
    assert words in last.found
    assert last.status == ("warn" if kind == "code" else "fail")
    assert not (adapter / "ran").exists()
