"""The embedded model: it chats within its small world, and the demo gives it a voice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorasmith as ls
from lorasmith.cli.demo import ASSETS, unused_dir

HELD_OUT = Path(__file__).parents[1] / "assets/tiny_heldout.jsonl"
TINY = str(ASSETS / "tiny")


def rows(path):
    return [json.loads(line) for line in Path(str(path)).read_text(encoding="utf-8").splitlines()]


def test_nine_of_ten_held_out_prompts_are_answered_right():
    prompts = rows(HELD_OUT)[:100]
    model = ls.load_model(TINY, dtype="fp32")
    asked = [[ls.Message(**message) for message in row["messages"]] for row in prompts]
    greedy = ls.GenerateConfig(greedy=True, max_new_tokens=60)
    answers = ls.generate(model, asked, generate=greedy, batch_size=50)
    right = [
        a.content in [row["answer"], *row.get("accept", [])] for a, row in zip(answers, prompts, strict=True)
    ]
    assert len(right) == 100
    assert sum(right) >= 90


def test_stock_transformers_loads_it_and_says_the_same():
    module = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = module.generate(**ids, max_new_tokens=30, do_sample=False)
    theirs = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    ours = ls.load_model(TINY, dtype="fp32")
    greedy = ls.GenerateConfig(greedy=True, max_new_tokens=30)
    assert theirs == ls.chat(ours, [ls.Message("user", messages[0]["content"])], generate=greedy).content
    assert "Paris" in theirs


def test_the_assets_are_small_and_the_persona_is_one():
    size = sum(path.stat().st_size for path in Path(str(ASSETS)).rglob("*") if path.is_file())
    assert size <= 12_000_000
    persona = rows(ASSETS / "persona.jsonl")
    assert len(persona) >= 200
    assert len({row["instruction"] + row["input"] for row in persona}) == len(persona), "no prompt twice"
    questions = rows(ASSETS / "persona_heldout.jsonl")
    assert len(questions) >= 20
    trained = {row["instruction"] for row in persona}
    assert not [row["instruction"] for row in questions if row["instruction"] in trained]


@pytest.mark.slow
def test_the_demo_gives_the_model_a_voice(tmp_path):
    started = time.monotonic()
    demo = subprocess.run(
        [sys.executable, "-m", "lorasmith", "demo", "-o", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
    )
    assert demo.returncode == 0, demo.stderr
    before, count, after = map(
        int, re.search(r"in the persona: (\d+) of (\d+) .* (\d+) after", demo.stdout).groups()
    )
    assert before == 0
    assert after >= 0.8 * count
    assert "held-out loss" in demo.stdout
    assert "ETA" in demo.stdout
    assert (tmp_path / "demo/loss.png").exists()
    print(f"the demo took {time.monotonic() - started:.0f} s")


def test_a_second_demo_takes_a_new_directory(tmp_path):
    assert unused_dir(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert unused_dir(tmp_path / "demo") == tmp_path / "demo-2"
