"""Real signals to a run: it ends after its step, with a checkpoint, and a resume ends in the same bytes."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from arena import Arena
from modules import examples, save_tiny

import lorasmith as ls
from lorasmith.data.dataset import Dataset
from lorasmith.errors import Interrupted, Preempted, Terminated
from lorasmith.runs.manifest import list_checkpoints, newest_checkpoint, read_state
from lorasmith.runs.progress import SilentReporter
from lorasmith.storage import Storage
from lorasmith.training.signals import stop_requests

Figures = Callable[..., None]
SIGNALS = {
    signal.SIGINT: (Interrupted, 130),
    signal.SIGTERM: (Terminated, 143),
    signal.SIGHUP: (Terminated, 143),
    signal.SIGUSR1: (Preempted, 75),
}
TRAIN = {"num_epochs": 4, "batch_size": 3, "save_steps": 100, "logging_steps": 2, "learning_rate": 1e-2}


class Signals(SilentReporter):
    """Sends real signals to this process when a step has been taken, or when something is said."""

    def __init__(self, *numbers: int, at: int = 7, word: str | None = None, pause: float = 0.3) -> None:
        self.numbers, self.at, self.word, self.pause = numbers, at, word, pause

    def advance(self, step: int) -> None:
        if step == self.at and self.word is None:
            self._send()

    def note(self, text: str) -> None:
        if self.word is not None and self.word in text:
            self._send()

    def _send(self) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)
            time.sleep(self.pause)


def fit(
    base: Path, run: Path, *, resume: bool = False, reporter: Any = None, storage: Any = None, **changes: Any
) -> None:
    ls.train(
        ls.load_module(str(base), dtype="fp32"),
        examples(14),
        output_dir=run,
        lora=ls.LoraConfig(r=4, lora_dropout=0.2),
        train=ls.TrainConfig(**{**TRAIN, **changes}),
        resume=resume,
        reporter=reporter or SilentReporter(),
        storage=storage,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama3", tmp_path_factory.mktemp("signals") / "base")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    run = tmp_path_factory.mktemp("signals") / "whole"
    fit(base, run)
    return (run / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_leaves_a_checkpoint_of_its_step(
    base: Path, whole: bytes, tmp_path: Path, number: Any, capfd: Any
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    error, code = SIGNALS[number]
    with pytest.raises(error, match=f"stopped by {number.name} after step 7 of 20, which is saved") as caught:
        fit(base, tmp_path, reporter=Signals(number))
    assert caught.value.exit_code == code
    assert f"--resume --output-dir {tmp_path}" in caught.value.fix
    assert "once more leaves at once" in capfd.readouterr().err
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000007"]
    fit(base, tmp_path, resume=True)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_twenty_random_moments(arena: Arena, figures: Figures, number: Any) -> None:
    """A run that hears of it says which step it saved; one that dies, not listening yet, is as killed."""
    chance, (kind, code) = random.Random(number), SIGNALS[number]
    seconds = min(arena.server.run("plain", run_dir=arena.new_dir())["seconds"] for _ in range(3))
    told = trials = 0
    while told < 20 and trials < 200:
        run_dir, moment = arena.new_dir(), chance.uniform(0.1, 1.0) * seconds
        answer = arena.server.run("plain", kill_after=moment, kill_by=number, run_dir=run_dir)
        trials, saved = trials + 1, 0
        if answer["ended"] == "raised" and answer["value"][0] != "KeyboardInterrupt":
            assert (answer["value"][0], answer["value"][2]) == (kind.__name__, code), answer
            saved = int(re.findall(r"after step (\d) of 4, which is saved", answer["value"][1])[0])
            told += 1
        assert arena.faults(run_dir, at_least=saved) == []
    assert told == 20
    figures(f"{number.name}_at_random_moments", trials=trials, told=told, survived=trials)


def test_one_request_sent_twice_at_once_is_one(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped by SIGINT after step 7"):
        fit(base, tmp_path, reporter=Signals(signal.SIGINT, signal.SIGINT, pause=0.0))
    assert newest_checkpoint(tmp_path)[0] is not None


def test_a_second_request_leaves_at_once(base: Path, whole: bytes, tmp_path: Path) -> None:
    with pytest.raises(Terminated, match="left at once"):
        fit(base, tmp_path, reporter=Signals(signal.SIGINT, signal.SIGTERM), save_steps=3)
    assert list_checkpoints(tmp_path)[-1].name == "step-000006"
    fit(base, tmp_path, resume=True, save_steps=3)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors", "MANIFEST.json"])
def test_a_second_request_in_the_middle_of_the_save_is_safe(
    base: Path, whole: bytes, tmp_path: Path, file: str
) -> None:
    class Again(Storage):
        def create(self, path: Path, data: bytes) -> None:
            super().create(path, data)
            if path.name == file and "step-000007" in path.parent.name:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)

    with pytest.raises(Terminated, match="left at once"):
        fit(base, tmp_path, reporter=Signals(signal.SIGTERM), storage=Again(), save_steps=3)
    newest, passed_over = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.name, passed_over) == ("step-000006", {})
    fit(base, tmp_path, resume=True, save_steps=3)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == whole


def test_a_program_may_catch_it_as_a_keyboard_interrupt(base: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(base, tmp_path, reporter=Signals(signal.SIGTERM))


def test_an_evaluation_is_given_up_and_done_after_the_resume(base: Path, tmp_path: Path) -> None:
    """The signal comes while the second evaluation runs: best step and metrics are those of the whole run."""

    rows = examples(18)
    data = Dataset(tuple(rows[:14]), (), tuple(rows[14:]), (), report=None, config=ls.DataConfig())

    def evaluated(run: Path, *, resume: bool = False, kill: bool = False) -> None:
        module = ls.load_module(str(base), dtype="fp32")
        seen: list[bool] = []

        def hook(part: Any, inputs: Any, out: torch.Tensor) -> None:
            seen.append(not part.training and out.shape[1] > 7)  # more than what packed() tries
            if kill and seen[-1] and sum(seen) == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.01)

        module.model.layers[0].register_forward_hook(hook)
        lora, train = ls.LoraConfig(r=4, lora_dropout=0.2), ls.TrainConfig(**TRAIN, eval_steps=4)
        how = {"lora": lora, "train": train, "resume": resume, "reporter": SilentReporter()}
        ls.train(module, data, output_dir=run, **how)

    evaluated(tmp_path / "whole")
    with pytest.raises(Preempted, match="after step 4 of 20, which is saved"):
        evaluated(tmp_path / "cut", kill=True)
    assert read_state(list_checkpoints(tmp_path / "cut")[-1]).evaluation_due
    evaluated(tmp_path / "cut", resume=True)
    files = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert files[0] == files[1]
    states = [read_state(list_checkpoints(tmp_path / run)[-1]) for run in ("whole", "cut")]
    assert states[0] == states[1]


def test_outside_the_main_thread_and_where_ignored_nothing_is_changed() -> None:
    found: list[Any] = []

    def look() -> None:
        with stop_requests() as stop:
            found.extend([bool(stop), signal.getsignal(signal.SIGTERM)])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [False, before]
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop
    finally:
        signal.signal(signal.SIGINT, kept)


def test_a_request_at_the_last_step_lets_the_run_end(base: Path, whole: bytes, tmp_path: Path) -> None:
    fit(base, tmp_path, reporter=Signals(signal.SIGTERM, at=20))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == whole


def lorasmith(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lorasmith", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_command_line_exits_by_its_signal_and_resumes(tmp_path: Path, number: Any) -> None:
    assets = Path(ls.__file__).parent / "assets"
    flags = ["--model", str(assets / "tiny"), "--data", str(assets / "persona.jsonl")]
    flags += [
        item
        for key in ("max_steps=16", "logging_steps=1", "batch_size=4")
        for item in ("--set", f"train.{key}")
    ]
    assert lorasmith("train", *flags, "--output-dir", str(tmp_path / "whole")).wait() == 0
    process = lorasmith("train", *flags, "--output-dir", str(tmp_path / "cut"))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step  3/"):
            process.send_signal(number)
    told = process.communicate()[1]
    assert process.returncode == SIGNALS[number][1], told
    assert f"stopped by {number.name} after step" in told
    assert "lorasmith train --resume --output-dir" in told
    assert "Traceback" not in told
    assert lorasmith("train", "--resume", "--output-dir", str(tmp_path / "cut")).wait() == 0
    results = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert results[0] == results[1]
