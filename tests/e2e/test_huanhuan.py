"""The main road on real rows: a random Llama with DeepSeek's own vocabulary learns huanhuan.json."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import lorasmith as ls
from lorasmith.runs.manifest import list_checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory, shared):
    directory = tmp_path_factory.mktemp("deepseek-like")
    script = str(shared / "acceptance/make_llama.py")
    subprocess.run([sys.executable, script, str(directory)], check=True, capture_output=True)
    return directory


def command(base, rows, run, *flags):
    settings = ["train.max_steps=60", "train.save_steps=10", "train.learning_rate=1e-2", "model.dtype=fp32"]
    sets = [part for setting in settings for part in ("--set", setting)]
    arguments = ["train", "--model", str(base), "--data", str(rows), "--output-dir", str(run), *sets, *flags]
    return [sys.executable, "-m", "lorasmith", *arguments]


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line.get("loss") is not None]


def test_train_kill_resume_and_load_in_stock_peft(base, shared, tmp_path):
    rows = shared / "data/datasets/huanhuan.json"
    whole = subprocess.run(command(base, rows, tmp_path / "whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    # Small, since the frozen head is random and its weights are of the size 0.02.
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.05

    killed = subprocess.Popen(command(base, rows, tmp_path / "cut"), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list_checkpoints(tmp_path / "cut")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "cut/adapter_model.safetensors").exists(), "the kill came too late"
    resumed = subprocess.run(
        command(base, rows, tmp_path / "cut", "--resume"), capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step-" in resumed.stdout
    adapters = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert adapters[0] == adapters[1]

    model = ls.load_model(str(tmp_path / "whole"), dtype="fp32")
    ids = torch.from_numpy(model.encode([ls.Message("user", "你是谁？")], for_generation=True).input_ids)[
        None
    ]
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(stock, tmp_path / "whole").eval()(ids).logits
        ours = model.module(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert model.family.name == "deepseek"
