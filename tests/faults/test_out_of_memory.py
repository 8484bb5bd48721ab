"""Memory runs out inside a step: the same step in smaller parts, the same batch, the same result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import KINDS, VOCAB, examples, tiny_module
from safetensors.torch import load_file

import lorasmith as ls
from lorasmith.adapters.dropout import DropoutClock
from lorasmith.adapters.lora import attach_lora, trainable_parameters
from lorasmith.batching.loader import training_loader
from lorasmith.config import TrainConfig
from lorasmith.errors import MemoryLimitError
from lorasmith.evaluation.loss import mean_loss
from lorasmith.memory.fitting import Fitting, Room, smaller
from lorasmith.model.checkpointing import activation_checkpointing
from lorasmith.model.packed import packed
from lorasmith.runs.manifest import list_checkpoints, read_state
from lorasmith.runs.progress import SilentReporter
from lorasmith.testing.texts import random_examples
from lorasmith.training.step import step_gradients

ROWS = examples(24, longest=20)
LONGEST = max(len(row) for row in ROWS)
TRAIN = {"num_epochs": 2, "batch_size": 8, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}


def limited(module: Any, tokens: int, *, backward: bool = False) -> Any:
    """Its second layer runs out of memory on a row of more than `tokens` tokens, in either direction."""

    def refuse(size: int) -> None:
        if size > max(tokens, 4):  # what packed() tries the model with
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} MiB")

    def hook(part: Any, inputs: Any, out: torch.Tensor) -> None:
        if not backward:
            refuse(out.shape[1])
        elif out.requires_grad:
            out.register_hook(lambda gradient: refuse(gradient.shape[1]))

    layers = [
        m for m in module.modules() if type(m).__name__.endswith("DecoderLayer")
    ] or module.base_model.layers
    layers[1].register_forward_hook(hook)
    return module


def gradients(kind: str, limit: int | None, backward: bool) -> tuple[list[Room], list[torch.Tensor], float]:
    """Of the first step, in float64 and with dropout on; and the rooms that were tried."""
    module = tiny_module(kind)
    if limit is not None:
        limited(module, limit, backward=backward)
    clock = DropoutClock(seed=3)
    config = ls.LoraConfig(r=4, lora_dropout=0.2, init_lora_weights=False, target_modules="all-linear")
    model = attach_lora(module, config, family_targets=None, base_name="base", clock=clock).double().train()
    parameters, rooms = list(trainable_parameters(model).values()), []
    train = TrainConfig(batch_size=24, max_tokens=4096)
    with packed(model, clock) as rows, activation_checkpointing(model) as layers:
        loader = training_loader(ROWS, train, packed=rows.by_layout)
        fitting = Fitting(loader, train, rows, layers, room=None, told=rooms.append)
        result = fitting.step(
            0,
            lambda most: step_gradients(rows, parameters, loader.step(0, most), max_grad_norm=None),
            model.zero_grad,
        )
    return rooms, [p.grad for p in parameters if p.grad is not None], result.loss


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("llama3", "transnormer") else pytest.mark.slow)
        for kind in KINDS
        if kind != "gemma2"
    ],
)
def test_the_step_is_done_again_with_the_same_gradient(kind: str, backward: bool) -> None:
    _, whole, loss = gradients(kind, None, backward)
    rooms, cut, again = gradients(kind, 40, backward)
    assert len(rooms) >= 2
    assert [room.max_tokens for room in rooms] == sorted((room.max_tokens for room in rooms), reverse=True)
    assert all(room.recomputed_layers == 0 for room in rooms)
    assert again == pytest.approx(loss, rel=1e-12)
    for ours, theirs in zip(cut, whole, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_without_discarding_the_law_fails() -> None:
    """Negative control: a half-made gradient that stays is counted twice."""
    _, whole, _ = gradients("llama3", None, False)
    module, clock = limited(tiny_module("llama3"), 40), DropoutClock(seed=3)
    config = ls.LoraConfig(r=4, lora_dropout=0.2, init_lora_weights=False, target_modules="all-linear")
    model = attach_lora(module, config, family_targets=None, base_name="base", clock=clock).double().train()
    parameters = list(trainable_parameters(model).values())
    train = TrainConfig(batch_size=24, max_tokens=60)
    with packed(model, clock) as rows, activation_checkpointing(model) as layers:
        loader = training_loader(ROWS, train, packed=True)
        batches = sorted(loader.step(0), key=lambda batch: len(batch.input_ids))
        loader.step = lambda n, most=None: batches if most == 60 else type(loader).step(loader, n, most)
        small_first = [b for b in batches if len(b.input_ids) <= 40]
        assert small_first, "the first rows must leave a gradient behind"
        fitting = Fitting(loader, train, rows, layers, room=None, told=lambda room: None)
        fitting.step(
            0,
            lambda most: step_gradients(rows, parameters, loader.step(0, most), max_grad_norm=None),
            lambda: None,
        )
    pairs = zip(parameters, whole, strict=True)
    assert not all(torch.allclose(p.grad, w, rtol=1e-3) for p, w in pairs)


def fit(module: Any, run: Path, *, resume: bool = False, reporter: Any = None, **changes: Any) -> None:
    ls.train(
        module,
        changes.pop("data", ROWS),
        output_dir=run,
        lora=ls.LoraConfig(r=4, lora_dropout=0.2),
        train=ls.TrainConfig(**{**TRAIN, **changes}),
        resume=resume,
        reporter=reporter or SilentReporter(),
    )


def events(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == "out_of_memory"]


def base(limit: int | None = None, **how: bool) -> Any:
    module = tiny_module("llama3", torch.float32)
    return module if limit is None else limited(module, limit, **how)


class Dies(SilentReporter):
    def advance(self, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_remembers_what_fits_and_a_resume_starts_with_it(tmp_path: Path) -> None:
    fit(base(), tmp_path / "roomy")
    fit(base(40), tmp_path / "whole")
    found = events(tmp_path / "whole")
    assert {event["step"] for event in found} == {1}, "all later steps fit"
    assert found[-1]["max_tokens"] <= 40
    with pytest.raises(KeyboardInterrupt):
        fit(base(40), tmp_path / "cut", reporter=Dies())
    fit(base(40), tmp_path / "cut", resume=True)
    assert events(tmp_path / "cut") == found, "the resume did not run out of memory again"
    results = {
        run: load_file(tmp_path / run / "adapter_model.safetensors") for run in ("roomy", "whole", "cut")
    }
    assert all(torch.equal(t, results["cut"][name]) for name, t in results["whole"].items())
    for name, tensor in results["roomy"].items():
        torch.testing.assert_close(results["whole"][name], tensor, rtol=1e-3, atol=1e-6)
    state = read_state(list_checkpoints(tmp_path / "whole")[-1])
    assert (state.tokens_that_fit, state.tokens_asked) == (found[-1]["max_tokens"], 4096)


@pytest.mark.slow
def test_another_max_tokens_is_tried_anew_by_a_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(base(40), tmp_path, reporter=Dies())
    fit(base(), tmp_path, resume=True, max_tokens=5000)
    assert {event["step"] for event in events(tmp_path)} == {1}
    state = read_state(list_checkpoints(tmp_path)[-1])
    assert state.step == 6


@pytest.mark.slow
def test_an_evaluation_halves_its_rows_too(tmp_path: Path) -> None:
    module = base()
    refused: list[int] = []

    def hook(part: Any, inputs: Any, out: torch.Tensor) -> None:
        if not torch.is_grad_enabled() and not part.training and out.shape[1] > 60:
            refused.append(out.shape[1])
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
            )

    module.model.layers[1].register_forward_hook(hook)
    clock = DropoutClock(seed=0)
    model = attach_lora(module, ls.LoraConfig(r=2), family_targets=None, base_name="b", clock=clock).eval()
    train = TrainConfig(batch_size=24)
    with packed(model, clock) as rows, activation_checkpointing(model) as layers:
        loader, rooms = training_loader(ROWS, train, packed=True), []
        fitting = Fitting(loader, train, rows, layers, room=None, told=rooms.append)
        cut = fitting.evaluation(lambda most: mean_loss(rows, loader.epoch(max_tokens=most)))
    assert refused
    assert rooms[-1].max_tokens <= 64
    assert cut > 0


@pytest.mark.slow
def test_layers_recompute_where_single_conversations_do_not_fit(tmp_path: Path) -> None:
    module = tiny_module("llama3", torch.float32, num_hidden_layers=8)
    watched = module.model.layers[3]

    def hook(part: Any, inputs: Any) -> None:
        if inputs[0].shape[1] > 7 and not part.gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")

    watched.register_forward_pre_hook(hook)
    fit(module, tmp_path)
    assert [e["recomputed_layers"] for e in events(tmp_path)][-2:] == [2, 4]
    assert read_state(list_checkpoints(tmp_path)[-1]).layers_recomputed == 4
    with pytest.raises(MemoryLimitError) as caught:
        fit(
            limited(tiny_module("llama3", torch.float32), 0),
            tmp_path / "never",
            activation_checkpointing=False,
        )
    assert caught.value.exit_code == 5


def test_one_conversation_that_does_not_fit_is_named(tmp_path: Path) -> None:
    rows = random_examples(VOCAB, 12, seed=1, prefix=3, longest=20)
    long = random_examples(VOCAB, 1, seed=2, prefix=40, longest=60)[0]
    rows[7] = type(long)(long.input_ids, long.labels, "novel.json:8")
    with pytest.raises(MemoryLimitError, match=rf"{len(long)} tokens of novel\.json:8") as caught:
        fit(base(30), tmp_path, data=rows)
    assert caught.value.exit_code == 5
    assert "max_length" in caught.value.fix


@pytest.mark.parametrize(
    ("room", "how", "then"),
    [
        (Room(4096, 0), {"widest": 900, "longest": 200, "num_layers": 30}, Room(450, 0)),
        (Room(450, 0), {"widest": 201, "longest": 200, "num_layers": 30}, Room(100, 0)),
        (Room(100, 0), {"widest": 200, "longest": 200, "num_layers": 30}, Room(100, 8)),
        (Room(100, 8), {"widest": 200, "longest": 200, "num_layers": 30}, Room(100, 16)),
        (Room(100, 16), {"widest": 200, "longest": 200, "num_layers": 30}, Room(100, 30)),
        (Room(100, 30), {"widest": 200, "longest": 200, "num_layers": 30}, None),
        (Room(100, 0), {"widest": 200, "longest": 200, "num_layers": 0}, None),
    ],
)
def test_what_is_tried_next(room: Room, how: dict[str, int], then: Room | None) -> None:
    assert smaller(room, **how) == then


@pytest.mark.parametrize(("static", "before"), [(True, 4096), (False, None)])
def test_rows_are_static_only_as_long_as_they_fit(static: bool, before: int | None) -> None:
    """Halved from 4096 to 2048, padding is what goes first."""
    module, rooms = tiny_module("llama3", torch.float32), []
    train = TrainConfig(batch_size=24, max_tokens=4096, static_rows=static)
    with packed(module) as rows, activation_checkpointing(module) as layers:
        loader = training_loader(ROWS, train, packed=True)
        fitting = Fitting(loader, train, rows, layers, room=None, told=rooms.append)
        lengths = [rows.row_length]

        def compute(most: int) -> None:
            lengths.append(rows.row_length)
            if most == 4096:
                raise torch.OutOfMemoryError("CUDA out of memory")

        fitting.step(0, compute, lambda: None)
        fitting = Fitting(loader, train, rows, layers, room=fitting.room, told=rooms.append)
        assert [*lengths, rows.row_length] == [before, before, None, None]
    assert len(rooms) == 1
    assert rooms[0].recomputed_layers == 0
    assert (rooms[0].max_tokens == 2048) is static


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    module = base()

    def hook(part: Any, inputs: Any) -> None:
        raise RuntimeError("a mistake")

    module.model.layers[1].mlp.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="a mistake"):
        fit(module, tmp_path)


REAL = """
import re, resource, sys
sys.path.insert(0, {tests!r})
import torch
import lorasmith as ls
import matplotlib.backends.backend_agg, matplotlib.figure  # the picture at the end, before the limit
from modules import tiny_module
from lorasmith.testing.texts import random_examples
module = tiny_module("llama3", torch.float32, hidden_size=512, intermediate_size=2048, num_hidden_layers=4,
                     num_attention_heads=8, max_positions=512)
rows = random_examples(96, 64, seed=0, prefix=3, longest=120)
train = ls.TrainConfig(max_steps=2, batch_size=64, max_tokens=4096, activation_checkpointing={recompute})
lora = ls.LoraConfig(r=4, target_modules="all-linear")
def address_space(peak):
    return int(re.search(rf"{{peak}}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
before = address_space("VmSize")
if {limit}:
    resource.setrlimit(resource.RLIMIT_AS, (before + {limit}, before + {limit}))
ls.train(module, rows, output_dir={run!r}, lora=lora, train=train)
print("taken", address_space("VmPeak") - before)
"""


@pytest.mark.slow
def test_a_real_allocator_that_fails(tmp_path: Path) -> None:
    """The address space is limited, so that torch's own allocator refuses in the middle of the step."""
    tests = str(Path(__file__).resolve().parents[1])
    results, limit = [], 0
    for name in ("roomy", "tight"):
        run = tmp_path / name
        code = REAL.format(tests=tests, run=str(run), limit=limit, recompute='"auto"')
        command = [sys.executable, "-c", code]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # each further one takes address space of its own
        done = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(load_file(run / "adapter_model.safetensors"))
        limit = int(done.stdout.split()[-1]) * 7 // 10  # of what the run took that had no limit
    assert events(tmp_path / "roomy") == []
    assert events(tmp_path / "tight")
    for name, tensor in results[0].items():
        # AdamW divides a gradient by its own size, so rounding of a tiny one shows: a tenth of 2 updates.
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-2, atol=2e-4)
