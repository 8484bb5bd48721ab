"""`train --resume`, `--resume prove` and `runs` as a person meets them: words, exit codes, files."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
from chat_models import alpaca_rows, chat_model

from lorasmith.cli import main as cli
from lorasmith.runs.lock import run_lock
from lorasmith.runs.manifest import list_checkpoints
from lorasmith.runs.progress import SilentReporter
from lorasmith.storage import Storage

SETTINGS = {
    "max_steps": 6,
    "num_epochs": 5,
    "save_steps": 2,
    "eval_steps": 2,
    "logging_steps": 1,
    "batch_size": 8,
    "warmup_ratio": 0,
    "lr_scheduler": "constant",
}
BAD = "adapter_model.safetensors is not what was written"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, rows, a recipe, and `whole`: the run of it."""
    place = tmp_path_factory.mktemp("place")
    tree = {
        "model": {"path": str(chat_model("llama3", place / "base")), "family": "llama3", "dtype": "fp32"},
        "data": {"train": str(alpaca_rows(place / "rows.json")), "eval": 0.2},
        "train": {**SETTINGS, "output_dir": str(place / "whole")},
    }
    (place / "recipe.yaml").write_text(json.dumps(tree))
    assert run_verb("train", place / "recipe.yaml") == 0
    return place


def run_verb(*arguments) -> int:
    argv, sys.argv = sys.argv, ["lorasmith", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = argv
    return 0


@pytest.fixture
def verb(capfd):
    """Exit code, standard output and standard error of a verb."""

    def told(*arguments):
        capfd.readouterr()
        code = run_verb(*arguments)
        return code, *capfd.readouterr()

    return told


@pytest.fixture
def run(place, tmp_path):
    return shutil.copytree(place / "whole", tmp_path / "run")


def cut(run, step=4):
    """As if it had been killed after the checkpoint of `step`."""
    for name in ("adapter_model.safetensors", "adapter_config.json", "loss.png"):
        (run / name).unlink()
    for path in list_checkpoints(run):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return run


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def content(run):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()}


def four_parts(text):
    """The parts of a printed error: what, where, why, do."""
    first, *rest = text.strip().splitlines()
    assert first.startswith("error: ")
    return first.removeprefix("error: "), {line[2:8].strip(" :"): line[9:] for line in rest if line[2] != " "}


def test_a_resume_goes_on_and_names_what_it_passes_over(verb, place, run):
    flip(list_checkpoints(cut(run))[-1] / "adapter_model.safetensors")
    code, out, _ = verb("train", "--resume", "-o", run)
    assert code == 0
    assert f"passing over step-000004: {BAD}" in out
    assert "going on from step-000002" in out
    for name in ("adapter_model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert (run / name).read_bytes() == (place / "whole" / name).read_bytes()


def test_for_a_program_events_go_to_standard_error(verb, run):
    flip(list_checkpoints(cut(run))[-1] / "adapter_model.safetensors")
    code, out, err = verb("train", "--resume", "-o", run, "--json")
    assert (code, json.loads(out)["step"]) == (0, 6)
    assert f"passing over step-000004: {BAD}" in err


def test_the_word_after_resume_is_a_recipe_unless_it_is_prove(verb, place, run):
    code, out, err = verb("train", "--resume", place / "recipe.yaml", "-o", run)
    assert (code, "nothing to do" in out) == (0, True), err
    code, out, err = verb("train", place / "recipe.yaml", "--resume", "prove", "-o", run)
    assert (code, "steps 5 to 6 reproduced bit by bit" in out) == (0, True), err
    code, _, err = verb("train", "--resume=soon", "-o", run)
    assert (code, four_parts(err)[0]) == (2, "--resume=soon is unknown")


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (None, "there is no such directory"),
        ([], "it is empty"),
        (["a", "notes.txt"], "it holds a, notes.txt"),
        (list("abcdefgh"), "it holds a, b, c, d, e, f, ..."),
    ],
)
@pytest.mark.parametrize("how", [["--resume"], ["--resume", "prove"]])
def test_without_a_run_nothing_starts(verb, tmp_path, there, why, how):
    run = tmp_path / "run"
    for name in there or []:
        run.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    if there == []:
        run.mkdir()
    code, _, err = verb("train", *how, "-o", run)
    what, parts = four_parts(err)
    assert (code, what, parts["where"], parts["why"]) == (4, "there is no run to resume", str(run), why)
    assert "leave --resume out to begin one" in parts["do"]
    assert sorted(p.name for p in run.glob("*")) == (there or [])
    assert run.exists() == (there is not None)


def test_a_run_without_a_checkpoint_says_that_it_starts_over(verb, place, run):
    shutil.rmtree(cut(run) / "checkpoints")
    code, out, _ = verb("train", "--resume", "-o", run)
    assert (code, "this run has no checkpoint yet: starting at step 0" in out) == (0, True)
    assert (run / "adapter_model.safetensors").read_bytes() == (
        place / "whole/adapter_model.safetensors"
    ).read_bytes()


def test_when_no_checkpoint_verifies_each_is_named(verb, run):
    for path in list_checkpoints(cut(run)):
        flip(path / "adapter_model.safetensors")
    code, _, err = verb("train", "--resume", "-o", run)
    what, parts = four_parts(err)
    assert (code, what) == (4, "no checkpoint of this run can be trusted")
    assert parts["why"] == f"step-000004: {BAD}; step-000002: {BAD}"


def test_a_finished_run_is_left_as_it_is(verb, run):
    before = content(run)
    code, out, _ = verb("train", "--resume", "-o", run, "--set", "train.logging_steps=3")
    assert code == 0
    assert "this run is finished, at step 6 of 6: nothing to do" in out
    assert content(run) == before


def test_a_changed_config_is_refused_with_a_table_and_taken_when_it_is_meant(verb, run):
    before = content(cut(run))
    change = ["--set", "train.learning_rate=2e-3", "--set", "train.max_tokens=512"]
    code, _, err = verb("train", "--resume", "-o", run, *change)
    what, parts = four_parts(err)
    assert (code, what) == (4, "this checkpoint belongs to another run: train.learning_rate changed")
    assert parts["where"] == str(run / "checkpoints/step-000004")
    assert "         train.learning_rate  0.0001  0.002" in err.splitlines()
    assert "--allow-change train.learning_rate" in err
    assert content(run) == before
    code, out, _ = verb("train", "--resume", "-o", run, *change, "--allow-change", "train.learning_rate")
    assert (code, "changed, as allowed: train.learning_rate, was 0.0001, is 0.002" in out) == (0, True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changes = {"train.learning_rate": {"was": 0.0001, "now": 0.002}}
    assert [line for line in lines if "event" in line] == [
        {"step": 4, "event": "changed", "changes": changes}
    ]
    assert lines[-2]["learning_rate"] == 0.002
    assert "learning_rate: 0.002" in (run / "config.yaml").read_text()
    code, out, _ = verb("train", "--resume", "-o", run)
    assert (code, "nothing to do" in out) == (0, True), "the new checkpoints are of the new config"


def test_a_finished_run_can_be_made_longer(verb, run):
    longer = ["--set", "train.max_steps=8", "--allow-change", "train.max_steps"]
    code, out, _ = verb("train", "--resume", "-o", run, *longer)
    assert (code, "after 8 steps" in out) == (0, True)
    shorter = ["--set", "train.max_steps=7", "--allow-change", "train.max_steps"]
    code, _, err = verb("train", "--resume", "-o", run, *shorter)
    assert (code, four_parts(err)[0]) == (2, "step-000008 lies beyond the end of the run, step 7")


def with_another_answer(source, target, row):
    rows = json.loads(source.read_text())
    rows[row]["output"] = "It is a secret."
    target.write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    return target


def test_changed_data_is_refused_by_its_first_row(verb, place, run, tmp_path):
    rows = with_another_answer(place / "rows.json", tmp_path / "rows.json", 0)
    other = ["train", "--resume", "-o", cut(run), "--data", rows]
    code, _, err = verb(*other)
    assert (code, four_parts(err)[0]) == (4, "this checkpoint belongs to another run: data changed")
    assert "data  17 rows  17 rows; the first that differs: " in err
    assert re.search(r"differs: \d+ \(.*rows\.json:\d+\)\n", err)
    assert "--allow-change data" in err
    assert verb(*other, "--allow-change", "data")[0] == 0
    prove = ["train", "--resume", "prove", "-o", run]
    assert verb(*prove)[0] == 0, "the new rows are the run's own now"
    code, _, err = verb(*prove, "--data", place / "rows.json", "--allow-change", "data")
    assert (code, four_parts(err)[0]) == (6, "steps 5 to 6 did not come out as they did then")


def test_changed_held_out_rows_are_refused(verb, place, run, tmp_path):
    rows = with_another_answer(place / "rows.json", tmp_path / "rows.json", 7)
    other = ["train", "--resume", "-o", cut(run), "--data", rows]
    code, _, err = verb(*other)
    assert (code, four_parts(err)[0]) == (4, "this checkpoint belongs to another run: held_out changed")
    assert verb(*other, "--allow-change", "held_out")[0] == 0


def test_another_base_is_refused(verb, place, run, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(place / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + torch.ones(1)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    other = ["train", "--resume", "-o", cut(run), "--model", base]
    code, _, err = verb(*other)
    assert (code, four_parts(err)[0]) == (4, "this checkpoint belongs to another run: base changed")
    assert "base  fingerprint " in err
    assert verb(*other, "--allow-change", "base")[0] == 0


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--resume", "--allow-change", "lora.r"], "lora.r cannot change within a run"),
        (["--resume", "--allow-change", "learning_rate"], "there is no change called learning_rate"),
        (["--allow-change", "data"], "a change is allowed to nothing: this is no resume"),
    ],
)
def test_overrides_that_can_do_nothing_are_refused(verb, place, run, flags, what):
    code, _, err = verb("train", place / "recipe.yaml", "-o", run, *flags)
    assert (code, four_parts(err)[0]) == (2, what)


def test_runs_shows_state_losses_and_checkpoints(verb, place, run, tmp_path):
    cut(shutil.copytree(run, tmp_path / "more/stopped"))
    flip(list_checkpoints(run)[1] / "adapter_model.safetensors")
    broken = shutil.copytree(run, tmp_path / "more/broken")
    for path in list_checkpoints(broken):
        (path / "optimizer.safetensors").write_bytes(b"")
    code, out, _ = verb("runs", tmp_path, "--json")
    found = {item["path"].removeprefix(f"{tmp_path}/"): item for item in json.loads(out)}
    assert (code, list(found)) == (0, ["more/broken", "more/stopped", "run"])
    assert {name: item["state"] for name, item in found.items()} == {
        "more/broken": "damaged",
        "more/stopped": "stopped",
        "run": "finished",
    }
    finished = found["run"]
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert finished["loss"] == [line["loss"] for line in log if "loss" in line][-1]
    assert finished["best_eval_loss"] == min(m["eval_loss"] for m in log if "eval_loss" in m and m["step"])
    assert (finished["step"], finished["total_steps"], finished["num_rows"]) == (6, 6, 17)
    assert (finished["base"], finished["data"]) == (str(place / "base"), str(place / "rows.json"))
    assert (finished["verified"], finished["damaged"]) == ([2, 4, 6], {}), "sizes are right"
    assert found["more/broken"]["damaged"]["2"] == "optimizer.safetensors is not what was written"
    code, out, _ = verb("runs", run, "--verify")
    assert (code, "2 good, 1 damaged" in out) == (0, True)
    assert f"{run}/checkpoints/step-000004: {BAD}" in out.replace("\n", "")


def test_runs_names_the_process_of_a_run_under_way(verb, run):
    with run_lock(Storage(), run, SilentReporter()):
        code, out, _ = verb("runs", run, "--json")
    (item,) = json.loads(out)
    assert (code, item["state"]) == (0, "running")
    assert item["told"].startswith("process ")


def test_runs_of_nothing(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert verb("runs")[:2] == (0, "no runs in runs\n")
    assert verb("runs", "--json")[:2] == (0, "[]\n")
    code, _, err = verb("runs", "nowhere")
    assert (code, four_parts(err)[0]) == (2, "there is no directory nowhere")
    (tmp_path / "runs/odd").mkdir(parents=True)
    (tmp_path / "runs/odd/config.yaml").write_text("train: [1")
    code, out, _ = verb("runs")
    assert (code, "damaged" in out, "this is not YAML that we read" in out) == (0, True, True)
