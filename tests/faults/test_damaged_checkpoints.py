"""Checkpoints that are not what was written: each damage is found, and the one before taken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from arena import Arena
from modules import tiny_module

from lorasmith.errors import CheckpointError
from lorasmith.runs.manifest import damage, list_checkpoints, newest_checkpoint
from lorasmith.training.checkpoint import restore

FILES = (
    "MANIFEST.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "state.json",
)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_link(path: Path) -> None:
    """To the very bytes: they could change under our hands."""
    elsewhere = path.parents[2] / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


KINDS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flip,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "missing": lambda path: path.unlink(),
    "a link": replace_by_link,
    "a pipe": replace_by_fifo,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_every_file_is_found(arena: Arena, name: str, kind: str) -> None:
    run_dir = arena.copy_of(arena.two_checkpoints)
    newest = list_checkpoints(run_dir)[-1]
    KINDS[kind](newest / name)
    chosen, skipped = newest_checkpoint(run_dir)
    assert chosen is not None
    assert chosen.name == "step-000002"
    assert [path.name for path in skipped] == ["step-000004"]


def test_every_flipped_byte_of_the_small_files_is_found(arena: Arena) -> None:
    newest = list_checkpoints(arena.copy_of(arena.two_checkpoints))[-1]
    for name in ("MANIFEST.json", "state.json"):
        whole = (newest / name).read_bytes()
        for place in range(len(whole)):
            (newest / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert damage(newest) is not None, f"byte {place} of {name}"
        (newest / name).write_bytes(whole)
    assert damage(newest) is None


def test_surplus_files_and_another_step_are_found(arena: Arena) -> None:
    newest = list_checkpoints(arena.copy_of(arena.two_checkpoints))[-1]
    (newest / "notes.txt").write_text("mine")
    assert damage(newest) == "unknown files: notes.txt"
    (newest / "notes.txt").unlink()
    renamed = newest.rename(newest.with_name("step-000007"))
    assert damage(renamed) == "it holds step 4"
    link = newest.with_name("step-000009")
    link.symlink_to(renamed, target_is_directory=True)
    assert damage(link) == "it is a symbolic link"


def test_a_manifest_of_another_format_is_named(arena: Arena) -> None:
    """Version 1 had the files at the top and no fingerprints."""
    newest = list_checkpoints(arena.copy_of(arena.two_checkpoints))[-1]
    (newest / "MANIFEST.json").write_text('{"state.json": {"size": 1, "sha256": "0"}}\n')
    assert damage(newest) == "MANIFEST.json has format None, this version of lorasmith reads 3"


@pytest.mark.parametrize("name", FILES)
def test_the_one_before_gives_the_same_adapter(arena: Arena, name: str) -> None:
    run_dir = arena.copy_of(arena.two_checkpoints)
    flip(list_checkpoints(run_dir)[-1] / name)
    assert arena.faults_of_resume(run_dir) == []


def test_a_damaged_best_checkpoint_is_not_restored(arena: Arena) -> None:
    """The best one is read again at the end of a run: what was flipped since is no result."""
    newest = list_checkpoints(arena.copy_of(arena.two_checkpoints))[-1]
    module = tiny_module("llama3", num_hidden_layers=1)
    flip(newest / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="step-000004 is damaged"):
        restore(newest, module, torch.optim.AdamW(module.parameters()))
    shutil.rmtree(newest)
    with pytest.raises(CheckpointError, match="No such file"):
        restore(newest, module, torch.optim.AdamW(module.parameters()))


def test_the_harness_finds_a_resume_that_asks_no_manifest(arena: Arena) -> None:
    """Negative control: a flipped byte of the adapter reaches the result."""
    run_dir = arena.copy_of(arena.two_checkpoints)
    flip(list_checkpoints(run_dir)[-1] / "adapter_model.safetensors")
    faults = arena.faults_of_resume(run_dir, task="trusting")
    assert "the adapter differs from that of the uninterrupted run" in faults


def test_retention_never_counts_a_damaged_checkpoint_as_the_newest(arena: Arena) -> None:
    run_dir = arena.copy_of(arena.two_checkpoints)
    for step in (7, 8):
        shutil.copytree(run_dir / "checkpoints/step-000004", run_dir / f"checkpoints/step-{step:06d}")
    flip(run_dir / "checkpoints/step-000004/optimizer.safetensors")
    assert arena.server.run("plain", run_dir=run_dir, resume=True)["ended"] == "returned"
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert [name.rpartition("-")[0] for name in left[:2]] == [
        "set-aside-step-000007",
        "set-aside-step-000008",
    ]
    assert left[2:] == ["step-000004"]
    assert newest_checkpoint(run_dir) == (run_dir / "checkpoints/step-000004", {})


def test_no_pickle_is_written(arena: Arena) -> None:
    kinds = {path.suffix for path in arena.whole.rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors", ".yaml", ".png"}


def test_leftovers_go_and_files_of_the_user_stay(arena: Arena) -> None:
    run_dir = arena.copy_of(arena.two_checkpoints)
    ours = ["checkpoints/.tmp-step-000006-0123abcd", "checkpoints/.trash-step-000002-0123abcd"]
    theirs = [".tmp-notes-0123abcd", "checkpoints/.tmp-mine", "checkpoints/notes", ".tmp-config.yaml-old"]
    for name in [*ours, *theirs]:
        (run_dir / name).mkdir()
        (run_dir / name / "file").write_text("content")
    (run_dir / ".tmp-config.yaml-0123abcd").write_text("half")
    assert arena.server.run("plain", run_dir=run_dir, resume=True)["ended"] == "returned"
    assert [(run_dir / name).exists() for name in ours] == [False, False]
    assert not (run_dir / ".tmp-config.yaml-0123abcd").exists()
    assert all((run_dir / name / "file").read_text() == "content" for name in theirs)


def test_steps_of_the_clock_change_nothing(arena: Arena) -> None:
    """The newest checkpoint looks oldest to the file system, and the wall clock jumps by years."""
    run_dir = arena.copy_of(arena.two_checkpoints)
    os.utime(run_dir / "checkpoints/step-000004", (0, 0))
    flip(run_dir / "checkpoints/step-000004/state.json")
    assert arena.faults_of_resume(run_dir, task="clock_steps") == []
