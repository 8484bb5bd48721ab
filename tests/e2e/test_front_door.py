"""The ten-line program and the verbs, from a model directory and rows to answers."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from chat_models import FAMILIES, alpaca_rows, chat_model
from typer.testing import CliRunner

import lorasmith as ls
from lorasmith.cli.main import app
from lorasmith.errors import CheckpointError, ConfigError, DataError, MemoryLimitError, SetupError
from lorasmith.runs.manifest import list_checkpoints
from lorasmith.runs.progress import SilentReporter

GREEDY = ls.GenerateConfig(greedy=True, max_new_tokens=12)
ASK = [ls.Message("user", "What is 3 and 3?")]


def learn(model, data, run, **changes):
    settings = {"num_epochs": 6, "batch_size": 4, "learning_rate": 2e-2, "save_steps": 10, **changes}
    lora = ls.LoraConfig(r=8, lora_dropout=0.0)
    return ls.train(
        model, data, output_dir=run, lora=lora, train=ls.TrainConfig(**settings), reporter=SilentReporter()
    )


@pytest.fixture
def base(tmp_path):
    return chat_model("llama3", tmp_path / "base")


@pytest.fixture
def rows(tmp_path):
    return alpaca_rows(tmp_path / "rows.json")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chat_format", ["official", pytest.param("tutorial", marks=pytest.mark.slow)])
def test_the_ten_line_program(tmp_path, rows, family, chat_format):
    if family == "generic" and chat_format == "tutorial":
        pytest.skip("the generic family has no tutorial")
    base = chat_model(family, tmp_path / "base")
    model = ls.load_model(str(base), family=family, chat_format=chat_format, dtype="fp32")
    data = ls.load_dataset(str(rows), model, system="Be brief.", eval=0.2)
    before = ls.chat(model, ASK, generate=GREEDY)
    run = learn(model, data, tmp_path / "run")
    assert run.eval_loss_after < run.eval_loss_before - 0.3
    tuned = ls.chat(model, ASK, generate=GREEDY)
    assert tuned.content != before.content
    again = ls.load_model(str(tmp_path / "run"), dtype="fp32")
    assert (again.family.name, again.chat_format.name, again.system) == (family, chat_format, "Be brief.")
    assert ls.chat(again, ASK, generate=GREEDY) == tuned, "what training wrote, chat reads"
    assert ls.evaluate(again, data).loss == pytest.approx(run.eval_loss_after, abs=1e-5)


def test_a_run_directory_holds_what_the_design_says(tmp_path, base, rows):
    model = ls.load_model(str(base), family="llama3", dtype="fp32")
    learn(model, ls.load_dataset(str(rows), model), tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "chat_format.json", "checkpoints", "config.yaml",
        "golden.json", "loss.png", "metrics.jsonl", "rows.json",
    }  # fmt: skip
    assert {p.name for p in list_checkpoints(tmp_path / "run")[0].iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json",
        "MANIFEST.json",
    }  # fmt: skip
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )


def test_a_checkpoint_can_be_talked_to(tmp_path, base, rows):
    model = ls.load_model(str(base), family="llama3", dtype="fp32")
    learn(model, ls.load_dataset(str(rows), model), tmp_path / "run")
    early = ls.load_model(str(tmp_path / "run"), checkpoint=10, dtype="fp32")
    late = ls.load_model(str(tmp_path / "run"), dtype="fp32")
    assert ls.chat(early, ASK, generate=GREEDY) != ls.chat(late, ASK, generate=GREEDY)
    with pytest.raises(CheckpointError, match="there is no checkpoint of step 11") as caught:
        ls.load_model(str(tmp_path / "run"), checkpoint=11)
    assert "step-000010" in str(caught.value)


def test_the_best_adapter_is_kept_when_asked(tmp_path, base, rows):
    model = ls.load_model(str(base), family="llama3", dtype="fp32")
    data = ls.load_dataset(str(rows), model, eval=0.3)
    settings = {"eval_steps": 2, "early_stopping_patience": 3, "final_adapter": "best", "save_total_limit": 1}
    wild = {"learning_rate": 0.2, "lr_scheduler": "constant", "num_epochs": 40}
    run = learn(model, data, tmp_path / "run", **settings, **wild)
    assert run.stopped_early
    losses = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evaluated = {m["step"]: m["eval_loss"] for m in losses if m.get("eval_loss") and m["step"]}
    assert run.best_step == min(evaluated, key=evaluated.get) != run.step
    assert {p.name for p in list_checkpoints(tmp_path / "run")} == {
        f"step-{s:06d}" for s in (run.best_step, run.step)
    }
    assert ls.evaluate(model, data).loss == pytest.approx(evaluated[run.best_step], abs=1e-5)


def test_training_goes_on_from_an_adapter(tmp_path, base, rows):
    model = ls.load_model(str(base), family="llama3", dtype="fp32")
    data = ls.load_dataset(str(rows), model, eval=0.2)
    first = learn(model, data, tmp_path / "first")
    fresh = ls.load_model(str(base), family="llama3", dtype="fp32")
    lora = ls.LoraConfig(init_from=str(tmp_path / "first"))
    second = ls.train(fresh, data, output_dir=tmp_path / "second", lora=lora, reporter=SilentReporter())
    assert second.eval_loss_before == pytest.approx(first.eval_loss_after, abs=1e-5)
    other = ls.LoraConfig(init_from=str(tmp_path / "first"), r=4)
    with pytest.raises(ConfigError, match=r"lora\.r is 4 but the adapter has 8"):
        ls.train(ls.load_module(str(base)), data, output_dir=tmp_path / "third", lora=other)


def test_wrong_calls_are_told_before_anything_is_written(tmp_path, base, rows):
    model = ls.load_model(str(base), family="llama3", dtype="fp32")
    data = ls.load_dataset(str(rows), model)
    with pytest.raises(ConfigError, match="no module of this model is called q_porj") as caught:
        ls.train(model, data, output_dir=tmp_path / "run", lora=ls.LoraConfig(target_modules=["q_porj"]))
    assert "did you mean q_proj" in str(caught.value)
    with pytest.raises(ConfigError, match="unknown key max_lenght; did you mean 'max_length'"):
        ls.load_dataset(str(rows), model, max_lenght=3)
    with pytest.raises(DataError, match="nothing to learn"):
        ls.train(model, [ls.Example([1, 2], [-100, -100], "mine:1")], output_dir=tmp_path / "run")
    with pytest.raises(DataError, match="token id 9999, the model only 512"):
        ls.train(model, [ls.Example([9999, 2], [2, 3], "mine:1")], output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        ls.load_model(str(base), family="llama3", dtype="fp16", device="cpu")
    with pytest.raises(ConfigError, match="dtype: input should be"):
        ls.load_model(str(base), dtype="int4")
    learn(model, data, tmp_path / "run")
    with pytest.raises(ConfigError, match="carries an adapter already"):
        learn(model, data, tmp_path / "again")


def test_a_damaged_model_directory_is_told_by_name(tmp_path, base):
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SetupError, match="not this model's") as caught:
        ls.load_module(str(base))
    assert "missing: model.norm.weight" in str(caught.value)
    assert "unknown: model.extra" in str(caught.value)
    (base / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(SetupError, match="the weights cannot be read"):
        ls.load_module(str(base))
    with pytest.raises(SetupError, match=r"there is no config\.json"):
        ls.load_module(str(tmp_path))


def test_pickled_weights_are_read_as_tensors_only(tmp_path, base):

    from safetensors.torch import load_file

    expected = ls.load_module(str(base), dtype="fp32").state_dict()
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    for name, tensor in ls.load_module(str(base), dtype="fp32").state_dict().items():
        assert torch.equal(tensor, expected[name])

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    torch.save({"model.norm.weight": Evil()}, base / "pytorch_model.bin")
    with pytest.raises(SetupError, match="more than tensors"):
        ls.load_module(str(base))
    assert not (tmp_path / "marker").exists()


def test_a_base_in_an_archive_that_swells_is_refused(tmp_path, base):
    torch.save({"model.norm.weight": torch.ones(32)}, tmp_path / "small.bin")
    with zipfile.ZipFile(tmp_path / "small.bin") as small:
        entries = {name: small.read(name) for name in small.namelist()}
    (base / "model.safetensors").unlink()
    with zipfile.ZipFile(base / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data + b"\0" * 10**7)
    with pytest.raises(SetupError, match=r"pytorch_model\.bin is refused") as caught:
        ls.load_module(str(base), dtype="fp32")
    assert "compressed" in caught.value.why


def test_train_and_chat_on_the_command_line(tmp_path, base, rows):
    run = str(tmp_path / "run")
    settings = ("train.max_steps=4", "train.save_steps=2", "train.logging_steps=1")
    sets = [part for setting in settings for part in ("--set", setting)]
    flags = ["--model", str(base), "--data", str(rows), "--family", "llama3", "--output-dir", run, *sets]
    told = CliRunner().invoke(app, ["train", *flags])
    assert told.exit_code == 0, told.output
    assert "24 rows to train on" in told.output
    assert "step 4/4" in told.output
    assert f"lorasmith chat {run}" in told.output
    plan = CliRunner().invoke(app, ["train", *flags, "--dry-run", "--json"])
    assert json.loads(plan.output)["total_steps"] == 4
    assert json.loads(plan.output)["saved_by_sharing"] > 0.05, "the head of the template is shared"
    again = CliRunner().invoke(app, ["train", "--output-dir", run, "--resume", "--json"])
    assert json.loads(again.output.splitlines()[-1])["step"] == 4, "a resume needs its directory only"
    answer = CliRunner().invoke(app, ["chat", run, "--prompt", "Who?", "--greedy", "--max-new-tokens", "5"])
    assert answer.exit_code == 0, answer.output


def test_a_step_that_does_not_fit_into_memory_is_told(tmp_path, base, rows):
    model = ls.load_model(str(base), family="llama3", dtype="fp32")

    def hungry(_, inputs):
        if inputs[0].shape[1] > 8:  # a row of the data, not the few tokens that try the module out
            torch.empty(1 << 60)

    model.module.model.layers[0].register_forward_pre_hook(hungry)
    with pytest.raises(MemoryLimitError, match="does not fit into memory") as caught:
        learn(model, ls.load_dataset(str(rows), model), tmp_path / "run")
    assert "data.max_length" in str(caught.value)  # rows were halved down to one conversation by then
    assert caught.value.exit_code == 5


def test_keys_that_would_do_nothing_are_refused(tmp_path, base, rows):
    model = ls.load_model(str(base), family="llama3", dtype="fp32")
    data = ls.load_dataset(str(rows), model)
    with pytest.raises(ConfigError, match=r"train\.eval_steps, train\.final_adapter would do nothing"):
        learn(model, data, tmp_path / "run", eval_steps=2, final_adapter="best")
    assert not (tmp_path / "run").exists()


def test_an_adapter_on_a_named_base_keeps_the_run_s_voice(tmp_path, base, rows):
    model = ls.load_model(str(base), family="llama3", chat_format="tutorial", dtype="fp32")
    learn(model, ls.load_dataset(str(rows), model, system="Be brief."), tmp_path / "run")
    again = ls.load_model(str(base), adapter=str(tmp_path / "run"), dtype="fp32")
    assert (again.family.name, again.chat_format.name, again.system) == ("llama3", "tutorial", "Be brief.")
