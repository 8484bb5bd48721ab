"""golden.json, from the end of a run to wherever its adapter goes: what is equal, moved or broken is told."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import sentencepiece_factory
import torch
from chat_models import alpaca_rows, chat_model
from modules import KINDS, examples, save_tiny, tiny_module
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import lorasmith as ls
from lorasmith.cli.main import app
from lorasmith.errors import ConfigError, DataError, SetupError, StorageError
from lorasmith.evaluation.recording import record
from lorasmith.runs.progress import SilentReporter
from lorasmith.storage import Storage


def learn(
    base: Path,
    folder: Path,
    family: str = "llama3",
    *,
    storage: Storage | None = None,
    resume: bool = False,
    golden_rows: int = 2,
) -> Path:
    model = ls.load_model(str(base), family=family, dtype="fp32")
    data = ls.load_dataset(str(alpaca_rows(folder / "rows.json")), model)
    train = ls.TrainConfig(max_steps=6, batch_size=4, learning_rate=2e-2, golden_rows=golden_rows)
    how: Any = {"train": train, "storage": storage, "resume": resume, "reporter": SilentReporter()}
    ls.train(model, data, output_dir=folder / "run", **how)
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    learn(chat_model("llama3", folder / "base"), folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def golden(directory: Path) -> dict[str, object]:
    tree: dict[str, object] = json.loads((directory / "golden.json").read_text())
    return tree


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("family", ["deepseek", "generic"])
def test_a_run_is_what_it_was(tmp_path: Path, family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = learn(chat_model(family, tmp_path / "base"), tmp_path, family)
    found = ls.verify(run)
    assert (found.outcome, found.base_equal, found.tokenizer_changes) == ("ok", True, ())
    assert found.effect == pytest.approx(1, abs=1e-3)
    assert len(found.prompts) == 4
    for prompt in found.prompts:
        assert prompt.ids_equal
        assert prompt.top1_equal
        assert prompt.answer_equal
        assert prompt.relative < 1e-5


def test_it_holds_two_rows_and_two_sentences(trained: Path) -> None:
    tree = golden(trained / "run")
    prompts = tree["prompts"]
    assert isinstance(prompts, list)
    asked = [prompt["messages"][-1]["content"] for prompt in prompts]
    assert asked[:2] == ["What is 0 and 0?", "What is 1 and 1?"]
    assert len(asked) == 4
    for prompt in prompts:
        assert len(prompt["top_ids"]) == len(prompt["top_logits"]) == 8
        assert prompt["top_logits"] == sorted(prompt["top_logits"], reverse=True)
        assert 1 <= len(prompt["answer_ids"]) <= 16
    assert set(tree["tokenizer"]) == {"tokenizer.json", "tokenizer_config.json"}  # type: ignore[call-overload]


def test_private_rows_stay_out_and_a_finished_run_keeps_what_it_said(tmp_path: Path) -> None:
    base = chat_model("llama3", tmp_path / "base")
    run = learn(base, tmp_path, golden_rows=0)
    assert "What is" not in (run / "golden.json").read_text()
    assert len(ls.verify(run).prompts) == 2
    learn(base, tmp_path, golden_rows=1, resume=True)  # another setting is no other run
    assert len(ls.verify(run).prompts) == 2
    (tmp_path / "other").mkdir()
    assert len(ls.verify(learn(base, tmp_path / "other", golden_rows=1)).prompts) == 3


@pytest.mark.parametrize("change", ["flipped", "zeroed"])
def test_another_adapter_is_broken(run: Path, change: str) -> None:
    path = run / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("lora_B.weight"):
            tensors[name] = -tensors[name] if change == "flipped" else torch.zeros_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    found = ls.verify(run)
    assert found.outcome == "broken"
    assert found.effect is not None
    assert found.effect < {"flipped": 0.9, "zeroed": 0.01}[change]
    assert (found.base_equal, found.tokenizer_changes) == (True, ())


def test_one_flipped_tensor_is_broken(run: Path) -> None:
    path = run / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({**tensors, name: -tensors[name]}, path, metadata={"format": "pt"})
    assert ls.verify(run).outcome == "broken"


def test_another_base_is_told(run: Path, tmp_path: Path) -> None:
    base = chat_model("llama3", tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    noise = {n: t + torch.randn_like(t) * t.std() for n, t in tensors.items()}
    save_file(noise, base / "model.safetensors", metadata={"format": "pt"})
    found = ls.verify(run, base=str(base))
    assert (found.outcome, found.base_equal) == ("broken", False)


def test_another_tokenizer_is_told(run: Path, trained: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(trained / "base", tmp_path / "base"))
    tree = json.loads((base / "tokenizer.json").read_text())
    vocab = tree["model"]["vocab"]
    vocab["e"], vocab["a"] = vocab["a"], vocab["e"]
    (base / "tokenizer.json").write_text(json.dumps(tree))
    found = ls.verify(run, base=str(base))
    assert (found.outcome, found.base_equal, found.tokenizer_changes) == ("broken", True, ("tokenizer.json",))
    assert {prompt.ids_equal for prompt in found.prompts} == {False}
    assert max(prompt.relative for prompt in found.prompts) < 1e-5


def test_a_rewritten_tokenizer_of_the_same_ids_is_no_fault(run: Path, trained: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(trained / "base", tmp_path / "base"))
    tree = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(tree, indent=3))
    found = ls.verify(run, base=str(base))
    assert (found.outcome, found.tokenizer_changes) == ("ok", ("tokenizer.json",))


def test_a_merged_directory_says_the_same(trained: Path, tmp_path: Path) -> None:
    merged = ls.merge(trained / "run", output_dir=tmp_path / "merged")
    found = ls.verify(merged)
    assert (found.outcome, found.base_equal, found.tokenizer_changes) == ("ok", None, ())
    assert found.effect == pytest.approx(1, abs=1e-3)


def test_a_base_that_is_put_in_its_place_is_broken(trained: Path, tmp_path: Path) -> None:
    merged = ls.merge(trained / "run", output_dir=tmp_path / "merged")
    shutil.copy(trained / "base/model.safetensors", merged / "model.safetensors")
    found = ls.verify(merged)
    assert found.outcome == "broken"
    assert found.effect == pytest.approx(0, abs=1e-3)


def test_a_dtype_moves_it_a_little(trained: Path, tmp_path: Path) -> None:
    merged = ls.merge(trained / "run", output_dir=tmp_path / "merged", dtype="bf16")
    for found in (ls.verify(trained / "run", dtype="bf16"), ls.verify(merged)):
        assert found.outcome in ("ok", "moved")  # whether a greedy answer turns over is chance
        assert found.effect == pytest.approx(1, abs=0.2)
        assert 1e-4 < max(prompt.relative for prompt in found.prompts) < found.allowed == 0.1


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("baichuan2", sentencepiece_factory.baichuan2_like),
        pytest.param("chatglm3", sentencepiece_factory.chatglm3_like, marks=pytest.mark.slow),
    ],
)
def test_it_goes_along_to_the_native_layout(tmp_path: Path, kind: str, write: object) -> None:
    base = save_native(kind, tmp_path / "base", write)
    run = learn(base, tmp_path, kind)
    assert ls.verify(run).outcome == "ok"
    merged = ls.merge(run, output_dir=tmp_path / "merged", layout="native")
    found = ls.verify(merged)
    assert (found.outcome, found.chat_format_problem) == ("ok", None)
    assert "tokenizer.model" in found.tokenizer_changes
    split = ls.convert_adapter(run, to="split", output_dir=tmp_path / "split")
    native = ls.merge(base, output_dir=tmp_path / "native", layout="native")
    converted = ls.verify(split, base=str(native))
    assert (converted.outcome, converted.base_equal) == ("ok", False)


def save_native(kind: str, directory: Path, write: object) -> Path:
    assert callable(write)
    write(directory)
    tiny_module(kind, torch.float32, vocab_size=640).save_pretrained(directory)
    return directory


def test_a_checkpoint_has_no_golden_answers(trained: Path, tmp_path: Path) -> None:
    merged = ls.merge(trained / "run", output_dir=tmp_path / "merged", checkpoint=6)
    assert not (merged / "golden.json").exists()
    with pytest.raises(SetupError, match="nothing is known"):
        ls.verify(merged)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 9}', "no json"])
def test_a_damaged_file_is_told(run: Path, text: str) -> None:
    (run / "golden.json").write_text(text)
    with pytest.raises(SetupError, match=r"golden\.json"):
        ls.verify(run)


WRONG: dict[str, Any] = {
    "ids that no vocabulary has": {"input_ids": [2**40]},
    "negative ids": {"top_ids": [-1] * 8},
    "no number": {"top_logits": ["a"] * 8},
    "too few numbers": {"base_logits": [0.0]},
    "a long answer": {"answer_ids": [1] * 1000},
    "an unknown role": {"messages": [{"role": "narrator", "content": "a"}]},
    "no content": {"messages": [{"role": "user"}]},
    "an unknown key": None,
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_prompt_that_is_not_whole_is_told(run: Path, kind: str) -> None:
    tree: Any = golden(run)
    if WRONG[kind] is None:
        tree["sampling"] = {}
    else:
        tree["prompts"][0] |= WRONG[kind]
    (run / "golden.json").write_text(json.dumps(tree))
    with pytest.raises(SetupError, match=r"golden\.json cannot be read") as caught:
        ls.verify(run)
    assert "--resume" in caught.value.fix


def test_ids_beyond_the_base_are_told(run: Path) -> None:
    tree: Any = golden(run)
    tree["prompts"][0]["input_ids"][0] = 600
    (run / "golden.json").write_text(json.dumps(tree))
    with pytest.raises(SetupError, match="token id 600, and the model has 512 rows"):
        ls.verify(run)


@pytest.mark.parametrize("damage", ["missing", "cut", "a pipe"])
def test_a_resume_of_a_finished_run_writes_it_anew(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "again"))
    path = folder / "run/golden.json"
    whole = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(whole[:-9])
    elif damage == "a pipe":
        os.mkfifo(path)
    before = {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file() and p != path}
    model = ls.load_model(str(trained / "base"), family="llama3", dtype="fp32")
    data = ls.load_dataset(str(folder / "rows.json"), model)
    train = ls.TrainConfig(max_steps=6, batch_size=4, learning_rate=2e-2)
    ls.train(model, data, output_dir=folder / "run", train=train, resume=True)
    told = capsys.readouterr().out
    assert "golden.json is missing or damaged: it is written anew" in told
    assert path.read_bytes() == whole
    assert before == {p: p.read_bytes() for p in before}, "nothing else is touched"
    assert ls.verify(folder / "run").outcome == "ok"


# Runs on ids, without a tokenizer


def learn_ids(base: Path, run: Path, **changes: Any) -> Path:
    train = ls.TrainConfig(**{"max_steps": 6, "batch_size": 4, "learning_rate": 2e-2, **changes})
    module = ls.load_module(str(base), dtype="fp32")
    ls.train(module, examples(), output_dir=run, train=train, reporter=SilentReporter())
    return run


@pytest.mark.parametrize(
    "kind", ["llama3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "llama3")]
)
def test_a_run_on_ids_is_what_it_was(tmp_path: Path, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = learn_ids(save_tiny(kind, tmp_path / "base"), tmp_path / "run")
    found = ls.verify(run)
    assert (found.outcome, found.base_equal, found.tokenizer_changes) == ("ok", True, ())
    assert found.effect == pytest.approx(1, abs=1e-3)
    assert "trained on ids" in (found.chat_format_problem or "")
    asked: Any = golden(run)["prompts"]
    rows = examples()
    assert len(asked) == 4
    for prompt, row in zip(asked[:2], rows, strict=False):
        first = int((row.labels != -100).argmax())
        assert prompt["input_ids"] == row.input_ids[: first + 1].tolist()
        assert prompt["messages"] == []
    for report in found.prompts:
        assert (report.ids_equal, report.top1_equal, report.answer_equal) == (None, True, True)
        assert report.prompt.startswith("ids (")


def test_private_ids_stay_out_and_another_adapter_is_broken(tmp_path: Path) -> None:
    base = save_tiny("llama3", tmp_path / "base")
    run = learn_ids(base, tmp_path / "run", golden_rows=0)
    prompts: Any = golden(run)["prompts"]
    assert [len(prompt["input_ids"]) for prompt in prompts] == [5, 17]
    tensors = load_file(run / "adapter_model.safetensors")
    save_file({n: -t if "lora_B" in n else t for n, t in tensors.items()}, run / "adapter_model.safetensors")
    assert ls.verify(run).outcome == "broken"
    told = invoke("verify", run)
    assert told.exit_code == 4
    assert "recorded ids replayed: the run was trained on ids" in told.stdout


@pytest.mark.parametrize(("context", "asked"), [(20, None), (21, [5])])
def test_a_context_without_room_for_a_prompt_is_named(context: int, asked: list[int] | None) -> None:
    module = tiny_module("llama3", torch.float32, max_positions=context)
    if asked is None:
        with pytest.raises(DataError, match="a context of 20 tokens has no room") as caught:
            record(module, examples(), 0, "base")
        assert "a context of 21 or more" in caught.value.fix
    else:
        assert [len(prompt.input_ids) for prompt in record(module, examples(), 0, "base").prompts] == asked


def test_a_dtype_that_nothing_loads_again_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nothing loads a model in torch\.float64 again"):
        record(tiny_module("llama3", torch.float64), examples(), 0, "base")


def test_a_run_on_ids_finds_its_base_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama3", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    learn_ids(Path("base"), tmp_path / "run")
    monkeypatch.chdir("/")
    assert ls.verify(tmp_path / "run").outcome == "ok"


def test_a_chat_model_trained_on_ids_is_asked_both(trained: Path, tmp_path: Path) -> None:
    model = ls.load_model(str(trained / "base"), family="llama3", dtype="fp32")
    train = ls.TrainConfig(max_steps=6, batch_size=4, learning_rate=2e-2)
    run = tmp_path / "run"
    ls.train(model, examples(), output_dir=run, train=train, reporter=SilentReporter())
    found = ls.verify(run)
    assert found.outcome == "ok"
    assert [prompt.ids_equal for prompt in found.prompts] == [None, None, True, True]


def test_a_full_disk_at_the_very_end_costs_no_run(tmp_path: Path) -> None:
    class Full(Storage):
        def replace(self, path: Path, data: bytes) -> None:
            if path.name == "golden.json":
                raise StorageError("cannot write golden.json")
            super().replace(path, data)

    base = chat_model("llama3", tmp_path / "base")
    with pytest.warns(UserWarning, match=r"the run is whole, but golden\.json"):
        run = learn(base, tmp_path, storage=Full())
    assert not (run / "golden.json").exists()
    assert ls.load_model(str(run)).module


def test_the_verb_says_it(trained: Path, run: Path, tmp_path: Path) -> None:
    told = invoke("verify", trained / "run")
    assert told.exit_code == 0
    assert "ids equal" in told.stdout
    assert told.stdout.splitlines()[-1].startswith("ok ")
    tree = json.loads(invoke("verify", trained / "run", "--json").stdout)
    assert tree["outcome"] == "ok"
    assert {"prompts", "allowed", "effect", "base_equal", "tokenizer_changes", "recorded", "here"} <= set(
        tree
    )
    moved = invoke("verify", trained / "run", "--dtype", "bf16")
    assert moved.exit_code == 0
    assert "warning: the numbers moved" in moved.stderr
    tensors = load_file(run / "adapter_model.safetensors")
    save_file({n: -t if "lora_B" in n else t for n, t in tensors.items()}, run / "adapter_model.safetensors")
    broken = invoke("verify", run)
    assert broken.exit_code == 4
    assert broken.stdout.splitlines()[-1].startswith("broken ")
