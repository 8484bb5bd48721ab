"""A model directory that names code to run: none is run, opened, or asked of a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

TINY = Path(__file__).parents[2] / "src/lorasmith/assets/tiny"
LOCAL, ELSEWHERE = "evil.Evil", "evil/repo--evil.Evil"
WATCHER = """
import json, sys
seen = []
def look(event, args):
    told = f"{event} {args}"
    bad = event in ("open", "import", "exec") and ("evil" in told or "requirements.txt" in told)
    asked = event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(args[1], tuple)
    if bad or asked:
        seen.append(told)
sys.addaudithook(look)
"""
OURS = """
import lorasmith as ls
model = ls.load_model(path)
data = ls.load_dataset(rows, model)
ls.train(model, data, output_dir=path + "-run", train=ls.TrainConfig(max_steps=1, batch_size=2))
assert ls.generate(model, [[ls.Message("user", "q")]], generate=ls.GenerateConfig(max_new_tokens=2))
"""
THEIRS = """
import transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
except Exception as error:
    print(error, file=sys.stderr)
"""


def hostile(directory: Path, reference: str, *, older_tokenizer: bool) -> Path:
    """The embedded model, with every key and file by which transformers has ever been led to run code."""
    directory.mkdir()
    for file in TINY.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), reference)
    config: dict[str, Any] = {
        "auto_map": classes,
        "custom_pipelines": {"text-generation": {"impl": reference, "pt": ["AutoModelForCausalLM"]}},
        "_attn_implementation": "evil/kernel",
        "_attn_implementation_internal": "evil/kernel",
        "use_kernels": True,
    }
    edit(directory / "config.json", **config)
    edit(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": [reference, reference]})
    edit(directory / "generation_config.json", custom_generate="evil/repo")
    code = f"open({str(directory.parent / 'marker')!r}, 'w').close()\nclass Evil:\n    pass\n"
    (directory / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py", "sitecustomize.py", "setup.py"):
        (directory / name).write_text(code)
    (directory / "requirements.txt").write_text("evil==1.0\n")
    if older_tokenizer:
        edit(directory / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
        Tokenizer.from_file(str(directory / "tokenizer.json")).model.save(str(directory))
        (directory / "tokenizer.json").unlink()
    return directory


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def seen_by(watched: str, model: Path) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """What a process of its own opened, imported or asked of a network, and how it ended."""
    paths = f"path, rows = {str(model)!r}, {str(TINY.parent / 'persona.jsonl')!r}"
    script = f"{WATCHER}\n{paths}\n{watched}\nprint('seen', json.dumps(seen))"
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(model.parent / "hub")}
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=model,
        env={**environment, **hub, "OMP_NUM_THREADS": "1"},
    )
    told = [line for line in done.stdout.splitlines() if line.startswith("seen ")]
    return json.loads(told[0].removeprefix("seen ")) if told else [], done


@pytest.mark.slow
@pytest.mark.parametrize("older_tokenizer", [False, True])
@pytest.mark.parametrize("reference", [LOCAL, ELSEWHERE])
def test_code_of_a_model_directory_is_never_touched(
    tmp_path: Path, reference: str, older_tokenizer: bool
) -> None:
    model = hostile(tmp_path / "model", reference, older_tokenizer=older_tokenizer)
    seen, done = seen_by(OURS, model)
    assert done.returncode == 0, done.stderr[-2000:]
    assert seen == []
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
def test_the_trap_works(tmp_path: Path) -> None:
    """Negative control: a loader that trusts the directory runs its code, and is seen."""
    model = hostile(tmp_path / "model", LOCAL, older_tokenizer=False)
    seen, _ = seen_by(THEIRS, model)
    assert any("evil" in told for told in seen)
    assert (tmp_path / "marker").exists()
