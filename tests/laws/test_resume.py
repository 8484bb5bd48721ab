"""Law 4: 20 steps == 10 steps, a kill, 10 steps: bitwise, with dropout on, mid-epoch."""

from __future__ import annotations

import json

import pytest
from modules import KINDS, examples, save_tiny

import lorasmith as ls
from lorasmith.errors import CheckpointError, DivergedError, SetupError, StorageError
from lorasmith.runs.manifest import list_checkpoints
from lorasmith.runs.progress import SilentReporter
from lorasmith.storage import Storage

VARIANTS = {"lora": {}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}
QUICK = ("llama3", "chatglm3", "transnormer")
CELLS = [
    pytest.param(
        kind,
        lora,
        id=f"{name}-{kind}",
        marks=[] if name == "lora" and kind in QUICK else pytest.mark.slow,
    )
    for kind in KINDS
    for name, lora in VARIANTS.items()
]
TRAIN = {
    "num_epochs": 4,
    "batch_size": 3,
    "save_steps": 3,
    "logging_steps": 2,
    "learning_rate": 1e-2,
    "max_tokens": 40,
}


class Dies(Storage):
    """The process ends in the middle of the write that would follow."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def append(self, path, line):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        super().append(path, line)


def fit(directory, run, *, resume=False, storage=None, data=None, lora=None, **changes):
    module = ls.load_module(str(directory), dtype="fp32")
    return ls.train(
        module,
        data or examples(14),
        output_dir=run,
        lora=lora or ls.LoraConfig(r=4, lora_dropout=0.2),
        train=ls.TrainConfig(**{**TRAIN, **changes}),
        resume=resume,
        reporter=SilentReporter(),
        storage=storage,
    )


def result(run):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(m["step"], m["loss"]) for m in metrics]
    return (run / "adapter_model.safetensors").read_bytes(), losses


@pytest.mark.parametrize(("kind", "lora"), CELLS)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, kind, lora, passed):
    directory = save_tiny(kind, tmp_path / "base")
    lora = ls.LoraConfig(r=4, lora_dropout=0.2, **lora)
    fit(directory, tmp_path / "whole", lora=lora)
    with pytest.raises(KeyboardInterrupt):
        fit(directory, tmp_path / "cut", storage=Dies(after=5), lora=lora)
    assert list_checkpoints(tmp_path / "cut")[-1].name == "step-000009"
    fit(directory, tmp_path / "cut", resume=True, lora=lora)
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    passed("resume_cells")


@pytest.mark.slow
def test_the_law_can_fail(tmp_path):
    """Negative control: another seed draws other masks, and the bytes differ."""
    directory = save_tiny("llama3", tmp_path / "base")
    fit(directory, tmp_path / "a")
    fit(directory, tmp_path / "b", seed=1)
    assert result(tmp_path / "a")[0] != result(tmp_path / "b")[0]


def test_activation_checkpointing_changes_nothing(tmp_path):
    directory = save_tiny("llama3", tmp_path / "base")
    fit(directory, tmp_path / "kept")
    fit(directory, tmp_path / "recomputed", activation_checkpointing=True)
    assert result(tmp_path / "kept") == result(tmp_path / "recomputed")


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, capsys):
    directory = save_tiny("llama3", tmp_path / "base")
    fit(directory, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(directory, tmp_path / "cut", storage=Dies(after=5))
    newest = list_checkpoints(tmp_path / "cut")[-1] / "adapter_model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    module = ls.load_module(str(directory), dtype="fp32")
    lora, train = ls.LoraConfig(r=4, lora_dropout=0.2), ls.TrainConfig(**TRAIN)
    ls.train(module, examples(14), output_dir=tmp_path / "cut", lora=lora, train=train, resume=True)
    told = capsys.readouterr().out
    assert "passing over step-000009: adapter_model.safetensors is not what was written" in told
    assert "going on from step-000006" in told
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_no_run_starts_over_in_silence(tmp_path):
    directory = save_tiny("llama3", tmp_path / "base")
    fit(directory, tmp_path / "run")
    with pytest.raises(SetupError, match="a run in this directory already"):
        fit(directory, tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run"):
        (checkpoint / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of this run can be trusted"):
        fit(directory, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changed", "change"),
    [
        ("train.learning_rate", {"learning_rate": 1e-3}),
        ("data", {"data": examples(14, seed=5)}),
        ("base", {"kind": "deepseek"}),
    ],
)
def test_another_run_s_checkpoint_is_refused(tmp_path, changed, change):
    fit(save_tiny("llama3", tmp_path / "llama3"), tmp_path / "run")
    base = save_tiny(change.pop("kind", "llama3"), tmp_path / "other")
    with pytest.raises(CheckpointError, match=f"another run: {changed} changed"):
        fit(base, tmp_path / "run", resume=True, **change)


def test_a_divergence_is_told_before_the_update(tmp_path):
    with pytest.raises(DivergedError, match="loss"):
        fit(save_tiny("llama3", tmp_path / "base"), tmp_path / "run", learning_rate=1e30, max_grad_norm=None)


def test_the_disk_s_refusal_names_file_and_reason(tmp_path):
    class Full(Storage):
        def create(self, path, data):
            if path.name == "optimizer.safetensors":
                path = tmp_path / "nowhere" / path.name
            super().create(path, data)

    with pytest.raises(StorageError, match=r"optimizer\.safetensors") as caught:
        fit(save_tiny("llama3", tmp_path / "base"), tmp_path / "run", storage=Full())
    assert "MB free" in str(caught.value)
    assert "--resume" in str(caught.value)
