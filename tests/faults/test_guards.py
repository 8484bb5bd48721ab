"""Rows that break the model, losses that leap, runs that do not learn: told, named, and never written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modules import VOCAB, examples, tiny_module
from safetensors.torch import load_file

import lorasmith as ls
from lorasmith.errors import DivergedError
from lorasmith.runs.manifest import list_checkpoints, read_state
from lorasmith.runs.progress import SilentReporter
from lorasmith.types import Example

POISON = VOCAB - 1
"""A token that only rows made by `poisoned` hold."""
TRAIN = {"num_epochs": 2, "batch_size": 3, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}


def clean(count: int) -> list[Example]:
    return [
        Example(
            example.input_ids % POISON,
            np.where(example.labels < 0, example.labels, example.labels % POISON),
            f"rows.json:{n}",
        )
        for n, example in enumerate(examples(count), start=1)
    ]


def poisoned(rows: list[Example], *numbers: int) -> list[Example]:
    """The token stands at the end of these rows, so that every one of them reads it."""
    out = list(rows)
    for number in numbers:
        ids = out[number - 1].input_ids.copy()
        ids[0] = POISON
        out[number - 1] = Example(ids, out[number - 1].labels, out[number - 1].origin)
    return out


def nan_token(dtype: torch.dtype = torch.float32) -> Any:
    module = tiny_module("llama3", dtype)
    with torch.no_grad():
        module.get_input_embeddings().weight[POISON] = math.nan
    return module


def fit(
    module: Any, rows: list[Example], run: Path, *, resume: bool = False, lora: Any = None, **changes: Any
) -> None:
    ls.train(
        module,
        rows,
        output_dir=run,
        lora=lora or ls.LoraConfig(r=4, lora_dropout=0.2),
        train=ls.TrainConfig(**{**TRAIN, **changes}),
        resume=resume,
        reporter=SilentReporter(),
    )


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == kind]


def adapter(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def test_a_row_that_gives_nan_is_skipped_and_named(tmp_path: Path) -> None:
    fit(nan_token(), poisoned(clean(12), 7), tmp_path)
    skipped = events(tmp_path, "skipped")
    assert len(skipped) == 2, "once an epoch"
    assert {tuple(event["rows"]) for event in skipped} == {("rows.json:7",)}
    assert skipped[0]["reason"] == "the loss is nan"
    assert skipped[0]["loss"] is None
    assert all(t.isfinite().all() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    state = read_state(list_checkpoints(tmp_path)[-1])
    assert (state.step, state.skipped_steps) == (8, 2)


def test_a_skipped_step_leaves_no_trace_in_the_adapter(tmp_path: Path) -> None:
    """The steps before it and after it are those of a run without it."""
    rows = clean(9)
    fit(nan_token(), poisoned(rows, 4, 5, 6), tmp_path / "skips", shuffle=False, num_epochs=1, max_steps=2)
    fit(nan_token(), rows, tmp_path / "short", shuffle=False, num_epochs=1, max_steps=1)
    skips, short = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("skips", "short"))
    assert list(skips) == list(short)
    # The warm-up of both is one step at the peak rate: the first update is the same.
    assert all(torch.equal(skips[name], short[name]) for name in skips)


def test_a_gradient_that_is_not_finite_is_skipped_and_its_row_named(tmp_path: Path) -> None:
    module = tiny_module("llama3", torch.float32)
    break_gradient_of(module)
    fit(module, poisoned(clean(12), 3), tmp_path)
    assert [event["rows"] for event in events(tmp_path, "skipped")] == [["rows.json:3"]] * 2
    assert {event["reason"] for event in events(tmp_path, "skipped")} == {"the gradient norm is nan"}


def break_gradient_of(module: Any) -> None:
    """The loss of a row with the token is finite, and its gradient is not."""
    seen: list[bool] = []
    module.get_input_embeddings().register_forward_pre_hook(
        lambda part, inputs: seen.append(bool((inputs[0] == POISON).any()))
    )

    def poison(part: Any, inputs: Any, out: torch.Tensor) -> None:
        if seen[-1] and out.requires_grad:
            out.register_hook(lambda gradient: gradient * math.nan)

    module.model.layers[1].register_forward_hook(poison)


def test_too_many_in_a_row_end_the_run_and_name_the_last_rows(tmp_path: Path) -> None:
    rows = poisoned(clean(12), 4, 8, 11)
    with pytest.raises(DivergedError, match="step 4: the loss is nan") as caught:
        fit(nan_token(), rows, tmp_path, shuffle=False)
    assert caught.value.exit_code == 6
    assert "rows.json:11" in caught.value.where
    assert "3 steps in a row" in caught.value.why
    assert [event["step"] for event in events(tmp_path, "skipped")] == [2, 3, 4]
    fit(nan_token(), rows, tmp_path / "patient", shuffle=False, max_skipped_steps=4)


def test_a_resume_counts_on_and_is_bitwise_the_same(tmp_path: Path) -> None:
    rows = poisoned(clean(14), 5)
    fit(nan_token(), rows, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        ls.train(
            nan_token(),
            rows,
            output_dir=tmp_path / "cut",
            lora=ls.LoraConfig(r=4, lora_dropout=0.2),
            train=ls.TrainConfig(**TRAIN),
            reporter=Dies(at=7),
        )
    fit(nan_token(), rows, tmp_path / "cut", resume=True)
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert events(tmp_path / "cut", "skipped") == events(tmp_path / "whole", "skipped")
    states = [read_state(list_checkpoints(tmp_path / run)[-1]) for run in ("cut", "whole")]
    assert states[0] == states[1]


class Dies(SilentReporter):
    def __init__(self, at: int) -> None:
        self.at = at

    def advance(self, step: int) -> None:
        if step == self.at:
            raise KeyboardInterrupt


def test_an_adapter_that_overflows_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="not finite"):
        fit(
            tiny_module("llama3", torch.float32),
            clean(6),
            tmp_path,
            learning_rate=1e37,
            save_steps=1,
            warmup_ratio=0.0,
            num_epochs=4,
        )
    for checkpoint in list_checkpoints(tmp_path):
        tensors = load_file(checkpoint / "adapter_model.safetensors")
        assert all(t.isfinite().all() for t in tensors.values())
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_spike_names_its_row_and_changes_nothing(tmp_path: Path) -> None:
    module = tiny_module("llama3", torch.float32)
    row = clean(1)[0]
    with torch.no_grad():
        logits_TV = module(torch.from_numpy(row.input_ids)[None]).logits[0]
    worst = np.where(row.labels < 0, row.labels, logits_TV.argmin(-1).numpy())
    rows = [Example(row.input_ids, worst if n == 25 else row.labels, f"rows.json:{n}") for n in range(1, 31)]
    still = {"shuffle": False, "batch_size": 2, "num_epochs": 2, "learning_rate": 0.0}
    fit(module, rows, tmp_path / "a", **still)
    [spike] = events(tmp_path / "a", "spike")
    assert (spike["step"], spike["rows"][0]) == (28, "rows.json:25"), (
        "the first epoch has too little to compare"
    )
    fit(tiny_module("llama3", torch.float32), [rows[0]] * 30, tmp_path / "b", **still)
    assert events(tmp_path / "b", "spike") == []


def disconnected() -> Any:
    """The loss does not depend on the adapter, though autograd thinks it does."""
    module = tiny_module("llama3", torch.float32)
    module.model.norm.register_forward_hook(lambda part, inputs, out: out.detach() + 0.0 * out)
    return module


def test_an_adapter_that_never_moves_is_told_after_ten_steps(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="after 10 steps the adapter has not moved") as caught:
        fit(disconnected(), clean(12), tmp_path / "long", num_epochs=9)
    assert "target_modules" in caught.value.fix
    with pytest.raises(DivergedError, match="after 4 steps the adapter has not moved"):
        fit(disconnected(), clean(12), tmp_path / "short", num_epochs=1)


def test_a_loss_that_never_moves_is_told(tmp_path: Path) -> None:
    lora = ls.LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False)
    with pytest.raises(DivergedError, match="after 50 steps the loss has been"):
        fit(disconnected(), clean(1), tmp_path, batch_size=1, num_epochs=80, lora=lora)


@pytest.mark.parametrize("legal", [{"learning_rate": 0.0}, {"warmup_ratio": 1.0}, {"learning_rate": 1e-12}])
def test_slow_and_frozen_runs_are_legal(tmp_path: Path, legal: dict[str, float]) -> None:
    fit(tiny_module("llama3", torch.float32), clean(2), tmp_path, batch_size=1, num_epochs=8, **legal)
    assert (tmp_path / "adapter_model.safetensors").exists()
