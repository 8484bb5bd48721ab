"""The oldest libraries of our range lose DeepSeek's text; what we load on them must not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOOR = (
    *("torch>=2.9,<2.14", "transformers==5.3.0", "peft==0.21.0", "tokenizers>=0.22", "jinja2==3.1.6"),
    *("numpy>=1.26", "pydantic>=2.10,<3", "pyyaml>=6.0", "safetensors>=0.8", "sentencepiece>=0.2,<0.3"),
)
CONFIG = {
    "tokenizer_class": "LlamaTokenizerFast",
    "bos_token": "<｜begin▁of▁sentence｜>",
    "eos_token": "<｜end▁of▁sentence｜>",
}

PROBE = """
import json, sys, warnings
from pathlib import Path

import transformers
from transformers import AutoTokenizer

from lorasmith.text.loading import load_tokenizer
from lorasmith.families import checked_tokenizer, find_family
from lorasmith.types import Conversation, Message

directory, golden = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
family = find_family({}, "deepseek")


def right(tokenizer):
    chat_format, found = family.chat_format("official", tokenizer), []
    for case in golden["conversations"]:
        messages = tuple(Message(m["role"], m["content"]) for m in case["messages"])
        example = chat_format.encode(Conversation(messages, case["name"]))
        ids, labels = example.input_ids.tolist(), example.labels.tolist()
        if (ids, labels) == (case["full_ids"][:-1], case["labels"][1:]):
            found.append(case["name"])
    return found


stock = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
report = {
    "transformers": transformers.__version__,
    "stock": stock.decode(stock.encode("你好 世界", add_special_tokens=False)),
    "ours": right(checked_tokenizer(family, load_tokenizer(directory))),
}
saved = directory / "saved"
stock.save_pretrained(str(saved))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    report["saved"] = right(checked_tokenizer(family, load_tokenizer(saved)))
report["warned"] = any("repaired the tokenizer" in str(warning.message) for warning in caught)
print(json.dumps(report))
"""


PORTS = """
import sys
import torch, transformers
from safetensors.torch import load_file
import lorasmith as ls

for case in sys.argv[2:]:
    directory = f"{sys.argv[1]}/{case}"
    inputs, expected = (load_file(f"{directory}/{name}.safetensors") for name in ("inputs", "expected"))
    module = ls.load_module(directory, dtype="fp32")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        logits = module(input_ids=ids, attention_mask=mask).logits
    assert (logits - expected["logits"])[mask.bool()].abs().max() < 5e-5
    for row, count in enumerate(mask.sum(1)):
        for cache in ("dynamic", "static"):
            knobs = {"do_sample": False, "eos_token_id": None, "cache_implementation": cache}
            prompt, ones = (x[row : row + 1, :count] for x in (ids, mask))
            new = module.generate(prompt, attention_mask=ones, max_new_tokens=12, **knobs)
            assert new[0, count:].tolist() == expected["greedy.tokens"][row].tolist(), (case, cache)
print(transformers.__version__)
"""


@pytest.fixture(scope="module")
def floor_python(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the oldest libraries that pyproject.toml allows, and this checkout."""
    home = tmp_path_factory.mktemp("floor")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin/python"
    install = [str(python), "-m", "pip", "install", "-q"]
    done = subprocess.run([*install, *FLOOR], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install the oldest libraries (offline?): {done.stderr.strip()[-200:]}")
    subprocess.run([*install, "--no-deps", str(copy_of_project(home / "project"))], check=True)
    return python


def copy_of_project(directory: Path) -> Path:
    """A wheel is built within its tree: two workers of a suite would be in each other's way."""
    shutil.copytree(
        ROOT / "src", directory / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    return directory


def run(python: Path, code: str, *arguments: str) -> str:
    """The last line that `code` prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_native_ports_on_the_floor(shared: Path, floor_python: Path) -> None:
    cases = ("baichuan2_7b_a", "baichuan2_13b_alibi", "chatglm3_b")
    assert run(floor_python, PORTS, str(shared / "golden/models"), *cases) == "5.3.0"


@pytest.mark.slow
def test_deepseek_on_the_floor(shared: Path, floor_python: Path, tmp_path: Path) -> None:
    source = shared / "data/tokenizers/deepseek-llm/tokenizer.rebuilt.json"
    (tmp_path / "tokenizer.json").write_bytes(source.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    golden = shared / "golden/tokenization/deepseek_official.json"
    report = json.loads(run(floor_python, PROBE, str(tmp_path), str(golden)))
    assert report["transformers"] == "5.3.0"
    everything_but_the_attack = ["single", "system", "multi3", "empty_system", "mixed"]
    assert report["ours"] == everything_but_the_attack
    assert report["saved"] == everything_but_the_attack
    if report["stock"] == "你好 世界":
        pytest.skip("ours is right; this transformers keeps the text too, so there is no negative control")
    assert report["warned"]
