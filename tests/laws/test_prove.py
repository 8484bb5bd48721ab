"""`resume="prove"`: an honest run comes out again bit by bit, every tampering shows, nothing is written."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
from modules import examples, save_tiny

import lorasmith as ls
from lorasmith.errors import CheckpointError, NotReproducedError
from lorasmith.runs.manifest import list_checkpoints
from lorasmith.runs.progress import SilentReporter

TRAIN = {
    "num_epochs": 2,
    "batch_size": 3,
    "save_steps": 3,
    "logging_steps": 2,
    "learning_rate": 1e-2,
    "max_tokens": 40,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny("llama3", tmp_path_factory.mktemp("base") / "base")


def fit(base, run, *, resume=False, data=None, reporter=None, allow=(), lora=None, **changes):
    return ls.train(
        ls.load_module(str(base), dtype="fp32"),
        data or examples(14),
        output_dir=run,
        lora=lora or ls.LoraConfig(r=4, lora_dropout=0.2),
        train=ls.TrainConfig(**{**TRAIN, **changes}),
        resume=resume,
        allow_changes=allow,
        reporter=reporter or SilentReporter(),
    )


def content(run):
    return {
        str(p.relative_to(run)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in run.rglob("*")
        if p.is_file()
    }


class Notes(SilentReporter):
    def __init__(self):
        self.told = []

    def note(self, text):
        self.told.append(text)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_an_honest_run_comes_out_again(tmp_path, base, lora):
    lora, notes = ls.LoraConfig(r=4, lora_dropout=0.2, **lora), Notes()
    fit(base, tmp_path / "run", lora=lora)
    before = content(tmp_path / "run")
    run = fit(base, tmp_path / "run", lora=lora, resume="prove", reporter=notes)
    assert run.proved == (9, 10)
    assert notes.told[0] == "proving step-000010 from step-000009"
    assert "steps 10 to 10 reproduced bit by bit: 1 lines of the log" in notes.told[-1]
    assert content(tmp_path / "run") == before


@pytest.mark.slow
def test_a_run_with_one_checkpoint_is_proved_from_step_0(tmp_path, base):
    fit(base, tmp_path / "run", save_total_limit=1)
    notes = Notes()
    assert fit(base, tmp_path / "run", save_total_limit=1, resume="prove", reporter=notes).proved == (0, 10)
    assert notes.told[0] == "proving step-000010 from step 0"
    assert "steps 1 to 10 reproduced bit by bit: 5 lines of the log" in notes.told[-1]


@pytest.mark.slow
def test_other_windows_of_the_log_are_no_difference(tmp_path, base):
    settings = {"save_total_limit": 1, "logging_steps": 3}
    fit(base, tmp_path / "run", **settings)
    log = tmp_path / "run/metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    notes = Notes()
    fit(base, tmp_path / "run", **{**settings, "logging_steps": 1}, resume="prove", reporter=notes)
    assert "reproduced bit by bit: 4 lines" in notes.told[-1]


def test_an_edited_number_in_the_log_shows(tmp_path, base):
    fit(base, tmp_path / "run", save_total_limit=1)
    log = tmp_path / "run/metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[2]["grad_norm"] += 1e-9
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(NotReproducedError, match="steps 1 to 10 did not come out as they did then") as caught:
        fit(base, tmp_path / "run", save_total_limit=1, resume="prove")
    assert caught.value.exit_code == 6
    assert "at step 6 grad_norm was" in caught.value.why
    assert "tensors of step-000010 came out again" in caught.value.why
    assert "number of threads (now " in caught.value.fix


@pytest.mark.slow
def test_a_changed_row_is_refused_and_shows_where_it_is_allowed(tmp_path, base):
    fit(base, tmp_path / "run", save_total_limit=1)
    data = [*examples(14)[:5], *examples(9, seed=3)]
    settings = {"data": data, "save_total_limit": 1, "resume": "prove"}
    with pytest.raises(CheckpointError, match="data changed"):
        fit(base, tmp_path / "run", **settings)
    before = content(tmp_path / "run")
    with pytest.raises(NotReproducedError, match="at step 2 ") as caught:
        fit(base, tmp_path / "run", **settings, allow=["data"])
    assert "tensors of step-000010 differ" in caught.value.why
    assert content(tmp_path / "run") == before


def test_a_forged_checkpoint_shows_though_its_manifest_verifies(tmp_path, base):
    fit(base, tmp_path / "run")
    newest = list_checkpoints(tmp_path / "run")[-1]
    path = newest / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = struct.pack("<f", 0.125)
    path.write_bytes(data)
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    manifest["files"][path.name]["sha256"] = hashlib.sha256(data).hexdigest()
    (newest / "MANIFEST.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    with pytest.raises(NotReproducedError, match="every line of the log came out again; 1 of ") as caught:
        fit(base, tmp_path / "run", resume="prove")
    assert "tensors of step-000010 differ, first base_model" in caught.value.why


def test_without_a_checkpoint_there_is_nothing_to_prove(tmp_path, base):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="there is no checkpoint to prove"):
        fit(base, tmp_path / "run", resume="prove")
